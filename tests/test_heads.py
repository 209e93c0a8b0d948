"""The joint loss and the heads of the paper's Fig. 3."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsdlib.errors import ConfigError
from rsdlib.models import HEADS, JointObjective, PromptRegressor, joint_loss, ridge

torch.manual_seed(0)
target = F.normalize(torch.randn(6, 12), dim=1)
logits = torch.randn(6, 20)
labels = (torch.rand(6, 20) < 0.2).to(torch.uint8)
images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)


class Own(nn.Module):
    """A researcher's own encoder: no base class, only what `PromptRegressor` asks for."""

    features, image_size = 16, 4

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU())

    def forward(self, images):
        return self.body(images.float() / 255)


def test_loss_of_the_answer_is_zero_and_of_its_opposite_two():
    assert joint_loss(target, None, target, None) == pytest.approx(0, abs=1e-6)
    assert joint_loss(-target, None, target, None) == pytest.approx(2, abs=1e-6)


def test_loss_ignores_the_length_of_the_prediction():
    guess = torch.randn(6, 12)
    loss, of_longer = (joint_loss(scale * guess, logits, target, labels) for scale in (1, 5))
    torch.testing.assert_close(loss, of_longer)


def test_loss_is_the_sum_of_its_terms_by_hand():
    guess = F.normalize(torch.randn(6, 12), dim=1)
    cos = (1 - (guess * target).sum(1)).mean()
    p = logits.sigmoid()
    bce = -(labels * p.log() + (1 - labels.float()) * (1 - p).log()).mean()
    loss = joint_loss(guess, logits, target, labels, weight=0.3)
    torch.testing.assert_close(loss, cos + 0.3 * bce)
    huber = (0.5 * (guess - target) ** 2).mean()  # all differences are below 1 apart from sign
    loss = joint_loss(guess, None, target, None, huber=2.0)
    torch.testing.assert_close(loss, cos + 2 * huber, atol=1e-3, rtol=1e-3)


def test_weight_zero_leaves_the_vocabulary_out():
    without = joint_loss(target, None, target, None)
    assert joint_loss(target, logits, target, labels, weight=0.0) == without


def test_objective_returns_each_samples_similarity():
    model = PromptRegressor(Own(), "sequential", 20, 12)
    batch = {"input": images, "target": target, "labels": labels}
    loss, similarity = JointObjective(0.1)(model, batch)
    embedding, words = model(images)
    torch.testing.assert_close(similarity, (embedding * target).sum(1))
    torch.testing.assert_close(loss, joint_loss(embedding, words, target, labels, 0.1))
    assert loss.requires_grad
    assert not similarity.requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_heads_give_unit_embeddings_and_one_logit_a_word(head):
    embedding, words = PromptRegressor(Own(), head, 20, 12)(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    assert words.shape == (6, 20)


def reads(model, output, module):
    """Tell whether `output` of the model depends on the parameters of `module`."""
    model.zero_grad()
    output(model(images)).sum().backward()
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_arrangements_differ_in_who_reads_whom():
    """The gradient tells: Fig. 3's first, second and third configuration."""
    separate, concat, sequential = (
        PromptRegressor(Own(), head, 20, 12) for head in ("separate", "concat", "sequential")
    )
    first, second = lambda out: out[0][:, 0], lambda out: out[1]
    assert not reads(separate, first, separate.vocabulary_head)
    assert not reads(separate, second, separate.embedding_head)
    assert reads(concat, first, concat.vocabulary_head)
    assert not reads(concat, second, concat.embedding_head)
    assert reads(sequential, second, sequential.embedding_head)
    assert not reads(sequential, first, sequential.vocabulary_head)


def test_without_vocabulary_there_are_no_logits():
    assert PromptRegressor(Own(), "concat", 0, 12)(images)[1] is None


def test_unknown_head_is_named():
    with pytest.raises(ConfigError, match="'parallel'"):
        PromptRegressor(Own(), "parallel")


@pytest.mark.parametrize("head", HEADS)
def test_probed_head_is_the_ridge_regression(head):
    """Without ridge, on targets linear in the features, it starts where training should end."""
    features, backbone = torch.randn(200, 12) + 3, nn.Identity()
    backbone.features = 12
    linear = features @ torch.randn(12, 7) + torch.randn(7)
    regressor = PromptRegressor(backbone, head, vocabulary_size=5, embedding_size=7)
    regressor.probe(features, linear, shrink=0.0)
    expected = F.normalize(linear, dim=1)
    torch.testing.assert_close(regressor(features)[0], expected, atol=1e-4, rtol=1e-4)
    regressor.probe(features, linear, shrink=1e9)
    mean = F.normalize(linear.mean(dim=0), dim=0).expand_as(linear)
    torch.testing.assert_close(regressor(features)[0], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strengths", [None, (1.0,)])
@pytest.mark.parametrize("features", [3, 30])
def test_features_that_are_all_the_same_predict_the_mean(strengths, features):
    known = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    weight, bias = ridge([torch.full((8, features), 0.1)], known, strengths)
    assert torch.allclose(bias + weight.sum(1) * 0.1, known.double().mean(dim=0))
