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
import tomllib
from pathlib import Path

from PIL import Image, PngImagePlugin

from rsdlib.data.images import _BROKEN_IMAGE, FORMATS, png_chunks, read_file
from rsdlib.errors import BadImageError, RsdError, refusing

MAX_TEXT = 2**20  # bytes of one text; ComfyUI's large graphs have 0.3 MB
MAX_TEXTS = 1_000  # of a PNG
MAX_PROMPT = 100_000  # characters
_CHUNKS = {b"IHDR", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"IEND"}

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_STEPS = [(re.compile(step).sub, instead) for step, instead in _TABLES["plain"]["steps"]]
BOILERPLATE = {word: n for n in (1, 2) for word in _TABLES["boilerplate"][n - 1].split()}
FIND = {name: re.compile(pattern) for name, pattern in _TABLES["patterns"].items()}


@dataclasses.dataclass(frozen=True)
class EmbeddedPrompt:
    """What an image says of its prompt; false where that is nothing.

    Attributes
    ----------
    prompt : str or None
        As it was written but for outer blanks, None where the image does not fix one.
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

    def __bool__(self):
        return self.prompt is not None


def read_prompt(image):
    """Read the prompt that an image carries.

    Parameters
    ----------
    image : bytes, str, path-like or PIL.Image.Image
        An image file; where it lies, or a locator of `load_pairs`; or an image that Pillow opened:
        then its file is read, or what it still holds where it has none.

    Returns
    -------
    EmbeddedPrompt
        Without a prompt, and with the reason, where there is none, where it is ambiguous, a
        placeholder or broken, where the file cannot be read, and where the picture's size
        contradicts the stored one (a screenshot, a crop, a collage).
    """
    try:
        texts, size = _read_image(image)
    except RsdError as error:
        return EmbeddedPrompt(None, reason=getattr(error, "reason", str(error)))
    reasons, others = [], (place for place in texts if texts[place].startswith("{"))
    for place in filter(texts.get, dict.fromkeys([*_TABLES["places"], *others])):
        try:
            if found := _read_text(place, texts[place].strip()):
                return _judge(*found, size, f"{place}\n{texts[place]}\n{texts.get('extras')}")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reasons.append(f"{place}: {error}")
    nothing = f"no prompt in any known form, within {MAX_TEXT:,} bytes"
    return EmbeddedPrompt(None, reason="; ".join(reasons) or nothing)


def _judge(prompt, negative, settings, picture, text):
    """Return what was found, unless it is no prompt or not this picture's."""
    if text.startswith(("dream\n", "sd-metadata\n")):  # InvokeAI wrote: a cat [ugly]
        negative = ", ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
        prompt = re.sub(r" ?\[[^\[\]]*\]", "", prompt)
    prompt, negative = prompt.strip(), negative.strip()
    if re.sub(r"[\W_]+", " ", prompt.lower()).strip() in _TABLES["placeholders"]:
        raise ValueError(f"{prompt[:40]!r} is a placeholder")
    if len(prompt) > MAX_PROMPT or FIND["damaged"].search(prompt + negative):
        raise ValueError("the prompt is damaged, or no prompt at that length")
    widths, heights = (FIND[side].findall(settings) for side in ("width", "height"))
    sizes = [*zip(map(int, widths), map(int, heights), strict=False)]
    known = len(widths) == len(heights) > 0 and not FIND["drawn_on"].search(settings)
    writer = next((w for w, mark in _TABLES["writers"].items() if re.search(mark, text)), "unknown")
    if known and not any(_agree(picture, size, text) for size in sizes):
        reason = "doubtful: the picture has {} x {} pixels, its metadata say {} x {}"
        return EmbeddedPrompt(None, negative, writer, reason.format(*picture, *sizes[0]), prompt)
    return EmbeddedPrompt(prompt, negative, writer)


def _agree(picture, stored, text):
    """Tell whether a picture may have had the stored size: kept, scaled, or with rounded sides."""
    (width, height), (wide, high) = picture, stored
    if abs(width * high - height * wide) > 0.03 * width * high:
        return abs(width - wide) < min(64, wide / 8) and abs(height - high) < min(64, high / 8)
    multiple = width > wide and width % wide == height % high == 0
    collage = multiple and "\nSteps:" in text and not FIND["enlarged"].search(text)
    return 8 * width >= wide and not collage


