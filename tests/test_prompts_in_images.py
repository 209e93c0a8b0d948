"""Prompts that lie inside images: every writer's form, what is missing and why, hostile files."""

import functools
import html
import io
import json
import random
import re
import struct
import time
import tracemalloc
import zipfile
import zlib

import pytest
from PIL import Image

from rsdlib.data import EmbeddedPrompt, plain, read_prompt

PROMPT, NEGATIVE = "a red fox in the snow, oil painting", "blurry, text"
SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 64x48, Model: sd"
INFOTEXT = f"{PROMPT}\nNegative prompt: {NEGATIVE}\n{SETTINGS}"

# --- files in the writers' forms ------------------------------------------------------------------


@functools.cache
def blank(kind="PNG", size=(64, 48)):
    stream = io.BytesIO()
    Image.new("RGB", size, "gray").save(stream, kind)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def text_chunk(place, text, kind="tEXt"):
    place, text = place.encode(), text if isinstance(text, bytes) else text.encode()
    if kind == "tEXt":
        return chunk(b"tEXt", place + b"\0" + text)
    if kind == "zTXt":
        return chunk(b"zTXt", place + b"\0\0" + zlib.compress(text))
    packed = zlib.compress(text) if kind == "packed iTXt" else text
    flag = b"\1" if kind == "packed iTXt" else b"\0"
    return chunk(b"iTXt", place + b"\0" + flag + b"\0en\0\0" + packed)


def inside(chunks):
    return blank()[:33] + chunks + blank()[33:]


def png(texts, kind="tEXt", behind=False, size=(64, 48)):
    """Return a PNG with texts by place, before or behind its pixels."""
    data = blank(size=size)
    start = len(data) - 12 if behind else 33  # of IEND, or behind IHDR
    chunks = b"".join(text_chunk(place, text, kind) for place, text in texts.items())
    return data[:start] + chunks + data[start:]


def exif_file(kind, comment=None, size=(64, 48), tags=(), **options):
    """Return an image with a user comment in its EXIF, and other tags beside that folder."""
    exif = Image.Exif()
    if comment is not None:
        exif.get_ifd(0x8769)[0x9286] = comment
    for tag, text in tags:
        exif[tag] = text
    stream = io.BytesIO()
    Image.new("RGB", size, "gray").save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def unicode_comment(text, order="utf-16-be"):
    return b"UNICODE\0" + text.encode(order)


def encode(text, clip="4"):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": [clip, 1]}}


def sampler(**links):
    inputs = {"seed": 7, "steps": 20, "cfg": 8.0, "model": ["4", 0], "latent_image": ["5", 0]}
    links = {"positive": ["6", 0], "negative": ["7", 0]} | links
    return {"class_type": "KSampler", "inputs": inputs | links}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(size=(64, 48), **nodes):
    """Return the JSON of a ComfyUI graph: the usual one, with nodes added or replaced."""
    usual = {
        "3": sampler(),
        "4": node("CheckpointLoaderSimple", ckpt_name="sd.safetensors"),
        "5": node("EmptyLatentImage", width=size[0], height=size[1], batch_size=1),
        "6": encode(PROMPT),
        "7": encode(NEGATIVE),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="x", images=["8", 0]),
    }
    nodes = {key.removeprefix("n"): value for key, value in nodes.items()}
    return json.dumps(usual | nodes)


def comfy(**nodes):
    return png({"prompt": graph(**nodes), "workflow": '{"nodes": []}'})


INVOKE_2 = {
    "app_id": "invoke-ai/InvokeAI",
    "image": {
        "prompt": [{"prompt": PROMPT, "weight": 1.0}],
        "seed": 1,
        "steps": 30,
        "width": 64,
        "height": 48,
        "type": "txt2img",
    },
}
INVOKE_3 = {
    "generation_mode": "txt2img",
    "positive_prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "width": 64,
    "height": 48,
    "seed": 1,
}
SWARM = {
    "sui_image_params": {
        "prompt": PROMPT,
        "negativeprompt": NEGATIVE,
        "seed": 1,
        "width": 64,
        "height": 48,
    },
    "sui_models": [],
}
FOOOCUS = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "full_prompt": [f"cinematic still {PROMPT} . 35mm", PROMPT],
    "resolution": "(64, 48)",
    "seed": "1",
    "version": "Fooocus v2.5.0",
}
NOVELAI = {"prompt": PROMPT, "uc": NEGATIVE, "steps": 28, "width": 64, "height": 48, "seed": 1}
DRAW_THINGS = {"c": PROMPT, "uc": NEGATIVE, "size": "64x48", "steps": 20, "seed": 1}
EASY = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": "1", "num_inference_steps": "25"}
IMAGINAIRY = {
    "prompt": {
        "software": "imaginAIry",
        "prompts": [[1, PROMPT]],
        "negative_prompt": [[1, NEGATIVE]],
        "seed": 1,
        "width": 64,
        "height": 48,
    }
}
FACTORY = f'--ddim_steps 30 --scale 7 --neg_prompt "{NEGATIVE}" --W 64 --H 48 --seed 1'


def changed(tree, *path, to):
    """Return a copy of a tree with another value at a path."""
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return copy


