"""Augmentations on the training device: what they leave alone, what they move and by how much, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2hsv
from torch import Tensor

from rayscale import augment_torch
from rayscale.augment_torch import (
    colour_jitter,
    contrastive_view,
    diff_augment,
    gaussian_blur,
    random_flip,
    random_gray,
    random_resized_crop,
)
from rayscale.errors import ConfigError

POLICIES = ("colour", "translation", "cutout")


def pictures(n: int = 4, height: int = 12, width: int = 12, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, 3, height, width), np.float32))


EVERY: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: random_resized_crop(x, x.shape[-1]),
    "flip": random_flip,
    "jitter": lambda x: colour_jitter(x, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "gray": random_gray,
    "blur": gaussian_blur,
    "view": lambda x: contrastive_view(x, blur_chance=0.5),
    **{name: lambda x, name=name: diff_augment(x, (name,)) for name in POLICIES},  # type: ignore[misc]
}
every = pytest.mark.parametrize("name", EVERY)


@every
def test_draws_are_of_torchs_generator_and_each_samples_own(name: str) -> None:
    x = pictures(1).expand(32, 3, 12, 12)
    torch.manual_seed(1)
    first = EVERY[name](x)
    torch.manual_seed(1)
    assert torch.equal(EVERY[name](x), first)
    assert not torch.equal(EVERY[name](x), first)
    assert len({sample.numpy().tobytes() for sample in first}) > 1


@every
def test_a_sample_knows_nothing_of_its_neighbours(name: str) -> None:
    torch.manual_seed(2)
    x, other = pictures(4), pictures(4, seed=1)
    other[0] = x[0]
    torch.manual_seed(3)
    first = EVERY[name](x)
    torch.manual_seed(3)
    assert torch.allclose(EVERY[name](other)[0], first[0], atol=1e-6)


@every
def test_gradients_pass_twice(name: str) -> None:
    """R1 and R2 differentiate a critic's gradient with respect to its pictures."""
    x = pictures(8).requires_grad_()
    torch.manual_seed(4)
    (gradient,) = torch.autograd.grad(EVERY[name](x).square().sum(), x, create_graph=True)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    gradient.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@every
def test_pictures_keep_their_precision_under_autocast(name: str) -> None:
    x = pictures()
    torch.manual_seed(5)
    plain = EVERY[name](x)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EVERY[name](x), plain)


@given(side=st.integers(2, 20), out=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_crop_stays_within_its_picture(side: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = pictures(3, side, side + 1, seed)
    y = random_resized_crop(x, out, area=(0.1, 1.0))
    assert y.shape == (3, 3, out, out)
    assert (y.amax((2, 3)) <= x.amax((2, 3)) + 1e-6).all()
    assert (y.amin((2, 3)) >= x.amin((2, 3)) - 1e-6).all()


def test_the_whole_picture_at_its_own_side_is_itself() -> None:
    x = pictures()
    assert torch.equal(random_resized_crop(x, 12, area=(1.0, 1.0), aspect=(1.0, 1.0)), x)


def test_half_the_side_is_antialiased() -> None:
    """Stripes of one pixel become gray; every second pixel of them would be black or white."""
    stripes = (torch.arange(16) % 2).float().expand(1, 3, 16, 16)
    halved = random_resized_crop(stripes, 8, area=(1.0, 1.0), aspect=(1.0, 1.0))
    assert (halved[..., 1:-1] - 0.5).abs().max() < 1e-6
    assert (stripes[..., ::2] - 0.5).abs().min() == 0.5  # the control


def test_crops_show_the_share_that_was_asked_for() -> None:
    """On a ramp, the range of a crop's values is the share of the side that it shows."""
    ramp = ((torch.arange(64) + 0.5) / 64).expand(512, 3, 64, 64)
    torch.manual_seed(6)
    y = random_resized_crop(ramp, 64, area=(0.25, 0.25), aspect=(1.0, 1.0))
    shown = (y[..., -1] - y[..., 0])[:, 0, 0]
    assert shown.min() > 0.45
    assert shown.max() < 0.5
    assert y.mean() == pytest.approx(0.5, abs=0.02)  # anywhere in the picture, evenly


def test_flips_are_exact_and_half_of_them() -> None:
    x = pictures(400)
    torch.manual_seed(7)
    y = random_flip(x)
    flipped = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x, y, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(x, y, strict=True)])
    assert (flipped ^ kept).all()
    assert 150 < flipped.sum() < 250


