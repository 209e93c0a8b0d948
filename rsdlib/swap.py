"""The U-Net swap: Stable Diffusion goes on with an encoder that reads prompts (supplementary, sections 1 and 2)."""

import copy

import torch
from torch import nn

from rsdlib.errors import BadValueError
from rsdlib.unet import into_unet, parts


def swap_encoder(pipe, encoder, start_step=1, blend=1.0):
    """Return a pipeline that takes `encoder` in place of its U-Net's own from a denoising step on.

    The first `start_step` steps run the pipeline's own U-Net; the paper's best images come from ``start_step=1``. The pipeline
    handed in is not changed; everything but the encoder's weights is shared with it.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
    encoder : rsdlib.unet.UNetEncoder
        Trained from this pipeline's U-Net.
    start_step : int or float
        Number of steps before the swap, or, for a float in [0, 1], their share of all steps. 1.0 never swaps.
    blend : float
        Share of the encoder's weights in the swapped ones, 0 to 1.

    Returns
    -------
    diffusers.StableDiffusionPipeline
        Of the same class.

    Raises
    ------
    CheckpointError
        The encoder is of another architecture.
    BadValueError
        `start_step` or `blend` is out of range; a number of steps above the sampler's own is refused when sampling begins.
    """
    if not 0 <= blend <= 1:
        raise BadValueError(f"blend = {blend} is not between 0 and 1")
    if start_step < 0 or (isinstance(start_step, float) and start_step > 1):
        raise BadValueError(
            f"start_step = {start_step} is no step", "Use a whole number from 0 on, or a share between 0.0 and 1.0."
        )
    swapped = with_encoder(pipe.unet, encoder, blend)
    again = type(pipe)(**pipe.components, requires_safety_checker=pipe.config.get("requires_safety_checker", False))
    again.unet = SwitchingUNet(pipe.unet, swapped, again.scheduler, start_step)
    again.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return again


def with_encoder(unet, encoder, blend=1.0):
    """Return a U-Net with an encoder's weights, its decoder half shared with `unet`, which is not changed.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
    encoder : rsdlib.unet.UNetEncoder
    blend : float

    Returns
    -------
    diffusers.UNet2DConditionModel
    """
    swapped = copy.copy(unet)
    swapped._modules = dict(unet._modules)
    for name in parts(unet):
        swapped._modules[name] = copy.deepcopy(unet._modules[name])
    into_unet(encoder, swapped, blend)
    return swapped


def weight_change(encoder, unet):
    """Return how far an encoder has moved from a U-Net's own, |W' - W| / |W| (Frobenius), for each of its parts.

    Parameters
    ----------
    encoder : rsdlib.unet.UNetEncoder
    unet : diffusers.UNet2DConditionModel

    Returns
    -------
    dict of str to float
    """
    change, own = {}, unet.state_dict()
    for part in parts(unet):
        pairs = [
            (own[name].float(), value.float()) for name, value in encoder.unet.state_dict().items() if name.startswith(f"{part}.")
        ]
        moved = sum(float((new.to(old) - old).square().sum()) for old, new in pairs)
        change[part] = (moved / sum(float(old.square().sum()) for old, _ in pairs)) ** 0.5
    return change


class SwitchingUNet(nn.Module):
    """Answers as one U-Net before a denoising step and as another from there on; a pipeline cannot tell it from either.

    Parameters
    ----------
    first, then : diffusers.UNet2DConditionModel
    scheduler : diffusers scheduler
        Knows which timestep is which step.
    start_step : int or float
    """

    def __init__(self, first, then, scheduler, start_step):
        super().__init__()
        self.first, self.then, self.start_step = first, then, start_step
        object.__setattr__(self, "scheduler", scheduler)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)

    def forward(self, sample, timestep, *args, **options):
        """Denoise with the U-Net whose turn it is."""
        steps = self.scheduler.timesteps.unique().flip(0)  # descending; some samplers repeat a step
        switch = round(self.start_step * len(steps)) if isinstance(self.start_step, float) else self.start_step
        if switch > len(steps):
            raise BadValueError(f"the swap is to come after step {switch}, but there are {len(steps)} steps", "Swap earlier.")
        done = int((steps > torch.as_tensor(timestep, device=steps.device)).sum())
        return (self.then if done >= switch else self.first)(sample, timestep, *args, **options)
