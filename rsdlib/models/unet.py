"""The encoder half of a diffusion model's own U-Net: a backbone, and put back into its pipeline.

The paper's white-box backbone (supplementary, section 8) and its U-Net swap (sections 1 and 2).
"""

import copy
import traceback
import weakref
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import files, runtime
from rsdlib.config import as_dict
from rsdlib.errors import BadValueError, CheckpointError, ConfigError, refusing
from rsdlib.models.blip import open_captioner
from rsdlib.models.encoders import FrontedEncoder, no_model, pipeline_folder
from rsdlib.models.heads import JointObjective

DROPPED = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")  # the decoder half
SLICE = 16 * 512 * 512  # pixels that the autoencoder reads at once: 16 images of 512 a side

# --- the encoder ----------------------------------------------------------------------------------


class UNetEncoder(FrontedEncoder):
    """Reads latents with the down and mid blocks of a U-Net, at timestep 0, and beside them a text.

    Weights keep the names and shapes that they have in the whole U-Net, below ``unet.``, so that
    they can go back into one. The text is the image's caption where `front` gives one, else the
    empty prompt; never the true prompt.

    Parameters
    ----------
    unet : diffusers.UNet2DConditionModel
        Its decoder half is taken off: the module is used up.
    context : Tensor (t, c)
        The text encoder's states of the empty prompt.
    front : nn.Module, optional
        Maps uint8 images to what `forward` reads, see `Latents` and `CaptionedLatents`; kept beside
        the module, not in it.
    image_size : int
        Pixels a side that `front` reads.
    sampler : diffusers.DDPMScheduler, optional
        Knows the noise of each timestep: needed by `with_noise`.
    noised : bool
        In training, read latents as the sampler sees them, at a timestep drawn for each; by default
        they are clean, as in the paper.

    Attributes
    ----------
    features : int
        Channels of the mid block.

    Raises
    ------
    ConfigError
        The U-Net is told more than a prompt, or reads a prompt of another width.
    """

    def __init__(self, unet, context, front=None, image_size=None, sampler=None, noised=False):
        super().__init__(front)
        for name in ("class_embedding", "add_embedding", "encoder_hid_proj"):
            if getattr(unet, name, None) is not None:
                raise ConfigError(f"this U-Net also has {name}", "Use one without it.")
        width, reads = context.shape[-1], unet.config.cross_attention_dim
        if width != reads:
            message = f"the text context has {width} numbers a token, the U-Net reads {reads}"
            raise ConfigError(message, "Take text encoder and U-Net from the same pipeline.")
        for name in DROPPED:
            delattr(unet, name)
        self.unet, self.image_size, self.sampler, self.noised = unet, image_size, sampler, noised
        self.features = unet.config.block_out_channels[-1]
        self.register_buffer("context", context)

    def unpack(self, inputs):
        """Return latents (b, c, h, w) and contexts (b, t, k) of what `forward` reads."""
        if inputs.dim() == 4:
            return inputs.float(), self.context.expand(len(inputs), -1, -1)
        latents, tokens = split_rows(inputs, self.unet.config.in_channels, len(self.context))
        return latents, self.front.texts.to(latents.device).states(tokens)

    def captions(self, inputs):
        """Return the captions in what `forward` reads, as their tokenizer spells them."""
        _, tokens = split_rows(inputs, self.unet.config.in_channels, len(self.context))
        return self.front.texts.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def with_noise(self, latents):
        """Return latents with the sampler's noise, and the timesteps (b,) drawn for them."""
        steps = torch.randint(len(self.sampler), (len(latents),), device=latents.device)
        return self.sampler.add_noise(latents, torch.randn_like(latents), steps), steps

    def all_maps(self, latents, context, steps=0):
        """Return the maps that the decoder half is handed: each skip connection's, and the mid's.

        It is given latents (b, c, h, w), a context (b, t, k) and timesteps, one or (b,).
        """
        unet, context = self.unet, context.to(latents.dtype)
        time = unet.time_embedding(unet.get_time_embed(latents, steps))
        sample = unet.conv_in(latents)
        maps = [sample]
        for block in unet.down_blocks:
            sample, skips = block(sample, temb=time, encoder_hidden_states=context)
            maps += skips
        return [*maps, unet.mid_block(sample, time, encoder_hidden_states=context)]

    def forward(self, inputs, context=None):
        """Map what the front made of images to features (b, p): the mid block's mean over places.

        Without a front's captions, these are latents (b, c, h, w). A `context` (b, t, k) replaces
        the inputs' own.
        """
        latents, own = self.unpack(inputs)
        steps = 0
        if self.training and self.noised:
            latents, steps = self.with_noise(latents)
        maps = self.all_maps(latents, own if context is None else context, steps)
        return maps[-1].mean(dim=(2, 3))


