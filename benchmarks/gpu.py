"""What one GPU makes of the paper's encoders: images a second, share of its peak, peak memory.

    python benchmarks/gpu.py                               # every row; under 8 minutes on an H100
    python benchmarks/gpu.py --only swinv2-l vae/compiled  # an encoder's rows, or one row
    python benchmarks/gpu.py --dry                         # tiny ones of the same kind, on a CPU

Architectures are real, weights random: nothing is downloaded. It needs torch and, for each row, the
package that its encoder comes from, nothing of this project. Rows are named ENCODER/WAY:

    original  the authors' loop: fp32, no autocast, batch 64, cosines one by one on the CPU
    eager     bf16 (weights of what is frozen, autocast for what is trained), TF32, fused AdamW,
              channels_last for VAE and U-Net; the inputs already lie on the device
    compiled  the same through torch.compile, from eager's batch size on
    copies    eager, and every batch is copied from pinned memory

Training is forward, 1 - cosine to a random target through a linear head, backward, AdamW. A batch
that does not fit is halved. Times are medians between CUDA events, without the first steps. FLOPs
are counted: matrix products and convolutions, without what flash attention computes again. What
fails, or no longer fits into the time, is a line that says so, and the others go on.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import json
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAKS = {r"H100 80GB HBM3|H200$": 989e12, r"A100": 312e12}  # dense bf16, by the data sheets
EMBEDDING = 384  # numbers of a prompt's embedding
TOKENS, BEAMS = 30, 3  # of a caption; none ends earlier, for random weights know no end
WARM, FEWEST, MOST = 2, 3, 50  # steps before the timed ones; how many are timed
LONGEST = 150  # seconds of a row
LEAST = {"eager": 10, "original": 10, "copies": 10, "compiled": 45}  # left for a row to begin
PACKAGES = ("torch", "timm", "open_clip_torch", "diffusers", "transformers")

# --- the encoders ---------------------------------------------------------------------------------

VAE = {  # of Stable Diffusion 1 and 2
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
UNET = {  # of Stable Diffusion 2 base
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


def layers(width, inner, depth, heads):
    """Return the size of one of BLIP's transformers."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, depth, heads), strict=True))


BLIP = {  # of blip-image-captioning-large
    "vision_config": layers(1024, 4096, 24, 16) | {"image_size": 384},
    "text_config": layers(768, 3072, 12, 12),
}
TINY_WORDS = {"vocab_size": 64, "bos_token_id": 62, "sep_token_id": 3}
TINY_BLIP = {
    "vision_config": layers(32, 64, 1, 2) | {"image_size": 32},
    "text_config": layers(32, 64, 1, 2) | TINY_WORDS,
}
TINY_VIT = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}
TINY_SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)}
TINY_CLIP = {"image_size": 28, "layers": 1, "width": 32, "head_width": 16}
TINY_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
TINY_UNET = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 16,
}


class Reader(nn.Module):
    """A network, how it is called if not as itself, and a head on features of a width, if any."""

    def __init__(self, network, width=0, call=None):
        super().__init__()
        self.network, self.call = network, call or network
        self.head = nn.Linear(width, EMBEDDING) if width else nn.Identity()

    def forward(self, first, *others):
        """Map a batch to what is asked of the network; uint8 becomes [-1, 1]."""
        if first.dtype == torch.uint8:
            first = first.to(next(self.parameters()).dtype) / 127.5 - 1
        return self.head(self.call(first, *others))


def vit(dry):
    """Build ViT-B/16."""
    import timm

    size = TINY_VIT | {"img_size": 32} if dry else {}
    network = timm.create_model("vit_base_patch16_224", num_classes=0, **size)
    return Reader(network, network.num_features)


def swin(dry):
    """Build SwinV2-L."""
    import timm

    name, size = "swinv2_large_window12to16_192to256", TINY_SWIN if dry else {}
    network = timm.create_model(name, num_classes=0, **size)
    return Reader(network, network.num_features)


def clip(dry):
    """Build the image tower of ViT-H/14: open_clip's or else timm's."""
    try:
        import open_clip
    except ImportError:
        import timm

        name, size = "vit_huge_patch14_clip_224", TINY_VIT if dry else {}
        return Reader(timm.create_model(name, num_classes=0, **size))
    config = open_clip.get_model_config("ViT-H-14")
    config["vision_cfg"] |= TINY_CLIP if dry else {}
    config["text_cfg"] |= {"layers": 1, "vocab_size": 1}  # built and dropped
    return Reader(open_clip.CLIP(**config).visual)


