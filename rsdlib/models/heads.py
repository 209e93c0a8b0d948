"""The paper's Fig. 3 and Fig. 1: an embedding and a vocabulary head on an encoder, their loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rsdlib.errors import ConfigError

HEADS = ("separate", "concat", "sequential")


class PromptRegressor(nn.Module):
    """Predicts a prompt's embedding and the words in it from an image.

    Parameters
    ----------
    backbone : nn.Module
        Any module that maps a batch of inputs to features (b, p) and states p as ``features``. One
        that reads uint8 images (b, 3, s, s) and states s as ``image_size`` needs no more to be
        trained with all the rest.
    head : {"sequential", "separate", "concat"}
        ``separate``: both heads read the features. ``concat``: the vocabulary logits join the
        features that the embedding head reads. ``sequential``: the vocabulary head reads the
        predicted embedding (what the authors' code runs).
    vocabulary_size : int
        m; 0 leaves the vocabulary head out.
    embedding_size : int
        d.
    """

    def __init__(self, backbone, head="sequential", vocabulary_size=1000, embedding_size=384):
        super().__init__()
        if head not in HEADS:
            raise ConfigError(f"head {head!r} is unknown", f"Use one of {HEADS}.")
        self.backbone, self.arrangement, self.vocabulary_size = backbone, head, vocabulary_size
        p, m, d = backbone.features, vocabulary_size, embedding_size
        self.embedding_head = nn.Linear(p + m if head == "concat" else p, d)
        self.vocabulary_head = nn.Linear(d if head == "sequential" else p, m) if m else None

    def forward(self, batch):
        """Return unit embeddings (b, d) and vocabulary logits (b, m), or None for m = 0."""
        features = self.backbone(batch)  # (b, p)
        return self.heads(features)

    def heads(self, features):
        """Map features (b, p) to embeddings (b, d) and logits (b, m)."""
        logits = None
        if self.vocabulary_head is not None and self.arrangement != "sequential":
            logits = self.vocabulary_head(features)
            if self.arrangement == "concat":
                features = torch.cat([features, logits], dim=1)  # (b, p + m)
        embedding = self.embedding_head(features)  # (b, d)
        if self.vocabulary_head is not None and self.arrangement == "sequential":
            logits = self.vocabulary_head(embedding)
        return F.normalize(embedding.float(), dim=1), logits

    def probe(self, features, target, ridge=0.01):
        """Start the embedding head at the ridge regression of targets on features.

        That is linear probing, then fine-tuning. Differs from the paper: its head starts at random,
        and its training has a thousand times as many steps to mend the features that the first,
        arbitrary gradients spoil (Kumar et al., 2022).

        Parameters
        ----------
        features : Tensor (n, p)
        target : Tensor (n, d)
        ridge : float
            Strength, as a share of the features' total variance.
        """
        features, target = features.double(), target.double()
        centre, middle = features.mean(dim=0), target.mean(dim=0)
        centred = features - centre
        gram = centred.T @ centred
        gram.diagonal().add_(ridge * len(features) * centred.var())
        weight = torch.linalg.solve(gram, centred.T @ (target - middle)).T  # (d, p)
        with torch.no_grad():
            self.embedding_head.weight.zero_()  # in "concat", what reads logits starts silent
            self.embedding_head.weight[:, : weight.shape[1]] = weight
            self.embedding_head.bias.copy_(middle - weight @ centre)


def joint_loss(embedding, logits, target, labels, weight=0.1, huber=0.0):
    """L = L_cos + weight * L_cls (+ huber * L_huber), each a mean over the batch, in float32.

    L_cos = mean(1 - cos(f(x), y)); L_cls is the multi-label binary cross-entropy over the m words
    of the vocabulary (paper, Fig. 1; weight = 0.1, supplementary section 7). The Huber term on the
    embeddings is in the authors' code only.

    Parameters
    ----------
    embedding : Tensor (b, d)
        Predicted prompt embeddings.
    logits : Tensor (b, m) or None
        Vocabulary scores before the sigmoid; None trains the embedding alone.
    target : Tensor (b, d)
        Embeddings of the true prompts.
    labels : Tensor (b, m) or None
        1 where the prompt holds the word.
    weight, huber : float

    Returns
    -------
    Tensor ()
    """
    embedding, target = embedding.float(), target.float()
    loss = (1 - F.cosine_similarity(embedding, target)).mean()
    if logits is not None and weight:
        classification = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        loss = loss + weight * classification
    if huber:
        loss = loss + huber * F.huber_loss(embedding, target)
    return loss


@dataclass(frozen=True)
class JointObjective:
    """What `rsdlib.training.fit` minimises for a `PromptRegressor`: the joint loss.

    A pair's similarity is the cosine of its predicted and true embedding.
    """

    weight: float = 0.1
    huber: float = 0.0

    def __call__(self, model, batch):
        """Return the loss, a scalar, and the similarities (b,) between prediction and target."""
        embedding, logits = model(batch["input"])
        target, labels = batch["target"], batch.get("labels")
        loss = joint_loss(embedding, logits, target, labels, self.weight, self.huber)
        return loss, F.cosine_similarity(embedding.detach().float(), target.float())
