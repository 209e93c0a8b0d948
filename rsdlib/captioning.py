"""From the image back to words: the nearest training prompt, and BLIP fine-tuned on prompts (supplementary, section 3)."""

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import registry, runtime
from rsdlib.errors import BadValueError, ModelNotFoundError
from rsdlib.retrieval import nearest

LENGTH = 48  # longest caption in tokens
REPEAT = 3  # no run of so many tokens comes twice in a caption: "by rembrandt, by rembrandt, by ..." tells nothing


class Captioner(nn.Module):
    """BLIP with an optional vocabulary head on its image encoder: the joint objective of the paper's captioning experiment.

    Parameters
    ----------
    blip : transformers.BlipForConditionalGeneration
    tokenizer : transformers tokenizer
        BLIP's; kept beside the module.
    vocabulary_size : int
        m; 0 leaves the vocabulary head out.
    mean, std : sequence of 3 floats
        Of the pixels in [0, 1], as the image encoder expects them.
    """

    front = None

    def __init__(self, blip, tokenizer, vocabulary_size=0, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.blip, self.tokenizer = blip, tokenizer
        self.image_size = blip.config.vision_config.image_size
        width = blip.config.vision_config.hidden_size
        self.vocabulary_head = nn.Linear(width, vocabulary_size) if vocabulary_size else None
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def see(self, images):
        """Map uint8 images (b, 3, s, s) to the image encoder's states (b, 1 + places, p)."""
        return self.blip.vision_model((images.float() - self.mean) / self.std).last_hidden_state

    def forward(self, images, tokens):
        """Return next-token logits (b, l, v) for captions `tokens` (b, l), and vocabulary logits (b, m) or None."""
        states = self.see(images)
        seen = (tokens != self.tokenizer.pad_token_id).long()
        logits = self.blip.text_decoder(input_ids=tokens, attention_mask=seen, encoder_hidden_states=states).logits
        return logits, None if self.vocabulary_head is None else self.vocabulary_head(states[:, 0])

    @property
    def length(self):
        """Longest caption in tokens."""
        return min(LENGTH, self.blip.config.text_config.max_position_embeddings)

    def encode(self, captions):
        """Return captions as tokens (n, l), int64, each opened by BLIP's decoder mark and cut at `length`."""
        found = self.tokenizer(list(captions), padding="longest", truncation=True, max_length=self.length, return_tensors="np")
        tokens = found["input_ids"].astype(np.int64)
        tokens[:, 0] = self.blip.config.text_config.bos_token_id
        return tokens

    def caption(self, images, beams=3):
        """Caption uint8 images (b, 3, s, s), greedily or by beam search; special tokens are taken out.

        Returns
        -------
        list of str
            At most `length` tokens each; an empty string where nothing came out.
        """
        config = self.blip.config.text_config
        states = self.see(images)
        start = torch.full((len(images), 1), config.bos_token_id, device=images.device)
        with torch.inference_mode():
            tokens = self.blip.text_decoder.generate(
                input_ids=start,
                encoder_hidden_states=states,
                max_length=self.length,
                num_beams=beams,
                no_repeat_ngram_size=REPEAT,
                do_sample=False,
                eos_token_id=config.sep_token_id,
                pad_token_id=config.pad_token_id,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@dataclass(frozen=True)
class CaptionObjective:
    """What `rsdlib.training.fit` minimises for a `Captioner`: L = L_lm + weight * L_cls.

    L_lm is the mean cross-entropy of the next token, L_cls the multi-label binary cross-entropy over the vocabulary. A pair's
    similarity, which its difficulty for the curriculum comes from, is the geometric mean probability of its tokens.
    """

    weight: float = 0.1

    def __call__(self, model, batch):
        """Return the loss, a scalar, and the similarities (b,)."""
        logits, words = model(batch["input"], batch["target"])
        following = batch["target"][:, 1:]
        counts = following != model.tokenizer.pad_token_id
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="none").view_as(following)
        losses = losses * counts
        loss = losses.sum() / counts.sum()
        if words is not None and self.weight:
            loss = loss + self.weight * F.binary_cross_entropy_with_logits(words.float(), batch["labels"].float())
        return loss, torch.exp(-losses.detach().sum(1) / counts.sum(1))


def open_captioner(name, vocabulary_size=0, pretrained=True):
    """Open a BLIP captioner with its tokenizer and colours.

    Parameters
    ----------
    name : str
        A folder in transformers' format, or a name in `rsdlib.registry`.
    vocabulary_size : int
    pretrained : bool
        False draws random weights.

    Returns
    -------
    Captioner
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    folder = registry.find(name, "config.json") or registry.locate(name)
    try:
        if pretrained:
            blip = BlipForConditionalGeneration.from_pretrained(folder).float()
        else:
            blip = BlipForConditionalGeneration(BlipConfig.from_pretrained(folder))
        processor = BlipProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{runtime.relative(folder)} is no BLIP captioner: {str(error).splitlines()[0]}",
            "It needs model, tokenizer and image processor in transformers' format.",
        ) from error
    blip.config.text_config.bos_token_id = processor.tokenizer.bos_token_id or blip.config.text_config.bos_token_id
    colours = processor.image_processor
    return Captioner(blip, processor.tokenizer, vocabulary_size, colours.image_mean, colours.image_std)


def caption_all(model, inputs, rows, beams=3, device="auto", batch_size=64):
    """Caption the images of some rows.

    Returns
    -------
    list of str
    """
    from rsdlib.training import evaluating

    on, found = runtime.device(device), []
    model.to(on)
    with evaluating(model):
        for start in runtime.track(range(0, len(rows), batch_size), "captioning"):
            images = torch.from_numpy(inputs.batch(rows[start : start + batch_size])).to(on)
            found += model.caption(images, beams)
    return found


def shows(caption, *names):
    """Tell whether a caption names a thing, in the singular or the plural.

    Parameters
    ----------
    caption : str
    *names : str
        What the thing may be called: one or more words each, in the singular.
    """
    from textblob.en.inflect import singularize

    words = re.findall(r"[a-z]+", caption.lower())
    said = {*words, *map(singularize, words)}
    return any(said.issuperset(re.findall(r"[a-z]+", name.lower())) for name in names)


def nearest_prompts(embeddings, bank, prompts):
    """Return the known prompt nearest to each predicted embedding: the paper's 1-NN captions.

    Parameters
    ----------
    embeddings : ndarray (n, d)
    bank : ndarray (m, d)
        Embeddings of the known prompts, memory-mapped if they are many.
    prompts : sequence of str (m)

    Returns
    -------
    list of str
    """
    if len(bank) != len(prompts):
        raise BadValueError(f"{len(bank)} embeddings do not belong to {len(prompts)} prompts")
    _, index = nearest(embeddings, bank, 1)
    return [prompts[i] for i in index[:, 0]]
