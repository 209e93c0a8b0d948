"""Prompts that lie inside images, as the programs that made them wrote them, and their plain form.

Each program has its own place and its own form. What a file does not fix is missing, never guessed.
Metadata are as hostile as any input: sizes are limited before anything is unpacked or parsed, and
every search is linear in the text.
"""

import contextlib
import dataclasses
import html
import io
import itertools
import json
import re
import struct
import zlib

from PIL import Image

from rsdlib import files
from rsdlib.data.parts import open_part
from rsdlib.errors import BadImageError

MAX_TEXT = 8 * 2**20  # bytes of a file's texts, unpacked; ComfyUI's large graphs have 0.3 MB
MAX_TEXTS = 64  # of one file
MAX_CHUNKS = 100_000  # of one PNG


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
        The prompt that was read but cannot be trusted: the picture contradicts its metadata.
    """

    prompt: str | None
    negative: str = ""
    writer: str = ""
    reason: str = ""
    doubtful: str = ""


class _Missing(ValueError):
    """Why a text in a known form fixes no prompt."""


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
    reasons = []
    try:
        texts, picture = _read_file(data, reasons)
    except BadImageError as error:
        return StoredPrompt(None, reason=error.reason)
    for place in filter(texts.__contains__, _PLACES):
        try:
            found = _read_text(place, texts[place])
            if found:
                text = f"{place}\n{texts[place]}\n{texts.get('extras', '')}"
                return _judge(*found, picture, text)
        except _Missing as missing:
            reasons.append(f"{place}: {missing}")
        except (ValueError, RecursionError):
            reasons.append(f"{place}: its JSON is broken")
    return StoredPrompt(None, reason="; ".join(reasons) or "no prompt in any known form")


def _judge(prompt, negative, sizes, picture, text):
    """Return what was found, unless it is no prompt or not this picture's."""
    prompt, negative = prompt.strip(), negative.strip()
    if not any(map(str.isalnum, prompt)) or prompt.lower() in _PLACEHOLDERS:
        raise _Missing(f"{prompt[:40]!r} is a placeholder, no prompt")
    if _BROKEN.search(prompt + negative):
        raise _Missing("its prompt is damaged")
    writer = next((writer for writer, mark in _WRITERS.items() if mark.search(text)), "unknown")
    sizes = [(int(width), int(height)) for width, height in sizes]
    if sizes and not any(_agree(picture, size, text) for size in sizes):
        sizes = " or ".join("{} x {}".format(*size) for size in sizes[:3])
        reason = "doubtful: the picture has {} x {} pixels, its metadata say {}"
        return StoredPrompt(None, negative, writer, reason.format(*picture, sizes), prompt)
    return StoredPrompt(prompt, negative, writer)


def _agree(picture, stored, text):
    """Tell whether a picture may be the stored one: as it was, scaled, or with rounded sides."""
    (width, height), (wide, high) = picture, stored
    if abs(width * high - height * wide) > 0.03 * width * high:
        return abs(width - wide) < 64 and abs(height - high) < 64
    _, settings, after = text.rpartition("\nSteps:")
    enlarged = not settings or _ENLARGED.search(after)
    collage = width > wide and width % wide == height % high == 0 and not enlarged
    return 8 * width >= wide and not collage


_PLACEHOLDERS = {"unknown", "none", "null", "undefined", "nan", "n/a", "prompt", "your prompt here"}
_BROKEN = re.compile("[\0\x7f-\x9f\ufffd\ud800-\udfff]")
_ENLARGED = re.compile("(?i)upscal|hires|resize")
_WRITERS = {
    "SwarmUI": "sui_image_params",
    "InvokeAI": "^(dream|sd-metadata|invokeai_metadata)\n",
    "ComfyUI": '"class_type"',
    "imaginAIry": '(?i)"software": *"imaginairy',
    "Dream Factory": "--ddim_steps ",
    "NovelAI": r'(?i)"software": *"NovelAI|^comment\n[^\n]*"uc"',
    "Draw Things": "^xmp\n",
    "Fooocus": "(?i)fooocus|^comment\n",
    "EasyDiffusion": "num_inference_steps|use_stable_diffusion_model",
    "SD.Next": "App: SD.Next",
    "stable-diffusion.cpp": "Version: stable-diffusion.cpp",
    "AUTOMATIC1111": "\nSteps:",
}
_WRITERS = {writer: re.compile(mark) for writer, mark in _WRITERS.items()}

