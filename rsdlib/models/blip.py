"""From the image back to words: BLIP fine-tuned on prompts (supplementary, section 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rsdlib import files, runtime, weights
from rsdlib.data import evaluating
from rsdlib.models.encoders import Encoder, no_model

LENGTH = 48  # longest caption in tokens
REPEAT = 3  # no run of so many tokens comes twice: "by rembrandt, by rembrandt, ..." tells nothing


class Captioner(nn.Module):
    """BLIP with an optional vocabulary head on its image encoder.

    The joint objective of the paper's captioning experiment trains both.

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

    def __init__(self, blip, tokenizer, vocabulary_size=0, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.blip, self.tokenizer = blip, tokenizer
        self.image_size = blip.config.vision_config.image_size
        self.pad = blip.config.text_config.pad_token_id  # it stands behind the end of a caption
        self.length = min(LENGTH, blip.config.text_config.max_position_embeddings)  # in tokens
        width = blip.config.vision_config.hidden_size
        self.vocabulary_head = nn.Linear(width, vocabulary_size) if vocabulary_size else None
        self.normalised = Encoder(nn.Identity(), 3, self.image_size, mean, std)

    def forward(self, images, tokens):
        """Map images (b, 3, s, s) and tokens (b, l) to logits.

        Those of the next token (b, l, v), and of the vocabulary (b, m) or None.
        """
        output = self.blip(self.normalised(images), tokens, (tokens != self.pad).long())
        states, head = output.image_embeds, self.vocabulary_head  # (b, 1 + places, p)
        return output.logits, None if head is None else head(states[:, 0])

    def encode(self, captions):
        """Return captions as tokens (n, l), int64, opened by BLIP's mark and cut at `length`."""
        how = {"padding": "longest", "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(list(captions), return_tensors="np", **how).input_ids
        tokens[:, 0] = self.blip.config.text_config.bos_token_id
        return tokens

    def caption(self, images, beams=3):
        """Caption images, greedily or by beam search; special tokens are taken out.

        Parameters
        ----------
        images : Tensor (b, 3, s, s), uint8
        beams : int
            1 is greedy.

        Returns
        -------
        list of str
            At most `length` tokens each; an empty string where nothing came out.
        """
        how = {"max_length": self.length, "num_beams": beams, "no_repeat_ngram_size": REPEAT}
        tokens = self.blip.generate(self.normalised(images), do_sample=False, **how)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


@dataclass(frozen=True)
class CaptionObjective:
    """What `rsdlib.training.fit` minimises for a `Captioner`: L = L_lm + weight * L_cls.

    L_lm is the mean cross-entropy of the next token over all tokens of the *global* batch, L_cls
    the multi-label binary cross-entropy over the vocabulary. A pair's similarity, which its
    difficulty for the curriculum comes from, is the geometric mean probability of its tokens.

    Parameters
    ----------
    weight : float
    pad : int
        The token that is not predicted: `Captioner.pad`.
    """

    weight: float = 0.1
    pad: int = 0

    def whole(self, answers):
        """Return how many tokens and rows a global batch has: captions are not equally long."""
        counted = answers["target"][:, 1:] != self.pad
        return {"tokens": int(counted.sum()), "rows": len(counted)}

    def __call__(self, model, batch):
        """Return the loss, a scalar, and the similarities (b,).

        Parts of a global batch are weighted by their rows and added. Each divides its sum by its
        rows' share of the global batch's tokens, so that any parts add up to the same mean.
        """
        logits, words = model(batch["input"], batch["target"])
        following = batch["target"][:, 1:]
        counted = following != self.pad
        scores = logits[:, :-1].float().flatten(0, 1)
        losses = F.cross_entropy(scores, following.flatten(), reduction="none")
        losses = losses.view_as(following) * counted
        whole = batch if "tokens" in batch else self.whole(batch)
        loss = losses.sum() / (whole["tokens"] * (len(following) / whole["rows"]))
        if words is not None and self.weight:
            labels = batch["labels"].float()
            loss = loss + self.weight * F.binary_cross_entropy_with_logits(words.float(), labels)
        return loss, torch.exp(-losses.detach().sum(1) / counted.sum(1))


def open_captioner(name, vocabulary_size=0, pretrained=True):
    """Open a BLIP captioner with its tokenizer and colours.

    Parameters
    ----------
    name : str
        A folder in transformers' format, or a name in `rsdlib.weights`.
    vocabulary_size : int
    pretrained : bool
        False draws random weights.

    Returns
    -------
    Captioner

    Raises
    ------
    ModelNotFoundError
        There is no such captioner.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    folder = weights.find(name, "config.json") or weights.locate(name)
    fix = "It needs model, tokenizer and image processor in transformers' format."
    with no_model(f"{files.relative(folder)} is no BLIP captioner: {{}}", fix):
        if pretrained:
            blip = BlipForConditionalGeneration.from_pretrained(folder).float()
        else:
            blip = BlipForConditionalGeneration(BlipConfig.from_pretrained(folder))
        processor = BlipProcessor.from_pretrained(folder)
    text, tokenizer = blip.config.text_config, processor.tokenizer
    text.bos_token_id = tokenizer.bos_token_id or text.bos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    colours = processor.image_processor
    return Captioner(blip, tokenizer, vocabulary_size, colours.image_mean, colours.image_std)


def caption_all(model, store, rows, beams=3, device="auto", batch_size=64):
    """Caption the images of some rows.

    Parameters
    ----------
    model : Captioner
        Moved to the device.
    store : rsdlib.data.Store or alike
    rows : array of int (n,)
    beams : int
        1 is greedy.
    device : str
    batch_size : int

    Returns
    -------
    list of str (n)
    """
    on, captions = runtime.device(device), []
    with evaluating(model.to(on)):
        for start in runtime.track(range(0, len(rows), batch_size), "captioning"):
            images = torch.from_numpy(store.batch(rows[start : start + batch_size])).to(on)
            captions += model.caption(images, beams)
    return captions
