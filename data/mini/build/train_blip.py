"""Train MiniBLIP to caption renders: ``python data/mini/build/train_blip.py``.

It comes after ``train_encoder.py vit``.

Li et al. (2022): a vision transformer and a text decoder that attends to it, trained with the
language-modelling loss alone. As there, the vision transformer begins as a pretrained one, here
ViT-mini. The captions say plainly what a picture shows.
"""

import common
import numpy as np
import torch
import torch.nn.functional as F
from corpus import NAMES, Corpus
from scenes import caption
from sprites import NOUNS
from torch import nn
from wordpieces import bert_tokenizer

from rsdlib import files, runtime
from rsdlib.data import weights_key

LENGTH = 24  # tokens of a caption
LAYERS = 4  # of ViT-mini's six, from below
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FOLDER = common.MINI / "blip"


class MiniBLIP(nn.Module):
    """`BlipForConditionalGeneration` on uint8 images."""

    def __init__(self, vit, tokenizer):
        super().__init__()
        from transformers import (
            BlipConfig,
            BlipForConditionalGeneration,
            BlipTextConfig,
            BlipVisionConfig,
        )

        width = vit.embed_dim
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features,
            num_hidden_layers=LAYERS,
            num_attention_heads=vit.blocks[0].attn.num_heads,
            image_size=64,
            patch_size=8,
            layer_norm_eps=1e-6,
            initializer_range=0.02,
        )
        special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        special |= {"eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id}
        text = BlipTextConfig(
            **TEXT,
            **special,
            vocab_size=len(tokenizer),
            encoder_hidden_size=width,
            max_position_embeddings=64,
        )
        self.blip = BlipForConditionalGeneration(
            BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        )
        self.blip.vision_model.load_state_dict(vision_weights(vit))

    def forward(self, images, tokens):
        """Map uint8 images (b, 3, 64, 64) and tokens (b, 24) to next-token logits."""
        pixels = (images.float() - 127.5) / 127.5
        seen = (tokens != self.blip.config.text_config.pad_token_id).long()
        return self.blip(pixel_values=pixels, input_ids=tokens, attention_mask=seen).logits


def vision_weights(vit):
    """Rename the weights of ViT's lower layers to those of `BlipVisionModel`."""
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
    }
    parts = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    for layer in range(LAYERS):
        renamed = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv"}
        renamed |= {"attn.proj": "self_attn.projection", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        parts |= {
            f"blocks.{layer}.{old}": f"encoder.layers.{layer}.{new}" for old, new in renamed.items()
        }
    names |= {
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in parts.items()
        for kind in ("weight", "bias")
    }
    return {names[name]: value for name, value in vit.state_dict().items() if name in names}


def objective(model, batch):
    """Cross entropy of the next token; for each picture the share of tokens that are right."""
    logits, following = (
        model(batch["input"], batch["tokens"])[:, :-1].float(),
        batch["tokens"][:, 1:],
    )
    counts = following != model.blip.config.text_config.pad_token_id
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(
        following
    )
    right = (logits.argmax(-1) == following) & counts
    return (losses * counts).sum() / counts.sum(), right.sum(1) / counts.sum(1)


def captions(corpus):
    """Return what every picture of the corpus shows, in words."""
    labels = corpus.labels
    columns = zip(labels["noun"], labels["count"], labels["setting"], labels["medium"], strict=True)
    return [
        caption(
            [NAMES["noun"][i] for i in np.flatnonzero(nouns)],
            int(count),
            NAMES["setting"][s],
            NAMES["medium"][m],
        )
        for nouns, count, s, m in columns
    ]


def noun_recall(texts, nouns):
    """Return the share of the nouns in the pictures (n, 60) that the captions name.

    In the singular or the plural.
    """
    named = 0
    for text, row in zip(texts, nouns, strict=True):
        padded = f" {text} "
        for i in np.flatnonzero(row):
            noun = NOUNS[NAMES["noun"][i]]
            named += f" {noun.singular} " in padded or f" {noun.plural} " in padded
    return named / nouns.sum()


def generate(blip, tokenizer, images):
    """Caption uint8 images (b, 3, 64, 64) greedily."""
    with torch.inference_mode():
        tokens = blip.generate(
            pixel_values=(images.float() - 127.5) / 127.5,
            max_length=LENGTH,
            num_beams=1,
            do_sample=False,
        )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def main():
    """Learn the tokenizer, train, report, export."""
    import timm
    from transformers import BlipImageProcessor, BlipProcessor

    chosen = common.options(__doc__, epochs=2, batch=64, lr=1e-3)
    corpus = Corpus(chosen.renders)
    texts = captions(corpus)
    tokenizer = bert_tokenizer(corpus.prompts + texts)
    tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="np")[
        "input_ids"
    ].astype(np.int64)
    tokens[:, 0] = tokenizer.bos_token_id  # BLIP's decoder begins with [DEC]
    data = common.Pictures(corpus, {"tokens": tokens}, *corpus.split())
    common.seeded("blip", chosen.seed)
    vit = timm.create_model(f"local-dir:{common.MINI / 'vit'}", pretrained=True)
    model = MiniBLIP(vit, tokenizer)
    settings = common.config(chosen, batch_size=chosen.batch, lr=chosen.lr)
    start = weights_key(vit)
    common.train(
        "blip", model, data, settings, objective, {"text": TEXT, "layers": LAYERS, "vision": start}
    )
    model.cpu().eval()
    held = data.val
    said = [
        text
        for rows in np.array_split(held, 16)
        for text in generate(model.blip, tokenizer, torch.from_numpy(corpus.images(rows)))
    ]
    print({"noun recall": round(float(noun_recall(said, corpus.labels["noun"][held])), 4)})
    print(*(f"{said[i]}   <-   {texts[held[i]]}" for i in range(8)), sep="\n")
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 64, "width": 64}}
    BlipProcessor(BlipImageProcessor(**colours), tokenizer).save_pretrained(FOLDER)
    common.save_half(model.blip, FOLDER)
    runtime.log(f"written: {files.relative(FOLDER)}")


if __name__ == "__main__":
    main()