# --- from a file to texts -------------------------------------------------------------------------

# Where prompts are looked for, in this order; `chunks` are the loose texts of a PNG together.
_PLACES = ("parameters", "usercomment", "xmp", "invokeai_metadata", "sd-metadata", "dream")
_PLACES += ("comment", "prompt", "generation_data", "imagedescription", "chunks")
_TAGS = {0x9286: "usercomment", 0x010E: "imagedescription", 0x010F: "make", 0x0110: "model"}
_PREFIXES = (b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8))  # of a UserComment


def _read_file(data, reasons):
    """Return the texts of an image file by place, and the picture's size; adds to the reasons."""
    if not isinstance(data, bytes):
        path = files.resolve_path(data)
        with open_part(path.parent) as part:
            data = part.read(path.name)
    texts, size = {}, (0, 0)
    try:
        if data.startswith(b"\x89PNG\r\n"):
            size, raw = struct.unpack(">II", data[16:24]), _png_texts(data, reasons)
        else:
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                size, raw = image.size, [*_exif_texts(image.getexif())]
                raw += [(place, image.info.get(place)) for place in ("xmp", "comment")]
        for place, text in itertools.islice(raw, MAX_TEXTS):
            if isinstance(text, bytes | str):
                _keep(texts, place, text, reasons)
    except Exception as error:  # what Pillow raises on broken metadata is in no list
        reasons.append(f"the file is damaged ({error})"[:200])
    loose = {place: text for place, text in texts.items() if text[:1] != "{" or place == "comment"}
    if len(loose) > 1:
        texts["chunks"] = json.dumps({place: text[:100_000] for place, text in loose.items()})
    return texts, size


def _keep(texts, place, raw, reasons):
    """Decode a text and keep it under its place, unless another one stands there."""
    text = _decode(raw[:MAX_TEXT])
    if label := re.match(r"(?i)\s*(prompt|workflow): *\{", text):  # ComfyUI's in EXIF
        place, text = label[1], text[label.end() - 1 :]
    if place in ("xmp", "XML:com.adobe.xmp"):  # Draw Things; no XML parser bears hostile input
        text = text.partition("<exif:UserComment>")[2].partition("<rdf:li")[2].partition(">")[2]
        place, text = "xmp", html.unescape(text.partition("</")[0])
    place = place.lower()
    if len(raw) + sum(map(len, texts.values())) > MAX_TEXT:
        reasons.append(f"{place}: the texts have more than {MAX_TEXT:,} bytes")
    elif texts.setdefault(place, text) != text:
        reasons.append(f"{place}: it stands there twice, with different texts")
        texts[place] = ""


_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")


def _png_texts(data, reasons):
    """Yield place and raw text of a PNG's chunks: packed or not, before or behind the pixels."""
    start = 8
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, start)
        start, end = start + 8, start + 8 + length
        body = data[start : min(end, start + 2 * MAX_TEXT)] if kind in _TEXT_CHUNKS else b""
        if kind == b"IEND":
            return
        if (
            body
            and len(body) == length
            and zlib.crc32(kind + body).to_bytes(4) != data[end : end + 4]
        ):
            reasons.append(f"{body[:20]!r}: its checksum is wrong")
        elif body:
            yield from _chunk_texts(kind, body, reasons)
        start = end + 4


def _chunk_texts(kind, body, reasons):
    if kind == b"eXIf":
        exif = Image.Exif()
        exif.load(body)
        yield from _exif_texts(exif)
        return
    place, _, text = body.partition(b"\0")
    packed = kind == b"zTXt" or text[:1] == b"\1"
    try:
        text = text[2:].split(b"\0", 2)[2] if kind == b"iTXt" else text[packed:]
        yield place.decode("latin-1"), _unpack(text) if packed else text
    except (zlib.error, IndexError):
        reasons.append(f"{place[:20]!r}: it cannot be unpacked")


