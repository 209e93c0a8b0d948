"""Stable Diffusion as the maker of the data: open it, sample from it, sample a row again."""

import copy

import numpy as np
import pandas as pd
import torch

from rsdlib import files, runtime, weights
from rsdlib.errors import BadTableError, refusing
from rsdlib.models.encoders import no_model, pipeline_folder


def open_pipeline(name, device="auto", dtype=None):
    """Open a `diffusers.StableDiffusionPipeline` without safety checker and progress bar.

    Parameters
    ----------
    name : str or Path
        A folder, or a name in `rsdlib.weights`.
    device : str
    dtype : torch.dtype, optional
        What it computes in. The default is float32 on a CPU; on a GPU bfloat16, or float16 where
        that is all it has.

    Returns
    -------
    diffusers.StableDiffusionPipeline

    Raises
    ------
    ModelNotFoundError
        There is no such pipeline.
    """
    from diffusers import StableDiffusionPipeline

    folder, on = pipeline_folder(name), runtime.device(device)
    how = {"safety_checker": None, "requires_safety_checker": False}
    fix = "It needs model_index.json and the parts it names, in diffusers' format."
    with no_model(f"{files.relative(folder)} is no Stable Diffusion pipeline: {{}}", fix):
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype or _precision(on), **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(on)


def _precision(on):
    if on.type != "cuda":
        return torch.float32
    return torch.bfloat16 if runtime.precision("auto", on) == "bf16" else torch.float16


def sample(pipe, prompts, seeds, steps=20, guidance=5.0, height=None, width=None):
    """Sample one image for each prompt, each from noise of its own seed.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
    prompts : list of str (n)
    seeds : sequence of int (n)
    steps : int
        Denoising steps.
    guidance : float
        Scale of the classifier-free guidance.
    height, width : int, optional
        Pixels; the default is what the model was trained with.

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)
    """
    config, factor = pipe.unet.config, pipe.vae_scale_factor
    height, width = (pixels or config.sample_size * factor for pixels in (height, width))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    # In float32 on the CPU: a seed is the same noise on any device, at any precision.
    shape = (1, config.in_channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    how |= {"height": height, "width": width, "latents": noise.to(pipe.unet.dtype)}
    images = pipe(list(prompts), generator=generators, **how).images
    return (images * 255).round().astype(np.uint8)


def sample_stored(pipe, weights, prompts, seeds, steps=20, guidance=5.0, batch_size=64):
    """Sample in batches, each kept in ``data/cache/samples``: what was stopped goes on.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
    weights : str, list or dict
        Says which weights `pipe` samples with, see `weights_of`.
    prompts, seeds, steps, guidance
        See `sample`.
    batch_size : int

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    how = {"steps": steps, "guidance": guidance}
    batches = []
    for start in runtime.track(range(0, len(prompts), batch_size), "sampling"):
        asked = prompts[start : start + batch_size], seeds[start : start + batch_size]
        key = files.digest([weights, *asked, how, pipe.unet.dtype])
        path = files.cache_dir() / "samples" / f"{key}.npy"
        batches.append(files.cached_rows(path, lambda asked=asked: sample(pipe, *asked, **how)))
    return np.concatenate(batches)


def weights_of(name):
    """Return the checksums of a pipeline's weights, which say what made a picture.

    Parameters
    ----------
    name : str or Path
        As for `open_pipeline`.

    Returns
    -------
    list of str
    """
    return [weights.sha256(p) for p in sorted(pipeline_folder(name).rglob("*.safetensors"))]


def sample_rows(pipe, pairs):
    """Sample rows of a table again as they were: seed, steps, guidance, size and sampler.

    Where a row does not tell its size, or no sampler that is known, the pipeline's own is taken; a
    line says so.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
        The one that made them.
    pairs : DataFrame
        With DiffusionDB's columns prompt, seed, step and cfg, and where they are known width,
        height and sampler (code or name).

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)
        A list of n where sizes differ.

    Raises
    ------
    BadTableError
        A column is missing, or a row's numbers are missing or make no image.
    """
    untold = "the table does not say how its images were sampled: {}"
    with refusing(KeyError, BadTableError, untold, "Use DiffusionDB's columns."):
        told = pairs[["prompt", "seed", "step", "cfg"]]
    rows = pairs.reindex(columns=["id", *told, "sampler", *_SIZE])
    sizes = rows[_SIZE].apply(pd.to_numeric, errors="coerce")
    rows[_SIZE] = sizes.fillna(0).clip(lower=0).astype(int)
    rows["sampler"] = rows["sampler"].astype(str).str.removesuffix(".0").replace(_TABLES["codes"])
    known = {"sampler": rows["sampler"].isin([*_TABLES["schedulers"]])}
    known["size"] = (rows[_SIZE] > 0).all(axis=1)
    for what, told in known.items():
        if not told.all():
            runtime.log(f"untold: {what} of {(~told).sum()} rows; the pipeline's own is taken")
    images, causes = [], (TypeError, ValueError, ArithmeticError)
    for row in rows.to_dict("records"):
        with refusing(causes, BadTableError, f"no image can be sampled as {row}: {{}}", "Drop it."):
            how = int(row["step"]), float(row["cfg"]), row["height"], row["width"]
            own = _with_sampler(pipe, row["sampler"])
            images.append(sample(own, [row["prompt"]], [row["seed"]], *how)[0])
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


_SIZE = ["height", "width"]
_TABLES = runtime.read_table("models/samplers.toml")


def _with_sampler(pipe, name):
    """Return the pipeline with a sampler of DiffusionDB; with its own where that is not known."""
    import diffusers

    if name not in _TABLES["schedulers"]:
        return pipe
    again, (kind, *how) = copy.copy(pipe), _TABLES["schedulers"][name]
    config = {**pipe.scheduler.config, **dict.fromkeys(how, True)}
    again.scheduler = getattr(diffusers, kind).from_config(config)
    return again
