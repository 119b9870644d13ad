"""Restoration and burst nets: what they see, what they leave alone, how frames are registered."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rayscale import recipes
from rayscale.contract import to_json
from rayscale.data.cut import sample_shapes
from rayscale.errors import ConfigError
from rayscale.recipes import Recipe
from rayscale.task import Batch
from rayscale.tasks.burst import Burst, BurstNet, align, lay
from rayscale.tasks.restore import Filled, Restore

CPU = torch.device("cpu")
OURS = ("denoise", "deblock", "deblur", "inpaint", "burst")
RECIPES = {name: make for name, make in recipes.discover().items() if name.split(":")[0].split(".")[-1] in OURS}


@cache
def luma(height: int = 96, width: int = 96) -> Tensor:
    """f32[1, 1, h, w] of a photo."""
    picture = skimage.data.astronaut()[20 : 20 + height, 170 : 170 + width]
    return torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)).float()[None, None] / 255


def moved(picture: Tensor, dx: float, dy: float) -> Tensor:
    """f32[1, 1, h, w]: at (x, y) what `picture` has at (x + dx, y + dy)."""
    by = np.array([[1, 0, dx], [0, 1, dy]])
    plane = picture[0, 0].numpy()
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(plane, by, plane.shape[::-1], flags=how, borderMode=cv2.BORDER_REPLICATE)
    return torch.from_numpy(found)[None, None]


def shaken(net: nn.Module) -> nn.Module:
    """Every weight counts: nets start with a correction of nothing."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


def radius(net: nn.Module, inputs: tuple[Tensor, ...], which: int, align_px: int) -> int:
    """Furthest pixel that a changed one in the middle moves the output at, low resolution; over a cell of align_px."""
    far = 0
    with torch.no_grad():
        before = net(*inputs)
        height, width = inputs[0].shape[-2:]
        for step in range(align_px):
            y, x = height // 2 // align_px * align_px + step, width // 2 // align_px * align_px + step
            changed = [t.clone() for t in inputs]
            changed[which][..., y, x] = 1 - changed[which][..., y, x]
            scale = before.shape[-1] // width
            _, _, rows, columns = torch.nonzero(net(*changed) != before, as_tuple=True)
            far = max(far, int((rows // scale - y).abs().max()), int((columns // scale - x).abs().max()))
    return far


@pytest.mark.parametrize(
    "task",
    [
        Restore(features=4, depth=3),
        Restore(features=4, depth=4, dilations=(1, 3)),
        Restore(features=4, depth=2, shuffle=2),
        Restore(features=4, depth=2, shuffle=4),
        Restore(features=4, depth=2, masked=True, fill_levels=3, fill_steps=0),
        Restore(features=4, depth=2, masked=True, fill_levels=2, fill_steps=3),
    ],
    ids=str,
)
def test_the_halo_is_the_receptive_radius(task: Restore) -> None:
    halo_px = task.specs[""].halo_px
    assert halo_px is not None
    side = 2 * halo_px + 9 + -(2 * halo_px + 9) % task.shuffle
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, side, side, generator=rng)
    mask = torch.ones(1, 1, side, side)
    mask[:, :, side // 2, side // 2] = 0  # the only one that is known
    net = shaken(task.build(CPU)["net"])
    assert radius(net, (image, mask) if task.masked else (image,), 0, task.shuffle) == halo_px


def test_nets_start_as_the_picture_they_are_given() -> None:
    image = torch.rand(2, 3, 8, 12)
    assert torch.equal(Restore(features=4, shuffle=2).build(CPU)["net"](image), image)
    assert not torch.equal(shaken(Restore(features=4, shuffle=2).build(CPU)["net"])(image), image)


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0, 1), fill=st.floats(0, 1), seed=st.integers(0, 99))
def test_known_pixels_stay_and_missing_ones_are_not_looked_at(ratio: float, fill: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, 20, 16, generator=rng)
    mask = (torch.rand(1, 1, 20, 16, generator=rng) < ratio).float()
    net = shaken(Restore(features=4, depth=3, masked=True, fill_levels=3).build(CPU)["net"])
    with torch.no_grad():
        found = net(image * (1 - mask), mask)
        assert torch.equal(found, net(image * (1 - mask) + fill * mask, mask))
    known = (mask == 0).expand_as(image)
    assert torch.equal(found[known], image[known])
    if ratio > 0.2:
        assert not torch.equal(found, image)  # negative control


def test_the_first_filling_continues_what_is_around() -> None:
    net = Filled(nn.Identity(), levels=4, steps=200)
    x = torch.linspace(0.2, 0.8, 32).expand(1, 3, 24, 32)
    mask = torch.zeros(1, 1, 24, 32)
    mask[:, :, 6:18, 10:22] = 1
    flat = torch.full_like(x, 0.4)
    assert torch.allclose(net.first_filling(flat, mask), flat, atol=1e-4)
    assert (net.first_filling(x, mask) - x).abs().max() < 0.15
    assert (x * (1 - mask) - x).abs().max() > 0.5  # negative control: of no filling
    diffused = net.diffused(net.first_filling(x, mask), mask)
    assert torch.equal(diffused * (1 - mask), x * (1 - mask))
    assert (diffused - x).abs().max() < 1e-3  # a ramp is harmonic


@settings(max_examples=15, deadline=None)
@given(dx=st.floats(-2, 2), dy=st.floats(-2, 2))
def test_shifts_are_found_by_parts_of_a_pixel(dx: float, dy: float) -> None:
    shift, left = align(luma(), moved(luma(), dx, dy), reach_px=2, window_px=7)
    inner = shift[0, :, 12:-12, 12:-12]
    error = (inner - torch.tensor([dx, dy])[:, None, None]).square().sum(0).sqrt()
    assert error.median() < 0.12
    assert left[..., 12:-12, 12:-12].median() < 1e-4


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), reach_px=st.integers(0, 3))
def test_no_shift_is_beyond_reach(seed: int, reach_px: int) -> None:
    noise = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(seed))
    shift, left = align(noise[:1], noise[1:], reach_px, window_px=2)
    assert shift.abs().max() <= reach_px
    assert left.mean() > 0.002  # and that they are unlike is told