def test_hue_turns_hues_and_leaves_grays() -> None:
    torch.manual_seed(8)
    x = 0.4 + 0.2 * pictures(16)  # far from where it would be clamped
    y = colour_jitter(x, brightness=0, contrast=0, saturation=0, hue=0.25)
    assert torch.allclose(y.mean(1), x.mean(1), atol=1e-5)
    turned = rgb2hsv(y.movedim(1, -1).numpy())[..., 0] - rgb2hsv(x.movedim(1, -1).numpy())[..., 0]
    turned = (turned + 0.5) % 1 - 0.5
    spread = turned.std(axis=(1, 2))
    assert np.abs(np.median(turned, axis=(1, 2))).max() > 0.1
    assert np.median(spread) < 0.05  # one angle a picture
    gray = x.mean(1, keepdim=True).expand_as(x)
    assert torch.allclose(colour_jitter(gray, brightness=0, contrast=0, saturation=0, hue=0.25), gray, atol=1e-6)


def test_jitter_of_nothing_is_nothing_and_of_chance_0_too() -> None:
    x = pictures()
    assert torch.allclose(colour_jitter(x, brightness=0, contrast=0, saturation=0, hue=0), x, atol=1e-6)
    assert torch.equal(colour_jitter(x, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.2, chance=0), x)


def test_blur_is_a_gaussian_and_keeps_what_is_even() -> None:
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    y = gaussian_blur(point, sigma=(2.0, 2.0), chance=1.0)[0, 0]
    at = torch.arange(31.0) - 15
    assert y.sum() == pytest.approx(1.0, abs=1e-4)
    assert ((y.sum(0) * at.square()).sum().sqrt()).item() == pytest.approx(2.0, abs=0.01)
    even = torch.full((2, 3, 9, 7), 0.3)
    assert torch.allclose(gaussian_blur(even, chance=1.0), even, atol=1e-6)


def test_gray_pictures_have_three_equal_channels_of_luma() -> None:
    y = random_gray(pictures(), chance=1.0)
    assert torch.equal(y[:, 0], y[:, 2])
    assert torch.allclose(y[:, 0], torch.einsum("nchw,c->nhw", pictures(), torch.tensor(augment_torch.LUMA)))


def test_translation_moves_whole_pixels_and_fills_with_the_middle() -> None:
    x = pictures(64, 16, 24)
    torch.manual_seed(9)
    y = diff_augment(x, ("translation",), low=-1.0, high=3.0)
    seen = set()
    for before, after in zip(x, y, strict=True):
        padded = torch.nn.functional.pad(before, (3, 3, 2, 2), value=1.0)
        moves = {
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-3, 4)
            if torch.allclose(padded[:, 2 - dy : 18 - dy, 3 - dx : 27 - dx], after, atol=1e-6)
        }
        assert len(moves) == 1
        seen |= moves
    assert {dy for dy, _ in seen} == set(range(-2, 3))
    assert {dx for _, dx in seen} == set(range(-3, 4))


def test_cutout_hides_a_rectangle_and_nothing_else() -> None:
    x = pictures(200, 12, 8)
    torch.manual_seed(10)
    y = diff_augment(x, ("cutout",))
    hidden = (y != x).all(1)
    assert torch.equal(y[~hidden[:, None].expand_as(y)], x[~hidden[:, None].expand_as(x)])
    rows, columns = hidden.any(2), hidden.any(1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).max() == 6
    assert columns.sum(1).max() == 4
    assert rows.sum(1).min() >= 3  # partly outside at most


def test_an_unknown_policy_is_told() -> None:
    with pytest.raises(ConfigError, match=r"policy=color: must be colour, translation or cutout"):
        diff_augment(pictures(), ("color",))  # type: ignore[arg-type]
