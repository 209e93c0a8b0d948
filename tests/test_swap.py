"""The U-Net swap and the sampling: identities for any encoder, sampler, batch, number of steps."""

import numpy as np
import pytest
import tiny
import torch

from rsdlib import config, models, runtime
from rsdlib.errors import BadTableError, BadValueError, CheckpointError
from rsdlib.models import sampling, swap_encoder
from rsdlib.models.unet import switch_step

PROMPTS = ["a fox in the snow", "two cats at night, watercolor"]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pipe(folder):
    return models.open_pipeline(folder, "cpu")


def own_encoder(folder):
    return models.create(config.BackboneConfig("diffusers", str(folder)))


@pytest.fixture(scope="module")
def encoder(folder):
    """Return an encoder that training has moved."""
    moved = own_encoder(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.1 * torch.randn_like(p)
    return moved


def sample(pipe, steps=6, prompts=PROMPTS, seeds=SEEDS, guidance=3.0):
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=noise, **how).images


def with_scheduler(pipe, name):
    """Return the pipeline with another sampler, everything else shared."""
    import diffusers

    again = type(pipe)(**pipe.components, requires_safety_checker=False)
    again.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    again.set_progress_bar_config(disable=True)
    return again


SCHEDULERS = [
    *("DDIMScheduler", "DPMSolverMultistepScheduler"),
    *("PNDMScheduler", "EulerDiscreteScheduler"),
]

# Before which step


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_never_swapping_changes_no_bit(pipe, encoder, scheduler):
    pipe = with_scheduler(pipe, scheduler)
    plain = sample(pipe)
    steps = len(pipe.scheduler.timesteps.unique())
    for start in (1.0, steps):
        np.testing.assert_array_equal(sample(swap_encoder(pipe, encoder, start)), plain)
    np.testing.assert_array_equal(sample(swap_encoder(pipe, encoder, 0, blend=0.0)), plain)
    images = [sample(swap_encoder(pipe, encoder, start)) for start in range(steps + 1)]
    change = [np.abs(image - plain).mean() for image in images]
    assert all(value > 0 for value in change[:-1])
    assert change[0] > change[-2]
    assert change[-1] == 0


def test_original_encoder_from_the_start_changes_no_bit(pipe, folder):
    np.testing.assert_array_equal(sample(swap_encoder(pipe, own_encoder(folder), 0)), sample(pipe))


def test_swapped_from_the_start_is_the_unet_with_that_encoder(pipe, encoder, folder):
    other = models.open_pipeline(folder, "cpu")
    models.into_unet(encoder, other.unet)
    np.testing.assert_array_equal(sample(swap_encoder(pipe, encoder, 0)), sample(other))


