"""The gate is arithmetic on scores: what it must promote, what it must hold, and that it cannot be fooled."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale import contract
from rayscale.contract import ModelCard, Scores, Spec
from rayscale.errors import ConfigError
from rayscale.registry.gate import Gate, Hold, Promote, Report, decide, lower_bound, markdown

GATE = Gate(resamples=200)
CARD = ModelCard(family="compact", spec=Spec(kind="transform", inputs=(), outputs=(), halo_px=1), licence="MIT",
                 parity_max_abs=1e-6)  # fmt: skip


def scores(subject: str, psnr: list[float], ssim: float = 0.9, suite: str = "s") -> Scores:
    keys = tuple(f"image{i}" for i in range(len(psnr)))
    return Scores(
        subject=subject, suite=suite, keys=keys, metrics={"psnr_y": tuple(psnr), "ssim_y": (ssim,) * len(psnr)}
    )


BICUBIC = scores("bicubic", [30.0, 28.0, 33.0], 0.85)
OLD = scores("old", [31.0, 29.0, 34.0], 0.89)
NEW = scores("new", [31.5, 29.4, 34.4], 0.90)
PSNR = NEW.metrics["psnr_y"]


def reasons(*args, **kwargs) -> tuple[str, ...]:
    decision = decide(*args, **kwargs)
    assert isinstance(decision, Hold)
    assert len(decision.reasons) == sum(not row.passed for row in decision.report.rows)
    return decision.reasons


def test_a_better_model_is_promoted_with_every_figure() -> None:
    decision = decide(NEW, OLD, BICUBIC, GATE, CARD)
    assert isinstance(decision, Promote)
    rows = {row.rule: row.value for row in decision.report.rows}
    assert rows["psnr_y gain over baseline, mean"] == pytest.approx(4.3 / 3)
    assert rows["psnr_y gain over champion, mean"] == pytest.approx(1.3 / 3)
    assert rows["psnr_y gain over champion, worst image (image1)"] == pytest.approx(0.4)
    assert rows["parity, max |ONNX Runtime - torch|"] == 1e-6
    assert decide(NEW, None, BICUBIC, GATE, CARD).report.champion == ""
    table = markdown(decision.report)
    assert table.count("\n|") == len(rows) + 2
    assert "NO" not in table
    assert contract.loads(Report, contract.dumps(decision.report), "report") == decision.report


@pytest.mark.parametrize(
    ("candidate", "champion", "gate", "card", "expected"),
    [
        (scores("new", [30.1, 28.1, 33.1]), None, GATE, CARD, "gain over baseline, mean"),
        (scores("new", [40.0, 40.0, 32.4]), None, GATE, CARD, "worst image (image2): -0.6, must be >= -0.5"),
        (scores("new", [30.9, 28.9, 33.9]), OLD, GATE, CARD, "gain over champion, lower 95% bound: -0.1"),
        (scores("new", [40.0, 28.4, 40.0]), OLD, GATE, CARD, "gain over champion, worst image (image1): -0.6"),
        (scores("new", [32.0, 30.0, 35.0], 0.84), None, GATE, CARD, "ssim_y gain over baseline"),
        (scores("new", [32.0, 30.0, 35.0], 0.88), OLD, GATE, CARD, "ssim_y gain over champion"),
        (dataclasses.replace(NEW, suite="t"), None, GATE, CARD, "suite of baseline: another suite"),
        (dataclasses.replace(NEW, keys=NEW.keys[::-1]), OLD, GATE, CARD, "suite of champion: other images"),
        (NEW, dataclasses.replace(OLD, subject="new"), GATE, CARD, "already champion"),
        (scores("new", [31.5, math.nan, 34.4]), None, GATE, CARD, "psnr_y of candidate: image1 is nan"),
        (scores("new", [31.5, math.inf, 34.4]), None, GATE, CARD, "psnr_y of candidate: image1 is inf"),
        (dataclasses.replace(NEW, metrics={"psnr_y": PSNR}), None, GATE, CARD, "ssim_y of candidate: missing"),
        (dataclasses.replace(NEW, metrics=NEW.metrics | {"psnr_y": PSNR[:1]}), None, GATE, CARD, "1 values for 3"),
        (NEW, None, dataclasses.replace(GATE, metric="lpips"), CARD, "lpips of baseline: missing"),
        (NEW, None, dataclasses.replace(GATE, min_images=4), CARD, "held-out images: 3, must be >= 4"),
        (NEW, None, GATE, dataclasses.replace(CARD, parity_max_abs=2e-4), "parity, max |ONNX Runtime - torch|: 0.0002"),
        (NEW, None, GATE, dataclasses.replace(CARD, parity_max_abs=None), "torch|: missing"),
        (NEW, None, GATE, dataclasses.replace(CARD, parity_max_abs=math.nan), "torch|: nan"),
        (NEW, None, GATE, dataclasses.replace(CARD, licence="  "), "licence: missing"),
    ],
)  # fmt: skip
def test_each_rule_holds_alone(candidate, champion, gate, card, expected) -> None:
    baseline = dataclasses.replace(BICUBIC, keys=candidate.keys)  # a wrong order is the champion's matter
    held = reasons(candidate, champion, baseline, gate, card)
    assert any(expected in reason for reason in held), held
    assert isinstance(decide(NEW, OLD, BICUBIC, GATE, CARD), Promote)  # the same call without the fault


def strict_json(report: Report) -> None:
    json.loads(contract.dumps(report), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_report_is_json_also_when_a_figure_is_none() -> None:
    strict_json(decide(NEW, OLD, BICUBIC, GATE, dataclasses.replace(CARD, parity_max_abs=math.nan)).report)


def test_nothing_held_out_holds() -> None:
    empty = scores("new", [])
    assert any("held-out images: 0" in r for r in reasons(empty, None, scores("bicubic", []), GATE, CARD))


def test_a_worse_mean_may_hide_in_noise_but_not_in_a_shift() -> None:
    """The interval, not the mean, decides: the same mean loss passes when tiny and holds when the spread is wide."""
    old = [30.0] * 20
    level = scores("new", [30.0 - 0.02] * 20)
    uneven = scores("new", [30.0 + (0.4 if i % 2 else -0.44) for i in range(20)])  # mean loss 0.02 as well
    low = scores("bicubic", [25.0] * 20)
    assert isinstance(decide(level, scores("old", old), low, GATE, CARD), Promote)
    assert any("lower 95% bound" in r for r in reasons(uneven, scores("old", old), low, GATE, CARD))


def test_the_bootstrap_bound_covers_as_it_says() -> None:
    """Over many draws the bound lies above the true mean in about 5 % of them: figures, not decoration."""
    rng = np.random.default_rng(7)
    misses = [
        lower_bound(list(rng.normal(0.3, 1.0, 40)), confidence=0.95, resamples=300, seed=0) > 0.3 for _ in range(300)
    ]
    assert 0.02 < np.mean(misses) < 0.10


values = st.floats(20.0, 45.0, allow_nan=False)
triples = st.lists(st.tuples(values, values, values), min_size=1, max_size=8)
FAST = Gate(resamples=30)


@given(triples, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_images_does_not_matter(rows, random) -> None:
    def outcome(rows):
        new, old, base = (
            scores(n, list(v)) for n, v in zip(("new", "old", "bicubic"), zip(*rows, strict=True), strict=True)
        )
        decision = decide(new, old, base, FAST, CARD)
        return type(decision), [row.value for row in decision.report.rows]

    shuffled = random.sample(rows, len(rows))
    assert outcome(rows) == outcome(shuffled)


@given(triples, st.lists(st.floats(0.0, 5.0), min_size=8, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_better_picture_is_never_punished(rows, lifts) -> None:
    new, old, base = (list(column) for column in zip(*rows, strict=True))
    lifted = [value + lift for value, lift in zip(new, itertools.cycle(lifts), strict=False)]
    before = decide(scores("new", new), scores("old", old), scores("bicubic", base), FAST, CARD)
    after = decide(scores("new", lifted), scores("old", old), scores("bicubic", base), FAST, CARD)
    assert not (isinstance(before, Promote) and isinstance(after, Hold))


@given(st.lists(values, min_size=1, max_size=8), st.sampled_from(["new", "old", "bicubic"]), st.data())
@settings(max_examples=60, deadline=None)
def test_one_unusable_value_anywhere_holds(psnr, where, data) -> None:
    given_scores = {name: scores(name, psnr) for name in ("new", "old", "bicubic")}
    spoilt = list(psnr)
    spoilt[data.draw(st.integers(0, len(psnr) - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    given_scores[where] = scores(where, spoilt)
    decision = decide(given_scores["new"], given_scores["old"], given_scores["bicubic"], FAST, CARD)
    assert isinstance(decision, Hold)
    strict_json(decision.report)


@pytest.mark.parametrize(
    "change",
    [
        {"confidence": 1.0},
        {"resamples": 0},
        {"min_images": 0},
        {"margin_vs_champion": -1.0},
        {"max_image_loss_db": math.inf},
        {"min_gain_db_over_baseline": math.nan},
    ],
)
def test_a_gate_that_says_nothing_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Gate(**change)
