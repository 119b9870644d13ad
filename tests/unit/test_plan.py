"""The plan: exact epochs, no repeated image in a micro-batch, O(1) at any position."""

import hashlib
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.data.degrade import Bicubic
from rayscale.data.plan import VERSION, DataSettings, Plan, permute, sample_generator
from rayscale.errors import ConfigError

SMALL = DataSettings(hr_crop_px=32, micro_batch=2, virtual_shards=3, window_images=4, crops=3, seed=7)


@given(st.integers(1, 3000), st.integers(0, 2**60))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_is_uniform_and_keyed() -> None:
    n, keys = 10, 4000
    hits = np.zeros((n, n))
    for key in range(keys):
        hits[np.arange(n), permute(np.arange(n), n, key)] += 1
    expected = keys / n
    assert ((hits - expected) ** 2 / expected).sum() < 150  # chi-square, 81 degrees of freedom: p < 1e-5 above
    assert not np.array_equal(permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2))


@given(st.integers(4, 23), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_image_exactly_once_per_crop(n: int, seed: int) -> None:
    plan = Plan((n,), replace(SMALL, seed=seed))
    epochs = 3
    shown: dict[tuple[int, int, int], int] = {}
    windows = -(-epochs * n // (SMALL.window_images * SMALL.virtual_shards)) + 1
    for w in range(windows):
        for v in range(SMALL.virtual_shards):
            window = plan.window(w, v)
            for row in window.order:
                images = window.images[row // SMALL.crops]
                assert len(set(images.tolist())) == SMALL.micro_batch, "two crops of one image in a micro-batch"
                for entry in row:
                    slot, crop = divmod(int(entry), SMALL.crops)
                    key = (int(window.epochs[slot]), int(window.images[slot]), crop)
                    shown[key] = shown.get(key, 0) + 1
    expected = {(e, i, c) for e in range(epochs) for i in range(n) for c in range(SMALL.crops)}
    assert {k for k in shown if k[0] < epochs} == expected
    assert set(shown.values()) == {1}


def test_a_round_visits_every_image_before_the_next_begins() -> None:
    window = Plan((50,), SMALL).window(0, 0)
    per_round = SMALL.window_images // SMALL.micro_batch
    for k in range(SMALL.crops):
        entries = window.order[k * per_round : (k + 1) * per_round].ravel()
        assert sorted(entries // SMALL.crops) == list(range(SMALL.window_images))
        assert set(entries % SMALL.crops) == {k}


def test_order_differs_between_rounds_epochs_and_seeds() -> None:
    plan = Plan((12,), SMALL)
    first, again = plan.window(0, 0), plan.window(1, 0)  # one epoch is one window of each shard here
    assert not np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, Plan((12,), replace(SMALL, seed=8)).window(0, 0).images)
    rounds = [first.order[i : i + 2] // SMALL.crops for i in (0, 2, 4)]
    assert not (np.array_equal(rounds[0], rounds[1]) and np.array_equal(rounds[1], rounds[2]))


def test_any_position_is_as_cheap_as_the_first() -> None:
    settings_ = replace(SMALL, micro_batch=8, window_images=64, crops=4, virtual_shards=16)
    plan = Plan((1_000_000,), settings_)

    def cost(w: int) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            for i in range(10):
                plan.window(w + i, 3)
            best = min(best, time.process_time() - begin)
        return best

    near, far = cost(0), cost(10**9 // settings_.global_batch)
    assert far < 5 * near + 0.01


def test_samples_draw_from_their_identity() -> None:
    def draws(*key: int) -> list[int]:
        return sample_generator(*key).integers(0, 2**62, 4).tolist()

    assert draws(1, 2, 3, 4) == draws(1, 2, 3, 4)
    others = [draws(0, 2, 3, 4), draws(1, 0, 3, 4), draws(1, 2, 0, 4), draws(1, 2, 3, 0)]
    assert draws(1, 2, 3, 4) not in others
    assert len({tuple(d) for d in others}) == 4


def test_digest_tells_apart_what_changes_the_sequence() -> None:
    base = Plan((50,), SMALL)
    variants = [
        Plan((51,), SMALL),
        *(Plan((50,), replace(SMALL, **change)) for change in (
            {"seed": 8}, {"crops": 2}, {"virtual_shards": 4}, {"hr_crop_px": 64}, {"flips": False},
            {"degradation": (Bicubic(scale=4),)}, {"degradation": (Bicubic(scale=2, border="mirror"),)},
        )),
    ]  # fmt: skip
    digests = {p.digest("photos") for p in [base, *variants]} | {base.digest("other photos")}
    assert len(digests) == len(variants) + 2
    assert base.digest("photos") == Plan((50,), replace(SMALL)).digest("photos")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"micro_batch": 0}, "data.micro_batch"),
        ({"window_images": 3}, "data.window_images"),
        ({"window_images": 2}, "data.window_images"),
        ({"hr_crop_px": 33}, "data.hr_crop_px"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SMALL, **change)


def test_fewer_images_than_a_window_are_refused_with_a_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.window_images=4: a window takes 4 images of this split, which has 3.*pack more"
    ):
        Plan((3,), SMALL)


def test_the_sequence_is_pinned() -> None:
    """A change of these numbers breaks the resume of every run there is: raise plan.VERSION with it."""
    plan = Plan((23,), SMALL)
    windows = [plan.window(w, v) for w, v in ((0, 0), (0, 2), (5, 1), (10**9, 0))]
    content = b"".join(np.ascontiguousarray(a, "<i8").tobytes() for window in windows for a in window)
    draws = sample_generator(7, 1, 2, 3)
    content += np.ascontiguousarray(draws.integers(0, 1000, 50), "<i8").tobytes() + draws.random(8).tobytes()
    content += draws.standard_normal(8, np.float32).tobytes()
    found = hashlib.sha256(content).hexdigest()
    assert (VERSION, found) == (1, "a9b4cfd175eb2d99c51ca61ff0ea87de7b45dc5c0c160aff46278e3f58e4c0bf")


MIXED = replace(SMALL, micro_batch=2, window_images=8, virtual_shards=2, crops=1, weights=(3, 1))


@given(st.integers(6, 40), st.integers(4, 30), st.integers(0, 2**32), st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_a_mixture_is_exact_at_any_position(first: int, second: int, seed: int, start: int) -> None:
    """Of every 4 slots in turn 3 are of the first dataset; each goes through epochs of its own, every image once."""
    plan = Plan((first, second), replace(MIXED, seed=seed))
    windows = [plan.window(start + w, v) for w in range(max(first, second)) for v in range(2)]
    images = np.concatenate([w.images for w in windows])
    epochs = np.concatenate([w.epochs for w in windows])
    of_second = images >= first
    assert (of_second.reshape(-1, 4).sum(axis=1) == 1).all()
    for of, size, low in ((~of_second, first, 0), (of_second, second, first)):
        seen = images[of] - low
        for epoch in np.unique(epochs[of])[1:-1]:  # those that lie in the range as a whole
            assert np.array_equal(np.sort(seen[epochs[of] == epoch]), np.arange(size))
    orders = {tuple(cycle) for cycle in of_second.reshape(-1, 4)}
    assert len(orders) > 1, "the order within a cycle is drawn, too"
    rows = [images_ for w in windows for images_ in w.images[w.order // plan.settings.crops]]
    assert all(len(set(row.tolist())) == 2 for row in rows), "no image twice in a micro-batch"


def test_weights_that_do_not_fit_the_datasets_are_refused() -> None:
    for sizes, weights in (((9, 9), ()), ((9,), (3, 1)), ((9, 9), (3, 0)), ((9, 9), (10_000, 1))):
        with pytest.raises(ConfigError, match=r"data\.weights=.*e\.g\. --set data\.weights=\[3,1\]"):
            Plan(sizes, replace(MIXED, weights=weights))
    with pytest.raises(ConfigError, match=r"data\.window_images=8: a window takes 8 images of this split, which has 2"):
        Plan((2, 9), MIXED)


@given(st.integers(17, 60), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_substitutes_are_others_and_differ(n: int, w: int) -> None:
    plan = Plan((n, n + 3), MIXED)
    there = plan.window(w, 1)
    for attempt in range(3):
        others = plan.substitute(w, 1, attempt)
        assert ((others < n) == (there.images < n)).all(), "of the same dataset"
        of = there.images < n
        if len(np.unique(there.epochs[of])) == 1:  # no seam of two epochs in this window
            assert len(set(others[of].tolist())) == of.sum()
            assert not set(others[of].tolist()) & set(there.images[of].tolist())


def test_a_position_costs_no_memory() -> None:
    plan = Plan((10**9,), replace(SMALL, micro_batch=8, window_images=64, virtual_shards=16))
    tracemalloc.start()
    for w in (0, 10**6, 10**12):
        plan.window(w, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_every_seed_is_a_stream_of_its_own() -> None:
    """Also beyond 2^63, where numpy takes a list of integers for floats."""
    seeds = [0, 1, -1, -2, 2**62, 2**63, 2**63 + 1, 2**64 - 3]
    draws = {int(sample_generator(seed, 0, 0, 0).integers(2**62)) for seed in seeds}
    assert len(draws) == len(seeds)