def test_a_batch_equals_single_prompts(pipe, encoder):
    swapped = swap_encoder(pipe, encoder, 2)
    together = sample(swapped)
    for i in range(2):
        alone = sample(swapped, prompts=PROMPTS[i : i + 1], seeds=SEEDS[i : i + 1])[0]
        np.testing.assert_allclose(alone, together[i], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_shares_and_numbers_of_steps_mean_the_same(pipe, encoder, steps, guidance):
    for start in range(steps + 1):
        by_number, by_share = (
            sample(swap_encoder(pipe, encoder, place), steps, guidance=guidance)
            for place in (start, start / steps)
        )
        np.testing.assert_array_equal(by_number, by_share)


def test_one_and_one_point_zero_are_opposites():
    assert switch_step(1, 50) == 1
    assert switch_step(1.0, 50) == 50
    assert switch_step(0, 50) == switch_step(0.0, 50) == 0
    assert switch_step(0.1, 50) == switch_step(np.float32(0.1), 50) == switch_step(np.int64(5), 50)
    for start in (-1, -0.1, 1.5, 51, float("nan")):
        with pytest.raises(BadValueError, match="is no step"):
            switch_step(start, 50)


# In whatever run


def with_turns(swapped, own, **how):
    """Sample; return the timesteps evaluated, by the pipeline's own U-Net and by the swapped."""
    turns = {"own": [], "all": []}
    hooks = [
        unet.register_forward_pre_hook(lambda _, inputs, name=name: turns[name].append(inputs[1]))
        for name, unet in (("own", own), ("all", swapped.unet))
    ]
    try:
        swapped(**{"prompt": PROMPTS[:1], "output_type": "latent", **how})
    finally:
        for hook in hooks:
            hook.remove()
    own, everything = ([float(t) for t in turns[name]] for name in turns)
    assert own == everything[: len(own)], "the pipeline's own comes first"
    return own, everything[len(own) :]


@pytest.mark.parametrize(
    ("scheduler", "evaluations"),
    [
        ("DDIMScheduler", [1, 1, 1]),
        ("LMSDiscreteScheduler", [1, 1, 1]),
        ("HeunDiscreteScheduler", [2, 2, 1]),
        ("KDPM2DiscreteScheduler", [2, 2, 1]),
    ],
)
def test_a_step_counts_once_however_often_it_is_evaluated(pipe, encoder, scheduler, evaluations):
    other = with_scheduler(pipe, scheduler)
    for start, guidance in ((1, 1.0), (2, 3.0), (1 / 3, 3.0), (1.0, 1.0)):
        how = {"num_inference_steps": 3, "guidance_scale": guidance}
        own, swapped = with_turns(swap_encoder(other, encoder, start), pipe.unet, **how)
        steps = switch_step(start, 3)
        assert len(own) == sum(evaluations[:steps])
        assert len(swapped) == sum(evaluations[steps:])


def test_a_timestep_that_a_sampler_repeats_is_one_step(pipe, encoder):
    from diffusers import PNDMScheduler

    other = with_scheduler(pipe, "DDIMScheduler")
    other.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    counts = []
    for start in (1, 2, 4):
        own, swapped = with_turns(swap_encoder(other, encoder, start), pipe.unet, **FOUR)
        counts.append((len(own), len(swapped)))
    assert counts == [(1, 4), (3, 2), (5, 0)]


FOUR = {"num_inference_steps": 4}


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_scheduler_of_ones_choice_set_after_the_swap(pipe, encoder, scheduler):
    import diffusers

    swapped = swap_encoder(pipe, encoder, 1)
    swapped.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    own, others = with_turns(swapped, pipe.unet, **FOUR)
    assert len(own) == swapped.scheduler.order
    assert max(others) <= own[-1]
    assert pipe.scheduler.timesteps is not swapped.scheduler.timesteps


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("handed_on", [True, False])
def test_image_to_image_counts_the_steps_that_are_left(pipe, encoder, scheduler, handed_on):
    """Also where the swapped U-Net is handed on, and the pipeline it was swapped in never runs."""
    import diffusers

    def image_to_image(pipe):
        kind = diffusers.StableDiffusionImg2ImgPipeline
        return kind(**pipe.components, requires_safety_checker=False)

    if handed_on:
        first = with_scheduler(pipe, "PNDMScheduler")  # has no timesteps before it runs
        swapped = image_to_image(swap_encoder(first, encoder, 1))
    else:
        swapped = swap_encoder(image_to_image(pipe), encoder, 1)
    swapped.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    swapped.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 6, "strength": 0.5, "image": picture}
    own, others = with_turns(swapped, pipe.unet, **how)
    assert len(set(own)) == swapped.scheduler.order
    assert others


def test_timesteps_and_sigmas_of_ones_own(pipe, encoder):
    for name, own in (
        ("DDPMScheduler", {"timesteps": [900, 500, 100]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 500, 100]}),
        ("EulerDiscreteScheduler", {"sigmas": [9.0, 3.0, 1.0, 0.1]}),
        ("HeunDiscreteScheduler", {"timesteps": [900, 500, 100]}),
    ):
        other = with_scheduler(pipe, name)
        before, after = with_turns(swap_encoder(other, encoder, 1), pipe.unet, **own)
        assert len(before) == other.scheduler.order
        assert before + after == other.scheduler.timesteps.tolist()


