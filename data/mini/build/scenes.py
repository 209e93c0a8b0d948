"""What a mini-world picture shows and how its prompt is worded.

`Scene`, `sample_scene` and the grammar behind them.

Prompts follow the habits of DiffusionDB: a subject, a place and a medium in changing order, then
modifiers which show nothing. Some prompts have no visual referent at all, and some pictures do not
show what their prompt asks for.
"""

from dataclasses import dataclass, replace

import numpy as np
from sprites import NOUNS

NO_REFERENT = 0.08  # share of prompts that name nothing visible
MISALIGNED = 0.05  # share of the other pictures that lack an object or show a wrong number
RELATIONS = {"single": 0.48, "count": 0.20, "and": 0.20, "left of": 0.12}
NUMBERS = {1: "one", 2: "two", 3: "three"}

SETTINGS = {
    "beach": ("on the beach", "on a sandy beach", "at the beach"),
    "forest": ("in the forest", "in a forest", "deep in the forest", "in the woods"),
    "night": ("at night", "under a starry night sky", "in the moonlight"),
    "snow": ("in the snow", "in a snowy landscape", "on a snowy day"),
    "sunset": ("at sunset", "during sunset", "in front of a sunset"),
    "under the sea": ("under the sea", "underwater", "at the bottom of the sea"),
    "desert": ("in the desert", "in a sandy desert", "among desert dunes"),
    "outer space": ("in outer space", "floating in outer space", "in space among planets"),
}

# For each medium: what goes before "of", and what stands alone between commas.
MEDIA = {
    "3d render": (
        ("3d render", "a 3d render", "cute 3d render"),
        ("3d render", "3d render style", "as a 3d render"),
    ),
    "cartoon": (
        ("cartoon", "a cartoon", "cartoon drawing"),
        ("cartoon", "cartoon style", "as a cartoon"),
    ),
    "pencil sketch": (
        ("pencil sketch", "a pencil sketch", "rough pencil sketch"),
        ("pencil sketch", "pencil drawing"),
    ),
    "pixel art": (
        ("pixel art", "16-bit pixel art"),
        ("pixel art", "pixel art style", "retro pixel art"),
    ),
    "watercolor": (
        ("watercolor", "a watercolor", "a watercolor painting"),
        ("watercolor", "watercolor painting"),
    ),
    "neon": (
        ("neon sign", "a glowing neon sign", "neon art"),
        ("neon sign style", "neon lights", "glowing neon art"),
    ),
    "sepia photograph": (
        ("sepia photograph", "a sepia photograph", "old sepia photograph"),
        ("sepia photograph", "sepia photo", "vintage sepia photograph"),
    ),
}

TEMPLATES = (  # with weights
    ("{of} of {subject} {place}{modifiers}", 4),
    ("{subject} {place}, {style}{modifiers}", 3),
    ("{subject} {place}{modifiers}, {style}", 2),
    ("{style}, {subject} {place}{modifiers}", 1),
    ("{subject}, {place}, {style}{modifiers}", 1),
    ("{style}{modifiers}, {subject} {place}", 1),
)

_MODIFIERS = (
    "highly detailed, intricate, trending on artstation, artstation, 8 k, 4 k, hd, sharp focus,"
    " smooth, elegant, cinematic lighting, dramatic lighting, volumetric lighting, soft "
    "lighting, studio lighting, unreal engine, octane render, concept art, digital art, matte "
    "painting, illustration, masterpiece, award winning, beautiful, very beautiful, stunning, "
    "epic, cute, whimsical, dreamy, surreal, fantasy, mysterious, atmospheric, moody, "
    "minimalist, symmetrical, ultra realistic, hyperrealistic, depth of field, bokeh, wide "
    "angle, close up, centered, dynamic pose, detailed background, deviantart, behance, "
    "pinterest, character design, storybook, art nouveau, baroque, impressionism, by vincent "
    "van gogh, by claude monet, by rembrandt, by albrecht durer, by katsushika hokusai, by "
    "alphonse mucha, by gustav klimt, by j. m. w. turner, by john singer sargent, by caspar "
    "david friedrich, by ivan shishkin, by hieronymus bosch"
)
MODIFIERS = tuple(_MODIFIERS.split(", "))

_IDEAS = (
    "hope silence memory nostalgia regret freedom time justice melancholy gratitude curiosity "
    "courage doubt patience wisdom envy forgiveness longing truth eternity destiny boredom "
    "kindness ambition faith loneliness wonder grief honesty jealousy serenity pride mercy "
    "chaos inspiration"
)
IDEAS = tuple(_IDEAS.split())

# {0} and {1} are ideas; the weight of a saying grows with the number of ways to fill it in.
SAYINGS = (
    ("the sound of one hand clapping", 1),
    ("nothing is more powerful than an idea", 1),
    ("i think therefore i am", 1),
    ("what would happen if nobody asked why", 1),
    ("all things must pass sooner or later", 1),
    ("the meaning of it all, explained badly", 1),
    ("you had me at hello", 1),
    ("monday morning mood", 1),
    ("never trust a perfect answer", 1),
    ("to be or not to be, that is the question", 1),
    ("an inside joke nobody remembers", 1),
    ("the unbearable lightness of being late", 1),
    ("the feeling of {0}", 4),
    ("{0} and {1}", 4),
    ("nothing is more powerful than {0}", 4),
    ("{0} is only {1} in disguise", 6),
    ("a moment of pure {0}", 4),
    ("what {0} means when there is no {1}", 6),
    ("{0}, the end of all {1}", 6),
    ("without {0} there can be no {1}", 6),
    ("an essay on {0}", 3),
    ('"{0} is the mother of {1}"', 6),
    ("how to live with {0}", 3),
    ("the opposite of {0}", 3),
)