def vae(dry):
    """Build what maps images to means and variances of Stable Diffusion's latents."""
    from diffusers import AutoencoderKL

    whole = AutoencoderKL(**VAE | (TINY_VAE if dry else {}))
    return Reader(nn.Sequential(whole.encoder, whole.quant_conv))


def unet(dry):
    """Build a U-Net without its decoder half: it ends with the mid block's mean over places."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**UNET | (TINY_UNET if dry else {}))
    network.up_blocks, network.conv_norm_out = nn.ModuleList(), None
    network.conv_out = nn.Identity()

    def call(latents, context):
        step = torch.zeros((), dtype=torch.long, device=latents.device)
        return network(latents, step, context, return_dict=False)[0].mean(dim=(2, 3))

    return Reader(network, network.config.block_out_channels[-1], call)


def blip(dry):
    """Build BLIP-large, which captions by beam search."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    network = BlipForConditionalGeneration(BlipConfig(**TINY_BLIP if dry else BLIP))
    tokens = 3 if dry else TOKENS
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    call = functools.partial(network.generate, num_beams=BEAMS, do_sample=False, **length)
    return Reader(network, call=call)


@dataclass(frozen=True)
class Work:
    """An encoder and how it is used."""

    name: str
    build: Callable  # given `dry`
    trains: bool
    batch: int  # the first that is tried
    gflop: int | None  # of an image, as the goals state them (README.md)
    shapes: tuple  # of an image's inputs; three channels are colours
    tiny: tuple  # the same where `dry`
    ways: tuple = ("original", "eager", "compiled")
    not_compiled: str = ""  # why
    channels_last: bool = False


ALL, TWO = ("original", "eager", "copies", "compiled"), ("original", "eager")
LATENTS, TINY_LATENTS = ((4, 64, 64), (77, 1024)), ((4, 8, 8), (7, 16))
NO_GAIN = "compiling gains 1 % (timm's tables: 402 and 407 images/s on a 4090)"
NO_END = "the cache of beam search grows with each token: it would be compiled for every length"
WORKS = (
    Work("vit-b16", vit, True, 512, 105, ((3, 224, 224),), ((3, 32, 32),), ways=ALL),
    Work("swinv2-l", swin, True, 128, 287, ((3, 256, 256),), ((3, 32, 32),)),
    Work("vit-h14", clip, False, 512, 335, ((3, 224, 224),), ((3, 28, 28),), TWO, NO_GAIN),
    Work("vae", vae, False, 32, 1120, ((3, 512, 512),), ((3, 32, 32),), channels_last=True),
    Work("unet", unet, True, 64, 785, LATENTS, TINY_LATENTS, channels_last=True),
    Work("captions", blip, False, 128, None, ((3, 384, 384),), ((3, 32, 32),), TWO, NO_END),
)  # in the order of ALL, so that what takes longest comes last
ROWS = {f"{work.name}/{way}": (work, way) for way in ALL for work in WORKS if way in work.ways}

# --- one row --------------------------------------------------------------------------------------


def release():
    """Forget what was compiled, free what was held, and measure memory anew."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def build(work, dry, device):
    """Build an encoder with random weights where it will run."""
    release()
    torch.manual_seed(0)
    with torch.device(device):
        network = work.build(dry)
    return network.to(device).train(work.trains).requires_grad_(work.trains)


def make_batch(work, batch, dry):
    """Make the inputs of a batch, on the CPU."""
    shapes = [(batch, *shape) for shape in (work.tiny if dry else work.shapes)]
    kinds = {True: lambda s: torch.randint(0, 256, s, dtype=torch.uint8), False: torch.randn}
    return [kinds[shape[1] == 3](shape) for shape in shapes]


@functools.cache
def flops_per_image(work, dry, device):
    """Count an image's FLOPs: forward, and backward where it is trained."""
    network = build(work, dry, device)
    inputs = [tensor.to(device) for tensor in make_batch(work, 1, dry)]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a whole layer in one, which is not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.set_grad_enabled(work.trains):
                made = network(*inputs)
            if work.trains:
                made.sum().backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def one_by_one(made, target):
    """Return the mean cosine as the authors' loop finds it: pair after pair, on the CPU."""
    pairs = zip(made.detach().cpu().numpy(), target.cpu().numpy(), strict=True)
    return statistics.fmean((a @ b) / ((a @ a) * (b @ b)) ** 0.5 for a, b in pairs)