def test_runs_do_not_touch_each_other(pipe, encoder):
    """Several in a row, of any length, one that is interrupted, one that fails."""
    swapped = swap_encoder(with_scheduler(pipe, "HeunDiscreteScheduler"), encoder, 0.5)

    def stop(running, *_):
        running._interrupt = True
        return {}

    def fail(*_):
        raise KeyboardInterrupt

    for steps in (4, 2, 4):
        own, others = with_turns(swapped, pipe.unet, num_inference_steps=steps)
        assert (len(own), len(others)) == (steps, steps - 1)
        with_turns(swapped, pipe.unet, **FOUR, callback_on_step_end=stop)
        with pytest.raises(KeyboardInterrupt):
            with_turns(swapped, pipe.unet, **FOUR, callback_on_step_end=fail)
    own, others = with_turns(swapped, pipe.unet, **FOUR, num_images_per_prompt=2)
    assert (len(own), len(others)) == (4, 3)


def test_a_copy_counts_its_own_run(pipe, encoder):
    import copy

    swapped = swap_encoder(pipe, encoder, 1)
    with_turns(swapped, pipe.unet, num_inference_steps=2)
    twin = copy.deepcopy(swapped)
    twin.set_progress_bar_config(disable=True)
    own, others = with_turns(twin, twin.unet.forward.own, **FOUR)
    assert (len(own), len(others)) == (1, 3)
    before = sample(pipe)
    with torch.no_grad():
        next(twin.unet.forward.own.parameters()).zero_()
    np.testing.assert_array_equal(sample(pipe), before)


@pytest.mark.parametrize("moved", ["the swapped", "the one handed in"])
def test_either_pipeline_may_be_moved(folder, encoder, moved):
    pipe = models.open_pipeline(folder, "cpu")
    swapped = swap_encoder(pipe, encoder, 1)
    (swapped if moved == "the swapped" else pipe).to(torch.float64)
    own, others = with_turns(swapped, pipe.unet, **FOUR)
    assert (len(own), len(others)) == (1, 3)
    sample(pipe)


def test_a_swap_of_a_swap(pipe, encoder, folder):
    """The first encoder's swap comes first; its pipeline is not copied."""
    first = swap_encoder(pipe, encoder, 1)
    second = swap_encoder(first, own_encoder(folder), 2)
    assert second.text_encoder is pipe.text_encoder
    runs = [with_turns(second, unet, **FOUR)[0] for unet in (pipe.unet, first.unet)]
    assert [len(run) for run in runs] == [1, 2]


def test_a_loop_of_ones_own(pipe, encoder):
    """It may use the pipeline's scheduler; steps of another cannot be told."""
    from diffusers import EulerDiscreteScheduler

    swapped = swap_encoder(with_scheduler(pipe, "PNDMScheduler"), encoder, 1)
    prompt = torch.zeros(1, 8, pipe.unet.config.cross_attention_dim)
    latents = torch.zeros(1, 4, 16, 16)
    with pytest.raises(BadValueError, match="cannot tell the step of timestep 900"):
        swapped.unet(latents, torch.tensor(900), prompt)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    swapped.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    swapped.scheduler.set_timesteps(3)
    with torch.no_grad():
        for _ in range(2):
            for timestep in swapped.scheduler.timesteps:
                swapped.unet(latents, timestep, encoder_hidden_states=prompt)
    hook.remove()
    assert len(calls) == 2


# What is swapped


def test_pipeline_handed_in_is_never_changed_and_shares_what_it_can(pipe, encoder):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    unet, plain = pipe.unet, sample(pipe)
    swapped = swap_encoder(pipe, encoder, 1, blend=0.7)
    sample(swapped)
    assert pipe.unet is unet
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    np.testing.assert_array_equal(sample(pipe), plain)
    assert swapped.vae is pipe.vae
    assert swapped.text_encoder is pipe.text_encoder
    own, old = ({p.data_ptr() for p in net.parameters()} for net in (swapped.unet, unet))
    own -= old
    assert len(own) == len(list(encoder.parameters()))


def test_blend_runs_from_one_encoder_to_the_other(pipe, encoder):
    plain, whole = sample(pipe), sample(swap_encoder(pipe, encoder, 0))
    images = [sample(swap_encoder(pipe, encoder, 0, blend=blend)) for blend in (0.0, 0.1, 1.0)]
    distance = [np.abs(image - plain).mean() for image in images]
    assert distance[0] == 0
    assert 0 < distance[1] < distance[2] == pytest.approx(np.abs(whole - plain).mean())