def xmp(tree):
    inner = html.escape(json.dumps(tree))
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description><exif:UserComment><rdf:Alt>'
        f'<rdf:li xml:lang="x-default">{inner}</rdf:li></rdf:Alt></exif:UserComment>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def infotext(**parts):
    return INFOTEXT.replace(PROMPT, parts.get("prompt", PROMPT)) + parts.get("after", "")


def a1111(text, **how):
    return png({"parameters": text}, **how)


LINES = "a red fox,  \n\nin the snow, テスト"
LATIN = "un café à Paris".encode("latin-1") + INFOTEXT[len(PROMPT) :].encode()
LARGE = (128, 96)
HIRES = ", Hires upscale: 2, Hires upscaler: Latent"
NAI_FILE = {"Comment": json.dumps(NOVELAI), "Description": PROMPT, "Software": "NovelAI"}
NAI_OLD = {"Software": "NovelAI", "Description": PROMPT}
NAI_OLD |= {"Comment": json.dumps({"steps": 28, "uc": NEGATIVE})}
TITLED = {"Prompt": PROMPT, "Negative Prompt": NEGATIVE, "Seed": "1", "Steps": "25"}
BRACKETS = changed(INVOKE_2, "image", "prompt", 0, "prompt", to=f"{PROMPT} [{NEGATIVE}]")
DREAM = "-s 30 -S 7 -W 64 -H 48 -C 7.5 -A k_lms"
EFFICIENT = node("Efficient Loader", positive=PROMPT, negative=NEGATIVE, empty_latent_width=64)
STRING = node("PrimitiveStringMultiline", value=PROMPT)
SDXL = node("CLIPTextEncodeSDXL", width=4096, height=4096, text_g=PROMPT, text_l=PROMPT)
CONTROL = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["1", 0])
PIPE = {  # positive and negative travel through one link
    "n10": node("ToBasicPipe", model=["4", 0], positive=["6", 0], negative=["7", 0]),
    "n11": node("FromBasicPipe", basic_pipe=["10", 0]),
    "n3": sampler(positive=["11", 3], negative=["11", 4]),
}
CONTEXTS = {
    "n10": node("Context", positive=["6", 0], negative=["7", 0], model=["4", 0]),
    "n11": node("Context Big", base_ctx=["10", 0], seed=["99", 0]),
    "n3": sampler(positive=["11", 4], negative=["11", 5]),
}
EASY_PIPE = {
    "n4": node("easy fullLoader", positive=PROMPT, negative=NEGATIVE, batch_size=1),
    "n10": node("easy preSampling", pipe=["4", 0], steps=20, seed=1),
    "n3": node("easy kSampler", pipe=["10", 0], image_output="Save"),
}
DETAILERS = {
    "n11": node("ToDetailerPipe", positive=["6", 0], negative=["7", 0], wildcard=""),
    "n12": node("EditDetailerPipe", detailer_pipe=["11", 0], wildcard=""),
    "n10": node("FaceDetailerPipe", image=["8", 0], detailer_pipe=["12", 0]),
    "n9": node("SaveImage", images=["10", 0]),
}
FLUX = {
    "n3": node("SamplerCustomAdvanced", guider=["10", 0], latent_image=["5", 0], noise=["12", 0]),
    "n10": node("BasicGuider", model=["4", 0], conditioning=["11", 0]),
    "n11": node("FluxGuidance", conditioning=["6", 0], guidance=3.5),
    "n12": node("RandomNoise", noise_seed=1),
}
FLUX_2 = {"n3": FLUX["n3"], "n12": FLUX["n12"]}
FLUX_2 |= {"n10": node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=3.0)}
THREE = {"clip_l": PROMPT, "clip_g": PROMPT, "t5xxl": PROMPT, "clip": ["4", 1]}
LUMINA = {"system_prompt": "superior", "user_prompt": PROMPT, "clip": ["4", 1]}
JOINED = node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["10", 0])
TO_11 = {"n3": sampler(positive=["11", 0])}
STYLE = {"conditioning": ["6", 0], "style_model": ["4", 0]}
CONTROL_1 = node("ControlNetApply", conditioning=["6", 0], image=["1", 0], strength=1.0)
REFINED = {"n10": node("CLIPTextEncodeSDXLRefiner", ascore=6.0, text=PROMPT, clip=["4", 1])}
REFINED |= {"n11": sampler(positive=["10", 0], latent_image=["3", 0], start_at_step=20)}
REFINED |= {"n8": node("VAEDecode", samples=["11", 0])}
TUPLE = {"n10": node("Pack SDXL Tuple", base_positive=["6", 0], base_negative=["7", 0])}
TUPLE |= {"n3": node("KSampler SDXL (Eff.)", sdxl_tuple=["10", 0], latent_image=["5", 0])}
CIVITAI_META = {"prompt": PROMPT, "negativePrompt": NEGATIVE, "steps": 25, "seed": 1}
CIVITAI = json.loads(graph(n6=encode("made of a template"))) | {"extra": {"airs": []}}
CIVITAI |= {"extraMetadata": json.dumps(CIVITAI_META)}
CAPTION = {"caption": {"base_caption": PROMPT, "char_captions": [{"char_caption": "a girl"}]}}
NAI_4 = {"uc": NEGATIVE, "steps": 28, "seed": 1, "v4_prompt": CAPTION | {"use_coords": False}}


