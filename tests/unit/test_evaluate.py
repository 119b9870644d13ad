"""Scores are what papers would report, of the pictures and the function they claim to be of."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.color
import skimage.metrics
import torch
from torch import nn

from rayscale import contract, evaluate
from rayscale.artifact import Session, load
from rayscale.cli import judge
from rayscale.cli import publish as publishing
from rayscale.contract import Lineage, ModelCard, Scores, Spec, TensorSpec
from rayscale.data import presets
from rayscale.data.operators import Bicubic, Mask
from rayscale.data.pack import pack
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, DivergedError, MissingError
from rayscale.evaluate import (
    Model,
    Pair,
    Run,
    Suite,
    baseline,
    baselines,
    compare,
    pairs,
    picture_run,
    sample_grid,
    score,
    score_baseline,
    score_model,
    self_ensemble,
    session_run,
    show,
    torch_model,
    torch_run,
)
from rayscale.features import FeatureNet
from rayscale.imaging import U8, decode_rgb, encode, to_hwc_u8
from rayscale.recipes import embed
from rayscale.registry.gate import Contest, Gate, Hold, Promote, decide

ARTIFACT = Path(__file__).parents[1] / "golden" / "artifact_v1"
SET5 = Path(__file__).parents[3] / "shared" / "data" / "eval" / "Set5"


IMAGE = TensorSpec(name="image", shape=("n", 3, "h", "w"))
PLAIN = Spec(kind="transform", inputs=(IMAGE,), outputs=(replace(IMAGE, name="image_out"),), halo_px=0)


@pytest.fixture(scope="module")
def suite(dataset: str) -> Suite:
    return Suite(dataset, "train", (Bicubic(scale=2),), max_images=4)


@pytest.fixture(scope="module")
def session() -> Session:
    return load(ARTIFACT)


@pytest.fixture(scope="module")
def bicubic(suite: Suite) -> Scores:
    return score(baseline(2), suite, "bicubic")


def truth(suite: Suite) -> Callable[[U8], U8]:
    """A function that knows the answers."""
    answers = {pair.lr.tobytes(): pair.hr for pair in pairs(suite)}
    return lambda lr: answers[lr.tobytes()]


def pack_photos(folder: Path, photos: dict[str, U8]) -> str:
    (folder / "photos" / "test").mkdir(parents=True)
    for name, photo in photos.items():
        (folder / "photos" / "test" / f"{name}.png").write_bytes(encode(photo, "png"))
    pack(str(folder / "photos"), str(folder / "packed"), PackSettings(split="folder", min_side=16))
    return str(folder / "packed")


class Sevens(nn.Module):
    """x2 by nearest neighbour; NaN in pictures whose first value is 7."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.interpolate(x, scale_factor=2.0)
        return torch.where(x.flatten()[0] == 7 / 255, torch.nan, out)