@pytest.mark.parametrize(
    ("start", "blend", "words"),
    [(-1, 1.0, "no step"), (1.5, 1.0, "no step"), (0, 1.5, "blend"), (0, -1.1, "blend")],
)
def test_settings_out_of_range_are_named(pipe, encoder, start, blend, words):
    with pytest.raises(BadValueError, match=words):
        swap_encoder(pipe, encoder, start, blend)


def test_swap_after_the_last_step_is_refused(pipe, encoder):
    with pytest.raises(BadValueError, match=r"start_step = 7 .* number up to 6"):
        sample(swap_encoder(pipe, encoder, 7))


def test_encoder_of_another_model_is_refused(pipe, tmp_path):
    other = own_encoder(tiny.stable_diffusion(tmp_path, cross=24))
    with pytest.raises(CheckpointError, match="does not fit this U-Net"):
        swap_encoder(pipe, other, 1)


# Sampling


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "EulerAncestralDiscreteScheduler"])
def test_noise_is_the_pipelines_own(pipe, scheduler):
    """Also where the sampler draws more of it on the way."""
    pipe = with_scheduler(pipe, scheduler)
    expected = (sample(pipe) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(models.sample(pipe, PROMPTS, SEEDS, 6, 3.0), expected)


def test_images_of_another_size(pipe):
    images = models.sample(pipe, PROMPTS, SEEDS, 2, 1.0, height=48, width=16)
    assert images.shape == (2, 48, 16, 3)


def test_a_seed_is_one_picture_at_any_precision(pipe, folder, encoder):
    low = models.open_pipeline(folder, "cpu", torch.bfloat16)
    assert {p.dtype for p in low.unet.parameters()} == {torch.bfloat16}
    exact, rough, other = (
        models.sample(which, PROMPTS, seeds, 4, 3.0).astype(int)
        for which, seeds in ((pipe, SEEDS), (low, SEEDS), (pipe, [5, 6]))
    )
    assert np.abs(rough - exact).mean() < 0.1 * np.abs(other - exact).mean()
    never, swapped = (
        models.sample(swap_encoder(low, encoder, start), PROMPTS, SEEDS, 4, 3.0)
        for start in (1.0, 1)
    )
    np.testing.assert_array_equal(never, rough)
    assert (swapped != never).any()


def test_precision_follows_the_device(pipe, monkeypatch):
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert sampling._precision(torch.device("cpu")) == torch.float32
    for known, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float16)):
        monkeypatch.setattr(runtime, "precision", lambda name, on, known=known: known)
        assert sampling._precision(torch.device("cuda")) == dtype
        assert sampling._precision(torch.device("cpu")) == torch.float32


def test_stored_samples_are_drawn_once(pipe, folder, monkeypatch):
    prompts, seeds = PROMPTS * 2, [1, 2, 3, 4]

    def stored(weights="a", pipe=pipe, guidance=1.0):
        return models.sample_stored(pipe, weights, prompts, seeds, 2, guidance, batch_size=3)

    first = stored()
    whole = models.sample(pipe, prompts, seeds, 2, 1.0)  # another batch may round otherwise
    assert np.abs(first.astype(int) - whole).max() <= 1

    def drawn(*_, **__):
        raise NotImplementedError("drawn")

    monkeypatch.setattr(sampling, "sample", drawn)
    np.testing.assert_array_equal(stored(), first)
    low = models.open_pipeline(folder, "cpu", torch.bfloat16)
    for other in ({"weights": "b"}, {"guidance": 1.5}, {"pipe": low}):
        with pytest.raises(NotImplementedError):
            stored(**other)


def test_weights_of_a_pipeline_change_with_any_byte(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "sd")
    before = models.weights_of(copy)
    assert before == models.weights_of(folder)
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    after = models.weights_of(copy)
    assert [old == new for old, new in zip(before, after, strict=True)].count(False) == 1