def edge(source, target, field):
    source = {"node_id": source, "field": "value"}
    return {"source": source, "destination": {"node_id": target, "field": field}}


INVOKE_NODES = {
    "p": {"type": "string", "id": "p", "value": PROMPT},
    "a": {"type": "sdxl_compel_prompt", "id": "a", "prompt": "stale", "style": "", "use": True},
    "b": {"type": "compel", "id": "b", "prompt": NEGATIVE, "is_intermediate": True},
    "c": {"type": "collect", "id": "c"},
    "d": {"type": "denoise_latents", "id": "d", "steps": 30, "scheduler": "euler"},
    "e": {"type": "l2i", "id": "e", "board": None},
}
INVOKE_EDGES = [edge("p", "a", "prompt"), edge("a", "c", "item")]
INVOKE_EDGES += [edge("c", "d", "positive_conditioning"), edge("b", "d", "negative_conditioning")]
INVOKE_EDGES += [edge("d", "e", "latents"), edge("m", "a", "clip"), edge("m", "b", "clip")]
INVOKE_NODES["m"] = {"type": "sdxl_model_loader", "id": "m", "model": {"key": "sdxl"}}
INVOKE_GRAPH = {"id": "g", "nodes": INVOKE_NODES, "edges": INVOKE_EDGES}
DETAILER = node("FaceDetailer", image=["8", 0], positive=["6", 0], negative=["7", 0], wildcard="")
SECOND = sampler(latent_image=["3", 0])
UNKNOWN = f"unknown\nNegative prompt: unknown\n{SETTINGS}"
PLAIN_2 = changed(INVOKE_2, "image", "prompt", to=PROMPT)
TWO_2 = changed(INVOKE_2, "image", "prompt", to=[{"prompt": "a"}, {"prompt": "b"}])
DRAWN_ON = changed(INVOKE_2, "image", "type", to="img2img")
TWO_IMAGINED = changed(IMAGINAIRY, "prompt", "prompts", to=[[1, "a"], [2, "b"]])
SQUARE = INVOKE_3 | {"width": 48}
CUT = node("ImageScale", image=["8", 0], width=48, height=64, crop="center")
SAVE = node("SaveImage", images=["10", 0])
RUINED = {"seed": 1, "software": "RuinedFooocus"}
PREVIEW = {"n13": node("PreviewImage", images=["12", 0]), "n10": encode("quite another prompt")}
PREVIEW |= {"n11": sampler(positive=["10", 0]), "n12": node("VAEDecode", samples=["11", 0])}


