"""The joint objective of the paper's Fig. 1: prompt-embedding regression and multi-label vocabulary classification."""

from dataclasses import dataclass

import torch.nn.functional as F


def joint_loss(embedding, logits, target, labels, weight=0.1, huber=0.0):
    """L = L_cos + weight * L_cls (+ huber * L_huber), each a mean over the batch, in float32.

    L_cos = mean(1 - cos(f(x), y)); L_cls is the multi-label binary cross-entropy over the m words of the vocabulary (paper,
    Fig. 1; weight = 0.1, supplementary section 7). The Huber term on the embeddings is in the authors' code only.

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
    """What `rsdlib.training.fit` minimises for a `PromptRegressor`: the joint loss, and the cosine similarity of each sample."""

    weight: float = 0.1
    huber: float = 0.0

    def __call__(self, model, batch):
        """Return the loss, a scalar, and the similarities (b,) between prediction and target."""
        embedding, logits = model(batch["input"])
        loss = joint_loss(embedding, logits, batch["target"], batch.get("labels"), self.weight, self.huber)
        return loss, F.cosine_similarity(embedding.detach().float(), batch["target"].float())
