"""The joint loss and the heads of the paper's Fig. 3; encoders and their own preprocessing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import Backbone

from rsdlib import backbones, config, registry
from rsdlib.errors import CheckpointError, ConfigError, ModelNotFoundError
from rsdlib.losses import JointObjective, joint_loss
from rsdlib.model import HEADS, PromptRegressor

torch.manual_seed(0)
target = F.normalize(torch.randn(6, 12), dim=1)
logits = torch.randn(6, 20)
labels = (torch.rand(6, 20) < 0.2).to(torch.uint8)
images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)


def test_loss_of_the_answer_is_zero_and_of_its_opposite_two():
    assert joint_loss(target, None, target, None) == pytest.approx(0, abs=1e-6)
    assert joint_loss(-target, None, target, None) == pytest.approx(2, abs=1e-6)


def test_loss_ignores_the_length_of_the_prediction():
    guess = torch.randn(6, 12)
    torch.testing.assert_close(joint_loss(guess, logits, target, labels), joint_loss(5 * guess, logits, target, labels))


def test_loss_is_the_sum_of_its_terms_by_hand():
    guess = F.normalize(torch.randn(6, 12), dim=1)
    cos = (1 - (guess * target).sum(1)).mean()
    p = logits.sigmoid()
    bce = -(labels * p.log() + (1 - labels.float()) * (1 - p).log()).mean()
    torch.testing.assert_close(joint_loss(guess, logits, target, labels, weight=0.3), cos + 0.3 * bce)
    huber = (0.5 * (guess - target) ** 2).mean()  # all differences are below 1 apart from their sign
    torch.testing.assert_close(joint_loss(guess, None, target, None, huber=2.0), cos + 2 * huber, atol=1e-3, rtol=1e-3)


def test_weight_zero_leaves_the_vocabulary_out():
    assert joint_loss(target, logits, target, labels, weight=0.0) == joint_loss(target, None, target, None)


def test_objective_returns_each_samples_similarity():
    model = PromptRegressor(Backbone(0.0), "sequential", 20, 12)
    loss, similarity = JointObjective(0.1)(model, {"input": images, "target": target, "labels": labels})
    embedding, found = model(images)
    torch.testing.assert_close(similarity, (embedding * target).sum(1))
    torch.testing.assert_close(loss, joint_loss(embedding, found, target, labels, 0.1))
    assert loss.requires_grad
    assert not similarity.requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_heads_give_unit_embeddings_and_one_logit_a_word(head):
    embedding, words = PromptRegressor(Backbone(), head, 20, 12)(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    assert words.shape == (6, 20)


def reads(model, output, module):
    """Tell whether `output` of the model depends on the parameters of `module`."""
    model.zero_grad()
    output(model(images)).sum().backward()
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_arrangements_differ_in_who_reads_whom():
    """The gradient tells: Fig. 3's first, second and third configuration."""
    separate, concat, sequential = (PromptRegressor(Backbone(0.0), head, 20, 12) for head in ("separate", "concat", "sequential"))
    first, second = lambda out: out[0][:, 0], lambda out: out[1]
    assert not reads(separate, first, separate.vocabulary_head)
    assert not reads(separate, second, separate.embedding_head)
    assert reads(concat, first, concat.vocabulary_head)
    assert not reads(concat, second, concat.embedding_head)
    assert reads(sequential, second, sequential.embedding_head)
    assert not reads(sequential, first, sequential.vocabulary_head)


def test_without_vocabulary_there_are_no_logits():
    assert PromptRegressor(Backbone(), "concat", 0, 12)(images)[1] is None


def test_unknown_head_is_named():
    with pytest.raises(ConfigError, match="'parallel'"):
        PromptRegressor(Backbone(), "parallel")


# --- encoders ---------------------------------------------------------------------------------------------------------------


def test_encoder_normalises_as_its_weights_expect():
    encoder = backbones.Encoder(torch.nn.Identity(), 3, 4, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1))
    out = encoder(images)
    by_hand = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(out, by_hand)


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_mini_vit_learns_from_its_own_size(profile):
    encoder = backbones.create(config.profile(profile).backbone("vit"))
    features = encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert encoder.image_size == 64
    assert features.shape == (2, encoder.features)
    features.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_paper_vit_has_the_papers_shape():
    """Architecture and preprocessing of the registered weights, without fetching them."""
    settings = config.replace(config.profile("paper").backbone("vit"), pretrained=False)
    encoder = backbones.create(settings)
    assert encoder.image_size == 224
    assert encoder.features == 768
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(86e6, rel=0.01)
    assert encoder.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    model = PromptRegressor(encoder)
    loss, _ = JointObjective()(
        model,
        {"input": torch.zeros(1, 3, 224, 224, dtype=torch.uint8), "target": torch.ones(1, 384), "labels": torch.zeros(1, 1000)},
    )
    loss.backward()
    assert np.isfinite(loss.item())


def test_any_timm_model_opens_at_its_own_size():
    encoder = backbones.create(config.replace(config.profile("mini").backbone("timm:resnet18"), pretrained=False))
    assert encoder.image_size == 224
    assert encoder.features == 512


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11", "vit_tiny_patch16_224", "resnet18"])
def test_features_are_as_many_as_stated(name):
    encoder = backbones.create(config.BackboneConfig("timm", name, pretrained=False))
    with torch.inference_mode():
        found = encoder.eval()(torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8))
    assert found.shape == (1, encoder.features)


def test_gradient_checkpointing_changes_no_gradient():
    settings = config.profile("smoke").backbone("vit")
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = backbones.create(config.replace(settings, gradient_checkpointing=checkpointing))
        encoder(torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)).sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_unknown_timm_model_is_named():
    with pytest.raises(ModelNotFoundError, match="no_such_model"):
        backbones.create(config.BackboneConfig("timm", "no_such_model", pretrained=False))


# --- registry ---------------------------------------------------------------------------------------------------------------


def test_weights_that_are_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"vit_base.*RSD_MODELS"):
        registry.locate("vit_base_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(ModelNotFoundError, match="not registered"):
        registry.locate("vit")


def test_override_folder_comes_first_and_its_bytes_are_checked(tmp_path, monkeypatch):
    folder = tmp_path / "all-MiniLM-L6-v2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"not the model")
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    with pytest.raises(CheckpointError, match="SHA-256"):
        registry.locate("all-MiniLM-L6-v2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors is missing"):
        registry.locate("all-MiniLM-L6-v2")


@pytest.mark.parametrize("head", HEADS)
def test_probed_head_is_the_ridge_regression(head):
    """With no ridge and targets that are linear in the features, the head starts where training should end."""
    features, backbone = torch.randn(200, 12) + 3, torch.nn.Identity()
    backbone.features = 12
    linear = features @ torch.randn(12, 7) + torch.randn(7)
    regressor = PromptRegressor(backbone, head, vocabulary_size=5, embedding_size=7)
    regressor.probe(features, linear, ridge=0.0)
    torch.testing.assert_close(regressor(features)[0], F.normalize(linear, dim=1), atol=1e-4, rtol=1e-4)
    regressor.probe(features, linear, ridge=1e9)
    mean = F.normalize(linear.mean(dim=0), dim=0).expand_as(linear)
    torch.testing.assert_close(regressor(features)[0], mean, atol=1e-4, rtol=1e-4)