FOUND = {  # by writer and form: a file that holds PROMPT and NEGATIVE, unless OTHERS says what
    "AUTOMATIC1111": {
        "tEXt": a1111(INFOTEXT),
        "zTXt": a1111(INFOTEXT, kind="zTXt"),
        "iTXt": a1111(infotext(prompt=LINES), kind="iTXt"),
        "packed iTXt": a1111(infotext(prompt=LINES), kind="packed iTXt"),
        "behind the pixels": a1111(INFOTEXT, behind=True),
        "zTXt behind the pixels": a1111(INFOTEXT, kind="zTXt", behind=True),
        "UTF-8 in tEXt": a1111(infotext(prompt=LINES)),
        "Latin-1 in tEXt": a1111(LATIN),
        "U+2028": a1111(infotext(prompt="a fox\u2028b"), kind="iTXt"),
        "CRLF": a1111(INFOTEXT.replace("\n", "\r\n")),
        "no negative": a1111(f"{PROMPT}\n{SETTINGS}"),
        "Steps in the prompt": a1111(infotext(prompt="a fox\nSteps: 3 up")),
        "a template behind": a1111(INFOTEXT + "\nTemplate: a {red|blue} fox"),
        "settings on lines": a1111(INFOTEXT.replace(", S", "\nS")),
        "braces first": a1111(infotext(prompt="{fox} in snow")),
        "a hires fix": a1111(INFOTEXT + HIRES, size=LARGE),
        "enlarged in extras": png({"parameters": INFOTEXT, "extras": "Upscale: 2"}, size=LARGE),
        "a thumbnail": a1111(INFOTEXT, size=(16, 12)),
        "JPEG": exif_file("JPEG", unicode_comment(INFOTEXT)),
        "JPEG, the other order": exif_file("JPEG", unicode_comment(INFOTEXT, "utf-16-le")),
        "JPEG with a mark of order": exif_file("JPEG", unicode_comment(INFOTEXT, "utf-16")),
        "JPEG, Japanese": exif_file("JPEG", unicode_comment(infotext(prompt=LINES))),
        "JPEG in ASCII": exif_file("JPEG", b"ASCII\0\0\0" + INFOTEXT.encode()),
        "JPEG without prefix": exif_file("JPEG", INFOTEXT.encode()),
        "JPEG of no encoding": exif_file("JPEG", bytes(8) + INFOTEXT.encode()),
        "JPEG in UTF-8": exif_file("JPEG", b"UNICODE\0" + INFOTEXT.encode()),
        "JPEG in bare UTF-16": exif_file("JPEG", INFOTEXT.encode("utf-16-le")),
        "JPEG's comment": exif_file("JPEG", comment=INFOTEXT.encode()),
        "WebP": exif_file("WEBP", unicode_comment(INFOTEXT)),
        "Windows' comment": exif_file("JPEG", tags=[(0x9C9C, INFOTEXT.encode("utf-16-le"))]),
        "an unknown place": png({"description": INFOTEXT}),
        "PNG's EXIF": exif_file("PNG", unicode_comment(INFOTEXT), tags=[(0x010F, "x")]),
    },
    "SD.Next": {"SD.Next": a1111(INFOTEXT + ", App: SD.Next")},
    "stable-diffusion.cpp": {"sd.cpp": a1111(INFOTEXT + ", Version: stable-diffusion.cpp")},
    "ComfyUI": {
        "graph": comfy(),
        "linked text": comfy(n6=encode(["10", 0]), n10=STRING),
        "SDXL": comfy(n6=SDXL),
        "SDXL, one text": comfy(n6=changed(SDXL, "inputs", "text_l", to="")),
        "pipe": comfy(**PIPE),
        "texts in the loader": comfy(
            n4=EFFICIENT, n3=sampler(positive=["4", 1], negative=["4", 2])
        ),
        "ControlNet": comfy(n10=CONTROL, n3=sampler(positive=["10", 0], negative=["10", 1])),
        "reroute": comfy(n10=node("Reroute", **{"": ["6", 0]}), n3=sampler(positive=["10", 0])),
        "contexts": comfy(**CONTEXTS),
        "a pipe's loader": comfy(**EASY_PIPE),
        "a pipe of detailers": comfy(**DETAILERS),
        "settings beside": comfy(n6=node("Prompt", prompt=PROMPT, lora="none", opt_clip=["4", 1])),
        "guider": comfy(**FLUX),
        "two guided": comfy(**FLUX_2),
        "three encoders": comfy(n6=node("CLIPTextEncodeSD3", **THREE, empty_padding="none")),
        "a system's prompt": comfy(n6=node("CLIPTextEncodeLumina2", **LUMINA)),
        "averaged with itself": comfy(n10=encode(PROMPT), n11=JOINED, **TO_11),
        "a primitive": comfy(n6=encode(["10", 0]), n10=node("PrimitiveNode", value=PROMPT)),
        "a pair for a refiner": comfy(**REFINED),
        "a style model": comfy(
            n10=node("StyleModelApply", **STYLE), n3=sampler(positive=["10", 0])
        ),
        "base and refiner in a tuple": comfy(**TUPLE),
        "a negative's control": comfy(n10=CONTROL_1, n3=sampler(positive=["10", 0])),
        "zeroed negative": comfy(n7=node("ConditioningZeroOut", conditioning=["6", 0])),
        "two samplers": comfy(n10=SECOND, n8=node("VAEDecode", samples=["10", 0])),
        "detailer": comfy(n10=DETAILER, n9=SAVE),
        "a preview of another": comfy(**PREVIEW),
        "NaN": comfy(n6=encode(PROMPT) | {"is_changed": [float("nan")]}),
        "no save node": comfy(n9=node("PreviewImage", images=["8", 0])),
        "enlarged": png({"prompt": graph()}, size=LARGE),
        "cut to a size": png({"prompt": graph(n10=CUT, n9=SAVE)}, size=(48, 64)),
        "a size of another node": comfy(n5=node("EmptyLatentImage", width=["12", 0], height=512)),
        "placeholder beside": png({"parameters": UNKNOWN, "prompt": graph()}),
        "WebP": exif_file("WEBP", tags=[(0x010F, "workflow:{}"), (0x0110, f"prompt:{graph()}")]),
        "JPEG": exif_file("JPEG", tags=[(0x010F, f"Prompt: {graph()}")]),
        "JPEG's user comment": exif_file("JPEG", f'{{"prompt": {graph()}, "a": 1}}'.encode()),
    },
    "InvokeAI": {
        "Dream": png({"Dream": f'"{PROMPT}" {DREAM}'}),
        "Dream, dense": png({"Dream": f'"{PROMPT}" -s50 -W64 -H48 -S7'}),
        "Dream, bare": png({"Dream": f"{PROMPT} {DREAM}"}),
        "Dream, brackets": png({"Dream": f'"{PROMPT} [{NEGATIVE}]" {DREAM}'}),
        "sd-metadata": png({"sd-metadata": json.dumps(INVOKE_2)}, kind="zTXt"),
        "sd-metadata, text": png({"sd-metadata": json.dumps(PLAIN_2)}),
        "sd-metadata, brackets": png({"sd-metadata": json.dumps(BRACKETS)}),
        "two with weights": png({"sd-metadata": json.dumps(TWO_2), "Dream": f"{PROMPT} {DREAM}"}),
        "drawn on another": png({"sd-metadata": json.dumps(DRAWN_ON)}, size=(48, 64)),
        "two lines in one place": png({"Dream": f'"{PROMPT} -s 5" {DREAM}'}),
        "graph": png({"invokeai_graph": json.dumps(INVOKE_GRAPH)}, kind="iTXt"),
        "invokeai_metadata": png({"invokeai_metadata": json.dumps(INVOKE_3)}, kind="iTXt"),
    },
    "SwarmUI": {
        "PNG": png({"prompt": graph(), "parameters": json.dumps(SWARM, indent=2)}),
        "JPEG": exif_file("JPEG", unicode_comment(json.dumps(SWARM), "utf-16-le")),
    },
    "Fooocus": {
        "PNG": a1111(json.dumps(FOOOCUS)),
        "JPEG": exif_file("JPEG", tags=[(0x9286, json.dumps(FOOOCUS))]),
        "comment": png({"Comment": json.dumps(FOOOCUS)}),
        "capitals": a1111(json.dumps({"Prompt": PROMPT, "Negative": NEGATIVE} | RUINED)),
    },
    "NovelAI": {
        "PNG": png(NAI_FILE),
        "without Comment's prompt": png(NAI_OLD),
        "WebP": exif_file("WEBP", b"ASCII\0\0\0" + json.dumps(NAI_FILE).encode()),
        "captions": png({"Software": "NovelAI", "Comment": json.dumps(NAI_4)}),
    },
    "Draw Things": {
        "PNG": png({"XML:com.adobe.xmp": xmp(DRAW_THINGS)}, kind="iTXt"),
        "JPEG": exif_file("JPEG", xmp=xmp(DRAW_THINGS)),
    },
    "EasyDiffusion": {
        "PNG": png(EASY),
        "titles": png(TITLED),
        "JPEG": exif_file("JPEG", unicode_comment(json.dumps(EASY))),
    },
    "Civitai": {"extraMetadata": exif_file("JPEG", unicode_comment(json.dumps(CIVITAI)))},
    "imaginAIry": {"JPEG": exif_file("JPEG", tags=[(0x9286, json.dumps(IMAGINAIRY))])},
    "Dream Factory": {
        "JPEG": exif_file("JPEG", f'"{PROMPT}" {FACTORY}'.encode()),
        "quoted twice": exif_file("JPEG", f'"\\"{PROMPT}\\"" {FACTORY}'.encode()),
    },
}
OTHERS = {
    "iTXt": (LINES, NEGATIVE),
    "packed iTXt": (LINES, NEGATIVE),
    "UTF-8 in tEXt": (LINES, NEGATIVE),
    "Latin-1 in tEXt": ("un café à Paris", NEGATIVE),
    "U+2028": ("a fox\u2028b", NEGATIVE),
    "no negative": (PROMPT, ""),
    "Steps in the prompt": ("a fox\nSteps: 3 up", NEGATIVE),
    "braces first": ("{fox} in snow", NEGATIVE),
    "JPEG, Japanese": (LINES, NEGATIVE),
    "guider": (PROMPT, ""),
    "two lines in one place": (f"{PROMPT} -s 5", ""),
    "zeroed negative": (PROMPT, ""),
    "Dream": (PROMPT, ""),
    "Dream, dense": (PROMPT, ""),
    "Dream, bare": (PROMPT, ""),
    "sd-metadata": (PROMPT, ""),
    "sd-metadata, text": (PROMPT, ""),
    "two with weights": (PROMPT, ""),
    "drawn on another": (PROMPT, ""),
}
CASES = [(writer, form) for writer, forms in FOUND.items() for form in forms]