class Latents(nn.Module):
    """Frozen front of the U-Net encoder: an autoencoder's latents of images.

    Parameters
    ----------
    vae : diffusers.AutoencoderKL
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.register_buffer("scale", torch.tensor(float(vae.config.scaling_factor)))

    def forward(self, images):
        """Map uint8 images (b, 3, s, s) to scaled latents (b, c, s / f, s / f).

        They are the mean of their distribution. Large images are read in slices: the autoencoder's
        first layers hold 128 numbers a pixel.
        """
        parts = images.split(max(SLICE // images[0, 0].numel(), 1))
        latents = [self.vae.encode((p.float() - 127.5) / 127.5).latent_dist.mode() for p in parts]
        return torch.cat(latents) * self.scale


class CaptionedLatents(nn.Module):
    """Frozen front of a U-Net encoder that reads captions: latents, and the caption's tokens.

    A caption is made from the image alone, by a captioner as it came.

    Parameters
    ----------
    latents : Latents
    captioner : rsdlib.models.blip.Captioner
    texts : Texts
        Its tokens are stored; `UNetEncoder` asks it for their states.
    """

    def __init__(self, latents, captioner, texts):
        super().__init__()
        self.latents, self.captioner, self.texts = latents, captioner, texts

    def forward(self, images):
        """Map uint8 images (b, 3, s, s) to latents and tokens in one row each, see `split_rows`."""
        latents = self.latents(images).flatten(1)
        shape = {"size": (self.captioner.image_size,) * 2, "mode": "bicubic", "antialias": True}
        images = F.interpolate(images.float(), **shape).round().clamp(0, 255)
        tokens = self.texts.tokens(self.captioner.caption(images, beams=1)).to(latents.device)
        return torch.cat([latents, tokens % PAGE, tokens // PAGE], dim=1)


PAGE = 2048  # float16 counts no further: a token is stored as its page and its place on it


def split_rows(inputs, channels, length):
    """Return latents (b, c, h, w) and tokens (b, t) of rows that `CaptionedLatents` made."""
    flat, places, pages = inputs.split([inputs.shape[1] - 2 * length, length, length], dim=1)
    side = round((flat.shape[1] / channels) ** 0.5)
    return flat.float().unflatten(1, (channels, side, side)), (places + PAGE * pages.float()).long()


class Texts(nn.Module):
    """A Stable Diffusion's frozen text encoder with its tokenizer.

    Parameters
    ----------
    folder : Path
        In diffusers' format.
    """

    def __init__(self, folder):
        from transformers import CLIPTextModel, CLIPTokenizer

        super().__init__()
        with runtime.quiet():
            self.encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")

    def tokens(self, prompts):
        """Return the tokens of prompts (n, t), int64, cut and filled to the model's length."""
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(prompts), **how).input_ids

    @torch.no_grad()
    def states(self, tokens):
        """Return what cross-attention reads (n, t, c)."""
        return self.encoder(tokens).last_hidden_state


def open_encoder(config, pretrained=True):
    """Build the U-Net encoder of the Stable Diffusion that a `config.BackboneConfig` describes.

    Parameters
    ----------
    config : rsdlib.config.BackboneConfig
        Its options are ``captioner``, whose captions are read beside the images (without, the empty
        prompt is), ``noised`` (see `UNetEncoder`), and, for random weights alone, settings of the
        U-Net that differ from the model's.
    pretrained : bool
        False draws random weights; what is frozen (autoencoder, text encoder) is opened all the
        same.

    Returns
    -------
    UNetEncoder
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel

    options, folder = as_dict(config.options), pipeline_folder(config.model)
    captioner, noised = options.pop("captioner", None), options.pop("noised", False)
    fix = "It needs unet, vae, text_encoder, tokenizer and scheduler in diffusers' format."
    with no_model(f"{files.relative(folder)} is no Stable Diffusion folder: {{}}", fix):
        sampler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        if pretrained:
            unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        else:
            told = UNet2DConditionModel.load_config(folder, subfolder="unet")
            unet = UNet2DConditionModel.from_config(told, **({} if config.pretrained else options))
        front = _open_front(folder, captioner)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    size = config.image_size or unet.config.sample_size * front.factor
    return UNetEncoder(unet, front.empty, front, size, sampler, noised)


_FRONTS = weakref.WeakValueDictionary()  # those in use: encoders side by side share one


def _open_front(folder, captioner):
    """Return the frozen front, with the empty prompt's states and the pixels behind a latent."""
    from diffusers import AutoencoderKL

    stamps = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))]
    key = str(folder), captioner, *stamps
    front = _FRONTS.get(key)
    if front is None:
        vae, texts = AutoencoderKL.from_pretrained(folder, subfolder="vae"), Texts(folder)
        front = Latents(vae)
        if captioner is not None:
            front = CaptionedLatents(front, open_captioner(captioner), texts)
        front.empty = texts.states(texts.tokens([""]))[0]
        front.factor = 2 ** len(vae.config.down_block_types[1:])
        _FRONTS[key] = front.eval().requires_grad_(False)
    return front