@dataclass(frozen=True)
class Scene:
    """A prompt and what the picture made for it shows.

    All fields but `modifiers`, `template` and `prompt` describe the picture, also where the prompt
    says something else.

    Attributes
    ----------
    objects : tuple of str
        Distinct nouns (keys of ``NOUNS``) in the picture, from left to right for "left of".
    count : int
        Number of things in the picture, 1 to 3.
    relation : str
        "single", "count" (`count` times the same noun), "and", "left of", or "none" where the
        prompt names no object.
    setting, medium : str
        Keys of ``SETTINGS`` and ``MEDIA``.
    modifiers : tuple of str
        Words of the prompt that show nothing.
    template : str
        Format string the prompt was made with.
    prompt : str
        The text.
    misaligned : bool
        Whether the picture lacks an object that the prompt names or shows another number of them.
    """

    objects: tuple[str, ...]
    count: int
    relation: str
    setting: str
    medium: str
    modifiers: tuple[str, ...] = ()
    template: str = ""
    prompt: str = ""
    misaligned: bool = False

    @property
    def has_referent(self) -> bool:
        """Whether the prompt names anything that the picture could show."""
        return self.relation != "none"


def sample_scene(rng: np.random.Generator, misaligned: float = MISALIGNED) -> Scene:
    """Draw one scene with its prompt.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    misaligned : float
        Share of the scenes that differ from what their prompt says.

    Returns
    -------
    Scene
    """
    relation = _pick(rng, list(RELATIONS), list(RELATIONS.values()))
    count = 1 if relation == "single" else 2 + (relation != "left of" and rng.random() < 0.35)
    objects = tuple(_pick_distinct(rng, list(NOUNS), 1 if relation == "count" else count))
    scene = Scene(objects, count, relation, _pick(rng, list(SETTINGS)), _pick(rng, list(MEDIA)))
    if rng.random() < NO_REFERENT:
        return _word(replace(scene, relation="none"), rng)
    scene = _word(scene, rng)
    return _misalign(scene, rng) if rng.random() < misaligned else scene


def _word(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with modifiers, template and prompt."""
    modifiers = tuple(_pick_distinct(rng, MODIFIERS, int(rng.integers(0, 6))))
    if scene.has_referent:
        template = _pick(rng, *zip(*TEMPLATES, strict=True))
        before_of, alone = MEDIA[scene.medium]
        words = {
            "of": _pick(rng, before_of),
            "style": _pick(rng, alone),
            "subject": _subject(scene),
            "place": _pick(rng, SETTINGS[scene.setting]),
        }
        text = template.format(modifiers="".join(f", {m}" for m in modifiers), **words)
    else:
        modifiers = modifiers[:2]
        template = _pick(rng, *zip(*SAYINGS, strict=True))
        text = ", ".join((template.format(*_pick_distinct(rng, IDEAS, 2)), *modifiers))
    return replace(scene, modifiers=modifiers, template=template, prompt=_recase(text, rng))


def caption(objects, count: int, setting: str, medium: str) -> str:
    """Say plainly what a picture shows: "a cartoon of two foxes in the snow"."""
    relation = "count" if len(objects) == 1 and count > 1 else "and"
    subject = _subject(Scene(tuple(objects), count, relation, setting, medium))
    before_of = next(
        (words for words in MEDIA[medium][0] if words.startswith("a ")), MEDIA[medium][0][0]
    )
    return f"{before_of} of {subject} {SETTINGS[setting][0]}"


def _subject(scene: Scene) -> str:
    nouns = [NOUNS[name] for name in scene.objects]
    if scene.relation == "count":
        return f"{NUMBERS[scene.count]} {nouns[0].plural}"
    things = [f"{noun.article} {noun.singular}" for noun in nouns]
    if scene.relation == "left of":
        return " to the left of ".join(things)
    return ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]


def _misalign(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with another number of things, or an object less; the prompt stays."""
    if len(scene.objects) == 1:
        count = _pick(rng, [n for n in NUMBERS if n != scene.count])
        return replace(
            scene, count=count, relation="single" if count == 1 else "count", misaligned=True
        )
    lost = _pick(rng, scene.objects)
    objects = tuple(name for name in scene.objects if name != lost)
    relation = "single" if len(objects) == 1 else "and"
    return replace(scene, objects=objects, count=len(objects), relation=relation, misaligned=True)


def _recase(text: str, rng: np.random.Generator) -> str:
    change = _pick(rng, (str, str.capitalize, str.title, str.upper), (84, 8, 5, 3))
    return change(text)


def _pick(rng: np.random.Generator, options, weights=None):
    """Pick one of `options`, uniformly or by `weights`."""
    if weights is None:
        return options[rng.integers(len(options))]
    bounds = np.cumsum(weights)
    return options[np.searchsorted(bounds, rng.random() * bounds[-1], side="right")]


def _pick_distinct(rng: np.random.Generator, options, number: int) -> list:
    """Pick `number` different ones of `options` in random order."""
    return [options[i] for i in rng.permutation(len(options))[:number]]