@pytest.mark.parametrize(("writer", "form"), CASES, ids=str)
def test_every_writers_prompt_is_read_as_it_stands(writer, form):
    prompt, negative = OTHERS.get(form, (PROMPT, NEGATIVE))
    assert read_prompt(FOUND[writer][form]) == EmbeddedPrompt(prompt, negative, writer)


def test_a_path_is_read_like_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(a1111(INFOTEXT))
    assert read_prompt(path) == read_prompt(str(path)) == read_prompt(path.read_bytes())
    assert "no such file" in read_prompt(tmp_path / "b.png").reason


def test_an_opened_image_and_a_locator_are_read_like_the_file(tmp_path):
    late = a1111(INFOTEXT, behind=True)
    (tmp_path / "a.png").write_bytes(late)
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        archive.writestr("in/b.png", late)
    expected = read_prompt(late)
    assert expected.prompt == PROMPT
    assert read_prompt(f"{tmp_path}/part.zip::in/b.png") == expected
    assert "no such file or member" in read_prompt(f"{tmp_path}/part.zip::c.png").reason
    assert read_prompt(f"{tmp_path}/none.zip::c.png").reason
    with Image.open(tmp_path / "a.png") as image:
        assert read_prompt(image) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_an_image_without_a_file_tells_what_it_still_holds(kind):
    data = FOUND["AUTOMATIC1111"]["tEXt" if kind == "PNG" else kind]
    with Image.open(io.BytesIO(data)) as image:
        assert read_prompt(image).prompt == PROMPT
        assert read_prompt(image.copy()).prompt == PROMPT
        image.load()
        assert image.getpixel((0, 0))  # what was read has left the image as it was
        part = image.crop((0, 0, 10, 30))
    assert part.size == (10, 30)
    assert read_prompt(part).doubtful == PROMPT
    assert not read_prompt(Image.new("RGB", (8, 8)))


def test_what_was_found_is_true_and_nothing_is_false():
    assert read_prompt(a1111(INFOTEXT))
    assert not read_prompt(blank())
    assert not read_prompt(DOUBTFUL["a crop"])


def test_outer_blanks_go_inner_ones_stay():
    data = png({"invokeai_metadata": json.dumps(INVOKE_3 | {"positive_prompt": " a  b,\n\n"})})
    assert read_prompt(data).prompt == "a  b,"


# --- what is missing, and why ---------------------------------------------------------------------

