"""Chains of operators: composition, records, scale and margin, plain values, the published presets."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale import recipes
from rayscale.contract import digest, dumps, loads, to_json
from rayscale.data import presets
from rayscale.data.degrade import FUNCTIONS, Operator, apply, degrade, replay, scale_of
from rayscale.data.draws import Chain, Drawn
from rayscale.data.extent import has_codec, margin_px
from rayscale.data.operators import (
    Bicubic,
    Burst,
    Decimate,
    Defocus,
    GaussianBlur,
    GaussianNoise,
    Jpeg,
    Mask,
    MotionBlur,
    OneOf,
    PoissonNoise,
    RandomResize,
    Resize,
    SaltPepper,
    Shrink,
    Shuffled,
    Sinc,
    Sometimes,
    SpeckleNoise,
    Webp,
    walk,
)
from rayscale.data.plan import DataSettings
from rayscale.errors import ConfigError
from rayscale.imaging import U8

PICTURE: U8 = cv2.resize(np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8), (48, 48))
PRESETS = {
    "bicubic": presets.bicubic(2),
    "first_order": presets.first_order(4),
    "real_esrgan": presets.real_esrgan(4),
    "bsrgan 2": presets.bsrgan(2),
    "bsrgan 4": presets.bsrgan(4),
    "denoise": presets.denoise(),
    "denoise 25": presets.denoise(25.0),
    "deblock": presets.deblock(),
    "deblur": presets.deblur(),
    "inpaint": presets.inpaint(),
    "burst": presets.burst(4, 3),
}

PLAIN: list[Operator] = [
    GaussianBlur(sigma=(0.2, 3.0), isotropic=False, shape="plateau", beta=(1.0, 2.0)),
    Sinc(),
    MotionBlur(length=(2.0, 9.0)),
    Defocus(radius=(1.0, 4.0)),
    GaussianNoise(sigma=(1.0, 30.0), gray=0.4, correlated=0.2),
    PoissonNoise(scale=(0.05, 3.0), gray=0.4),
    SpeckleNoise(sigma=(1.0, 30.0)),
    SaltPepper(amount=(0.01, 0.1)),
    Jpeg(quality=(30, 95), sampling=("420", "444")),
    Webp(quality=(30, 95)),
    RandomResize(probabilities=(1, 2, 1), factor=(0.3, 1.5)),
    RandomResize(probabilities=(1, 2, 1), factor=(0.3, 1.5), scale=4),
    Shrink(ratio=(1.0, 4.0)),
    Decimate(scale=2, sigma=(0.1, 1.2)),
    Bicubic(scale=2),
]


def chains(least: int = 0) -> st.SearchStrategy[tuple[Operator, ...]]:
    """Any composition, ended by a resize to a quarter, and perhaps a mask."""

    def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        several = st.lists(inner, min_size=1, max_size=3).map(tuple)
        return st.one_of(
            st.builds(Sometimes, probability=st.floats(0, 1), operators=several),
            st.builds(OneOf, options=st.lists(several, min_size=1, max_size=3).map(tuple)),
            st.builds(lambda ops: Shuffled(operators=ops, ordered=(0, len(ops) - 1) if len(ops) > 1 else ()), several),
        )

    anything = st.lists(st.recursive(st.sampled_from(PLAIN), composed, max_leaves=5), min_size=least, max_size=4)
    return st.tuples(anything, st.booleans()).map(
        lambda given: (*given[0], Resize(scale=4), *((Mask(),) if given[1] else ()))
    )


@settings(max_examples=60, deadline=None)
@given(chain=chains(), seed=st.integers(0, 999))
def test_any_chain_gives_its_shape_and_is_replayed_from_its_record(chain: tuple[Operator, ...], seed: int) -> None:
    record = Chain(np.random.default_rng(seed))
    tensors = degrade(chain, PICTURE, record)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        "lr": ((12, 12, 3), np.uint8),
        **({"mask": ((12, 12, 1), np.uint8)} if isinstance(chain[-1], Mask) else {}),
    }
    told = json.loads(json.dumps(record.drawn))
    assert [entry["name"] for entry in told] == [operator.name for operator in chain]
    again = degrade(chain, PICTURE, Chain(None, told))
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)
    same, drawn = apply(chain, PICTURE, np.random.default_rng(seed))
    assert np.array_equal(same, tensors["lr"])
    assert drawn == record.drawn


@settings(max_examples=30, deadline=None)
@given(chain=chains())
def test_any_chain_is_a_plain_value(chain: tuple[Operator, ...]) -> None:
    data = DataSettings(hr_crop_px=64, degradation=chain)
    assert loads(DataSettings, dumps(data), "data") == data
    typed = pydantic.TypeAdapter(tuple[Operator, ...]).validate_json(json.dumps(to_json(chain)))
    assert typed == chain
    assert digest(typed) == digest(chain) != digest((*chain, chain[0]))


def test_equal_values_have_equal_digests() -> None:
    whole, fraction = PoissonNoise(scale=(1, 2), gray=1), PoissonNoise(scale=(1.0, 2.0), gray=1.0)
    assert whole == fraction
    assert digest(whole) == digest(fraction)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_their_contract(name: str) -> None:
    chain = PRESETS[name]
    scale = scale_of(chain)
    lr, drawn = apply(chain, PICTURE, np.random.default_rng(5))
    assert lr.shape[-3:] == (48 // scale, 48 // scale, 3)
    assert np.array_equal(replay(chain, PICTURE, json.loads(json.dumps(drawn))), lr)
    assert np.array_equal(apply(chain, PICTURE, np.random.default_rng(5))[0], lr)
    if name != "bicubic":
        assert not np.array_equal(apply(chain, PICTURE, np.random.default_rng(6))[0], lr)
    data = DataSettings(hr_crop_px=64, degradation=chain)
    assert loads(DataSettings, dumps(data), "data") == data
    assert recipes.load(
        "rayscale.recipes.compact:tiny", [f"data.degradation={json.dumps(to_json(chain))}"]
    ).data.degradation == chain  # fmt: skip


def test_every_operator_has_its_function() -> None:
    union = Operator.__origin__.__args__  # type: ignore[attr-defined]
    assert set(union) == {*FUNCTIONS, Mask}, "the mask is the end of a chain, not a step of it"
    assert {type(o) for chain in PRESETS.values() for o in walk(chain)} <= set(union)
    assert len({operator.__dataclass_fields__["name"].default for operator in union}) == len(union)


def test_a_record_of_another_chain_is_refused() -> None:
    _, drawn = apply((Sinc(), Resize(scale=2)), PICTURE, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"drawn=defocus: the record goes on with sinc; replay it with the operators"):
        replay((Defocus(radius=(1, 2)), Resize(scale=2)), PICTURE, drawn)
    with pytest.raises(ConfigError, match=r"drawn=jpeg: the record goes on with nothing"):
        replay((Sinc(), Resize(scale=2), Jpeg(quality=(30, 90))), PICTURE, drawn)
    with pytest.raises(ConfigError, match=r"drawn=cutoff: the record of sinc does not hold it"):
        replay((Sinc(), Resize(scale=2)), PICTURE, [{"name": "sinc", "size": 7}])
    changed = [{**drawn[0], "cutoff": 1.1}, drawn[1]]
    assert not np.array_equal(replay((Sinc(), Resize(scale=2)), PICTURE, changed),
                              replay((Sinc(), Resize(scale=2)), PICTURE, drawn))  # fmt: skip


# Composition


def drawn_of(chain: tuple[Operator, ...], count: int, picture: U8 = PICTURE[:16, :16]) -> list[Drawn]:
    return [apply(chain, picture, np.random.default_rng(seed))[1] for seed in range(count)]


def test_sometimes_and_one_of_have_their_probabilities() -> None:
    quick = Bicubic(scale=1)
    chain = (
        Sometimes(probability=0.3, operators=(quick,)),
        OneOf(options=((), (quick,), (quick, quick)), weights=(1, 3, 6)),
        OneOf(options=((), (quick,))),
    )
    records = drawn_of(chain, 2000)
    assert np.mean([r[0]["taken"] for r in records]) == pytest.approx(0.3, abs=0.04)
    options = Counter(r[1]["option"] for r in records)
    np.testing.assert_allclose([options[i] / 2000 for i in range(3)], (0.1, 0.3, 0.6), atol=0.04)
    assert np.mean([r[2]["option"] for r in records]) == pytest.approx(0.5, abs=0.04)
    assert all(len(r[1]["drawn"]) == r[1]["option"] for r in records)


def test_shuffled_keeps_the_order_it_is_told_to_keep() -> None:
    names = ("sinc", "shrink", "resize", "jpeg")
    operators = (Sinc(sizes=(7,)), Shrink(ratio=(1, 2)), Resize(scale=2), Jpeg(quality=(90, 95)))
    orders = Counter(
        tuple(step["name"] for step in record[0]["drawn"])
        for record in drawn_of((Shuffled(operators=operators, ordered=(1, 2)),), 600)
    )
    assert all(order.index("shrink") < order.index("resize") for order in orders)
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(orders) == 12
    assert min(orders.values()) > 600 / 12 / 2
    free = {tuple(r[0]["order"]) for r in drawn_of((Shuffled(operators=(Sinc(sizes=(7,)),) * 3),), 60)}
    assert len(free) == 6


# Scale and margin


SIZES = RandomResize(probabilities=(1, 1, 1), factor=(0.5, 2.0))


@pytest.mark.parametrize(
    ("chain", "scale"),
    [
        ((), 1),
        ((Bicubic(scale=2), Bicubic(scale=3)), 6),
        ((Bicubic(scale=2), Resize(scale=4)), 4),
        ((SIZES, Resize(scale=3)), 3),
        ((OneOf(options=((Resize(scale=2),), (Bicubic(scale=2),))),), 2),
        ((Sometimes(probability=0.5, operators=(SIZES,)), Resize(scale=2)), 2),
        ((Sometimes(probability=0.5, operators=(SIZES, Resize(scale=1))),), 1),
        ((Shuffled(operators=(Sinc(), SIZES, Resize(scale=4)), ordered=(1, 2)),), 4),
        ((Burst(frames=2, shift_px=1.0, shared=(Resize(scale=4),), each=(Sinc(),)),), 4),
        ((SIZES,), None),
        ((Resize(scale=2), Shrink(ratio=(1, 2))), None),
        ((Shuffled(operators=(SIZES, Resize(scale=4))),), None),
        ((Shuffled(operators=(Bicubic(scale=2), Sinc())),), None),
        ((OneOf(options=((Resize(scale=2),), (Resize(scale=4),))),), None),
        ((Sometimes(probability=0.5, operators=(Bicubic(scale=2),)),), None),
        ((SIZES, Bicubic(scale=2)), None),
    ],
)
def test_a_chain_has_one_scale_or_is_refused(chain: tuple[Operator, ...], scale: int | None) -> None:
    if scale is None:
        with pytest.raises(ConfigError, match=r"degradation=.*: ends at a random size; end it with"):
            DataSettings(hr_crop_px=48, degradation=chain)
    else:
        assert DataSettings(hr_crop_px=48, degradation=chain).scale == scale
        assert {apply(chain, PICTURE, np.random.default_rng(s))[0].shape[-2] for s in range(5)} == {48 // scale}


@pytest.mark.parametrize("last", [Mask(), Burst(frames=2, shift_px=1.0)])
def test_a_mask_or_a_burst_is_the_end(last: Operator) -> None:
    DataSettings(hr_crop_px=48, degradation=(Sinc(), last))
    for wrong in ((last, Sinc()), (last, last), (Sometimes(probability=1, operators=(last,)),)):
        with pytest.raises(ConfigError, match="must be the last operator of the chain"):
            DataSettings(hr_crop_px=48, degradation=wrong)


def test_margins_are_what_is_read_and_bounded() -> None:
    assert margin_px((GaussianNoise(sigma=(1, 5)), SaltPepper(amount=(0, 0.1)))) == 0
    assert margin_px((Bicubic(scale=4),)) == 8
    assert margin_px((GaussianBlur(sigma=(1, 2), sizes=(7, 11)), Resize(scale=3))) == 9  # 5 + 4
    assert margin_px((Bicubic(scale=16),)) == 32
    assert margin_px((GaussianBlur(sigma=(1, 2), sizes=(51,)),)) == 16
    for scale in (1, 2, 3, 4, 8):
        margin = margin_px((SIZES, Sinc(), Resize(scale=scale)))
        assert margin % scale == 0
        assert margin <= max(16, 4 * scale) + scale
    moved = Burst(frames=2, shift_px=7.5, shared=(Resize(scale=4),))
    assert margin_px((moved,)) == 4 + 8
    assert has_codec(presets.bsrgan(4))
    assert not has_codec(presets.deblur())


# Bursts


def test_the_first_frame_of_a_burst_is_in_place_and_the_lens_is_shared() -> None:
    resized = Resize(scale=4, methods=("area",))
    still = Burst(frames=4, shift_px=0.0, shared=(GaussianBlur(sigma=(0.5, 3.0), isotropic=False), resized))
    frames, drawn = apply((still,), PICTURE, np.random.default_rng(2))
    assert all(np.array_equal(frames[0], frame) for frame in frames), "one kernel for all"
    assert len(drawn[0]["shared"]) == 2
    noisy = replace(still, each=(GaussianNoise(sigma=(5.0, 10.0)),))
    frames, _ = apply((noisy,), PICTURE, np.random.default_rng(2))
    assert not any(np.array_equal(frames[0], frame) for frame in frames[1:]), "noise is of each frame's own"
    moved = Burst(frames=3, shift_px=4.0, degrees=2.0, shared=(resized,))
    frames, drawn = apply((moved,), PICTURE, np.random.default_rng(2))
    assert np.array_equal(frames[0], apply((resized,), PICTURE, np.random.default_rng(0))[0])
    assert len(drawn[0]["shifts"]) == 2
    assert max(abs(s[k]) for s in drawn[0]["shifts"] for k in ("dx", "dy")) < 4


def test_frames_lie_where_the_record_says() -> None:
    plain = (Burst(frames=2, shift_px=8.0, degrees=45.0),)
    shift = {"name": "shift", "dx": 3.0, "dy": -2.0, "degrees": 0.0}
    record = [{"name": "burst", "shifts": [shift], "shared": [], "each": [{"name": "frame", "drawn": []}] * 2}]
    frames = replay(plain, PICTURE, record)
    np.testing.assert_array_equal(frames[1, 2:-1, :-3], PICTURE[:-3, 3:])
    half = replay(plain, PICTURE, [{**record[0], "shifts": [{**shift, "dx": 0.5, "dy": 0.0}]}])
    between = (PICTURE[:, 8:-9].astype(float) + PICTURE[:, 9:-8]) / 2
    assert np.abs(half[1, :, 8:-9] - between).max() < 12  # cubic, of a smooth picture
    assert np.abs(half[1, :, 8:-9] - PICTURE[:, 8:-9].astype(float)).max() > 12


# Published numbers


def flattened(record: Any) -> list[dict[str, Any]]:
    """All steps of a record, composed ones opened."""
    found = []
    for step in record:
        found.append(step)
        found += flattened(step.get("drawn", []))
    return found


def test_real_esrgan_has_the_published_probabilities() -> None:
    count = 1500
    records = drawn_of(presets.real_esrgan(4), count, PICTURE[:32, :32])

    def share(hits: Any) -> float:
        return float(np.mean([bool(hit) for hit in hits]))

    kinds = np.array([0.45, 0.25, 0.12, 0.03, 0.12, 0.03]) * 0.9
    expected = [*kinds, 0.1 * 3 / 8, 0.1 * 5 / 8]
    for first in (True, False):
        taken = [r[0] for r in records] if first else [r[4]["drawn"][0] for r in records if r[4]["taken"]]
        options = Counter(step["option"] for step in taken)
        found = [options[i] / len(taken) for i in range(8)]
        np.testing.assert_allclose(found, expected, atol=0.045)
        sigmas = [s for step in taken for s in (step["drawn"][0].get("sigma_x"),) if s is not None]
        assert 0.2 <= min(sigmas) < 0.25
        assert (2.9 if first else 1.4) < max(sigmas) <= (3.0 if first else 1.5)
        sincs = [step["drawn"][0] for step in taken if step["option"] > 5]
        assert all(s["cutoff"] >= math.pi / (3 if s["size"] < 13 else 5) for s in sincs)
    for at, expected in ((1, (0.2, 0.7, 0.1)), (5, (0.3, 0.4, 0.3))):
        ways = Counter(r[at]["way"] for r in records)
        np.testing.assert_allclose([ways[i] / count for i in range(3)], expected, atol=0.045)
    assert share(r[4]["taken"] for r in records) == pytest.approx(0.8, abs=0.04)
    for at, sigma_max, scale_max in ((2, 30, 3.0), (6, 25, 2.5)):
        gaussian = [r[at]["drawn"][0] for r in records if r[at]["option"] == 0]
        poisson = [r[at]["drawn"][0] for r in records if r[at]["option"] == 1]
        assert len(gaussian) / count == pytest.approx(0.5, abs=0.05)
        assert share(step["kind"] == 0 for step in gaussian) == pytest.approx(0.4, abs=0.06)
        assert share(step["gray"] for step in poisson) == pytest.approx(0.4, abs=0.06)
        assert 0.95 * sigma_max < max(step["sigma"] for step in gaussian) <= sigma_max
        assert 0.95 * scale_max < max(step["scale"] for step in poisson) <= scale_max
    qualities = [s["quality"] for r in records for s in flattened(r) if s["name"] == "jpeg"]
    assert len(qualities) == 2 * count
    assert (min(qualities), max(qualities)) == (30, 95)
    assert share(r[7]["option"] for r in records) == pytest.approx(0.5, abs=0.05)
    ends = [tuple(step["name"] for step in r[7]["drawn"]) for r in records]
    assert set(ends) == {("resize", "sometimes", "jpeg"), ("jpeg", "resize", "sometimes")}
    assert share(s["taken"] for r in records for s in r[7]["drawn"] if s["name"] == "sometimes") == pytest.approx(
        0.8, abs=0.04
    )


def test_bsrgan_is_shuffled_with_the_published_probabilities() -> None:
    count = 600
    records = drawn_of(presets.bsrgan(4), count, PICTURE[:32, :32])
    halved = [r[0]["option"] for r in records]
    assert np.mean(halved) == pytest.approx(0.25, abs=0.07)
    shuffled = [r[0]["drawn"][-1] for r in records]
    orders = Counter(tuple(step["order"]) for step in shuffled)
    assert len(orders) > 300
    names = [[step["name"] for step in s["drawn"]] for s in shuffled]
    assert all(n.count("gaussian_noise") == 1 and n.count("resize") == 1 and len(n) == 6 for n in names)
    kept = [s["taken"] for record in shuffled for s in record["drawn"] if s["name"] == "sometimes"]
    assert np.mean(kept) == pytest.approx(0.9, abs=0.05)
    noises = Counter(s["kind"] for record in shuffled for s in record["drawn"] if s["name"] == "gaussian_noise")
    np.testing.assert_allclose([noises[i] / count for i in range(3)], (0.4, 0.2, 0.4), atol=0.08)
    assert {r[1]["name"] for r in records} == {"jpeg"}