def test_figures_are_those_of_an_independent_implementation(suite: Suite, bicubic: Scores) -> None:
    def figures(pair: Pair, border: int) -> tuple[float, ...]:
        inner = slice(border, -border or None)
        sr, hr = (p[inner, inner] for p in (baseline(2)(pair.lr), pair.hr))
        luma = [skimage.color.rgb2ycbcr(p)[..., 0] for p in (sr, hr)]
        window = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return (
            skimage.metrics.peak_signal_noise_ratio(luma[1], luma[0], data_range=255),
            skimage.metrics.structural_similarity(*luma, **window),
            skimage.metrics.peak_signal_noise_ratio(hr, sr, data_range=255),
            skimage.metrics.structural_similarity(sr, hr, channel_axis=2, **window),
        )

    for i, pair in enumerate(pairs(suite)):
        found = [bicubic.metrics[m][i] for m in ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")]
        np.testing.assert_allclose(found, figures(pair, border=2), rtol=0, atol=1e-3)
        assert abs(found[0] - figures(pair, border=0)[0]) > 0.01, "negative control: the border matters"
    assert bicubic.keys == tuple(pair.key for pair in pairs(suite))
    assert (bicubic.subject, bicubic.suite, len(bicubic.keys)) == ("bicubic", suite.digest, 4)


@pytest.mark.skipif(not SET5.is_dir(), reason="Set5 is not part of the repository")
@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_on_set5_is_the_published_figure(scale: int, published: float, tmp_path: Path) -> None:
    photos = {p.stem: decode_rgb(p.read_bytes()) for p in (SET5 / f"x{scale}").glob("*_HR.png")}
    suite = Suite(pack_photos(tmp_path, photos), "test", (Bicubic(scale=scale),))
    scores = score(baseline(scale), suite, "bicubic")
    assert len(scores.keys) == 5
    assert scores.mean("psnr_y") == pytest.approx(published, abs=0.02)  # papers differ by 0.02 among themselves


def test_a_perfect_picture_has_finite_scores(suite: Suite) -> None:
    scores = score(truth(suite), suite, "truth")
    assert scores.metrics["psnr_y"] == scores.metrics["psnr_rgb"] == (100.0,) * 4
    assert scores.metrics["ssim_y"] == scores.metrics["ssim_rgb"] == (1.0,) * 4
    assert contract.loads(Scores, contract.dumps(scores), "scores") == scores

    def off_by_one(lr: U8) -> U8:
        hr = truth(suite)(lr).copy()
        hr[..., :] ^= 1
        return hr

    assert score(off_by_one, suite, "almost").metrics["psnr_rgb"] == pytest.approx((48.13,) * 4, abs=0.01)


def test_pictures_that_are_not_finite_score_nan_and_pass_no_gate(tmp_path: Path) -> None:
    photos = np.random.default_rng(0).integers(8, 255, (3, 32, 32, 3), np.uint8)
    photos[1, :8, :8] = 7
    suite = Suite(pack_photos(tmp_path, dict(zip("abc", photos, strict=True))), "test", (Bicubic(scale=2),))
    broken = torch_run(Sevens(), torch.device("cpu"), replace(PLAIN, scale=2))
    scores, base = score(broken, suite, "x"), score(baseline(2), suite, "bicubic")
    for values in scores.metrics.values():
        assert sorted(math.isnan(v) for v in values) == [False, False, True], "the others keep their scores"
    assert math.isnan(scores.mean("psnr_y"))
    again = contract.loads(Scores, contract.dumps(scores), "scores")
    assert math.isnan(again.mean("psnr_y"))
    assert sample_grid(suite, {"model": broken}, max_images=3, crop_px=32).ndim == 3

    card = ModelCard(family="x", spec=Spec(kind="transform", inputs=(), outputs=(), halo_px=0), licence="MIT",
                     parity_max_abs=0.0, lineage=Lineage(recipe="r", code_version="1"))  # fmt: skip
    gate = Gate(min_gain_db_over_baseline=-100, max_image_loss_db=100, also=())
    other = replace(base, subject="other")
    assert isinstance(decide({"s": Contest(candidate=scores, baseline=base)}, gate, card), Hold)
    assert isinstance(decide({"s": Contest(candidate=base, baseline=other)}, gate, card), Promote)
    with np.errstate(invalid="ignore"):  # negative control: as uint8 it would be a picture like any other
        assert to_hwc_u8(np.full((1, 3, 2, 2), np.nan, np.float32)).dtype == np.uint8
    with pytest.raises(DivergedError, match="NaN"):
        broken(np.full((4, 4, 3), 7, np.uint8))


def test_a_model_of_another_scale_is_refused(suite: Suite) -> None:
    with pytest.raises(ConfigError, match="scale") as error:
        score(baseline(3), suite, "x3")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="float64"):
        score(lambda lr: baseline(2)(lr).astype(np.float64), suite, "floats")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_pairs_are_cut_to_the_scale_and_never_change(dataset: str, scale: int) -> None:
    suite = Suite(dataset, "train", (Bicubic(scale=scale),), max_images=5)
    first, second = list(pairs(suite)), list(pairs(suite))
    sides = open_split(dataset, "train")
    for a, b in zip(first, second, strict=True):
        assert a.key == b.key
        np.testing.assert_array_equal(a.lr, b.lr)
        assert a.hr.shape == (a.lr.shape[0] * scale, a.lr.shape[1] * scale, 3)
        index = [str(k) for k in sides.keys].index(a.key)
        assert 0 <= sides.heights[index] - a.hr.shape[0] < scale
    if scale == 3:
        assert any(a.hr.shape[0] % 8 for a in first), "some photo lost a row: its sides are multiples of 8"