def _unpack(packed):
    stream = zlib.decompressobj()
    text = stream.decompress(packed, MAX_TEXT + 1)
    if not stream.eof and len(text) <= MAX_TEXT:
        raise zlib.error("cut short")
    return text


def _exif_texts(exif):
    for folder in (exif, exif.get_ifd(0x8769)):
        yield from ((place, folder[tag]) for tag, place in _TAGS.items() if tag in folder)


def _decode(raw):
    """Return the text of bytes: UTF-16 in the order that gives more ASCII, UTF-8, or Latin-1."""
    raw = raw.encode("latin-1", "replace") if isinstance(raw, str) else raw  # as Pillow read it
    raw = raw[8:] if raw.startswith(_PREFIXES) else raw
    if b"\0" in raw.strip(b"\0"):
        texts = [raw.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
        return max(texts, key=lambda text: len(text.encode("ascii", "ignore"))).strip("\ufeff\0")
    try:
        return raw.decode().strip("\ufeff\0")
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip("\0")


# --- from a text to a prompt ----------------------------------------------------------------------


def _read_text(place, text):
    """Return a text's prompt, negative prompt and sizes, None if it is in no known form."""
    text = text.strip()
    steps = [step.start() for step in re.finditer(r"(?m)^Steps: *\d", text)]
    if steps and _SETTINGS.search(text, steps[-1]):  # AUTOMATIC1111 and whoever writes its form
        sizes = _SIZE.findall(text, steps[-1])
        prompt, _, negative = f"\n{text[: steps[-1]]}".partition("\nNegative prompt:")
        return prompt, negative, sizes
    if place == "dream" or " --ddim_steps " in text:
        return _of_command(text)
    return _of_json(json.loads(text)) if text.startswith("{") else None


_SETTINGS = re.compile("Sampler|Seed|CFG [Ss]cale")
_SIZE = re.compile(r"(?i)size: *([1-9]\d{0,4})x([1-9]\d{0,4})")


def _of_command(text):
    """Read a command line: of InvokeAI's first age (``"a cat" -s50 ...``) or of Dream Factory."""
    start = re.search(r" -s ?\d| --ddim_steps ", text)
    if text.startswith("!") or not start:
        raise _Missing("a command, no prompt")
    prompt, settings = _unquote(_unquote(text[: start.start()])), text[start.start() :]
    negative = settings.partition('--neg_prompt "')[2].partition('" --')[0]
    sizes = [] if _DRAWN_ON.search(settings) else _SIDES.findall(settings)
    return (prompt, negative, sizes) if negative else (*_without_brackets(prompt), sizes)


_SIDES = re.compile(r"-W ?([1-9]\d{0,4}) --?H ?([1-9]\d{0,4})")
_DRAWN_ON = re.compile(
    "(?i)img2img|inpaint|outpaint| -I | --?init"
)  # the picture's size is another's


def _unquote(text):
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('\\"', '"') if quoted else text


def _without_brackets(prompt):
    """Part InvokeAI's prompt from the negative one, which it kept in brackets until version 3."""
    negative = ", ".join(re.findall(r"\[([^][]*)\]", prompt))
    return re.sub(r" ?\[[^][]*\]", "", prompt), negative


def _of_json(tree, depth=4):
    """Read a JSON object: each program has its own keys, some put one object into another."""
    nodes = {key: node for key, node in tree.items() if isinstance(node, dict)}
    nodes = {key: node for key, node in nodes.items() if "class_type" in node}
    if nodes:
        return _of_graph({key: _Node(node) for key, node in nodes.items()})
    flat = {re.sub("[ _-]", "", key).lower(): value for key, value in tree.items()}
    for key in ("suiimageparams", "image", "comment", "prompt"):
        inner = flat.get(key)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                inner = json.loads(inner)
        if isinstance(inner, dict) and depth:
            del flat[key]
            return _of_json(flat | inner, depth - 1)
    keys = ["positiveprompt", "prompt", "prompts"]
    keys += ["c"] if "uc" in flat else []  # Draw Things
    keys += ["description"] if str(flat.get("software")).startswith("NovelAI") else []
    key = next((key for key in keys if key in flat), None)
    if key is None or flat.keys().isdisjoint(_OF_A_WRITER):
        return None
    prompts = _strings(flat[key])
    if len(prompts) != 1:
        raise _Missing(f"ambiguous: it names {len(prompts)} prompts")
    negative = next((flat[key] for key in ("negativeprompt", "uc", "negative") if key in flat), "")
    prompt, negative = prompts[0], ", ".join(_strings(negative))
    if "appid" in flat and not negative:
        prompt, negative = _without_brackets(prompt)
    drawn_on = any(flat.get(key) for key in ("initimg", "initimage"))
    mode = str(flat.get("type")) + str(flat.get("generationmode"))
    sides = f"size: {flat.get('width')}x{flat.get('height')} size: {flat.get('size')}"
    return prompt, negative, [] if drawn_on or _DRAWN_ON.search(mode) else _SIZE.findall(sides)


# What a prompt is stored with by programs that draw; JSON without any of them is something else's.
_OF_A_WRITER = {"seed", "steps", "sampler", "cfgscale", "negativeprompt", "uc", "numinferencesteps"}


def _strings(value):
    """Return the texts of a value: a text, or a list of texts, with or without their weights."""
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else []
    items = [
        item.get("prompt", item.get("text")) if isinstance(item, dict) else item for item in items
    ]
    items = [item[-1] if isinstance(item, list) and item else item for item in items]
    return [item if isinstance(item, str) else "" for item in items]


class _Node:
    """A node of a ComfyUI graph: its kind, its values, and to which nodes its inputs lead."""

    def __init__(self, node):
        inputs = node.get("inputs")
        self.kind = str(node["class_type"]).lower()
        self.inputs = inputs if isinstance(inputs, dict) else {}
        pairs = {name: value for name, value in self.inputs.items() if isinstance(value, list)}
        self.links = {name: str(pair[0]) for name, pair in pairs.items() if len(pair) == 2}


def _of_graph(nodes):
    """Read a ComfyUI graph: the one text that all samplers behind the saved picture share."""
    saving = {key for key, node in nodes.items() if "save" in node.kind and "images" in node.links}
    behind, pending = {}, [*(saving or nodes)]
    while pending:
        key = pending.pop()
        if key in nodes and key not in behind:
            behind[key] = nodes[key]
            pending += nodes[key].links.values()
    drawing = {key: node for key, node in behind.items() if key not in saving}
    guided = [key for key, node in drawing.items() if "conditioning" in node.inputs]
    samplers = [key for key, node in drawing.items() if "positive" in node.inputs]
    samplers += [key for key in guided if "guider" in nodes[key].kind]
    texts, negatives = _texts_behind(nodes, samplers or guided, "positive"), set()
    with contextlib.suppress(_Missing):
        samplers = [key for key, node in drawing.items() if "negative" in node.inputs]
        negatives = _texts_behind(nodes, samplers, "negative")
    if len(texts) != 1:
        raise _Missing(f"ambiguous: {len(texts)} texts stand behind the picture's samplers")
    latents = [node.inputs for node in drawing.values() if "latent" in node.kind]
    sides = "".join(f"size: {node.get('width')}x{node.get('height')}" for node in latents)
    return texts.pop(), negatives.pop() if len(negatives) == 1 else "", _SIZE.findall(sides)


def _texts_behind(nodes, samplers, role):
    """Return the texts that links of one role lead to; a pipe carries both roles in one link."""
    other = "negative" if role == "positive" else "positive"
    texts, seen, pending = set(), set(), [*samplers]
    while pending:
        key = pending.pop()
        if key not in nodes:
            raise _Missing("broken: a link leads to no node")
        node = nodes[key]
        if key in seen or "zeroout" in node.kind:
            continue
        seen.add(key)
        names = [name for name in node.inputs if other not in name.lower()]
        if role in names:  # a sampler, a loader or a pipe; detailers may have words of their own
            names = [name for name in names if name in (role, "wildcard")]
        elif _makes_words(node, names):
            raise _Missing(f"ambiguous: {node.kind!r} makes words inside the graph")
        found = [node.inputs[name] for name in names if _OF_TEXT.search(name)]
        found = [text.strip() for text in found if isinstance(text, str)]
        links = [name for name in names if name in node.links and not _NO_TEXT.search(name)]
        if not (links or found):
            raise _Missing(f"ambiguous: no text is known behind {node.kind!r}")
        pending += [node.links[name] for name in links]
        texts |= {*found}
    return texts - {""} or texts


def _makes_words(node, names):
    """Tell whether a node draws or edits words, so that the graph does not hold what came out."""
    texts = [name for name in names if _OF_TEXT.search(name)]
    others = [name for name in names if name not in texts]
    settings = [name for name in others if isinstance(node.inputs[name], str) and node.inputs[name]]
    edits = settings and "clip" not in node.inputs  # which encoders of text have
    return _MAKERS.search(node.kind) or (texts and (edits or any(map(_MAKERS.search, others))))


_OF_TEXT = re.compile(
    "(?i)(?<!con)text|prompt|string|^value$|^positive|^negative|^wildcard$|^t5xxl$|^clip_[lg]$"
)
_NO_TEXT = re.compile(
    "(?i)^clip$|clip_v|model|vae|image|pixel|mask|latent|sampl|control|noise|sigma|lora|seg|detect"
    "|width|height|crop|target|seed|step|cfg|scale|strength|guidance|start|^end|weight|area|hook"
)
_MAKERS = re.compile(
    "(?i)random|wildcard|dynamic|seed|styl(?!e_?model)|generat|translat|replace|concatenat|join"
    "|llm|gpt|ollama|interrogat|caption|tagger"
)

# --- the plain form -------------------------------------------------------------------------------


class _Plain(str):
    """A prompt in its plain form, in which a bracket is a bracket."""


def plain(prompt):
    r"""Return a prompt without the dialects of the programs that draw.

    Tags such as ``<lora:detail:0.8>`` go, ``BREAK`` becomes a comma; of ``(x:1.3)``, ``((x))``,
    ``[x]`` and ``{x}`` the words stay, of ``[a:b:0.5]`` and ``[a|b]`` both sides; ``long_hair`` is
    two words and ``\(`` a bracket. Applying it twice changes nothing.

    Parameters
    ----------
    prompt : str

    Returns
    -------
    str
    """
    if isinstance(prompt, _Plain):
        return prompt
    text = re.sub(r"(?i)<(?:lora|lyco|hypernet)\s*:[^<>]*>", " ", prompt)
    text = re.sub(r"\\([][(){}])", lambda escaped: chr(_PRIVATE + ord(escaped[1])), text)
    text = re.sub(r":\s*[+-]?[\d.]{1,8}\s*(?=\))", "", re.sub(r"\bBREAK\b", ", ", text))
    for _ in range(MAX_NESTED):
        text, inner = _SCHEDULED.subn(lambda found: re.sub("[:|]", " ", found[1] or found[2]), text)
        if not inner:
            break
    text = re.sub(r"(?:(?<![\w.])-?[\d.]{1,8})?::", " ", text)  # NovelAI's 1.2::x::
    text = re.sub(r"(?<=\w)[][(){}]+(?=\w)", " ", text)
    text = re.sub(r"(?<=[^\W_])_+(?=[^\W_]|[\ue000-\ue0ff])", " ", text)
    text = " ".join(re.sub(r"[][(){}]", "", text).split()).replace(" ,", ",")
    text = re.sub(r",(?: ?,)+ ?", ", ", text).strip(" ,")
    return _Plain(text.translate({_PRIVATE + ord(bracket): bracket for bracket in "()[]{}"}))


MAX_NESTED = 8  # alternations inside each other
_PRIVATE = 0xE000  # where an escaped bracket waits: no character has this place
_SCHEDULED = re.compile(r"[[{]([^][{}]*):\s*[\d.]{1,8}\s*[]}]|[[{]([^][{}|]*\|[^][{}]*)[]}]")
