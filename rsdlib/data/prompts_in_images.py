"""Prompts that lie inside images, as the programs that drew these wrote them; their plain form.

Each program has a place and a form of its own (``prompts_in_images.toml``). What a file does not
fix is missing, never guessed. Metadata are as hostile as any input: their size is limited before
they are unpacked and parsed, and every search takes a time linear in the text.
"""

import contextlib
import dataclasses
import html
import io
import json
import re
import struct
import tomllib
from pathlib import Path

from PIL import Image, PngImagePlugin

from rsdlib import files
from rsdlib.data.images import FORMATS
from rsdlib.data.parts import open_part

MAX_TEXT = 2**20  # bytes of one text; ComfyUI's large graphs have 0.3 MB
MAX_TEXTS, MAX_CHUNKS = 1_000, 100_000  # of a PNG
MAX_PROMPT = 100_000  # characters

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_PLACES, _EXIF = _TABLES["places"], {int(tag, 16): name for tag, name in _TABLES["exif"].items()}
_WRITERS = {name: re.compile(pattern) for name, pattern in _TABLES["writers"].items()}
_FIND = {name: re.compile(pattern) for name, pattern in _TABLES["patterns"].items()}


@dataclasses.dataclass(frozen=True)
class StoredPrompt:
    """What an image file says of its prompt.

    Attributes
    ----------
    prompt : str or None
        As it was written but for outer blanks, None where the file does not fix one.
    negative : str
        The negative prompt, "" without one.
    writer : str
        The program that wrote it, "" if none is known.
    reason : str
        Why there is no prompt, "" if there is one.
    doubtful : str
        A prompt that was read but cannot be trusted: the picture contradicts its metadata.
    """

    prompt: str | None
    negative: str = ""
    writer: str = ""
    reason: str = ""
    doubtful: str = ""


def stored_prompt(data):
    """Read the prompt that an image file carries.

    Parameters
    ----------
    data : bytes or path-like
        An image file, or its path.

    Returns
    -------
    StoredPrompt
        Without a prompt, and with the reason, where there is none, where it is ambiguous, a
        placeholder or broken, where the file cannot be read, and where the picture's size
        contradicts the stored one (a screenshot, a crop, a collage).
    """
    try:
        texts, picture = _read_file(data)
    except Exception as error:  # what Pillow raises on broken metadata is in no list
        reason = str(error).partition(" <")[0]  # no address in memory
        return StoredPrompt(None, reason=f"its metadata cannot be read ({reason})")
    reasons = []
    for place in filter(texts.get, _PLACES):
        try:
            if found := _read_text(place, texts[place].strip()):
                text = f"{place}\n{texts[place]}\n{texts.get('extras')}"
                return _judge(*found, picture, text)
        except (ValueError, RecursionError) as error:
            reasons.append(f"{place}: {error}")
    nothing = f"no prompt in any known form, within {MAX_TEXT:,} bytes"
    return StoredPrompt(None, reason="; ".join(reasons) or nothing)


def _judge(prompt, negative, settings, picture, text):
    """Return what was found, unless it is no prompt or not this picture's."""
    if text.startswith(("dream\n", "sd-metadata\n")):  # InvokeAI wrote: a cat [ugly]
        negative = ", ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
        prompt = re.sub(r" ?\[[^\[\]]*\]", "", prompt)
    prompt, negative = prompt.strip(), negative.strip()
    if not any(map(str.isalnum, prompt)) or prompt.lower() in _TABLES["placeholders"]:
        raise ValueError(f"{prompt[:40]!r} is a placeholder")
    if len(prompt) > MAX_PROMPT or _FIND["damaged"].search(prompt + negative):
        raise ValueError("the prompt is damaged, or no prompt at that length")
    writer = next((name for name, mark in _WRITERS.items() if mark.search(text)), "unknown")
    widths, heights = (_FIND[side].findall(settings) for side in ("width", "height"))
    sizes = [*zip(map(int, widths), map(int, heights), strict=False)]
    known = len(widths) == len(heights) > 0 and not _FIND["drawn_on"].search(settings)
    if known and not any(_agree(picture, size, text) for size in sizes):
        reason = "doubtful: the picture has {} x {} pixels, its metadata say {} x {}"
        return StoredPrompt(None, negative, writer, reason.format(*picture, *sizes[0]), prompt)
    return StoredPrompt(prompt, negative, writer)


def _agree(picture, stored, text):
    """Tell whether a picture may have had the stored size: kept, scaled, or with rounded sides."""
    (width, height), (wide, high) = picture, stored
    if abs(width * high - height * wide) > 0.03 * width * high:
        return abs(width - wide) < min(64, wide / 8) and abs(height - high) < min(64, high / 8)
    collage = width > wide and width % wide == height % high == 0
    enlarged = "\nSteps:" not in text or _FIND["enlarged"].search(text)
    return 8 * width >= wide and (enlarged or not collage)


# --- from a file to texts -------------------------------------------------------------------------


