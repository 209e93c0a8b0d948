"""The paper's Fig. 3 and Fig. 1: an embedding and a vocabulary head on an encoder, their loss."""

import functools
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
    speech : Speech, optional
        What the backbone can say. ``voice`` times that joins the embedding head's prediction.
    reads : {"features", "spoken", "both"}
        What the embedding head reads; with ``"both"``, features and spoken feature of unit length.
    named : bool
        The vocabulary is the classes of `speech`: its head corrects what they are given.
    """

    def __init__(
        self,
        backbone,
        head="sequential",
        vocabulary_size=1000,
        embedding_size=384,
        *,
        speech=None,
        reads="features",
        named=False,
    ):
        super().__init__()
        if head not in HEADS:
            raise ConfigError(f"head {head!r} is unknown", f"Use one of {HEADS}.")
        self.backbone, self.arrangement, self.vocabulary_size = backbone, head, vocabulary_size
        self.speech, self.reads, self.named = speech, reads, named
        self.register_buffer("voice", torch.zeros(()) if speech is not None else None)
        m, d = vocabulary_size, embedding_size
        p = {"features": backbone.features, "spoken": d, "both": backbone.features + d}[reads]
        self.embedding_head = nn.Linear(p + m if head == "concat" else p, d)
        self.vocabulary_head = nn.Linear(d if head == "sequential" else p, m) if m else None
        if named:
            for learnt in self.vocabulary_head.parameters():
                nn.init.zeros_(learnt)

    def forward(self, batch):
        """Return unit embeddings (b, d) and vocabulary logits (b, m), or None for m = 0."""
        return self.heads(self.backbone(batch))

    def heads(self, features):
        """Map features (b, p) to embeddings (b, d) and logits (b, m)."""
        read, logits = torch.cat(self.blocks(features), dim=1), None
        if self.vocabulary_head is not None and self.arrangement != "sequential":
            logits = self.vocabulary_head(read)
            if self.arrangement == "concat":
                read = torch.cat([read, logits], dim=1)  # (b, p + m)
        embedding = self.embedding_head(read)  # (b, d)
        if self.speech is not None:
            embedding = embedding + self.voice * self.speech(features)
        if self.vocabulary_head is not None and self.arrangement == "sequential":
            logits = self.vocabulary_head(embedding)
        if self.named:
            logits = logits + self.speech.log_odds(features)
        return F.normalize(embedding.float(), dim=1), logits

    def blocks(self, features):
        """Return what the heads read, one or two blocks (b, p), each regularised on its own."""
        if self.reads == "features":
            return [features]
        both = [F.normalize(block.float(), dim=1) for block in (features, self.speech(features))]
        return both if self.reads == "both" else both[1:]

    def only_speak(self):
        """Become the zero-shot reader: the speech alone answers, nothing has been learnt."""
        for learnt in self.embedding_head.parameters():
            nn.init.zeros_(learnt)
        self.voice.fill_(1)

    def probe(self, features, target, held=None, shrink=0.01):
        """Start the embedding head at the ridge regression of targets on what it reads.

        That is linear probing, then fine-tuning. Differs from the paper: its head starts at random,
        and its training has a thousand times as many steps to mend the features that the first,
        arbitrary gradients spoil (Kumar et al., 2022).

        Parameters
        ----------
        features : Tensor (n, p)
        target : Tensor (n, d)
        held : tuple of Tensor (v, p) and Tensor (v, d), optional
            Validation features and targets, on which each block's strength is chosen, and what
            `speech` has to choose: its temperature, and the voice it has in the prediction.
        shrink : float
            Without `held`: the penalty, as a share of the features' mean variance.
        """
        if held is None:
            weight, bias = ridge(self.blocks(features), target, shrink=shrink)
        else:
            weight, bias = self._choose(features, target, *held)
        with torch.no_grad():
            self.embedding_head.weight.zero_()  # in "concat", what reads logits starts silent
            self.embedding_head.weight[:, : weight.shape[1]] = weight
            self.embedding_head.bias.copy_(bias)

    def _choose(self, features, target, seen, truth):
        """Return the regression (W, b) that is best on validation pairs; set the speech's two."""

        def cosines(pred):
            return F.cosine_similarity(pred, truth.double())

        def warmth(temperature):
            self.speech.temperature.fill_(temperature)
            return cosines(self.speech(seen).double()).mean().item()

        if self.speech is not None:
            self.speech.temperature.fill_(max(TEMPERATURES, key=warmth))
        blocks, held = self.blocks(features), torch.cat(self.blocks(seen), dim=1).double()

        @functools.cache
        def fitted(strengths):
            weight, bias = ridge(blocks, target, strengths)
            return cosines(held @ weight.T + bias).mean().item(), weight, bias

        strengths = (STRENGTHS[len(STRENGTHS) // 2],) * len(blocks)
        for block in [*range(len(blocks))] * 2:  # one after the other, twice
            tried = [(*strengths[:block], s, *strengths[block + 1 :]) for s in STRENGTHS]
            strengths = max(tried, key=lambda choice: fitted(choice)[0])
        _, weight, bias = fitted(strengths)
        if self.speech is not None:
            pred, said = held @ weight.T + bias, self.speech(seen).double()
            self.voice.fill_(loudest({voice: cosines(pred + voice * said) for voice in VOICES}))
        return weight, bias


TEMPERATURES = (0.5, 1.0, 1.5, 2.0)
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
VOICES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)


def loudest(heard):
    """Return the largest voice that costs less than it is sure of, by the one-standard-error rule.

    On validation pictures of the own kind voices differ little; on those of other kinds a louder
    one is better (Hastie, Tibshirani and Friedman, 2009, section 7.10, on the rule).

    Parameters
    ----------
    heard : dict of float to Tensor (v,)
        Voice to the validation pictures' cosine similarities.

    Returns
    -------
    float
    """
    best = max(heard.values(), key=torch.mean)
    lost = {voice: best - cosines for voice, cosines in heard.items()}
    return max(v for v, loss in lost.items() if loss.mean() <= loss.std() / len(loss) ** 0.5)


def ridge(blocks, target, strengths=None, shrink=0.01):
    """Return W (d, p) and b (d,), the ridge regression of targets on blocks of features.

    min_W |Y - X W^T - b|^2 + sum_j |W_j|^2 v_j / s_j over the blocks j, with v_j the variance of a
    block, summed over its features: s_j is how much more than noise the block is trusted to tell.

    Parameters
    ----------
    blocks : list of Tensor (n, p_j)
    target : Tensor (n, d)
    strengths : sequence of float, optional
        s_j; by default, one penalty for all features.
    shrink : float
        That penalty, as a share of the features' mean variance.
    """
    X, Y = torch.cat(blocks, dim=1).double(), target.double()  # (n, p), (n, d)
    centre, middle = X.mean(dim=0), Y.mean(dim=0)
    X, Y = X - centre, Y - middle
    if strengths is None:
        penalty = X.new_full((X.shape[1],), shrink * len(X) * X.var())
    else:
        parts = zip(X.split([block.shape[1] for block in blocks], dim=1), strengths, strict=True)
        penalties = [(part.square().mean(dim=0).sum() / s).expand_as(part[0]) for part, s in parts]
        penalty = torch.cat(penalties)
    penalty = penalty.clamp(min=1e-9)  # features that are all the same tell nothing
    if len(X) < X.shape[1]:  # the smaller of two equal systems
        scaled = X / penalty
        weight = (scaled.T @ torch.linalg.solve(scaled @ X.T + torch.eye(len(X)).to(X), Y)).T
    else:
        weight = torch.linalg.solve(X.T @ X + penalty.diag(), X.T @ Y).T
    return weight, middle - weight @ centre


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
        loss = loss + weight * F.binary_cross_entropy_with_logits(logits.float(), labels.float())
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
