"""The U-Net swap: identities that hold for any encoder, sampler, batch and number of steps."""

import numpy as np
import pytest
import tiny
import torch

from rsdlib import backbones, config, diffusion, swap
from rsdlib.errors import BadValueError, CheckpointError

PROMPTS = ["a fox in the snow", "two cats at night, watercolor"]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pipe(folder):
    return diffusion.open_pipeline(folder, "cpu")


@pytest.fixture(scope="module")
def encoder(folder):
    """Return an encoder that training has moved."""
    found = backbones.create(config.BackboneConfig("diffusers", str(folder)))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.1 * torch.randn_like(p)
    return found


def sample(pipe, steps=6, prompts=PROMPTS, seeds=SEEDS, guidance=3.0):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="np").images


SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_never_swapping_changes_no_bit(pipe, encoder, scheduler):
    import diffusers

    old = pipe.scheduler
    pipe.scheduler = getattr(diffusers, scheduler).from_config(old.config)
    try:
        plain = sample(pipe)
        steps = len(pipe.scheduler.timesteps.unique())
        for start in (1.0, steps):
            np.testing.assert_array_equal(sample(swap.swap_encoder(pipe, encoder, start)), plain)
        np.testing.assert_array_equal(sample(swap.swap_encoder(pipe, encoder, 0, blend=0.0)), plain)
        images = [sample(swap.swap_encoder(pipe, encoder, start)) for start in range(steps + 1)]
    finally:
        pipe.scheduler = old
    change = [np.abs(image - plain).mean() for image in images]
    assert all(value > 0 for value in change[:-1])
    assert change[0] > change[-2]
    assert change[-1] == 0


def test_original_encoder_from_the_start_changes_no_bit(pipe, folder):
    own = backbones.create(config.BackboneConfig("diffusers", str(folder)))
    np.testing.assert_array_equal(sample(swap.swap_encoder(pipe, own, 0)), sample(pipe))


def test_swapped_from_the_start_is_the_unet_with_that_encoder(pipe, encoder, folder):
    from rsdlib.unet import into_unet

    other = diffusion.open_pipeline(folder, "cpu")
    into_unet(encoder, other.unet)
    np.testing.assert_array_equal(sample(swap.swap_encoder(pipe, encoder, 0)), sample(other))


def test_a_batch_equals_single_prompts(pipe, encoder):
    swapped = swap.swap_encoder(pipe, encoder, 2)
    together = sample(swapped)
    for i in range(2):
        np.testing.assert_allclose(sample(swapped, prompts=PROMPTS[i : i + 1], seeds=SEEDS[i : i + 1])[0], together[i], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_shares_and_numbers_of_steps_mean_the_same(pipe, encoder, steps, guidance):
    for start in range(steps + 1):
        by_number = sample(swap.swap_encoder(pipe, encoder, start), steps, guidance=guidance)
        by_share = sample(swap.swap_encoder(pipe, encoder, start / steps), steps, guidance=guidance)
        np.testing.assert_array_equal(by_number, by_share)


def test_pipeline_handed_in_is_never_changed_and_shares_what_it_can(pipe, encoder):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    unet, plain = pipe.unet, sample(pipe)
    swapped = swap.swap_encoder(pipe, encoder, 1, blend=0.7)
    sample(swapped)
    assert pipe.unet is unet
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    np.testing.assert_array_equal(sample(pipe), plain)
    assert swapped.vae is pipe.vae
    assert swapped.text_encoder is pipe.text_encoder
    new, old = swapped.unet.then, swapped.unet.first
    assert old is unet
    own = {p.data_ptr() for p in new.parameters()} - {p.data_ptr() for p in old.parameters()}
    assert len(own) == len(list(encoder.parameters()))


def test_blend_runs_from_one_encoder_to_the_other(pipe, encoder):
    plain, whole = sample(pipe), sample(swap.swap_encoder(pipe, encoder, 0))
    distance = [np.abs(sample(swap.swap_encoder(pipe, encoder, 0, blend=blend)) - plain).mean() for blend in (0.0, 0.1, 1.0)]
    assert distance[0] == 0
    assert 0 < distance[1] < distance[2] == pytest.approx(np.abs(whole - plain).mean())


@pytest.mark.parametrize(
    ("start", "blend", "words"), [(-1, 1.0, "no step"), (1.5, 1.0, "no step"), (0, 1.5, "blend"), (0, -0.1, "blend")]
)
def test_settings_out_of_range_are_named(pipe, encoder, start, blend, words):
    with pytest.raises(BadValueError, match=words):
        swap.swap_encoder(pipe, encoder, start, blend)


def test_swap_after_the_last_step_is_refused(pipe, encoder):
    with pytest.raises(BadValueError, match="after step 7, but there are 6 steps"):
        sample(swap.swap_encoder(pipe, encoder, 7))


def test_encoder_of_another_model_is_refused(pipe, tmp_path):
    other = backbones.create(config.BackboneConfig("diffusers", str(tiny.stable_diffusion(tmp_path, cross=24))))
    with pytest.raises(CheckpointError, match="does not fit this U-Net"):
        swap.swap_encoder(pipe, other, 1)


def test_change_of_weights(pipe, folder):
    moved = backbones.create(config.BackboneConfig("diffusers", str(folder)))
    assert set(swap.weight_change(moved, pipe.unet).values()) == {0.0}
    with torch.no_grad():
        for p in moved.unet.mid_block.parameters():
            p *= 1.25
    change = swap.weight_change(moved, pipe.unet)
    assert change.pop("mid_block") == pytest.approx(0.25, rel=1e-5)
    assert set(change.values()) == {0.0}


def test_pictures_on_the_way_end_in_the_finished_one(pipe):
    on_the_way = diffusion.sample_steps(pipe, PROMPTS, SEEDS, [1, 3, 4], steps=4, guidance=3.0)
    assert on_the_way.shape == (3, 2, 32, 32, 3)
    np.testing.assert_array_equal(on_the_way[-1], diffusion.sample(pipe, PROMPTS, SEEDS, 4, 3.0))
    assert (on_the_way[0] != on_the_way[1]).any()


def test_stored_samples_are_drawn_once(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(diffusion.runtime, "cache_dir", lambda: tmp_path)
    prompts, seeds = PROMPTS * 2, [1, 2, 3, 4]
    first = diffusion.sample_stored(pipe, "a", prompts, seeds, 2, 1.0, batch_size=3)
    whole = diffusion.sample(pipe, prompts, seeds, 2, 1.0)  # a batch of another size may round otherwise
    assert np.abs(first.astype(int) - whole).max() <= 1
    np.testing.assert_array_equal(diffusion.sample_stored(None, "a", prompts, seeds, 2, 1.0, batch_size=3), first)
    with pytest.raises(TypeError):  # other weights, or another guidance: nothing is stored, and there is nothing to draw with
        diffusion.sample_stored(None, "b", prompts, seeds, 2, 1.0, batch_size=3)
    with pytest.raises(TypeError):
        diffusion.sample_stored(None, "a", prompts, seeds, 2, 1.5, batch_size=3)
