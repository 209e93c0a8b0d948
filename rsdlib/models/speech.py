"""What an encoder can say: the names of its classes, spoken in the space of prompt embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from rsdlib.data import embed_cached
from rsdlib.models.encoders import clip_pair, open_timm


class Speech(nn.Module):
    """Maps an encoder's features to the mean embedding of the names it would give the image.

    s(x) = sum_k p_k e_k, with p = softmax((W x + b) / T) over the encoder's own classes and e_k the
    sentence embedding of the k-th class's name. Nothing here is trained. Differs from the paper:
    there, a head learns all of a prompt from features that say no word; where pairs are few, words
    that the encoder knows already say more.

    Parameters
    ----------
    weight : Tensor (k, p)
    bias : Tensor (k,)
    embeddings : Tensor (k, d)
        Of the names, unit rows.
    cosines : bool
        The classifier reads features of unit length, as CLIP's does.
    """

    def __init__(self, weight, bias, embeddings, cosines=False):
        super().__init__()
        self.cosines = cosines
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)
        self.embeddings, self.temperature = nn.Buffer(embeddings), nn.Buffer(torch.ones(()))

    @classmethod
    def blank(cls, k, p, d=384, cosines=False):
        """Return one of the right shape, whose values are to be loaded."""
        return cls(torch.zeros(k, p), torch.zeros(k), torch.zeros(k, d), cosines)

    def log_probabilities(self, features):
        """Map features (b, p) to the classes' log-probabilities (b, k)."""
        with torch.autocast(features.device.type, enabled=False):  # a rounded score is another word
            features = features.float()
            features = F.normalize(features, dim=1) if self.cosines else features
            scores = F.linear(features, self.weight, self.bias)
            return F.log_softmax(scores / self.temperature, dim=1)

    def log_odds(self, features):
        """Map features (b, p) to log p_k / (1 - p_k), what a sigmoid takes back to p_k: (b, k)."""
        logs = self.log_probabilities(features).clamp(max=-1e-4)
        return logs - torch.log(-torch.expm1(logs))

    def forward(self, features):
        """Map features (b, p) to s(x) (b, d); the surer, the longer."""
        with torch.autocast(features.device.type, enabled=False):
            return self.log_probabilities(features).exp() @ self.embeddings


def open_speech(config, words=()):
    """Return what the encoder of a `config.BackboneConfig` can say.

    Parameters
    ----------
    config : rsdlib.config.BackboneConfig
    words : sequence of str
        What a CLIP is asked for; a classifier has names of its own.

    Returns
    -------
    names : tuple of str
        Of the k classes, synonyms separated by commas; empty if the encoder says nothing.
    speech : Speech or None

    Raises
    ------
    ModelNotFoundError
        See `create`.
    """
    names, classifier = (), None
    if config.library == "timm" and config.pretrained:
        names, classifier = _classes(config)
    elif config.library == "open_clip" and words and not config.options.get("mlp"):
        names, classifier = tuple(words), _asking(config, words)
    if not names:
        return (), None
    embeddings = torch.from_numpy(embed_cached(names))
    return names, Speech(*classifier, embeddings, cosines=config.library == "open_clip")


def _classes(config):
    """Return the names of a timm model's ImageNet classes with its classifier (W, b)."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    body = open_timm(config, config.pretrained, classes=True)
    classifier, subset = body.get_classifier(), infer_imagenet_subset(body)
    if subset is None or not isinstance(classifier, nn.Linear):
        return (), None
    names = tuple(ImageNetInfo(subset).label_descriptions())
    return names, (classifier.weight.detach(), classifier.bias.detach())


def _asking(config, words):
    """Return CLIP's zero-shot classifier (W, b) of some words (Radford et al., 2021, 3.1)."""
    _, read = clip_pair(config, device="cpu")
    weight = 100 * torch.from_numpy(read([f"a photo of {word}" for word in words]))
    return weight, torch.zeros(len(words))