def test_a_pixel_is_laid_where_it_belongs() -> None:
    """The frame's dot at x, shifted by d, is at x + d of the picture."""
    frame = torch.zeros(1, 3, 9, 9)
    frame[..., 4, 4] = 1
    for dx, dy in ((0.0, 0.0), (0.25, -0.25), (1.75, 0.25), (-1.25, 1.75)):
        shift = torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
        planes = lay(frame, shift, scale=2, reach_px=2, sigma_px=0.2)
        grid = nn.functional.pixel_shuffle(planes[:, :3].flatten(1, 2), 2)[0, 0]
        y, x = torch.meshgrid(torch.arange(18), torch.arange(18), indexing="ij")
        centre = [float((grid * axis).sum() / grid.sum()) for axis in (x, y)]
        assert centre == pytest.approx([2 * (4.5 + dx) - 0.5, 2 * (4.5 + dy) - 0.5], abs=0.3)


def frames_of(*shifts: tuple[float, float]) -> Tensor:
    """f32[1, T, 3, h, w]."""
    return torch.stack([moved(luma(), *shift).expand(1, 3, -1, -1) for shift in shifts], 1)


def merged(config: Burst, frames: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = BurstNet(replace(config, frames=frames.shape[1]))(frames)
    return found


SMALL = Burst(features=4, blocks=0, window_px=4)
SHIFTS = ((0.0, 0.0), (0.5, 0.0), (-0.5, 1.5), (1.0, -0.5))


def test_the_order_of_the_other_frames_does_not_matter() -> None:
    frames = frames_of(*SHIFTS)
    assert torch.allclose(merged(SMALL, frames), merged(SMALL, frames[:, [0, 3, 1, 2]]), atol=1e-5)
    other_first = merged(SMALL, frames[:, [1, 0, 2, 3]])
    assert not torch.allclose(merged(SMALL, frames), other_first, atol=1e-2)  # negative control


def test_a_frame_of_something_else_leaves_no_ghost() -> None:
    frames = frames_of(*SHIFTS)
    other = torch.rand(1, 1, *frames.shape[2:], generator=torch.Generator().manual_seed(0))
    with_other = merged(SMALL, torch.cat([frames, other], 1))
    assert (with_other - merged(SMALL, frames)).abs().mean() < 0.01
    shown = torch.cat([frames, frames[:, :1].flip(-1)], 1).mean(1)  # negative control: a plain mean shows it
    assert (shown - frames.mean(1)).abs().mean() > 0.02


def test_the_merge_is_float32_under_autocast() -> None:
    frames = frames_of(*SHIFTS)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = merged(SMALL, frames)
    assert (coarse - merged(SMALL, frames)).abs().max() < 1e-3  # the net adds nothing yet


@pytest.mark.parametrize("count", [1, 3])
def test_the_halo_of_a_burst_is_exact(count: int) -> None:
    """Cut with its halo, the middle of a burst is what the whole gives; with 3 px less it is not."""
    config = Burst(frames=count, features=4, blocks=1, window_px=2, reach_px=1)
    net = shaken(BurstNet(config))
    frames = torch.rand(1, count, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    halo_px = config.halo_px
    with torch.no_grad():
        whole = net(frames)[..., 40:56, 40:56]

        def cut(halo: int) -> Any:
            side = slice(20 - halo, 28 + halo)
            return net(frames[..., side, side])[..., 2 * halo : 2 * halo + 16, 2 * halo : 2 * halo + 16]

        assert torch.allclose(cut(halo_px), whole, atol=1e-4)
        assert (cut(halo_px - 3) - whole).abs().max() > 1e-3


def test_a_burst_of_another_length_is_refused() -> None:
    task = Burst(frames=4)
    batch = Batch({"lr": torch.rand(1, 3, 3, 8, 8), "hr": torch.rand(1, 3, 16, 16)}, 0)
    with pytest.raises(ConfigError, match="gives 3"):
        task.loss("g", task.build(CPU), batch)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [(Restore, "depth", 1), (Restore, "features", 0), (Restore, "dilations", (0,)), (Restore, "shuffle", 3),
     (Restore, "fill_levels", 0), (Burst, "scale", 5), (Burst, "frames", 0), (Burst, "reach_px", 9),
     (Burst, "window_px", 0), (Burst, "sigma_px", 0.0), (Burst, "features", 0), (Burst, "blocks", -1)],
)  # fmt: skip
def test_values_out_of_range_are_refused(family: Any, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        family(**{field: value})


def test_there_are_recipes() -> None:
    assert {name.split(":")[0].split(".")[-1] for name in RECIPES} == set(OURS)


@pytest.mark.parametrize("name", RECIPES)
def test_data_and_task_of_a_recipe_fit(name: str) -> None:
    recipe: Recipe = RECIPES[name]()
    shapes = sample_shapes(recipe.data)
    assert set(recipe.task.needs) <= set(shapes)
    spec = recipe.task.specs[""]
    assert spec.scale == recipe.data.scale
    assert recipe.data.hr_crop_px // recipe.data.scale % spec.align == 0
    assert len(spec.inputs) == len(recipe.task.needs) - 1
    if spec.kind == "burst":
        assert spec.inputs[0].shape[1] == shapes["lr"][0]
        shift_px = to_json(recipe.data.degradation)[-1]["shift_px"]
        assert shift_px / spec.scale <= recipe.task.reach_px  # type: ignore[attr-defined]