def prepared(work, way, batch, dry, device):
    """Return network and inputs in the precision, layout and place of a way."""
    original = way == "original"
    torch.set_float32_matmul_precision("highest" if original else "high")
    torch.backends.cudnn.benchmark = not original
    network, inputs = build(work, dry, device), make_batch(work, batch, dry)
    if work.channels_last and not original:
        last = {"memory_format": torch.channels_last}
        network = network.to(**last)
        inputs = [tensor.to(**last) if tensor.ndim == 4 else tensor for tensor in inputs]
    if not (work.trains or original):
        network = network.bfloat16()
    inputs.append(torch.randn(batch, EMBEDDING))  # the target
    if way != "copies":
        inputs = [tensor.to(device) for tensor in inputs]
    elif device.type == "cuda":
        inputs = [tensor.pin_memory() for tensor in inputs]
    return network, inputs


def stepper(work, way, batch, dry, device):
    """Return the function that is timed: it reads a batch, or trains on one."""
    original = way == "original"
    run, inputs = prepared(work, way, batch, dry, device)
    optimizer = torch.optim.AdamW(run.parameters(), fused=not original) if work.trains else None
    if way == "compiled":
        run = torch.compile(run, dynamic=False, backend="eager" if dry else "inductor")
    autocast = {"dtype": torch.bfloat16, "enabled": work.trains and not original}

    def step():
        *given, target = [tensor.to(device, non_blocking=True) for tensor in inputs]
        with torch.set_grad_enabled(work.trains), torch.autocast(device.type, **autocast):
            made = run(*given)
        if not work.trains:
            return made
        loss = (1 - F.cosine_similarity(made.float(), target)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if original:
            one_by_one(made, target)
        return loss.detach()

    return step


def clock(device):
    """Return what marks a moment, the seconds between two, and what waits for the device."""
    if device.type != "cuda":
        return time.perf_counter, lambda a, b: b - a, lambda: None

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda a, b: a.elapsed_time(b) / 1000, torch.cuda.synchronize


def median_seconds(step, device, seconds):
    """Return a step's median, found in about so many seconds; the step has run before."""
    mark, between, wait = clock(device)
    wait()
    began = time.perf_counter()
    step()
    wait()
    repeats = seconds / (time.perf_counter() - began)
    moments = [mark()]
    for _ in range(int(min(max(repeats, FEWEST), MOST))):
        step()
        moments.append(mark())
    wait()
    return statistics.median(between(a, b) for a, b in itertools.pairwise(moments))


def peak_bytes(device):
    """Return the most memory that was used: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def attempt(work, way, batch, dry, device):
    """Measure a row at one batch size."""
    began = time.perf_counter()
    step = stepper(work, way, batch, dry, device)
    for _ in range(WARM):
        made = step()
    if not made.isfinite().all():  # waits for the device
        raise ValueError("what comes out is not finite")
    begin = time.perf_counter() - began
    seconds = median_seconds(step, device, 0.05 if dry else 2)
    memory = peak_bytes(device) / 1e9
    return {"batch": batch, "ms": 1000 * seconds, "peak_gb": memory, "begin_s": begin}


def fitting(measure, batch):
    """Return measure(batch), with half the batch as long as memory does not suffice."""
    while True:
        try:
            return measure(batch)
        except RuntimeError as error:  # OutOfMemoryError is one; cuBLAS has words of its own
            words = ("out of memory", "alloc_failed")
            if batch == 1 or not any(word in str(error).lower() for word in words):
                raise
        print(f"a batch of {batch} does not fit: {batch // 2}", flush=True)
        batch //= 2


@contextlib.contextmanager
def at_most(seconds):
    """Raise TimeoutError in what takes longer, and again where something caught it."""

    def ring(*_):
        raise TimeoutError(f"not done after {seconds:.3g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def measured(name, dry, device, peak, rows, seconds):
    """Measure a row within seconds; what eager found to fit, of the rows before it, holds here."""
    work, way = ROWS[name]
    before = {other: rows.get(f"{work.name}/{other}", {}) for other in ALL}
    flops = flops_per_image(work, dry, device)  # imports a package, which nothing may interrupt
    first = min(64, work.batch) if way == "original" else before["eager"].get("batch", work.batch)
    with at_most(seconds):
        row = fitting(lambda batch: attempt(work, way, batch, dry, device), 2 if dry else first)
    rate = 1000 * row["batch"] / row["ms"]
    original = rate if way == "original" else before["original"].get("images_per_s")
    return row | {
        "images_per_s": rate,
        "times_original": rate / original if original else None,
        "of_peak": rate * flops / peak,
        "gflop": flops / 1e9,
        "stated_gflop": None if dry else work.gflop,
    }


# --- all rows -------------------------------------------------------------------------------------


def version(package):
    """Return an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def look_at(device, n):
    """Return the card's name and peak, and the FLOP/s of an n x n x n product in bf16."""
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device)
    torch.mm(a, b)
    product = 2 * n**3 / median_seconds(lambda: torch.mm(a, b), device, 0.5)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sheet = [rate for card, rate in PEAKS.items() if re.search(card, name)]
    source = "data sheet, dense bf16" if sheet else f"measured, bf16 product of {n} x {n}"
    return {"device": name, "peak": [*sheet, product][0], "peak_from": source, "product": product}


