"""The tile plan: covers once, keeps only what has its context, and stitches to the untiled picture bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.errors import ConfigError
from rayscale.imaging import F32, Tile, fitted_side, place, plan_tiles, run_tiled


def faults(tiles: tuple[Tile, ...], height: int, width: int, halo_px: int, align: int) -> set[str]:
    """Every rule of an exact plan that these tiles break."""
    found = set()
    covered = np.zeros((height, width), int)
    for t in tiles:
        covered[t.keep_top : t.keep_bottom, t.keep_left : t.keep_right] += 1
        for start, size, first, last, side in (
            (t.y, t.height, t.keep_top, t.keep_bottom, height),
            (t.x, t.width, t.keep_left, t.keep_right, width),
        ):
            if start < 0 or start + size > side:
                found.add("window outside")
            if start % align:
                found.add("not aligned")
            if start != 0 and first - start < halo_px:
                found.add("no context")
            if start + size != side and start + size - last < halo_px:
                found.add("no context")
    if (covered != 1).any():
        found.add("not a partition")
    if len({(t.height, t.width) for t in tiles}) != 1:
        found.add("unlike shapes")
    return found


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(height, width, tile_px, halo_px, align), all valid."""
    align, halo_px = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(0, 12))
    least = -(-(2 * halo_px + align) // align)
    tile_px = align * draw(st.integers(least, least + 12))
    height, width = (align * draw(st.integers(1, 160 // align)) for _ in range(2))
    return height, width, tile_px, halo_px, align


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_plan_is_exact(plan: tuple[int, int, int, int, int]) -> None:
    height, width, tile_px, halo_px, align = plan
    tiles = plan_tiles(height, width, tile_px=tile_px, halo_px=halo_px, align=align)
    assert faults(tiles, height, width, halo_px, align) == set()
    assert (tiles[0].height, tiles[0].width) == (min(tile_px, height), min(tile_px, width))
    if height <= tile_px and width <= tile_px:
        assert tiles == (Tile(0, 0, height, width, 0, height, 0, width),)


@settings(max_examples=200, deadline=None)
@given(plans())
def test_fitted_windows_are_as_few_and_no_larger(plan: tuple[int, int, int, int, int]) -> None:
    height, width, tile_px, halo_px, align = plan
    cut = {"halo_px": halo_px, "align": align}
    tall, wide = (fitted_side(side, tile_px=tile_px, **cut) for side in (height, width))
    assert max(tall, wide) <= tile_px
    fitted, usual = (plan_tiles(height, width, tile_px=px, **cut) for px in ((tall, wide), tile_px))
    assert faults(fitted, height, width, halo_px, align) == set()
    assert len(fitted) == len(usual)
    assert all(f.height <= u.height and f.width <= u.width for f, u in zip(fitted, usual, strict=True))


def test_fitted_windows_save_what_the_last_one_would_overlap() -> None:
    assert [t.y for t in plan_tiles(520, 8, tile_px=256, halo_px=8)] == [0, 240, 264]
    assert fitted_side(520, tile_px=256, halo_px=8, align=1) == 192  # 3 * 192 of 3 * 256
    assert [t.y for t in plan_tiles(520, 8, tile_px=192, halo_px=8)] == [0, 176, 328]


def test_broken_plans_are_caught() -> None:
    tiles = plan_tiles(64, 64, tile_px=32, halo_px=4, align=2)
    assert faults(tiles, 64, 64, 4, 2) == set()
    assert faults(tiles, 64, 64, 5, 2) == {"no context"}
    assert faults(tiles, 64, 64, 4, 16) == {"not aligned"}
    assert faults(tiles[:-1], 64, 64, 4, 2) == {"not a partition"}
    assert faults((*tiles, tiles[0]), 64, 64, 4, 2) == {"not a partition"}
    assert faults(tiles, 63, 64, 4, 2) >= {"window outside"}
    assert "unlike shapes" in faults((replace(tiles[0], height=30), *tiles[1:]), 64, 64, 4, 2)


def test_windows_are_as_few_as_the_halo_allows() -> None:
    rows = [t.y for t in plan_tiles(100, 10, tile_px=40, halo_px=5, align=1)]
    assert rows == [0, 30, 60]
    assert [t.y for t in plan_tiles(101, 10, tile_px=40, halo_px=5, align=1)] == [0, 30, 60, 61]


@pytest.mark.parametrize(
    ("height", "width", "tile_px", "halo_px", "align", "message"),
    [
        (64, 64, 16, 8, 1, "tile_px=16: must exceed two halos of 8 px by 1; use 17 or more"),
        (64, 64, 16, 7, 4, "tile_px=16: must exceed two halos of 7 px by 4; use 20 or more"),
        (8, 8, 16, 8, 1, "tile_px=16: must exceed"),  # a setting is wrong for small pictures too
        (64, 64, 18, 2, 4, "tile_px=18: must be a multiple of align, 4"),
        (64, 64, 16, -1, 1, "tile_px=16"),
        (64, 66, 16, 2, 4, "image=66x64: sides must be multiples of align, 4"),
        (0, 64, 16, 2, 4, "image=64x0"),
    ],
)
def test_impossible_plans_are_refused(
    height: int, width: int, tile_px: int, halo_px: int, align: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_tiles(height, width, tile_px=tile_px, halo_px=halo_px, align=align)


def conv3(x: F32, weights: F32) -> F32:
    """3x3 convolution with zero padding, taps added in a fixed order: a pixel depends on its window alone."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((x.shape[0], weights.shape[0], height, width), np.float32)
    for c_out, kernels in enumerate(weights):
        for c_in, kernel in enumerate(kernels):
            for dy in range(3):
                for dx in range(3):
                    out[:, c_out] += kernel[dy, dx] * padded[:, c_in, dy : dy + height, dx : dx + width]
    return out


def network(scale: int, align: int = 1) -> Callable[[F32], F32]:
    """Three random convolutions (radius 3 px on the grid of `align`), then `scale` times larger by pixel shuffle."""
    rng = np.random.default_rng(11)
    channels = 3 * align * align
    shapes = [(4, channels), (4, 4), (3 * scale * scale * align * align, 4)]
    weights = [rng.normal(0, 0.4, (*s, 3, 3)).astype(np.float32) for s in shapes]

    def run(x: F32) -> F32:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // align, align, w // align, align).transpose(0, 1, 3, 5, 2, 4)
        x = x.reshape(n, channels, h // align, w // align)
        x = np.maximum(conv3(np.maximum(conv3(x, weights[0]), 0), weights[1]), 0)
        x = conv3(x, weights[2])
        factor = scale * align
        x = x.reshape(n, 3, factor, factor, h // align, w // align).transpose(0, 1, 4, 2, 5, 3)
        return np.ascontiguousarray(x.reshape(n, 3, h * scale, w * scale))

    return run


def noise(height: int, width: int) -> F32:
    return np.random.default_rng(5).random((1, 3, height, width), dtype=np.float32)


@pytest.mark.parametrize(
    ("height", "width", "tile_px"), [(40, 53, 16), (33, 17, 17), (9, 60, 20), (25, 25, 24), (7, 7, 7)]
)
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_tiled_equals_whole_bit_for_bit(height: int, width: int, tile_px: int, scale: int) -> None:
    x, net = noise(height, width), network(scale)
    tiled = run_tiled(net, x, scale=scale, tile_px=tile_px, halo_px=3, align=1)
    assert tiled.shape == (1, 3, height * scale, width * scale)
    np.testing.assert_array_equal(tiled, net(x))


def test_a_halo_one_pixel_short_is_caught() -> None:
    x, net = noise(40, 53), network(2)
    assert (run_tiled(net, x, scale=2, tile_px=16, halo_px=2, align=1) != net(x)).any()


@pytest.mark.parametrize("align", [2, 4])
def test_a_network_on_a_coarser_grid(align: int) -> None:
    x, net, halo_px = noise(8 * 5 - 1, 8 * 9 - align + 1), network(2, align), 3 * align
    whole = run_tiled(net, x, scale=2, tile_px=None, halo_px=halo_px, align=align)
    assert whole.shape == (1, 3, x.shape[2] * 2, x.shape[3] * 2)
    tiled = run_tiled(net, x, scale=2, tile_px=8 * align, halo_px=halo_px, align=align)
    np.testing.assert_array_equal(tiled, whole)
    short = run_tiled(net, x, scale=2, tile_px=8 * align, halo_px=halo_px - align, align=align)
    assert (short != whole).any()


def test_whole_where_no_halo_is_exact_or_it_fits() -> None:
    calls: list[tuple[int, ...]] = []

    def net(x: F32) -> F32:
        calls.append(x.shape)
        return x

    x = noise(30, 40)
    for tile_px, halo_px in ((None, 3), (16, None), (40, 3)):
        np.testing.assert_array_equal(run_tiled(net, x, scale=1, tile_px=tile_px, halo_px=halo_px, align=1), x)
    assert calls == [(1, 3, 30, 40)] * 3
    run_tiled(net, x, scale=1, tile_px=16, halo_px=3, align=1)
    assert set(calls[3:]) == {(1, 3, 16, 16)}


def test_padding_repeats_the_border() -> None:
    seen: list[F32] = []

    def net(x: F32) -> F32:
        seen.append(x)
        return x

    x = noise(5, 6)
    np.testing.assert_array_equal(run_tiled(net, x, scale=1, tile_px=None, halo_px=None, align=4), x)
    assert seen[0].shape == (1, 3, 8, 8)
    np.testing.assert_array_equal(seen[0][:, :, 5:, :6], np.repeat(x[:, :, 4:], 3, axis=2))
    np.testing.assert_array_equal(seen[0][:, :, :, 7], seen[0][:, :, :, 5])


def test_a_result_of_another_size_names_the_card() -> None:
    with pytest.raises(ConfigError, match=r"scale=2: a tile of 16x16 px came back as 16x16; correct the model's card"):
        run_tiled(lambda x: x, noise(32, 32), scale=2, tile_px=16, halo_px=2, align=1)


def test_tiles_may_come_back_in_any_order() -> None:
    x, net = noise(40, 53), network(2)
    tiles = plan_tiles(40, 53, tile_px=16, halo_px=3)
    out = np.zeros((1, 3, 80, 106), np.float32)
    for i in np.random.default_rng(0).permutation(len(tiles)):
        t = tiles[i]
        place(out, net(x[:, :, t.y : t.y + t.height, t.x : t.x + t.width]), t, 2)
    np.testing.assert_array_equal(out, net(x))