ANOTHER = encode("quite another prompt")
TWO = {"n10": ANOTHER, "n11": sampler(positive=["10", 0], latent_image=["3", 0])}
TWO |= {"n8": node("VAEDecode", samples=["11", 0])}
COMBINED = node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["10", 0])
REGIONS = [*INVOKE_EDGES, edge("f", "c", "item"), edge("m", "f", "clip")]
ANOTHER_REGION = INVOKE_NODES | {"f": {"type": "compel", "prompt": "another"}}
REGIONS = {"nodes": ANOTHER_REGION, "edges": REGIONS}
OWN_WORDS = {"n10": changed(DETAILER, "inputs", "wildcard", to="a perfect face")}
OWN_WORDS |= {"n9": SAVE}
OWN_LINK = {"n10": changed(DETAILER, "inputs", "positive", to=["11", 0]), "n11": ANOTHER}
OWN_LINK |= {"n9": SAVE}
OTHER_PIPE = PIPE | {"n12": node("ToBasicPipe", positive=["13", 0], negative=["7", 0])}
OTHER_PIPE |= {"n13": ANOTHER, "n14": node("FaceDetailerPipe", pipe=["12", 0], image=["8", 0])}
OTHER_PIPE |= {"n9": node("SaveImage", images=["14", 0])}


PREFIXED = node("Text Prefix", prefix="masterpiece, ", input=["11", 0])


def made_by(kind, **inputs):
    """Return a picture whose prompt comes out of a node that makes words."""
    return comfy(n6=encode(["10", 0]), n10=node(kind, **inputs))


