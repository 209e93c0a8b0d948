"""Stable Diffusion as the maker of the data: open a pipeline, sample from it, sample a row of DiffusionDB again."""

import hashlib

import numpy as np

from rsdlib import registry, runtime
from rsdlib.errors import BadTableError, ModelNotFoundError

HOW = ("prompt", "seed", "step", "cfg")  # DiffusionDB's columns that say how an image was sampled


def locate(name):
    """Return the folder of a pipeline in diffusers' format: a path, or a name in `rsdlib.registry`."""
    return registry.find(name, "model_index.json") or registry.locate(name)


def open_pipeline(name, device="auto"):
    """Open a `diffusers.StableDiffusionPipeline` without safety checker and progress bar.

    Parameters
    ----------
    name : str or Path
        A folder, or a name in `rsdlib.registry`.
    device : str

    Raises
    ------
    ModelNotFoundError
        There is no such pipeline.
    """
    from diffusers import StableDiffusionPipeline

    folder = locate(name)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{runtime.relative(folder)} is no Stable Diffusion pipeline: {str(error).splitlines()[0]}",
            "It needs model_index.json and the parts it names, in diffusers' format.",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(runtime.device(device))


def sample(pipe, prompts, seeds, steps=20, guidance=5.0, **options):
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
    **options
        Handed to the pipeline, such as ``height`` and ``width``.

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)
    """
    import torch

    noise = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    prompts = list(prompts)
    made = pipe(prompts, generator=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="np", **options).images
    return (made * 255).round().astype(np.uint8)


def sample_steps(pipe, prompts, seeds, at, steps=20, guidance=5.0):
    """Sample as `sample` does, and decode what is there after some of the denoising steps.

    Parameters
    ----------
    pipe, prompts, seeds, steps, guidance
        See `sample`.
    at : sequence of int (k)
        Numbers of steps, 1 to `steps`.

    Returns
    -------
    ndarray of uint8, shape (k, n, height, width, 3)
    """
    import torch

    kept = {}

    def keep(_, step, __, values):
        if step + 1 in at:
            kept[step + 1] = values["latents"].clone()
        return values

    sample(pipe, prompts, seeds, steps, guidance, callback_on_step_end=keep)
    with torch.inference_mode():
        decoded = [pipe.vae.decode(kept[step] / pipe.vae.config.scaling_factor).sample for step in at]
    images = [pipe.image_processor.postprocess(image, output_type="np") for image in decoded]
    return (np.stack(images) * 255).round().astype(np.uint8)


def sample_stored(pipe, weights, prompts, seeds, steps=20, guidance=5.0, batch_size=64):
    """Sample in batches, each kept in ``data/cache/samples``: what was sampled once is read, what was stopped goes on.

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
    prompts, seeds, found = list(prompts), [int(seed) for seed in seeds], []
    for start in runtime.track(range(0, len(prompts), batch_size), "sampling"):
        some = prompts[start : start + batch_size], seeds[start : start + batch_size]
        path = runtime.cache_dir() / "samples" / f"{runtime.digest([weights, *some, steps, guidance])}.safetensors"
        found.append(runtime.cached_arrays(path, lambda some=some: {"images": sample(pipe, *some, steps, guidance)})["images"])
    return np.concatenate(found)


def weights_of(name):
    """Return the checksums of a pipeline folder's weights, which say what made a picture."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(locate(name).rglob("*.safetensors"))]


def sample_rows(pipe, pairs):
    """Sample rows of a table again from the seed, steps and guidance that they state.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
        The one that made them; samplers are not told apart, the pipeline's own is used.
    pairs : DataFrame
        With DiffusionDB's columns prompt, seed, step and cfg.

    Returns
    -------
    ndarray of uint8, shape (n, height, width, 3)

    Raises
    ------
    BadTableError
        A column is missing.
    """
    missing = [name for name in HOW if name not in pairs]
    if missing:
        raise BadTableError(
            f"the table does not say how its images were sampled: no {', '.join(missing)}", "Use DiffusionDB's columns."
        )
    images = np.empty(len(pairs), object)
    positions = pairs.reset_index(drop=True)
    for (steps, guidance), some in positions.groupby(["step", "cfg"]):
        made = sample(pipe, some["prompt"], some["seed"], int(steps), float(guidance))
        for at, image in zip(some.index, made, strict=True):
            images[at] = image
    return np.stack(list(images))