COLUMNS = {  # of the table: title, and which figure of a row stands there in which form
    "images/s": ("images_per_s", ",.1f"),
    "x original": ("times_original", ".1f"),
    "of peak": ("of_peak", ".1%"),
    "batch": ("batch", "d"),
    "ms a step": ("ms", ",.1f"),
    "peak GB": ("peak_gb", ".1f"),
    "GFLOP an image": ("gflop", ",.4g"),
    "as stated": ("stated_gflop", ",d"),
    "s to begin": ("begin_s", ".0f"),
}


def line(name, row=None):
    """Print a line of the table: a row's, or without one the titles."""
    cells = []
    for title, (key, form) in COLUMNS.items():
        cell = title if row is None else "-" if row[key] is None else f"{row[key]:{form}}"
        cells.append(f"{cell:>{max(len(title), 8)}}")
    print("|", " | ".join([f"{name:<17}", *cells]), "|", flush=True)


def write(path, report):
    """Write the report whole."""
    if path:
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(report, indent=1) + "\n")
        beside.replace(path)


def main(names=tuple(ROWS), dry=False, seconds=420.0, out=None):
    """Measure these rows, print each as it is done, write all of them; return the report."""
    end = time.monotonic() + seconds
    if not dry:
        importlib.import_module("torch._inductor.compile_fx")  # as a whole, not within a row's time
    device = torch.device("cpu" if dry else "cuda")
    card, rows, left_out = look_at(device, 256 if dry else 8192), {}, {}
    versions = {package: version(package) for package in PACKAGES}
    report = {"card": card, "versions": versions, "dry": dry, "rows": rows, "left_out": left_out}
    print(", ".join(" ".join(pair) for pair in versions.items()))
    print(
        f"{card['device']}: peak {card['peak'] / 1e12:.4g} TFLOP/s ({card['peak_from']}), ", end=""
    )
    print(f"a product reaches {card['product'] / 1e12:.4g}")
    line("row")
    print("|---|" + "---:|" * len(COLUMNS), flush=True)

    def leave_out(name, why):
        left_out[name] = why
        print(f"{name} is left out: {why}", flush=True)

    for name in names:
        left = end - time.monotonic()
        if left < LEAST[ROWS[name][1]]:
            leave_out(name, f"{max(left, 0):.0f} of {seconds:.0f} s are left")
            continue
        try:
            row = measured(name, dry, device, card["peak"], rows, min(left, LONGEST))
        except Exception as error:
            message = [*str(error).strip().splitlines(), ""][0]
            leave_out(name, f"{type(error).__name__}: {message[:200]}")
        else:
            rows[name] = row
            line(name, row)
        write(out, report)
    for work in WORKS:
        if work.not_compiled and f"{work.name}/eager" in names:
            leave_out(f"{work.name}/compiled", work.not_compiled)
    write(out, report)
    return report


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    every = [*(work.name for work in WORKS), *ROWS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="ROW")
    parser.add_argument("--dry", action="store_true", help="tiny encoders on the CPU")
    parser.add_argument("--seconds", type=float, default=420, help="after these nothing goes on")
    parser.add_argument("--out", type=Path, metavar="JSON", help="written after every row")
    given = parser.parse_args()
    names = [name for name in ROWS if {name, name.split("/")[0]} & set(given.only)]
    dry = given.dry or not torch.cuda.is_available()
    if dry and not given.dry:
        print("There is no GPU here: this is the dry form, tiny encoders on the CPU.")
    if not main(names, dry, given.seconds, given.out)["rows"]:
        sys.exit("no row came out")
