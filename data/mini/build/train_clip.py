"""Train MiniCLIP on renders and their prompts: ``python data/mini/build/train_clip.py``.

Radford et al. (2021): the symmetric cross entropy of image-text similarities within a batch,
section 2.3. The model is open_clip's; its text tower is also written as the ``CLIPTextModel`` that
the mini Stable Diffusion reads prompts with.
"""

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import FRESH
from corpus import Corpus
from torch import nn
from wordpieces import CONTEXT, clip_tokenizer

from rsdlib import files

VISION = {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 4}
EMBED = 128
FOLDER = common.MINI / "clip"
DIFFUSION = common.MINI / "stable-diffusion"


class MiniCLIP(nn.Module):
    """open_clip's CLIP on uint8 images."""

    def __init__(self, words):
        super().__init__()
        import open_clip

        self.clip = open_clip.model.CLIP(EMBED, VISION, {**TEXT, "vocab_size": words})

    def forward(self, images, tokens):
        """Map uint8 images (b, 3, 64, 64) and tokens (b, 40) to unit embeddings (b, 128) each.

        And to the scale of their logits.
        """
        pixels = (images.float() - 127.5) / 127.5
        return self.clip(pixels, tokens)


def objective(model, batch):
    """Symmetric cross entropy over the batch; for each image whether its prompt is nearest."""
    images, texts, scale = model(batch["input"], batch["tokens"])
    logits = (scale * images @ texts.T).float()
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float()


def text_model(clip, tokenizer):
    """Return the text tower as a `transformers.CLIPTextModel` with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width = TEXT["width"]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=EMBED,
            num_hidden_layers=TEXT["layers"],
            num_attention_heads=TEXT["heads"],
            max_position_embeddings=CONTEXT,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    source, weights = clip.state_dict(), {}
    weights["embeddings.token_embedding.weight"] = source["token_embedding.weight"]
    weights["embeddings.position_embedding.weight"] = source["positional_embedding"]
    renamed = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(TEXT["layers"]):
        theirs, ours = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for part, value in zip(
                "qkv", source[f"{theirs}attn.in_proj_{kind}"].chunk(3), strict=True
            ):
                weights[f"{ours}self_attn.{part}_proj.{kind}"] = value
            weights |= {
                f"{ours}{new}.{kind}": source[f"{theirs}{old}.{kind}"]
                for old, new in renamed.items()
            }
    weights |= {
        f"final_layer_norm.{kind}": source[f"ln_final.{kind}"] for kind in ("weight", "bias")
    }
    prefix = (
        "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    )
    weights = {prefix + name: value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise RuntimeError(
            f"CLIPTextModel has other names: missing {missing}, unexpected {unexpected}"
        )
    return model.eval()


def export(model, tokenizer):
    """Write open_clip's folder, and tokenizer and text encoder of the diffusion pipeline."""
    text = {**TEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": "mini-clip"}
    colours = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    settings = {
        "model_cfg": {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": text},
        "preprocess_cfg": colours,
    }
    files.write_json(FOLDER / "open_clip_config.json", settings)
    files.save_arrays(FOLDER / "open_clip_model.safetensors", common.half(model.clip))
    tokenizer.save_pretrained(FOLDER)
    tokenizer.save_pretrained(DIFFUSION / "tokenizer")
    common.save_half(text_model(model.clip, tokenizer), DIFFUSION / "text_encoder")


def recall(images, texts, group=100):
    """Return the share of images whose own text is the nearest of `group`.

    Over disjoint groups of unit embeddings (n, d).
    """
    starts = range(0, len(images) - group + 1, group)
    hits = [
        (images[i : i + group] @ texts[i : i + group].T).argmax(1) == np.arange(group)
        for i in starts
    ]
    return round(float(np.mean(hits)), 4)


def shipped_recall(corpus):
    """Measure the recall of the model as it ships, opened by open_clip itself."""
    import open_clip

    name = f"local-dir:{FOLDER}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    tokens = {"tokens": tokenizer(corpus.prompts).numpy()}
    data = common.Pictures(corpus, tokens, np.arange(0), np.arange(len(corpus)))

    def embed(batch):
        pixels = (batch["input"].float() - 127.5) / 127.5
        images, texts = (
            clip.encode_image(pixels, normalize=True),
            clip.encode_text(batch["tokens"], normalize=True),
        )
        return {"images": images, "texts": texts}

    found = common.mapped(embed, data, data.val)
    return recall(found["images"], found["texts"])


def main():
    """Learn the tokenizer, train, report, export."""
    chosen = common.options(__doc__, epochs=2, batch=128, lr=1e-3)
    corpus = Corpus(chosen.renders)
    tokenizer = clip_tokenizer(corpus.prompts)
    tokens = tokenizer(corpus.prompts, padding="max_length", truncation=True, return_tensors="np")[
        "input_ids"
    ].astype(np.int64)
    data = common.Pictures(corpus, {"tokens": tokens}, *corpus.split())
    common.seeded("clip", chosen.seed)
    model = MiniCLIP(len(tokenizer))
    settings = common.config(chosen, batch_size=chosen.batch, lr=chosen.lr, weight_decay=0.1)
    common.train(
        "clip", model, data, settings, objective, {"vision": VISION, "text": TEXT, "embed": EMBED}
    )
    model.cpu().eval()
    export(model, tokenizer)
    truncated = float(
        np.mean(
            [len(ids) > CONTEXT for ids in tokenizer(corpus.prompts, verbose=False)["input_ids"]]
        )
    )
    print(
        {
            "recall@1 of 100 fresh renders": shipped_recall(Corpus(4096, seed=FRESH)),
            "prompts cut off": round(truncated, 5),
        }
    )


if __name__ == "__main__":
    main()