def text_states(folder, prompts):
    """Return the text encoder's states of prompts, as the U-Net's cross-attention reads them.

    Parameters
    ----------
    folder : Path
        A Stable Diffusion in diffusers' format.
    prompts : sequence of str (n)

    Returns
    -------
    Tensor (n, t, c)
    """
    texts = Texts(folder)
    return texts.states(texts.tokens(prompts))


# --- fine-tuned, yet fit to paint -----------------------------------------------------------------


@dataclass(frozen=True)
class KeepingObjective(JointObjective):
    """The joint objective and how far the encoder has left what the decoder half was trained on.

    L + keep * mean_k |m_k - o_k|^2 / |o_k|^2 over the maps m_k that the decoder half is handed
    (each skip connection's, and the mid block's) and the original encoder's o_k, on latents with
    the sampler's noise, half of them with the empty prompt, as in its guidance. The paper has no
    such term.

    Parameters
    ----------
    weight, huber
        See `JointObjective`.
    keep : float
    original : UNetEncoder
        Frozen here.
    share : float
        Of each batch that the second term is computed on.
    """

    keep: float = 1.0
    original: nn.Module = None
    share: float = 0.25

    def __call__(self, model, batch):
        """Return the loss, a scalar, and the cosine similarities (b,)."""
        loss, similarity = super().__call__(model, batch)
        encoder = getattr(model, "module", model).backbone
        original = self.original.to(batch["input"].device).eval().requires_grad_(False)
        count = max(round(self.share * len(batch["input"])), 1)
        latents, context = encoder.unpack(batch["input"][:count])
        told = torch.arange(count, device=latents.device) % 2 == 0  # the others are not, as guided
        context = torch.where(told[:, None, None], context, encoder.context)
        latents, steps = encoder.with_noise(latents)
        with torch.no_grad():
            kept = original.all_maps(latents, context, steps)
        ours = encoder.all_maps(latents, context, steps)
        return loss + self.keep * distances(ours, kept).mean(), similarity


def distances(maps, originals):
    """Return |m - o|^2 / |o|^2 of each map (k,)."""
    pairs = zip(maps, originals, strict=True)
    return torch.stack([(m - o).square().sum() / o.square().sum() for m, o in pairs])


# --- back into the pipeline -----------------------------------------------------------------------


def encoder_parts(unet):
    """Return the names of the modules that make up a U-Net's encoder half."""
    return [n for n, part in unet.named_children() if n not in DROPPED and part.state_dict()]


def into_unet(encoder, unet, blend=1.0, parts=("",)):
    """Put an encoder's weights into a whole U-Net, in place; its decoder half stays as it is.

    Parameters
    ----------
    encoder : UNetEncoder
    unet : diffusers.UNet2DConditionModel
    blend : float
        1 takes the encoder's weights, 0 keeps the U-Net's own, in between mixes them linearly;
        below 0 goes away from the encoder.
    parts : sequence of str
        What the names of the weights to take begin with, such as ``"mid_block"``; all by default.

    Raises
    ------
    CheckpointError
        The encoder is of another architecture: the tensors that do not fit are named.
    BadValueError
        There is no such part.
    """
    own, new = unet.state_dict(), encoder.unet.state_dict()
    wrong = [n for n, value in new.items() if n not in own or own[n].shape != value.shape]
    wrong += [name for name in own if name not in new and not name.startswith(DROPPED)]
    if wrong:
        some = ", ".join(wrong[:3])
        message = f"the encoder does not fit this U-Net: {len(wrong)} tensors differ ({some}, …)"
        raise CheckpointError(message, "Use the U-Net it came from.")
    for part in parts:
        if not any(name.startswith(part) for name in new):
            raise BadValueError(f"there is no part {part!r}", f"Parts: {encoder_parts(unet)}.")
    taken = {name: value for name, value in new.items() if name.startswith(tuple(parts))}
    blended = {name: torch.lerp(own[name].to(new), new, blend) for name, new in taken.items()}
    unet.load_state_dict(blended, strict=False)