# --- from an image to texts -----------------------------------------------------------------------


def _read_image(image):
    """Return the texts of an image by their places, and its width and height."""
    if isinstance(image, Image.Image) and Path(str(getattr(image, "filename", ""))).is_file():
        image = image.filename
    image, *_ = read_file(image)
    with refusing(_BROKEN_IMAGE, BadImageError, "", "", "its metadata cannot be read ({})"):
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(_without_pixels(image)), formats=FORMATS)
        return _texts(image), image.size


def _texts(image):
    """Return the texts that Pillow found, by their places in lower case."""
    exif = Image.Image.getexif(image)  # a PNG's own would decode its pixels
    tags = dict(exif) | exif.get_ifd(0x8769)
    found = image.info | {name: tags[tag] for name, tag in _TABLES["exif"].items() if tag in tags}
    found = {place: raw for place, raw in found.items() if isinstance(raw, bytes | str)}
    texts = {p.lower(): _decode(raw) for p, raw in found.items() if len(raw) <= MAX_TEXT}
    loose = {p: text for p, text in texts.items() if p == "comment" or text[:1] != "{"}
    return texts | {"texts": json.dumps(loose)}


def _without_pixels(data):
    """Return what an image says of itself: Pillow reads no text behind the pixels of a PNG."""
    if not data.startswith(b"\x89PNG\r\n"):  # a JPEG says it in front
        return data[: 16 * MAX_TEXT] if data.startswith(b"\xff\xd8") else data
    chunks = {}
    for chunk in png_chunks(data):
        kept = chunk[4:8] in _CHUNKS and len(chunk) <= MAX_TEXT and len(chunks) < MAX_TEXTS
        if kept and chunks.setdefault(chunk[4:].partition(b"\0")[0], chunk) != chunk:
            raise ValueError("one of its texts stands there twice, differently")
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
    text = FIND["label"].sub("", text)
    steps = [match.start() for match in re.finditer(r"(?m)^Steps: *\d", text)]
    if steps and re.search("Sampler|Seed|CFG [Ss]cale", text[steps[-1] :]):  # AUTOMATIC1111's form
        prompt, _, negative = f"\n{text[: steps[-1]]}".partition("\nNegative prompt:")
        return prompt, negative, text[steps[-1] :]
    if place == "dream" or " --ddim_steps " in text:  # InvokeAI's first age, Dream Factory
        command = FIND["command"].match(text)
        if text.startswith("!") or not command:
            raise ValueError("it is a command, no prompt")
        negative = command["settings"].partition('--neg_prompt "')[2].partition('" --')[0]
        return command["prompt"].replace('\\"', '"'), negative, command["settings"]
    return _read_json(json.loads(text)) if text.startswith("{") else None


def _read_json(tree):
    """Read a JSON object: each program has its own keys, some put one object into another."""
    flat = {re.sub("[ _-]", "", key).lower(): value for key, value in tree.items()}
    outer = {key: flat[key] for key in _TABLES["outer"] if key in flat}
    if str(flat.get("software")).startswith("NovelAI"):
        outer["prompt"] = flat.get("description")
    for key in _TABLES["inner"]:
        inner = flat.get(key)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                inner = json.loads(inner)
        found = _read_json(outer | inner) if isinstance(inner, dict) else None
        if found or (isinstance(inner, dict) and key != "extrametadata"):
            return found
    if isinstance(flat.get("nodes"), dict) and "edges" in flat:
        tree = _as_comfyui(flat["nodes"], flat["edges"])
    nodes = {key: node for key, node in tree.items() if isinstance(node, dict)}
    nodes = {key: node for key, node in nodes.items() if isinstance(node.get("inputs"), dict)}
    if nodes:
        return _read_graph(nodes)
    prompts = _strings(next(filter(None, map(flat.get, _TABLES["positive"])), []))
    negatives = _strings(next(filter(None, map(flat.get, _TABLES["negative"])), []))
    if not prompts or flat.keys().isdisjoint(_TABLES["settings"]):
        return None
    if len(prompts) > 1:
        raise ValueError(f"ambiguous: it holds {len(prompts)} prompts")
    return prompts[0], ", ".join(negatives), json.dumps(flat)


