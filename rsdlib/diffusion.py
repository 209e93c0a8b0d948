"""Stable Diffusion as the maker of the data: open a pipeline, sample from it, sample a row of DiffusionDB again."""

import numpy as np

from rsdlib import registry, runtime
from rsdlib.errors import BadTableError, ModelNotFoundError

HOW = ("prompt", "seed", "step", "cfg")  # DiffusionDB's columns that say how an image was sampled


def locate(name):
    """Return the folder of a pipeline in diffusers' format: a path, or a name in `rsdlib.registry`."""
    folder = runtime.resolve_path(name)
    return folder if (folder / "model_index.json").is_file() else registry.override(name) or registry.locate(name)


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