MISSING = {
    "nothing": (blank(), "no prompt"),
    "nothing in a JPEG": (blank("JPEG"), "no prompt"),
    "no image": (b"not an image", "cannot be read"),
    "no bytes": (b"", "cannot be read"),
    "cut short": (a1111(INFOTEXT)[:90], "cannot be read"),
    "wrong checksum": (a1111(INFOTEXT).replace(b"fox", b"cat"), "cannot be read"),
    "a broken pack": (inside(chunk(b"zTXt", b"parameters\0\0x")), "no prompt"),
    "twice": (a1111(INFOTEXT)[:-12] + a1111(INFOTEXT + " ")[33:], "twice"),
    "placeholder": (a1111(UNKNOWN), "placeholder"),
    "punctuation": (a1111(infotext(prompt=" ,.")), "placeholder"),
    "empty": (a1111(f"Negative prompt: {NEGATIVE}\n{SETTINGS}"), "placeholder"),
    "no settings": (a1111(PROMPT), "no prompt"),
    "a recipe": (exif_file("JPEG", b"Bread\nSteps: 1. wash your hands"), "no prompt"),
    "a camera's": (
        exif_file("JPEG", b"by Ann", tags=[(0x010F, "Canon")]),
        "no prompt",
    ),
    "a command": (png({"Dream": "!mask ./curly.png -tm hair 0.5"}), "command"),
    "a bare command": (png({"Dream": "a fox"}), "command"),
    "other JSON": (a1111('{"prompt": "your name?", "type": "form"}'), "no prompt"),
    "an unknown one": (a1111(UNKNOWN.replace("unknown", "[object Object]")), "placeholder"),
    "no JSON": (a1111('{"prompt": "a fox", "seed": 1'), "parameters"),
    "a list": (png({"sd-metadata": "[1, 2]"}), "no prompt"),
    "a number": (a1111('{"prompt": 7, "seed": 1}'), "no prompt"),
    "null": (a1111('{"prompt": null, "seed": 1}'), "no prompt"),
    "lone surrogate": (a1111('{"prompt": "a \\ud800 fox", "seed": 1}'), "damaged"),
    "NUL": (a1111('{"prompt": "a \\u0000 fox", "seed": 1}'), "damaged"),
    "half of UTF-8": (
        a1111(infotext(prompt=LINES).encode().replace(b"\x86", b"")),
        "damaged",
    ),
    "too long": (a1111(infotext(prompt="a fox " * 20_000)), "length"),
    "two prompts": (
        a1111(json.dumps(TWO_IMAGINED)),
        "ambiguous",
    ),
    "sub-prompts": (png({"sd-metadata": json.dumps(TWO_2)}), "ambiguous"),
    "the editor's graph": (png({"workflow": '{"nodes": []}'}), "no prompt"),
    "two texts": (comfy(**TWO), "ambiguous: 2 texts"),
    "joined texts": (comfy(n10=ANOTHER, n11=JOINED, **TO_11), "ambiguous: 2 texts"),
    "combined texts": (comfy(n10=ANOTHER, n11=COMBINED, **TO_11), "ambiguous: 2 texts"),
    "InvokeAI's regions": (png({"invokeai_graph": json.dumps(REGIONS)}), "ambiguous: 2 texts"),
    "InvokeAI's broken graph": (png({"invokeai_graph": '{"nodes": {"a": 1}, "edges": []}'}), "inv"),
    "SDXL's two": (comfy(n6=changed(SDXL, "inputs", "text_l", to="a cat")), "ambiguous"),
    "two saved": (comfy(**PREVIEW, n14=node("SaveImage", images=["12", 0])), "ambiguous"),
    "a detailer's words": (comfy(**OWN_WORDS), "ambiguous: 2 texts"),
    "a detailer's link": (comfy(**OWN_LINK), "ambiguous: 2 texts"),
    "another pipe": (comfy(**OTHER_PIPE), "ambiguous: 2 texts"),
    "drawn by a seed": (made_by("Text Lines", text="a\nb", seed=3), "no fixed"),
    "drawn at random": (made_by("RandomPrompt", text="{a|b}"), "no fixed"),
    "wildcards": (comfy(n6=node("ImpactWildcardEncode", populated_text="a fox")), "no fixed"),
    "a style": (
        made_by("SDXLPromptStyler", text_positive="a fox", style="anime"),
        "no fixed",
    ),
    "edited": (made_by("Text Edit", text="a fox", find="fox", by="cat"), "no fixed"),
    "joined words": (made_by("StringConcatenate", string_a="a", string_b="b"), "no fixed"),
    "a prefix": (comfy(n6=encode(["10", 0]), n10=PREFIXED), "no fixed"),
    "combined words": (made_by("CR Combine Prompt", part1=["99", 0], part2=""), "no fixed"),
    "a caption": (made_by("Florence2", image=["8", 0]), "no fixed"),
    "a lost link": (comfy(n6=encode(["77", 0])), "behind a lost link"),
    "a circle": (comfy(n6=encode(["10", 0]), n10=node("Text", text=["6", 0])), "ambiguous: 0"),
    "no sampler": (comfy(n8=node("LoadImage", image="a.png")), "ambiguous: 0"),
    "a graph of nothing": (png({"prompt": '{"3": {"class_type": "KSampler"}}'}), "no prompt"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_a_file_does_not_fix_is_missing_with_the_reason(case):
    data, reason = MISSING[case]
    found = read_prompt(data)
    assert found.prompt is None
    assert found.doubtful == ""
    assert reason in found.reason


DOUBTFUL = {
    "a crop": a1111(INFOTEXT, size=(1, 1)),
    "a crop of the same shape": png({"invokeai_metadata": json.dumps(SQUARE)}, size=(2, 2)),
    "a collage": a1111(INFOTEXT, size=(192, 48)),
    "a collage of the same shape": a1111(INFOTEXT, size=LARGE),
    "a screenshot": png({"prompt": graph(size=(512, 512))}, size=(192, 108)),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_picture_of_another_size_is_doubtful(case):
    found = read_prompt(DOUBTFUL[case])
    assert (found.prompt, found.doubtful) == (None, PROMPT)
    assert found.reason.startswith("doubtful: the picture has")


# --- hostile files --------------------------------------------------------------------------------


@functools.cache
def bomb():
    """Return 32 MB of blanks, packed."""
    packer = zlib.compressobj()
    return b"".join(packer.compress(bytes(2**20)) for _ in range(32)) + packer.flush()


def chain(length, last):
    """Return a graph in which the text stands behind many nodes."""
    nodes = {f"n{n}": node("Reroute", any=[str(n + 1), 0]) for n in range(100, 100 + length)}
    return graph(n3=sampler(positive=["100", 0]), **nodes, **{f"n{100 + length}": last})


NODES = {f"n{n}": sampler() for n in range(99, 5_999)}
INPUTS = {f"positive_text_{n}": ["7", 0] for n in range(20_000)}
HOSTILE = {
    "20 MB behind the pixels": lambda: a1111(b"{" * 2 * 10**7, behind=True),
    "20 MB behind a JPEG": lambda: exif_file("JPEG", b"a" * 60_000) + b"\xff" * 2 * 10**7,
    "20 MB in a WebP": lambda: exif_file("WEBP", b"UNICODE\0" + b"a\0" * 10**7),
    "deep lists": lambda: a1111('{"a":' + "[" * 1_000_000),
    "deep objects": lambda: a1111('{"prompt":' * 100_000),
    "nested forms": lambda: a1111('{"prompt":' * 900 + '"a fox"' + "}" * 900),
    "a long number": lambda: a1111('{"seed": ' + "9" * 100_000 + "}"),
    "many lists": lambda: a1111('{"prompt": [' + "[]," * 340_000 + '1], "seed": 1}'),
    "many widths": lambda: a1111(json.dumps(EASY)[:-1] + ', "width": 1' * 85_000 + "}"),
    "a circle of nodes": lambda: png({"prompt": chain(14_000, node("Reroute", any=["100", 0]))}),
    "many samplers": lambda: png({"prompt": graph(**NODES)}),
    "many inputs": lambda: png({"prompt": graph(n6=node("Context", **INPUTS))}),
    "many roles": lambda: png({"prompt": graph(n3=node("KSampler", **INPUTS))}),
    "a zip bomb": lambda: inside(chunk(b"iTXt", b"parameters\0\1\0\0\0" + bomb())),
    "many zip bombs": lambda: inside(
        b"".join(chunk(b"zTXt", b"%d\0\0" % n + bomb()) for n in range(40))
    ),
    "a million chunks": lambda: inside(chunk(b"abCd", b"") * 10**6),
    "many texts": lambda: inside(b"".join(text_chunk(str(n), "a") for n in range(50_000))),
    "blanks": lambda: a1111(" " * 1_000_000 + INFOTEXT),
    "many settings": lambda: a1111("Steps: 1\n" * 100_000 + SETTINGS),
    "brackets": lambda: png({"Dream": "[" * 1_000_000 + " -s 5"}),
    "quotes": lambda: png({"Dream": '"' * 1_000_000 + " -s 5"}),
    "XMP": lambda: exif_file("WEBP", xmp=b"<exif:UserComment><rdf:li>" * 40_000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_end_in_time(case):
    data = HOSTILE[case]()
    start = time.process_time()
    found = read_prompt(data)
    assert time.process_time() - start < 5
    assert found.prompt in (None, PROMPT, NEGATIVE)
    assert found.reason or found.prompt


def test_100_mb_of_text_end_in_memory():
    data = a1111(b"a" * 10**8)
    tracemalloc.start()
    assert "within" in read_prompt(data).reason
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**29


def mutated(text, rng):
    """Return bytes with a few of them lost, doubled, swapped or replaced."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 6)):
        place, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 40])
        part = bytes(data[place : place + length])
        other = bytes(rng.randrange(256) for _ in part)
        data[place : place + length] = rng.choice([b"", part * 2, part[::-1], other, b"\0", b'"'])
    return bytes(data)


BLOCKS = [
    ("parameters", INFOTEXT),
    ("prompt", graph()),
    ("prompt", graph(**PIPE)),
    ("Dream", f'"{PROMPT} [{NEGATIVE}]" {DREAM}'),
    ("sd-metadata", json.dumps(INVOKE_2)),
    ("parameters", json.dumps(SWARM)),
    ("Comment", json.dumps(NOVELAI)),
    ("XML:com.adobe.xmp", xmp(DRAW_THINGS).decode()),
]


def test_of_1000_mutated_blocks_none_is_a_crash_or_a_guess():
    rng, prompts = random.Random(18), 0
    for number in range(1000):
        place, text = BLOCKS[number % len(BLOCKS)]
        text = mutated(text.encode(), rng)
        if number % 3:
            data = png({place: text}, kind="iTXt" if place.startswith("XML") else "tEXt")
        else:
            data = exif_file("JPEG", b"ASCII\0\0\0" + text)
        found = read_prompt(data)
        assert {type(value) for value in vars(found).values()} <= {str, type(None)}
        assert (found.prompt is None) == bool(found.reason)
        if found.prompt is not None:  # what is told stands there
            prompts += 1
            written = text.decode("utf-8", "replace") + text.decode("latin-1")
            assert all(word in written for word in re.findall(r"\w+", found.prompt))
    assert 100 < prompts < 900


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF
def test_a_mutated_file_is_no_crash():
    rng, files = random.Random(4), [file for forms in FOUND.values() for file in forms.values()]
    for number in range(500):
        found = read_prompt(mutated(files[number % len(files)], rng))
        assert (found.prompt is None) == bool(found.reason)


# --- the plain form -------------------------------------------------------------------------------

PLAIN = {
    "a cat, oil painting": "a cat, oil painting",
    "a cat, <lora:add_detail:0.8>, (masterpiece:1.2), 8k": "a cat, masterpiece, 8k",
    "<hypernet:x:1>a cat<lyco:y>": "a cat",
    "((red)) car, [blue], {green}": "red car, blue, green",
    "(a (white:1.2) cat:1.3)": "a white cat",
    "(masterpiece)(best quality)": "masterpiece best quality",
    "a BREAK b": "a, b",
    "a,\nBREAK\nb": "a, b",
    "BREAKFAST": "BREAKFAST",
    "a [dog:cat:0.5]": "a dog cat",
    "[dog:cat:0.0]": "dog cat",
    "a [dog:10], a [cat::10]": "a dog, a cat",
    "a [red|blue] mat": "a red blue mat",
    "[a:[b:c:0.3]:0.5]": "a b c",
    "[(red:1.2):blue:0.5] mat": "red blue mat",
    "long_hair, 1girl": "long hair, 1girl",
    r"saber_\(fate\)": "saber fate",
    r"artoria \(fate\), (smile:1.1)": "artoria fate, smile",
    "^_^, __wild__": "^_^, __wild__",
    "1.3::cat::, dog": "cat, dog",
    "16:9, f/1.4, 1,000 dogs": "16:9, f/1.4, 1,000 dogs",
    " , a ,, b , , c,  ": "a, b, c",
    "": "",
}


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_form(prompt):
    assert plain(prompt) == PLAIN[prompt]
    assert plain(PLAIN[prompt]) == PLAIN[prompt]


PARTS = "a b BREAK <lora: <lora:x> <hypernet: embedding: embed :: 1.3:: -1 : | ( ) [ ] { } < > \\"
PARTS = [*PARTS.split(" "), " ", ",", "_", "\n", "\u2028", "\xa0", ",,", " ,", "__", "é", "_BREAK_"]


def test_what_is_plain_stays_as_it_is():
    rng = random.Random(5)
    for _ in range(4_000):
        once = plain("".join(rng.choices(PARTS, k=rng.randint(0, 14))))
        assert plain("".join(once)) == once  # as it comes back from a file
        assert not re.search(r"[()\[\]{}]|::|<lora:|\bBREAK\b", once)


def test_plain_is_fast():
    start = time.process_time()
    for part in ("(", "[a:", "[a|", ":", "_", " ", ", ", "<lora:", "\\(", "1", "(x:1."):
        plain(part * (50_000 // len(part)))
    assert time.process_time() - start < 5