def swap_encoder(pipe, encoder, start_step=1, blend=1.0, parts=("",)):
    """Return a pipeline that takes `encoder` in place of its U-Net's own from a denoising step on.

    The first `start_step` steps run the pipeline's own U-Net; the paper's best images come from
    ``start_step=1``. The pipeline handed in is not changed; everything but the encoder's weights is
    shared with it.

    Steps are counted in what runs: under any scheduler, of its own timesteps, of image-to-image
    those that are left, also where the U-Net has been handed on to another pipeline. Several
    evaluations of one step (Heun, KDPM2) are one.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
    encoder : UNetEncoder
        Trained from this pipeline's U-Net.
    start_step : int or float
        Number of steps before the swap, or, for a float in [0, 1], their share of all steps: see
        `switch_step`. 1.0 never swaps.
    blend : float
        Share of the encoder's weights in the swapped ones, -1 to 1; see `into_unet`.
    parts : sequence of str
        See `into_unet`.

    Returns
    -------
    diffusers.StableDiffusionPipeline
        Of the same class.

    Raises
    ------
    CheckpointError
        The encoder is of another architecture.
    BadValueError
        `start_step` or `blend` is out of range, or there is no such part; a number of steps above
        the run's own, or a timestep that its scheduler does not have, is refused in sampling.
    """
    if not -1 <= blend <= 1:
        raise BadValueError(f"blend = {blend} is not between -1 and 1")
    switch_step(start_step, pipe.scheduler.config.num_train_timesteps)  # as many as there may be
    kept = [part for name, part in pipe.unet.named_children() if name in DROPPED]
    kept.append(vars(pipe.unet).get("forward"))  # of an earlier swap
    swapped = copy.deepcopy(pipe.unet, {id(part): part for part in kept})
    into_unet(encoder, swapped, blend, parts)
    again = copy.copy(pipe)
    again.unet = swapped
    swapped.forward = _Turns(again, pipe.unet, swapped, start_step)
    return again


@dataclass(eq=False)
class _Turns:
    """Denoises with the U-Net whose turn it is at the step that the pipeline has reached."""

    pipe: object
    own: nn.Module
    swapped: nn.Module
    start_step: float
    timesteps: object = None  # the scheduler's: other ones in each run
    first: int = 0  # which of them this run began with: image-to-image leaves some out

    def __call__(self, sample, timestep, *args, **options):
        """Denoise as a U-Net does."""
        early = self._early(float(torch.as_tensor(timestep).flatten()[0]))
        unet = self.own if early else self.swapped
        half, shared = unet.conv_in.weight, unet.conv_out.weight  # the latter moves with either
        if (half.device, half.dtype) != (shared.device, shared.dtype):
            unet.to(shared)
        denoise = type(unet).__call__ if early else type(unet).forward
        return denoise(unet, sample, timestep, *args, **options)

    def _early(self, timestep):
        """Tell whether the denoising step that a timestep belongs to comes before the swap.

        A step that needs several evaluations is one; so is a timestep that a sampler repeats.
        """
        from diffusers import DiffusionPipeline

        callers = (frame.f_locals.get("self") for frame, _ in traceback.walk_stack(None))
        running = next((one for one in callers if isinstance(one, DiffusionPipeline)), self.pipe)
        scheduler = running.scheduler  # the U-Net may have been handed on to another pipeline
        order, timesteps = scheduler.order, scheduler.timesteps
        unknown = f"the swap cannot tell the step of timestep {timestep:g}: {{}}"
        fix = "Sample with the pipeline, or set the timesteps of its own scheduler."
        with refusing((ValueError, AttributeError), BadValueError, unknown, fix):
            whole = timesteps.tolist() if order > 1 else list(dict.fromkeys(timesteps.tolist()))
            place = (order > 1 and scheduler.step_index) or whole.index(timestep)
        if timesteps is not self.timesteps:
            self.timesteps, self.first = timesteps, place
        steps = -((self.first - len(whole)) // order)  # rounded up
        return (place - self.first) // order < switch_step(self.start_step, steps)


def switch_step(start_step, steps):
    """Return after how many of `steps` denoising steps the swap comes.

    A whole number counts steps, a float is their share, so that 1 and 1.0 are opposites: 1 swaps
    after the first step, 1.0 after the last, that is never. 0 and 0.0 both swap from the start.

    Parameters
    ----------
    start_step : int or float
        0 to `steps`, or 0.0 to 1.0.
    steps : int

    Returns
    -------
    int

    Raises
    ------
    BadValueError
        `start_step` is out of range.
    """
    counts = isinstance(start_step, Integral)
    if not 0 <= start_step <= (steps if counts else 1):
        fix = f"Use a whole number up to {steps}, or a share between 0.0 and 1.0."
        raise BadValueError(f"start_step = {start_step} is no step", fix)
    return int(start_step) if counts else round(start_step * steps)