def _read_file(data):
    """Return the texts of an image file by their places, and the picture's width and height."""
    if not isinstance(data, bytes):
        path = files.resolve_path(data)
        with open_part(path.parent) as part:
            data = part.read(path.name)
    with Image.open(io.BytesIO(_without_pixels(data)), formats=FORMATS) as image:
        exif = Image.Image.getexif(image)  # a PNG's own would decode its pixels
        tags = [*exif.items(), *exif.get_ifd(0x8769).items()]
        fields = [*image.info.items(), *((_EXIF[tag], text) for tag, text in tags if tag in _EXIF)]
    texts = {}
    for place, raw in fields:
        text = _decode(raw) if isinstance(raw, bytes | str) and len(raw) <= MAX_TEXT else ""
        label = re.match(r"(?i)(prompt|workflow): *(?=\{)", text)  # ComfyUI's in EXIF
        place, text = (label[1], text[label.end() :]) if label else (place, text)
        texts[place.lower()] = text
    loose = [place for place in texts if place == "comment" or texts[place][:1] != "{"]
    return texts | {"texts": json.dumps({place: texts[place] for place in loose})}, image.size


def _without_pixels(data):
    """Return what an image says of itself: Pillow reads no text behind the pixels of a PNG."""
    if data.startswith(b"\xff\xd8"):  # a JPEG says it in front
        return data[: 16 * MAX_TEXT]
    if not data.startswith(b"\x89PNG\r\n"):
        return data
    chunks, start = {}, 8
    for _ in range(MAX_CHUNKS):
        [length] = struct.unpack_from(">I", data, start)
        kind, end = data[start + 4 : start + 8], start + 12 + length
        kept = kind in (b"IHDR", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"IEND")
        if kept and length <= MAX_TEXT and len(chunks) < MAX_TEXTS:
            chunk = data[start:end]
            if chunks.setdefault(chunk[4:].partition(b"\0")[0], chunk) != chunk:
                raise ValueError("one of its texts stands there twice, differently")
        if kind == b"IEND":
            break
        start = end
    return data[:8] + b"".join(chunks.values())


def _decode(raw):
    """Return the text of bytes: UTF-16 in the order that gives more ASCII, UTF-8 or Latin-1."""
    if isinstance(raw, PngImagePlugin.iTXt):
        return str(raw)
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # as Pillow read it
    raw = raw[8:] if raw.startswith((b"UNICODE\0", b"ASCII\0\0\0", bytes(8))) else raw
    encodings = ("utf-16-be", "utf-16-le") if b"\0" in raw.strip(b"\0") else ("utf-8", "latin-1")
    texts = [raw.decode(encoding, "replace").strip("\ufeff\0") for encoding in encodings]
    return max(texts, key=lambda t: (len(t.encode("ascii", "ignore")), -t.count("\ufffd")))


# --- from a text to a prompt ----------------------------------------------------------------------


def _read_text(place, text):
    """Return a text's prompt, negative prompt and settings, None if it has no known form."""
    if place == "xmp":  # Draw Things; no parser of XML bears hostile input
        text = text.partition("<exif:UserComment>")[2].partition("<rdf:li")[2].partition(">")[2]
        text = html.unescape(text.partition("</")[0])
    steps = [match.start() for match in re.finditer(r"(?m)^Steps: *\d", text)]
    if steps and re.search("Sampler|Seed|CFG [Ss]cale", text[steps[-1] :]):  # AUTOMATIC1111's form
        prompt, _, negative = f"\n{text[: steps[-1]]}".partition("\nNegative prompt:")
        return prompt, negative, text[steps[-1] :]
    if place == "dream" or " --ddim_steps " in text:
        return _read_command(text)
    return _read_json(json.loads(text)) if text.startswith("{") else None


def _read_command(text):
    """Read a command line: of InvokeAI's first age (``"a cat" -s50 ...``) or of Dream Factory."""
    start = re.search(r" -s ?\d| --ddim_steps ", text)
    if text.startswith("!") or not start:
        raise ValueError("it is a command, no prompt")
    prompt, settings = text[: start.start()].strip(), text[start.start() :]
    for _ in range(2):  # Dream Factory's may be quoted twice
        if len(prompt) > 1 and prompt[0] == prompt[-1] == '"':
            prompt = prompt[1:-1].replace('\\"', '"')
    return prompt, settings.partition('--neg_prompt "')[2].partition('" --')[0], settings