def _strings(value):
    """Return the texts within a value: some lists pair them with weights."""
    if isinstance(value, str):
        return [value]
    inner = [*value.values()] if isinstance(value, dict) else value
    return [text for part in inner for text in _strings(part)] if isinstance(inner, list) else []


def _as_comfyui(nodes, edges):
    """Return InvokeAI's graph as ComfyUI would write it."""
    for edge in edges:
        inputs, name = nodes[edge["destination"]["node_id"]], edge["destination"]["field"]
        inputs[name] = 0  # what stood there before the edge
        inputs[f"{len(inputs)} {name}"] = [edge["source"]["node_id"], 0]
    own = {"id": 0, "type": 0}  # not what it reads
    return {key: {"class_type": node["type"], "inputs": node | own} for key, node in nodes.items()}


def _read_graph(nodes):
    """Read a ComfyUI graph: the one text that all samplers behind the saved picture share."""
    nodes = {key: (str(node.get("class_type")), node["inputs"]) for key, node in nodes.items()}
    savers = [key for key in nodes if FIND["saves"].search(f"{nodes[key][0]} {[*nodes[key][1]]}")]
    behind, pending = set(), [*(savers or nodes)]
    for key in pending:
        if key in nodes and key not in behind:
            behind.add(key)
            pending += [str(link[0]) for link in nodes[key][1].values() if _is_link(link)]
    drawing = {key: nodes[key] for key in sorted(behind.difference(savers))}
    prompt, negative = _text_behind(nodes, drawing, "positive", "negative"), ""
    with contextlib.suppress(ValueError):
        negative = _text_behind(nodes, drawing, "negative", "positive")
    sized = [inputs for kind, inputs in drawing.values() if re.search("Latent|Image", kind)]
    sized = json.dumps(sized) if any("Latent" in kind for kind, _ in drawing.values()) else ""
    return prompt, negative, sized


def _is_link(value):
    return isinstance(value, list) and len(value) == 2


def _text_behind(nodes, drawing, role, other):
    """Return the text that links of a role lead to; one link of a pipe carries both roles."""
    own, other = FIND[role].search, FIND[other].search
    pending = [key for key, node in drawing.items() if any(map(own, (node[0], *node[1])))]
    texts, seen = set(), set()
    for key in pending:
        kind, inputs = nodes.get(key, ("a lost link", {}))
        if key in seen or "zeroout" in kind.lower():
            continue
        seen.add(key)
        names = {name for name in inputs if not other(name)}
        if roles := {*filter(own, names)}:  # a sampler, a loader or a pipe
            names = roles | ({"wildcard"} & names)  # a detailer may have words of its own
        holders = {*filter(FIND["holds_text"].search, names)}
        found = [inputs[name] for name in holders if isinstance(inputs[name], str)]
        links = [name for name in names if not FIND["leads_elsewhere"].search(name)]
        links = [str(inputs[name][0]) for name in links if _is_link(inputs[name])]
        others = names - holders
        edits = [name for name in others if isinstance(inputs[name], str) or "seed" in name]
        edits = holders and edits and "clip" not in " ".join(inputs)
        makes = edits or FIND["makes_words"].search(" ".join([kind, *others]))
        if makes or not found + links:
            raise ValueError(f"ambiguous: no fixed words behind {kind}")
        texts.update(map(str.strip, found))
        pending += links
    texts = texts - {""} or texts
    if len(texts) != 1:
        raise ValueError(f"ambiguous: {len(texts)} texts stand behind the picture's samplers")
    return texts.pop()


# --- the plain form -------------------------------------------------------------------------------


def plain(prompt):
    r"""Return a prompt without the dialects of the programs that draw.

    Tags such as ``<lora:detail:0.8>`` and ``embedding:name`` go and ``BREAK`` becomes a comma; of
    ``(x:1.3)``, ``((x))``, ``[x]``, ``{x}`` and ``\(x\)`` the words stay, of ``[a:b:0.5]`` and
    ``[a|b]`` both; ``long_hair`` is two words. Applying it to what it returned changes nothing.

    Parameters
    ----------
    prompt : str

    Returns
    -------
    str
    """
    signs = map(prompt.__contains__, _TABLES["plain"]["signs"])
    if FIND["dialect"].search(prompt) or prompt != prompt.strip(" ,") or any(signs):
        for substitute, instead in _STEPS:
            prompt = substitute(instead, prompt)
    return prompt
