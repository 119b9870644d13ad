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
from rayscale.contract import Cost, Lineage, ModelCard, Scores, Spec
from rayscale.errors import ConfigError
from rayscale.registry.gate import (
    Contest,
    Forced,
    Gate,
    Hold,
    Promote,
    Report,
    decide,
    default_for,
    lower_bound,
    markdown,
    overrule,
    refuse,
)

GATE = Gate(resamples=200)
CARD = ModelCard(family="compact", spec=Spec(kind="transform", inputs=(), outputs=(), halo_px=1), licence="MIT",
                 lineage=Lineage(recipe="recipes:tiny", code_version="1"), parity_max_abs=1e-6)  # fmt: skip


def cost(subject: str, ms: float = 100.0, mib: float | None = 50.0, hardware: str = "CPU, EPYC, 2 CPUs") -> Cost:
    return Cost(subject=subject, hardware=hardware, ms_per_megapixel=(ms, 1.1 * ms, 0.9 * ms), memory_mib=mib)


def judged(candidate, champion, baseline, gate, card, measured=None):
    """On one suite; candidate and champion cost the same."""
    who = {"candidate": candidate} | ({"champion": champion} if champion else {})
    found = {name: cost(one.subject) for name, one in who.items()} if measured is None else measured
    return decide({"s": Contest(candidate=candidate, champion=champion, baseline=baseline)}, gate, card, found)


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
    decision = judged(*args, **kwargs)
    assert isinstance(decision, Hold)
    assert len(decision.reasons) == sum(not row.passed for row in decision.report.rows)
    return decision.reasons


def test_a_better_model_is_promoted_with_every_figure() -> None:
    decision = judged(NEW, OLD, BICUBIC, GATE, CARD)
    assert isinstance(decision, Promote)
    rows = {row.rule: row.value for row in decision.report.rows}
    assert rows["psnr_y gain over baseline, mean"] == pytest.approx(4.3 / 3)
    assert rows["psnr_y gain over champion, mean"] == pytest.approx(1.3 / 3)
    assert rows["psnr_y gain over champion, worst image (image1)"] == pytest.approx(0.4)
    assert rows["parity, max |ONNX Runtime - torch|"] == 1e-6
    assert judged(NEW, None, BICUBIC, GATE, CARD).report.champion == ""
    table = markdown(decision.report)
    assert table.count("\n|") == len(decision.report.rows) + 2
    assert "EPYC" in table
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
        (NEW, None, GATE, dataclasses.replace(CARD, family=""), "card: without family"),
        (NEW, None, GATE, dataclasses.replace(CARD, lineage=Lineage(recipe="x")), "card: without lineage.code_version"),
        (NEW, None, dataclasses.replace(GATE, suites=("s", "night")), CARD, "suite night: missing"),
    ],
)  # fmt: skip
def test_each_rule_holds_alone(candidate, champion, gate, card, expected) -> None:
    baseline = dataclasses.replace(BICUBIC, keys=candidate.keys)  # a wrong order is the champion's matter
    held = reasons(candidate, champion, baseline, gate, card)
    assert any(expected in reason for reason in held), held
    assert isinstance(judged(NEW, OLD, BICUBIC, GATE, CARD), Promote)  # the same call without the fault


