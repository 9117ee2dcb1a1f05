"""What the model sees: resized, normalised, augmented by (seed, position)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from mnistm_dist.config import AugmentConfig
from mnistm_dist.data.hashing import uniform
from mnistm_dist.data.transforms import (
    CHANNEL_ORDERS,
    DRAWS,
    GREY,
    POINTS,
    Augment,
    Preprocess,
    change_colours,
    cut_out,
    elastic_displacement,
    permute_channels,
    resize,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
ALL = AugmentConfig(
    shift=3,
    rotate=15,
    scale=0.1,
    shear=10,
    elastic=2,
    invert=0.5,
    permute_channels=0.5,
    cutout=6,
    flip=0.5,
    crop=0.4,
    colour=0.2,
)


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def test_preprocessing_is_resize_and_normalise():
    batch = images(4)
    wide = functional.interpolate(
        batch.permute(0, 3, 1, 2).float() / 255, (64, 64), mode="bilinear", align_corners=False
    )
    expected = (wide - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.allclose(Preprocess(MEAN, STD)(batch, 64), expected, atol=1e-5)


def test_preprocessing_gives_channels_last():
    assert Preprocess(MEAN, STD)(images(4), 32).is_contiguous(memory_format=torch.channels_last)


def test_shrinking_is_antialiased():
    stripes = torch.zeros(1, 1, 32, 32)
    stripes[..., ::2] = 1
    assert (resize(stripes, 16) - 0.5)[..., 1:-1].abs().max() < 0.05


def test_without_augmentation_training_sees_what_evaluation_sees():
    preprocess = Preprocess(MEAN, STD)
    augment = Augment(AugmentConfig(), preprocess, seed=0)
    assert torch.equal(augment(images(4), np.arange(4), 48), preprocess(images(4), 48))


def test_a_warp_by_zero_is_a_resize():
    preprocess = Preprocess(MEAN, STD)
    still = Augment(AugmentConfig(shift=1e-9), preprocess, seed=0)
    assert torch.allclose(still(images(4), np.arange(4), 64), preprocess(images(4), 64), atol=1e-4)


@pytest.mark.parametrize("size", [28, 64])
def test_an_image_is_augmented_by_its_position_alone(size):
    """The same in any micro-batch, on any rank: a batch of 8 equals two of 4, and the order within does not matter."""
    augment, batch, positions = Augment(ALL, Preprocess(MEAN, STD), seed=5), images(8), np.arange(100, 108)
    whole = augment(batch, positions, size)
    halves = torch.cat([augment(batch[:4], positions[:4], size), augment(batch[4:], positions[4:], size)])
    backwards = augment(batch.flip(0), positions[::-1].copy(), size).flip(0)
    assert torch.equal(whole, halves)
    assert torch.equal(whole, backwards)


def test_another_position_or_seed_is_augmented_otherwise():
    preprocess, batch = Preprocess(MEAN, STD), images(1)
    first = Augment(ALL, preprocess, seed=5)(batch, np.array([0]), 32)
    assert not torch.equal(first, Augment(ALL, preprocess, seed=5)(batch, np.array([1]), 32))
    assert not torch.equal(first, Augment(ALL, preprocess, seed=6)(batch, np.array([0]), 32))


SMOOTH = replace(ALL, invert=0, permute_channels=0, cutout=0, flip=0, crop=0)


def test_a_ramp_begins_without_change_and_ends_at_the_full_strength():
    """One fifth of a run of 1,000 images."""
    preprocess, batch, full = Preprocess(MEAN, STD), images(8), Augment(SMOOTH, Preprocess(MEAN, STD), seed=5)
    ramped = Augment(replace(SMOOTH, ramp=0.2), preprocess, seed=5, run_images=1000)
    first, later = np.zeros(8, np.int64), np.arange(200, 208)
    assert torch.allclose(ramped(batch, first, 48), preprocess(batch, 48), atol=1e-3)
    assert not torch.allclose(full(batch, first, 48), preprocess(batch, 48), atol=0.1)
    assert torch.equal(ramped(batch, later, 48), full(batch, later, 48))


@pytest.mark.parametrize("field", ["shift", "rotate", "scale", "shear", "elastic", "colour"])
def test_in_the_middle_of_the_ramp_a_change_has_half_its_strength(field):
    whole = AugmentConfig(**{field: getattr(ALL, field)}, ramp=0.2)
    half = AugmentConfig(**{field: getattr(ALL, field) / 2})
    batch, middle, preprocess = images(4), np.full(4, 100), Preprocess(MEAN, STD)
    expected = Augment(half, preprocess, seed=5)(batch, middle, 48)
    assert torch.allclose(Augment(whole, preprocess, seed=5, run_images=1000)(batch, middle, 48), expected, atol=1e-3)


def test_a_ramp_changes_no_probability():
    config, preprocess = AugmentConfig(invert=0.5, permute_channels=0.5, flip=0.5, cutout=6), Preprocess(MEAN, STD)
    seen = Augment(replace(config, ramp=0.5), preprocess, seed=5, run_images=1000)(images(8), np.arange(8), 32)
    assert torch.equal(seen, Augment(config, preprocess, seed=5)(images(8), np.arange(8), 32))


def test_inversion_is_255_minus_the_image():
    preprocess = Preprocess(MEAN, STD)
    inverted = Augment(AugmentConfig(invert=1), preprocess, seed=0)(images(4), np.arange(4), 32)
    assert torch.equal(inverted, preprocess(255 - images(4), 32))


def test_half_of_the_images_are_inverted_if_asked():
    preprocess, batch = Preprocess(MEAN, STD), images(1).expand(2000, -1, -1, -1).contiguous()
    seen = Augment(AugmentConfig(invert=0.5), preprocess, seed=0)(batch, np.arange(2000), 32)
    share = (seen != preprocess(batch, 32)).flatten(1).any(1).double().mean()
    assert 0.46 < share < 0.54


def test_a_shift_moves_the_image_by_at_most_its_pixels():
    dot = torch.zeros(200, 33, 33, 3, dtype=torch.uint8)
    dot[:, 16, 16] = 255
    seen = Augment(AugmentConfig(shift=3), Preprocess((0, 0, 0), (1, 1, 1)), seed=0)(dot, np.arange(200), 33)[:, 0]
    places = seen.flatten(1).argmax(1)
    rows, columns = places // 33 - 16, places % 33 - 16
    assert rows.abs().max() == 3
    assert columns.abs().max() == 3
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 40


@pytest.mark.parametrize(("config", "draw", "sign"), [({"rotate": 30}, 2, 1), ({"shear": 30}, 9, -1)])
def test_a_shear_tilts_a_line_by_the_angle_that_was_drawn(config, draw, sign):
    line = torch.zeros(16, 64, 64, 3, dtype=torch.uint8)
    line[:, :, 31:33] = 255
    positions = np.arange(16)
    moved = Augment(AugmentConfig(**config), Preprocess((0, 0, 0), (1, 1, 1)), seed=0)(line, positions, 64)[:, 0, 16:48]
    places = torch.arange(64) - 31.5
    line_x = (moved * places).sum(2) / moved.sum(2)
    rows = (torch.arange(16, 48) - 31.5).double()
    leaning = (line_x.double() @ rows) / (rows @ rows)
    angles = np.deg2rad(30) * (2 * uniform(0, positions, DRAWS)[:, draw] - 1)
    assert np.ptp(angles) > 0.5
    np.testing.assert_allclose(leaning.numpy(), sign * np.tan(angles), atol=0.02)


def test_an_elastic_displacement_moves_the_points_as_drawn_and_is_smooth_between_them():
    draws = torch.from_numpy(uniform(3, np.arange(8), 2 * POINTS**2))
    moved = elastic_displacement(draws, 0.2, 0.1, 61)
    assert moved.shape == (8, 61, 61, 2)
    points = moved[:, :: 60 // (POINTS - 1), :: 60 // (POINTS - 1)].permute(0, 3, 1, 2).flatten(2)
    drawn = (2 * draws - 1).view(8, 2, POINTS**2) * torch.tensor([0.2, 0.1]).view(1, 2, 1)
    torch.testing.assert_close(points, drawn, atol=1e-6, rtol=0)
    assert moved.diff(dim=1).abs().max() < 0.06  # of a range of 0.4, over 15 pixels between two points


def test_an_elastic_displacement_is_at_most_its_pixels():
    dot = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    dot[:, 15:17, 15:17] = 255
    moved = Augment(AugmentConfig(elastic=2), Preprocess((0, 0, 0), (1, 1, 1)), seed=0)(dot, np.arange(64), 32)[:, 0]
    places = torch.arange(32) - 15.5
    mass = moved.sum((1, 2))
    by_x, by_y = (moved.sum(1) @ places) / mass, (moved.sum(2) @ places) / mass
    assert max(by_x.abs().max(), by_y.abs().max()) < 2.5
    assert min(by_x.std(), by_y.std()) > 0.5


def test_channels_are_permuted_in_all_six_orders():
    batch = torch.tensor([1, 2, 3], dtype=torch.uint8).expand(600, 2, 2, 3).contiguous()
    draws, orders = torch.linspace(0, 0.999, 600), torch.tensor(CHANNEL_ORDERS)
    seen = permute_channels(batch, torch.ones(600, dtype=torch.bool), draws, orders)[:, 0, 0]
    assert len({tuple(row) for row in seen.tolist()}) == 6
    assert torch.equal(permute_channels(batch, torch.zeros(600, dtype=torch.bool), draws, orders), batch)


def test_cutout_sets_a_square_to_the_mean():
    seen = cut_out(torch.ones(1, 3, 32, 32), torch.tensor([[0.5, 0.25]]), 8 / 32, 8 / 32)
    assert (seen == 0).sum() == 3 * 8 * 8
    assert (seen[:, :, 4:12, 12:20] == 0).all()


def test_a_flip_mirrors_left_and_right():
    preprocess = Preprocess(MEAN, STD)
    flipped = Augment(AugmentConfig(flip=1), preprocess, seed=0)(images(4), np.arange(4), 32)
    assert torch.equal(flipped, preprocess(images(4).flip(2), 32))


def test_a_crop_is_a_square_of_the_image_of_at_least_the_area_that_is_kept():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).view(1, 1, 64, 1).expand(500, 64, 64, 3).contiguous()
    seen = Augment(AugmentConfig(crop=0.5), Preprocess((0, 0, 0), (1, 1, 1)), seed=0)(ramp, np.arange(500), 64)
    left, right = seen[:, 0, 32, 1] * 255 / 4, seen[:, 0, 32, -2] * 255 / 4
    sides = (right - left) / 61  # of the image's side
    assert 0.70 < sides.min() < 0.73
    assert 0.98 < sides.max() < 1.01
    assert left.max() > 15
    assert left.min() < 2


def test_colours_change_by_at_most_the_asked_factor_and_grey_stays_grey():
    grey = torch.full((300, 8, 8, 3), 100, dtype=torch.uint8)
    seen = Augment(AugmentConfig(colour=0.2), Preprocess((0, 0, 0), (1, 1, 1)), seed=0)(grey, np.arange(300), 8) * 255
    assert (seen.amax(1) - seen.amin(1)).max() < 1e-3
    assert 79.9 < seen.min() < 83
    assert 117 < seen.max() < 120.1


def test_the_augmentation_can_be_compiled_as_one_graph():
    augment, batch = Augment(ALL, Preprocess(MEAN, STD), seed=5), images(4)
    draws = augment.draw(np.arange(4))
    compiled = torch.compile(augment.apply, dynamic=False, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(batch, draws, 32), augment.apply(batch, draws, 32), atol=1e-4)


def test_saturation_zero_is_grey_and_brightness_zero_black():
    batch, weights = images(2), torch.tensor(GREY)
    assert change_colours(batch, torch.tensor([[0.0, 1, 1]] * 2), weights).max() == 0
    grey = change_colours(batch, torch.tensor([[1.0, 1, 0]] * 2), weights)
    assert torch.equal(grey[..., 0], grey[..., 2])
    assert torch.equal(change_colours(batch, torch.ones(2, 3), weights), batch)