def test_rows_are_sampled_as_they_say(pipe):
    import pandas as pd

    told = {"prompt": PROMPTS + PROMPTS[:1], "seed": [3, 4, 3], "step": [2, 3, 2]}
    rows = pd.DataFrame({**told, "cfg": [1.0, 3.0, 1.0]}, index=[7, 8, 9])
    images = models.sample_rows(pipe, rows)
    for image, row in zip(images, rows.itertuples(), strict=True):
        alone = models.sample(pipe, [row.prompt], [row.seed], row.step, row.cfg)[0]
        assert np.abs(image.astype(int) - alone).max() <= 1
    with pytest.raises(BadTableError, match=r"step.*cfg"):
        models.sample_rows(pipe, rows[["prompt", "seed"]])


ROWS = {"prompt": PROMPTS[:1] * 3, "seed": [3, 4, 5], "step": [2] * 3, "cfg": [2.0] * 3}


def test_rows_have_their_own_size(pipe, capsys):
    import pandas as pd

    sizes = {"width": [16, 24, 0], "height": [48, None, 40], "sampler": ["ddim"] * 3}
    images = models.sample_rows(pipe, pd.DataFrame({**ROWS, **sizes}))
    assert [image.shape for image in images] == [(48, 16, 3), (32, 24, 3), (40, 32, 3)]
    assert "size of 2 rows" in capsys.readouterr().out
    alone = models.sample(pipe, PROMPTS[:1], [3], 2, 2.0, height=48, width=16)[0]
    assert np.abs(images[0].astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    ("code", "name", "scheduler"),
    [
        (1, "ddim", "DDIMScheduler"),
        (2.0, "plms", "PNDMScheduler"),
        (3, "k_euler", "EulerDiscreteScheduler"),
        (4, "k_euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("5", "k_heun", "HeunDiscreteScheduler"),
        (6, "k_dpm_2", "KDPM2DiscreteScheduler"),
        (7, "k_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
        (np.uint8(8), "k_lms", "LMSDiscreteScheduler"),
    ],
)
def test_rows_have_their_own_sampler(pipe, monkeypatch, code, name, scheduler):
    import pandas as pd

    used = []

    def drawn(pipe, prompts, seeds, *how):
        used.append((type(pipe.scheduler).__name__, pipe.scheduler.config))
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    monkeypatch.setattr(sampling, "sample", drawn)
    for sampler in (code, name):
        models.sample_rows(pipe, pd.DataFrame({**ROWS, "sampler": [sampler] * 3}))
    assert [kind for kind, _ in used] == [scheduler] * 6
    assert all(config["beta_end"] == pipe.scheduler.config.beta_end for _, config in used)
    assert used[0][1].get("skip_prk_steps") is (True if name == "plms" else None)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


def test_another_sampler_paints_another_picture(pipe):
    import pandas as pd

    rows = pd.DataFrame({**ROWS, "seed": [3] * 3, "sampler": [8, 1, 4]})
    euler = with_scheduler(pipe, "EulerAncestralDiscreteScheduler")
    lms, ddim, ancestral = models.sample_rows(pipe, rows)
    assert (lms != ddim).any()
    for image, own in ((ddim, pipe), (ancestral, euler)):
        alone = models.sample(own, PROMPTS[:1], [3], 2, 2.0)[0]
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_samplers_that_are_not_known_are_said_not_guessed(pipe, capsys):
    import pandas as pd

    same = pd.DataFrame({**ROWS, "seed": [3] * 3, "width": 32, "height": 32})
    own = models.sample_rows(pipe, same.assign(sampler=[9, 1, None]))
    assert "sampler of 2 rows" in capsys.readouterr().out
    np.testing.assert_array_equal(own[0], own[2])
    models.sample_rows(pipe, same.iloc[:1].assign(sampler="k_dpm_adaptive"))
    assert "sampler of 1 rows" in capsys.readouterr().out
    models.sample_rows(pipe, same.iloc[:1].assign(sampler="ddim"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [{"seed": [3, None, 5]}, {"step": [2, 0, 2]}, {"cfg": ["2", "?", "2"]}, {"width": [8, 9, 8]}],
)
def test_rows_that_cannot_be_sampled_again_are_named(pipe, changes):
    import pandas as pd

    rows = pd.DataFrame({**ROWS, "height": [8] * 3, "id": ["a", "b", "c"], **changes})
    with pytest.raises(BadTableError, match=r"no image can be sampled as .*'id': 'b'"):
        models.sample_rows(pipe, rows)