def strict_json(report: Report) -> None:
    json.loads(contract.dumps(report), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_report_is_json_also_when_a_figure_is_none() -> None:
    strict_json(judged(NEW, OLD, BICUBIC, GATE, dataclasses.replace(CARD, parity_max_abs=math.nan)).report)


def test_nothing_held_out_holds() -> None:
    empty = scores("new", [])
    assert any("held-out images: 0" in r for r in reasons(empty, None, scores("bicubic", []), GATE, CARD))


def test_a_worse_mean_may_hide_in_noise_but_not_in_a_shift() -> None:
    """The interval, not the mean, decides: the same mean loss passes when tiny and holds when the spread is wide."""
    old = [30.0] * 20
    level = scores("new", [30.0 - 0.02] * 20)
    uneven = scores("new", [30.0 + (0.4 if i % 2 else -0.44) for i in range(20)])  # mean loss 0.02 as well
    low = scores("bicubic", [25.0] * 20)
    assert isinstance(judged(level, scores("old", old), low, GATE, CARD), Promote)
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
        decision = judged(new, old, base, FAST, CARD)
        return type(decision), [row.value for row in decision.report.rows]

    shuffled = random.sample(rows, len(rows))
    assert outcome(rows) == outcome(shuffled)


@given(triples, st.lists(st.floats(0.0, 5.0), min_size=8, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_better_picture_is_never_punished(rows, lifts) -> None:
    new, old, base = (list(column) for column in zip(*rows, strict=True))
    lifted = [value + lift for value, lift in zip(new, itertools.cycle(lifts), strict=False)]
    before = judged(scores("new", new), scores("old", old), scores("bicubic", base), FAST, CARD)
    after = judged(scores("new", lifted), scores("old", old), scores("bicubic", base), FAST, CARD)
    assert not (isinstance(before, Promote) and isinstance(after, Hold))


@given(st.lists(values, min_size=1, max_size=8), st.sampled_from(["new", "old", "bicubic"]), st.data())
@settings(max_examples=60, deadline=None)
def test_one_unusable_value_anywhere_holds(psnr, where, data) -> None:
    given_scores = {name: scores(name, psnr) for name in ("new", "old", "bicubic")}
    spoilt = list(psnr)
    spoilt[data.draw(st.integers(0, len(psnr) - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    given_scores[where] = scores(where, spoilt)
    decision = judged(given_scores["new"], given_scores["old"], given_scores["bicubic"], FAST, CARD)
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
        {"worst_k": 0},
        {"max_worst_k_loss_db": -0.1},
        {"max_latency_ratio": 0.0},
        {"max_memory_mib": math.inf},
    ],
)
def test_a_gate_that_says_nothing_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Gate(**change)


# --- a few ruined images ----------------------------------------------------------------------------------------


def many(subject: str, gains: list[float]) -> Scores:
    return scores(subject, [30.0 + gain for gain in gains])


@given(loss=st.floats(0.26, 0.49), num=st.integers(10, 20), gain=st.floats(0.5, 3.0))
@settings(max_examples=8, deadline=None)
def test_better_on_average_but_worse_on_a_few_is_held(loss, num, gain) -> None:
    """No single image loses more than it may; together they do."""
    old, low = many("old", [0.0] * 100), scores("bicubic", [29.0] * 100)
    ruined = many("new", [-loss] * num + [gain] * (100 - num))
    (reason,) = reasons(ruined, old, low, FAST, CARD)
    assert reason.startswith("psnr_y gain over champion, mean of the worst 10: -0.")
    fewer = many("new", [-loss] * 5 + [gain] * 95)  # control: five of the worst ten gain as much
    assert isinstance(judged(fewer, old, low, FAST, CARD), Promote)
    strict = dataclasses.replace(FAST, max_worst_k_loss_db=0.5)
    assert isinstance(judged(ruined, old, low, strict, CARD), Promote)


@given(shift=st.floats(-0.2, 0.2))
@settings(max_examples=25, deadline=None)
def test_an_equal_one_passes_within_its_margin_and_only_there(shift) -> None:
    old, low = many("old", [0.0] * 12), scores("bicubic", [29.0] * 12)
    decision = judged(many("new", [shift] * 12), old, low, FAST, CARD)
    if abs(shift + FAST.margin_vs_champion) > 1e-9:
        assert isinstance(decision, Promote) == (shift > -FAST.margin_vs_champion)


def test_the_baseline_has_an_interval_too() -> None:
    """A gain on average that a few images make, the others losing, is none."""
    low = scores("bicubic", [30.0] * 8)
    lucky = scores("new", [33.0] + [29.8] * 7)
    assert any("gain over baseline, lower 95% bound" in r for r in reasons(lucky, None, low, FAST, CARD))
    level = scores("new", [30.21] * 8)  # control: as much on average
    assert isinstance(judged(level, None, low, FAST, CARD), Promote)


# --- suites -----------------------------------------------------------------------------------------------------


def test_every_suite_counts_and_is_named() -> None:
    day = Contest(candidate=NEW, champion=OLD, baseline=BICUBIC)
    worse = dataclasses.replace(scores("new", [30.0, 28.0, 33.0]), suite="t")
    night = Contest(
        candidate=worse, champion=dataclasses.replace(OLD, suite="t"), baseline=dataclasses.replace(BICUBIC, suite="t")
    )
    costs = {"candidate": cost("new"), "champion": cost("old")}
    assert isinstance(decide({"day": day, "dusk": day}, GATE, CARD, costs), Promote)
    held = decide({"day": day, "night": night}, GATE, CARD, costs)
    assert isinstance(held, Hold)
    assert {reason.partition(":")[0] for reason in held.reasons} == {"night"}
    assert held.report.suite == "s, t"
    assert "| night | psnr_y gain over champion, mean |" in markdown(held.report)
    other = dataclasses.replace(day, candidate=dataclasses.replace(NEW, subject="another"))
    mixed = decide({"day": day, "dusk": other}, GATE, CARD, costs)
    assert isinstance(mixed, Hold)
    assert "models: not the same on all suites, must be same" in mixed.reasons
    nothing = decide({}, GATE, CARD)
    assert isinstance(nothing, Hold)
    assert "suite any: missing, must be scored" in nothing.reasons


# --- costs ------------------------------------------------------------------------------------------------------

TWICE = {"candidate": cost("new", 210.0), "champion": cost("old")}


@pytest.mark.parametrize(
    ("measured", "change", "expected"),
    [
        (TWICE, {}, "ms a megapixel, times the champion's: 2.1, must be <= 2"),
        (TWICE, {"max_latency_ratio": 3.0}, ""),
        (TWICE, {"max_latency_ratio": None}, ""),
        ({"candidate": cost("new", mib=151.0), "champion": cost("old")}, {}, "memory of a session, MiB, times the"),
        ({"candidate": cost("new", mib=151.0), "champion": cost("old")}, {"max_memory_ratio": None}, ""),
        ({"candidate": cost("new", mib=None), "champion": cost("old")}, {}, "champion's: missing, must be <= 3"),
        ({"candidate": cost("new"), "champion": cost("old", mib=0.0)}, {}, "champion's: missing, must be <= 3"),
        ({"candidate": cost("new")}, {}, "ms a megapixel, times the champion's: missing"),
        ({}, {}, "ms a megapixel, times the champion's: missing"),
        ({}, {"max_latency_ratio": None, "max_memory_ratio": None}, ""),
        ({}, {"max_ms_per_megapixel": 1.0}, "ms a megapixel: missing"),
        ({"candidate": cost("new"), "champion": cost("old")}, {"max_ms_per_megapixel": 99.0}, "megapixel: 100, must"),
        ({"candidate": cost("new"), "champion": cost("old")}, {"max_memory_mib": 49.0}, "session, MiB: 50, must"),
        ({"candidate": cost("new", math.nan), "champion": cost("old")}, {}, "ms a megapixel, times the champion's: m"),
        ({"candidate": cost("elsewhere"), "champion": cost("old")}, {}, "ms a megapixel, times the champion's: m"),
        ({"candidate": cost("new"), "champion": cost("old", hardware="CUDA, H100")}, {}, "hardware of champion"),
        ({"candidate": cost("new"), "champion": cost("old")}, {"hardware": "H100"}, "hardware: CPU, EPYC, 2 CPUs, mu"),
        ({"candidate": cost("new"), "champion": cost("old")}, {"hardware": "EPYC"}, ""),
        ({}, {"max_latency_ratio": None, "max_memory_ratio": None, "hardware": "EPYC"}, "hardware: missing, must be"),
    ],
)
def test_what_a_model_may_cost(measured, change, expected) -> None:
    gate = dataclasses.replace(GATE, **change)
    if not expected:
        assert isinstance(judged(NEW, OLD, BICUBIC, gate, CARD, measured), Promote)
        return
    held = reasons(NEW, OLD, BICUBIC, gate, CARD, measured)
    assert any(expected in reason for reason in held), held


@given(st.floats(0.1, 8.0), st.floats(0.01, 1e4), st.lists(st.floats(0.3, 30.0), min_size=3, max_size=7))
@settings(max_examples=60, deadline=None)
def test_the_ratio_is_paired_whatever_the_machine_did_meanwhile(factor, speed, load) -> None:
    """Each round may be as slow as it likes: what holds is how much slower the candidate is in the same round."""

    def measured(subject: str, ms: float) -> Cost:
        rounds = tuple(ms * one for one in load)
        return Cost(subject=subject, hardware="h", ms_per_megapixel=rounds, memory_mib=1.0)

    found = {"candidate": measured("new", factor * speed), "champion": measured("old", speed)}
    decision = judged(NEW, OLD, BICUBIC, GATE, CARD, found)
    if abs(factor - 2.0) > 1e-6:
        assert isinstance(decision, Promote) == (factor < 2.0)


def test_the_first_champion_needs_no_costs() -> None:
    assert isinstance(decide({"s": Contest(candidate=NEW, baseline=BICUBIC)}, GATE, CARD), Promote)


# --- forced, refused, other kinds -------------------------------------------------------------------------------


def test_forcing_stays_on_record() -> None:
    held = judged(scores("new", [20.0, 20.0, 20.0]), OLD, BICUBIC, GATE, CARD)
    assert isinstance(held, Hold)
    forced = overrule(held, "the old one\nleaks faces")
    assert isinstance(forced, Forced)
    assert forced.report.forced == "the old one leaks faces"
    assert forced.report.rows == held.report.rows
    assert markdown(forced.report).startswith("**forced**: the old one leaks faces\n")
    assert "forced" not in markdown(held.report)
    assert contract.loads(Report, contract.dumps(forced.report), "report") == forced.report


def test_what_cannot_be_verified_is_asked_nothing_else() -> None:
    found = refuse("new", "model.onnx differs")
    assert found.reasons == ("digest and golden probe: model.onnx differs, must be verified",)
    strict_json(found.report)


@pytest.mark.parametrize(
    ("kind", "metric", "champion", "good", "bad"),
    [
        ("transform", "psnr_y", 30.0, 30.5, 29.0),
        ("burst", "psnr_y", 30.0, 30.5, 29.0),
        ("generate", "neg_kid", -40.0, -39.0, -42.0),
        ("embed", "same_photo_at_1", 0.8, 0.85, 0.7),
    ],
)
def test_each_kind_has_a_gate_in_its_own_unit(kind, metric, champion, good, bad) -> None:
    def found(subject: str, value: float) -> Scores:
        values = tuple(float(i < round(20 * value)) for i in range(20)) if kind == "embed" else (value,) * 20
        metrics = {metric: values, "ssim_y": (0.9,) * 20}
        return Scores(subject=subject, suite="s", keys=tuple(map(str, range(20))), metrics=metrics)

    baseline = found("baseline", 0.5 if kind == "embed" else champion - 5)
    gate = default_for(kind)
    assert isinstance(judged(found("new", good), found("old", champion), baseline, gate, CARD), Promote)
    assert isinstance(judged(found("new", bad), found("old", champion), baseline, gate, CARD), Hold)