def _read_json(tree):
    """Read a JSON object: each program has its own keys, some put one object into another."""
    nodes = {key: node for key, node in tree.items() if isinstance(node, dict)}
    nodes = {key: node for key, node in nodes.items() if isinstance(node.get("inputs"), dict)}
    if nodes:
        return _read_graph(nodes)
    flat = {re.sub("[ _-]", "", key).lower(): value for key, value in tree.items()}
    novelai = str(flat.get("software")).startswith("NovelAI")
    for key in ("suiimageparams", "image", "comment", "prompt"):
        inner = flat.get(key)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                inner = json.loads(inner)
        if isinstance(inner, dict):
            outer = {"prompt": flat.get("description"), "software": "NovelAI"} if novelai else {}
            return _read_json(outer | inner)
    keys = [key for key in ("positiveprompt", "prompt", "prompts", "c") if key in flat]
    prompts = _strings([flat[key] for key in keys[:1]])
    if not prompts or flat.keys().isdisjoint(_TABLES["settings"]):
        return None
    if len(prompts) > 1:
        raise ValueError(f"ambiguous: it holds {len(prompts)} prompts")
    negatives = [flat[key] for key in ("negativeprompt", "uc", "negative") if key in flat]
    return prompts[0], ", ".join(_strings(negatives[:1])), json.dumps(flat)


def _strings(value):
    """Return the texts within a value: some lists pair them with weights."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    inner = values if isinstance(value, dict | list) else []
    return [text for part in inner for text in _strings(part)]


def _read_graph(nodes):
    """Read a ComfyUI graph: the one text that all samplers behind the saved picture share."""
    kinds = {key: str(node.get("class_type")) for key, node in nodes.items()}
    inputs = {key: node["inputs"] for key, node in nodes.items()}
    savers = [key for key in nodes if "save" in kinds[key].lower() and "images" in inputs[key]]
    behind, pending = set(), [*(savers or nodes)]
    while pending:
        key = pending.pop()
        if key in nodes and key not in behind:
            behind.add(key)
            pending += _links(inputs[key]).values()
    drawing = sorted(behind.difference(savers))
    samplers = [key for key in drawing if "positive" in inputs[key] or "Guider" in kinds[key]]
    texts, negatives = _texts_behind(kinds, inputs, samplers, "positive"), []
    if len(texts) != 1:
        raise ValueError(f"ambiguous: {len(texts)} texts stand behind the picture's samplers")
    with contextlib.suppress(ValueError):
        samplers = [key for key in drawing if "negative" in inputs[key]]
        negatives = _texts_behind(kinds, inputs, samplers, "negative")
    sized = [inputs[key] for key in drawing if re.search("Latent|Image", kinds[key])]
    sized = json.dumps(sized) if "Latent" in "".join(map(kinds.get, drawing)) else ""
    return texts[0], negatives[0] if len(negatives) == 1 else "", sized


def _links(inputs):
    """Return to which nodes a node's inputs lead."""
    pairs = {name: value for name, value in inputs.items() if isinstance(value, list)}
    return {name: str(pair[0]) for name, pair in pairs.items() if len(pair) == 2}


def _texts_behind(kinds, inputs, samplers, role):
    """Return the texts that links of a role lead to; one link of a pipe carries both roles."""
    texts, seen, pending = [], set(), [*samplers]
    other = "negative" if role == "positive" else "positive"
    while pending:
        key = pending.pop()
        if key not in kinds:
            raise ValueError("broken: a link of its graph leads to no node")
        if key in seen or "zeroout" in kinds[key].lower():
            continue
        seen.add(key)
        names = [name for name in inputs[key] if other not in name.lower()]
        if role in names:  # a sampler, a loader or a pipe; a detailer may have words of its own
            names = [name for name in names if name in (role, "wildcard")]
        holders = [name for name in names if _FIND["holds_text"].search(name)]
        found = [inputs[key][name] for name in holders if isinstance(inputs[key][name], str)]
        links = _links({name: inputs[key][name] for name in names})
        links = [links[name] for name in links if not _FIND["leads_elsewhere"].search(name)]
        others = set(names).difference(holders)
        edits = [name for name in others if isinstance(inputs[key][name], str)]
        makes = [name for name in (kinds[key], *others) if _FIND["makes_words"].search(name)]
        if holders and (makes or (edits and "clip" not in " ".join(inputs[key]))):
            raise ValueError(f"ambiguous: its graph makes words ({kinds[key]})")
        if not found + links:
            raise ValueError(f"ambiguous: no text is known behind {kinds[key]}")
        texts += map(str.strip, found)
        pending += links
    return [*{text for text in texts if text}] or texts[:1]


# --- the plain form -------------------------------------------------------------------------------


class _Plain(str):
    """A prompt in its plain form: its brackets are brackets."""


def plain(prompt):
    r"""Return a prompt without the dialects of the programs that draw.

    Tags such as ``<lora:detail:0.8>`` go and ``BREAK`` becomes a comma; of ``(x:1.3)``, ``((x))``,
    ``[x]`` and ``{x}`` the words stay, of ``[a:b:0.5]`` and ``[a|b]`` both; ``long_hair`` is two
    words, ``\(`` a bracket. Applying it to what it returned changes nothing.

    Parameters
    ----------
    prompt : str

    Returns
    -------
    str
    """
    if isinstance(prompt, _Plain):
        return prompt
    for expression, instead in _TABLES["plain"]["steps"]:
        prompt = re.sub(expression, instead, prompt)
    return _Plain(prompt)