def test_limits_choose_evenly_and_cut_the_centre(dataset: str) -> None:
    whole = Suite(dataset, "train", (Bicubic(scale=2),))
    every = list(pairs(whole))
    assert len(every) == len(open_split(dataset, "train")) == 12
    chosen = [pair.key for pair in pairs(replace(whole, max_images=3))]
    assert chosen == [every[i].key for i in (0, 4, 8)]
    assert [p.key for p in pairs(replace(whole, max_images=99))] == [p.key for p in every]
    for large, small in zip(every, pairs(replace(whole, max_side_px=65)), strict=True):
        assert small.hr.shape == (64, 64, 3)
        top, left = ((side - 65) // 2 for side in large.hr.shape[:2])
        np.testing.assert_array_equal(small.hr, large.hr[top : top + 64, left : left + 64])


def test_the_digest_is_of_content_and_choice_not_of_place(dataset: str, photo_folder: Path, tmp_path: Path) -> None:
    suite = Suite(dataset, "train", (Bicubic(scale=2),), max_images=4)
    shutil.copytree(dataset, tmp_path / "moved")
    assert replace(suite, photos_uri=str(tmp_path / "moved")).digest == suite.digest
    fewer = tmp_path / "fewer"
    shutil.copytree(photo_folder, fewer / "photos")
    next((fewer / "photos" / "train").iterdir()).unlink()
    pack(str(fewer / "photos"), str(fewer / "packed"), PackSettings(split="folder", min_side=64))
    others = [
        replace(suite, photos_uri=str(fewer / "packed")),
        replace(suite, split="test"),
        replace(suite, degradation=(Bicubic(scale=3),)),
        replace(suite, degradation=(Bicubic(scale=2, border="mirror"),)),
        replace(suite, max_images=3),
        replace(suite, max_side_px=64),
        replace(suite, fit_px=64),
        replace(suite, side_px=64),
        replace(suite, features=FeatureNet(uri="builtin:pixels")),
        replace(suite, num_samples=7),
    ]
    assert len({suite.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert len(others) >= len(dataclasses.fields(Suite)), "a new field belongs into the digest"


def test_an_empty_split_and_wrong_limits_are_refused(tmp_path: Path) -> None:
    uri = pack_photos(tmp_path, {"only": np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)})
    empty = Suite(uri, "validation", (Bicubic(scale=2),))
    for use in (lambda: list(pairs(empty)), lambda: score(baseline(2), empty, "bicubic")):
        with pytest.raises(MissingError, match="validation"):
            use()
    for wrong in ({"max_images": -1}, {"max_side_px": -1}, {"max_side_px": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(empty, **wrong)  # type: ignore[arg-type]


class Deaf(nn.Module):
    """Gives the first picture back, larger, whatever else it is given."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        picture = image[:, 0] if image.ndim == 5 else image
        return nn.functional.interpolate(picture, scale_factor=float(self.scale))


@pytest.mark.parametrize(
    ("degradation", "kind", "shapes", "among"),
    [
        (presets.inpaint(), "transform", (("n", 3, "h", "w"), ("n", 1, "h", "w")), "telea"),
        (presets.burst(2, 3), "burst", (("n", 3, 3, "h", "w"),), "shift_and_add"),
        (presets.denoise(25.0), "transform", (("n", 3, "h", "w"),), "nonlocal_means"),
        (presets.deblock((20, 20)), "transform", (("n", 3, "h", "w"),), "bilateral"),
        (presets.deblur(), "transform", (("n", 3, "h", "w"),), "wiener_disc"),
    ],
)
def test_masks_bursts_and_restoration_are_scored_beside_their_classical_methods(
    dataset: str, degradation: presets.Degradation, kind: Any, shapes: Any, among: str
) -> None:
    suite = Suite(dataset, "train", degradation, max_images=2)
    inputs = tuple(TensorSpec(name=f"in{i}", shape=shape) for i, shape in enumerate(shapes))
    out = TensorSpec(name="out", shape=("n", 3, "h", "w"))
    spec = Spec(kind=kind, inputs=inputs, outputs=(out,), scale=suite.scale, halo_px=0)
    model = torch_model(Deaf(suite.scale), spec, torch.device("cpu"))
    scores, classical = score_model(model, suite, "deaf"), score_baseline(spec, suite)
    assert (scores.suite, scores.keys) == (classical.suite, classical.keys)
    assert classical.mean("psnr_y") > scores.mean("psnr_y") - 1e-9
    for pair in pairs(suite):
        whole, tiled = (picture_run(model, tile_px)(*pair.inputs) for tile_px in (None, 16))
        first = pair.lr[0] if pair.lr.ndim == 4 else pair.lr
        np.testing.assert_array_equal(whole, first.repeat(suite.scale, axis=0).repeat(suite.scale, axis=1))
        np.testing.assert_array_equal(whole, tiled)
    assert show({"model": model}, suite, max_images=2).dtype == np.uint8
    assert {among, classical.subject} <= set(baselines(suite))


def test_generators_and_embeddings_are_scored_on_small_whole_pictures(dataset: str) -> None:
    suite = Suite(dataset, "train", (), fit_px=32, side_px=32, num_samples=40)
    truth = np.stack([pair.hr for pair in pairs(suite)])
    z = TensorSpec(name="z", shape=("n", 4), low=-4, high=4)
    spec = Spec(kind="generate", inputs=(z,), outputs=(TensorSpec(name="image_out", shape=("n", 3, 32, 32)),))

    def remember(given: Any) -> Any:  # the photos themselves, by turns: the best there can be
        chosen = np.abs(given["z"][:, 0] * 1000).astype(int) % len(truth)
        return {"image_out": truth[chosen].transpose(0, 3, 1, 2).astype(np.float32) / 255}

    def noise(given: Any) -> Any:
        rng = np.random.default_rng(0)
        return {"image_out": rng.random((len(given["z"]), 3, 32, 32)).astype(np.float32)}

    good, bad = (score_model(Model(spec, f), suite, "g") for f in (remember, noise))
    base = score_baseline(spec, suite)
    for metric in ("neg_kid", "neg_frechet"):
        assert good.mean(metric) > base.mean(metric) > bad.mean(metric)
    broken = score_model(Model(spec, lambda g: {"image_out": noise(g)["image_out"] * np.nan}), suite, "nan")
    assert np.isnan(broken.mean("neg_kid"))
    assert show({"model": Model(spec, noise)}, suite, max_images=1).shape[2] == 3

    spec = Spec(kind="embed", inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")),),
                outputs=(TensorSpec(name="vector", shape=("n", 8)),))  # fmt: skip

    def colours(given: Any) -> Any:  # finds a mirrored, cut copy by its mean colours
        pooled = given["image"].mean(axis=(2, 3)) - 0.4
        return {"vector": np.concatenate([pooled, given["image"].std(axis=(2, 3))], axis=1)}

    def blind(given: Any) -> Any:
        return {"vector": np.ones((len(given["image"]), 8), np.float32)}

    found, lost = (score_model(Model(spec, f), suite, "e").mean("same_photo_at_1") for f in (colours, blind))
    assert found > 0.5 > lost
    assert score_baseline(spec, suite).subject in ("pixels", "colour-histogram")
    assert show({"model": Model(spec, colours)}, suite, max_images=2).shape[2] == 3


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Photos of two classes told apart by which half is light, in colours of their own: raw pixels tell the class,
    colour histograms find the photo."""
    folder, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    for split in ("train", "test"):
        for side in ("left", "right"):
            (folder / "photos" / split / side).mkdir(parents=True)
            for i in range(12):
                picture = np.empty((64, 64, 3), np.uint8)
                light, dark = 170 + rng.integers(0, 80, 3), rng.integers(0, 80, 3)
                picture[:, :32], picture[:, 32:] = (light, dark) if side == "left" else (dark, light)
                (folder / "photos" / split / side / f"{i}.png").write_bytes(encode(picture, "png"))
    pack(str(folder / "photos"), str(folder / "packed"), PackSettings(split="folder"))
    return Suite(str(folder / "packed"), "test", (), side_px=64)


EMBED = Spec(kind="embed", inputs=(IMAGE,), outputs=(TensorSpec(name="vector", shape=("n", 8)),))


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("same_photo_at_1", "colour-histogram"),
        ("precision_at_10", "pixels"),
        ("", "pixels"),  # the first of the kind
        ("psnr_y", "pixels"),  # not of the kind
    ],
)
def test_the_baseline_is_the_best_by_the_metric_that_decides(halves: Suite, metric: str, best: str) -> None:
    assert score_baseline(EMBED, halves, metric).subject == best


@pytest.mark.parametrize(("metric", "best"), [("psnr_y", "noise"), ("ssim_y", "offset"), ("", "noise")])
def test_so_it_is_for_pictures(suite: Suite, metric: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = truth(suite)

    def noise(lr: U8) -> U8:
        hr = known(lr)
        return np.clip(hr + np.random.default_rng(0).normal(0, 10, hr.shape), 0, 255).astype(np.uint8)

    def offset(lr: U8) -> U8:
        return np.clip(known(lr).astype(int) + 20, 0, 255).astype(np.uint8)

    monkeypatch.setattr(evaluate, "baselines", lambda _: {"noise": noise, "offset": offset})
    assert score_baseline(PLAIN, suite, metric).subject == best


@pytest.mark.parametrize("order", [("broken", "good", "bad"), ("good", "broken", "bad"), ("bad", "good", "broken")])
def test_a_baseline_that_is_not_finite_is_the_best_of_none(
    suite: Suite, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: U8) -> U8:
        raise DivergedError("picture", "nan", "must be finite", "-")

    runs: dict[str, Run] = {"broken": broken, "good": baseline(2), "bad": lambda lr: baseline(2)(lr) // 2}
    monkeypatch.setattr(evaluate, "baselines", lambda _: {name: runs[name] for name in order})
    assert score_baseline(PLAIN, suite).subject == "good"
    monkeypatch.setattr(evaluate, "baselines", lambda _: {"broken": broken})
    assert math.isnan(score_baseline(PLAIN, suite).mean("psnr_y"))


@pytest.mark.parametrize(("metric", "passes"), [("same_photo_at_1", False), ("precision_at_10", True)])
def test_publish_and_promote_hold_a_model_against_the_baseline_of_its_gate(
    halves: Suite, metric: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate knows every class, and half the photos that a colour histogram knows: by its photos it is held."""
    best = score_baseline(EMBED, halves, "same_photo_at_1")
    half = [value * (i % 2) for i, value in enumerate(best.metrics["same_photo_at_1"])]
    values = {"precision_at_10": (1.0,) * len(best.keys), "same_photo_at_1": tuple(half)}
    candidate = replace(best, subject="candidate", metrics=values)
    assert 0.02 < candidate.mean("same_photo_at_1") < best.mean("same_photo_at_1") - 0.1
    gate = replace(embed.GATE, metric=metric, min_gain_db_over_baseline=0.0)
    made = ModelCard(family="f", spec=EMBED, licence="MIT", parity_max_abs=0.0,
                     lineage=Lineage(recipe="r", code_version="c"))  # fmt: skip

    monkeypatch.setattr(judge, "score_session", lambda *_: candidate)
    sessions: Any = {"candidate": SimpleNamespace(card=made)}
    contest = judge._contest(halves, sessions, {}, gate)
    assert isinstance(decide({"published": contest}, gate, made), Promote) == passes

    monkeypatch.setattr(publishing, "digest_of", lambda _: "")
    monkeypatch.setattr(publishing, "score_artifact", lambda *_: SimpleNamespace(scores=candidate))
    published = publishing._score(Path(), EMBED, halves, gate, "cpu")
    assert published == {"baseline": contest.baseline, "model": candidate}


def test_the_self_ensemble_is_what_it_says() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    plain = baseline(2)

    def apart(run: Run) -> float:
        return float(np.abs(self_ensemble(run)(picture).astype(int) - run(picture)).mean())

    assert apart(plain) < 0.5, "bicubic is symmetric, up to its rounding between the passes"

    def shifted(lr: U8) -> U8:
        return np.roll(plain(lr), 1, axis=1)

    assert apart(shifted) > 10  # negative control


def test_an_artifact_is_scored_whole_or_tiled_alike(suite: Suite, session: Session) -> None:
    whole, tiled = session_run(session), session_run(session, tile_px=24)
    for pair in pairs(suite):
        np.testing.assert_array_equal(whole(pair.lr), tiled(pair.lr))
        direct = session.transform(pair.lr.transpose(2, 0, 1)[None].astype(np.float32) / 255)
        np.testing.assert_array_equal(whole(pair.lr), np.rint(direct[0] * 255).astype(np.uint8).transpose(1, 2, 0))
    scores = score(whole, suite, session.digest, session.provider)
    assert (scores.subject, scores.provider) == (session.digest, "CPUExecutionProvider")


def test_a_module_in_training_is_scored_as_it_will_be_shipped() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.average = nn.Conv2d(3, 3, 1).eval()
            self.drop = nn.Dropout(0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            out: torch.Tensor = self.drop(self.average(self.conv(x)))
            assert out.dtype == torch.float32, "autocast would score another model"
            return out.sigmoid()

    torch.manual_seed(0)
    module = Probe()
    modes = [m.training for m in module.modules()]
    assert len(set(modes)) == 2, "mixed on purpose"
    run = torch_run(module, torch.device("cpu"), PLAIN)
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.conv(torch.zeros(1, 3, 4, 4)).dtype == torch.bfloat16  # negative control
        first = run(picture)
    np.testing.assert_array_equal(first, run(picture))  # no dropout
    assert [m.training for m in module.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_module_that_needs_alignment_gets_it() -> None:
    class Blocks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pixel_shuffle(nn.functional.pixel_unshuffle(x, 4), 4)

    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    np.testing.assert_array_equal(torch_run(Blocks(), torch.device("cpu"), replace(PLAIN, align=4))(picture), picture)
    with pytest.raises(RuntimeError):
        torch_run(Blocks(), torch.device("cpu"), PLAIN)(picture)


def test_the_baseline_reproduces_flat_pictures_and_scale_one() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    np.testing.assert_array_equal(baseline(1)(picture), picture)
    assert (baseline(3)(np.full((5, 4, 3), 77, np.uint8)) == 77).all()
    assert baseline(3)(picture).shape == (27, 21, 3)


def test_scores_are_compared_only_on_one_suite(suite: Suite, bicubic: Scores, session: Session) -> None:
    ours = score(session_run(session), suite, session.digest)
    table = compare({"bicubic": bicubic, "ours": ours})
    head, _, first, second = table.splitlines()
    assert head.startswith("| 4 images | PSNR Y (dB) |")
    assert f"| bicubic | {bicubic.mean('psnr_y'):.2f} |" in first
    gain = ours.mean("psnr_y") - bicubic.mean("psnr_y")
    assert f"{ours.mean('psnr_y'):.2f} ({gain:+.2f})" in second
    assert len({line.count("|") for line in table.splitlines()}) == 1
    for unlike in (replace(ours, suite="another"), replace(ours, keys=tuple(reversed(ours.keys)))):
        with pytest.raises(ConfigError, match="suite of ours"):
            compare({"bicubic": bicubic, "ours": unlike})


def test_samples_show_the_most_detailed_crop(tmp_path: Path) -> None:
    photo = np.full((96, 128, 3), 128, np.uint8)
    photo[48:80, 64:96] = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    suite = Suite(pack_photos(tmp_path, {"a": photo}), "test", (Bicubic(scale=2),))
    seen: list[U8] = []

    def run(lr: U8) -> U8:
        seen.append(lr)
        return baseline(2)(lr)

    grid = sample_grid(suite, {"bicubic": run, "model": run}, max_images=4, crop_px=32)
    (pair,) = pairs(suite)
    np.testing.assert_array_equal(seen[0], pair.lr[24:40, 32:48])
    assert grid.dtype == np.uint8
    assert grid.shape[1] > 2 * grid.shape[0], "four cells in a row"
    np.testing.assert_array_equal(grid, sample_grid(suite, {"bicubic": run, "model": run}, max_images=4, crop_px=32))
    small = sample_grid(suite, {"bicubic": run}, max_images=1, crop_px=1000)
    assert seen[-1].shape == pair.lr.shape
    assert small.shape != grid.shape


def test_samples_show_the_missing_detail_and_the_best_rivals(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    suite = Suite(pack_photos(tmp_path, {"a": photo}), "test", (Mask(kinds=("box",), ratio=(0.05, 0.05)),))
    seen: dict[str, U8] = {}

    def rival(name: str, error: int) -> Run:
        def run(lr: U8, mask: U8) -> U8:
            seen[name] = mask
            return np.asarray(np.full_like(lr, 128) + error, np.uint8)

        return run

    rivals = {str(error): rival(str(error), error) for error in (60, 0, 30, 90)}
    model = rival("model", 10)
    grid = sample_grid(suite, {"model": model}, max_images=1, crop_px=32, rivals=rivals)
    assert (seen["model"] > 0).mean() > 0.2, "of a hole of a twentieth"
    ordered = sample_grid(suite, {"0": rivals["0"], "30": rivals["30"], "model": model}, max_images=1, crop_px=32)
    np.testing.assert_array_equal(grid, ordered)


def test_metrics_are_named_once() -> None:
    assert {"psnr_y", "ssim_y"} <= set(evaluate.METRICS), "the gate's defaults are among them"
    assert Gate().metric in evaluate.METRICS
    assert set(Gate().also) <= set(evaluate.METRICS)
