"""What every model family must pass. No test here names one: recipes are discovered."""

from __future__ import annotations

import asyncio
import math
import runpy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from rayscale import artifact, imaging, recipes
from rayscale.artifact import Session
from rayscale.contract import ModelCard, Spec
from rayscale.data.cut import dtype_of, sample_shapes
from rayscale.data.mixture import open_mixture
from rayscale.data.plan import DataSettings
from rayscale.data.sample import MicroBatch, render_window
from rayscale.evaluate import picture_run, session_model, torch_model
from rayscale.export import to_onnx
from rayscale.recipes import Recipe, discover
from rayscale.serve.batching import leads
from rayscale.serve.engine import Canvas, Engine, EngineSettings, plan
from rayscale.task import Batch
from rayscale.train import checkpoint
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.loop import RunSettings, State, build_state, fit

served = runpy.run_path(str(Path(__file__).parents[1] / "service.py"))
CPU = torch.device("cpu")
TINY = {name: make for name, make in discover().items() if name.endswith(":tiny")}
OTHERS = {name: make for name, make in discover().items() if name not in TINY}
families = pytest.mark.parametrize("name", TINY)


class Hooks:
    """Keeps the losses, and a checkpoint half-way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses = folder, []

    folder: Path
    losses: list[float]

    def stepped(self, images_seen: int) -> None: ...

    def log(self, images_seen: int, metrics: dict[str, float]) -> None:
        self.losses.append(next(v for k, v in metrics.items() if k.startswith("loss/")))

    def validate(self, images_seen: int, nets: object) -> dict[str, float]:
        return {}

    def checkpoint(self, state: State, images_seen: int, metrics: object) -> None:
        folder = self.folder / str(images_seen)
        folder.mkdir(parents=True)
        info = CheckpointInfo(
            images_seen=images_seen, position=state.step, plan_digest="", recipe_digest="", code_version="",
            chain=state.chain, metrics={}, files={},
        )  # fmt: skip
        checkpoint.save(folder, state.nets, state.optimizers, info)


def steps(dataset: str, data: DataSettings, start: int) -> Iterator[list[MicroBatch]]:
    photos = open_mixture((dataset,), "train")
    plan = photos.plan(data)
    w, first = divmod(start, plan.rows)
    while True:
        shards = [render_window(photos, plan, w, v, first, plan.rows) for v in range(data.virtual_shards)]
        yield from (list(row) for row in zip(*shards, strict=True))
        w, first = w + 1, 0


def train(recipe: Recipe, dataset: str, hooks: Hooks, resume: Path | None = None) -> State:
    state = build_state(recipe.task, recipe.run, CPU)
    if resume:
        checkpoint.restore(resume, state.nets, state.optimizers)
        state.step = int(resume.name) // recipe.data.global_batch
    return fit(
        recipe.task, recipe.run, state, steps(dataset, recipe.data, state.step),
        global_batch=recipe.data.global_batch, shards=recipe.data.virtual_shards, device=CPU, hooks=hooks,
    )  # fmt: skip


def card_of(recipe: Recipe, function: str) -> ModelCard:
    return ModelCard(family=recipe.task.family, spec=recipe.task.specs[function], licence="CC0-1.0")


def pictures(spec: Spec, height: int, width: int) -> tuple[NDArray[np.uint8], ...]:
    """Noise for every input, of this size where sides are free."""
    rng, found = np.random.default_rng(height), []
    for tensor in spec.inputs:
        *frames, channels, h, w = tensor.shape[1:]
        sides = [axis if isinstance(axis, int) else free for axis, free in ((h, height), (w, width))]
        found.append(rng.integers(0, 256, (*frames, *sides, channels), np.uint8))  # type: ignore[arg-type]
    return tuple(found)


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, State, Hooks]]:
    """Every family's tiny recipe, trained to its end."""
    found = {}
    for name, make in TINY.items():
        recipe, hooks = make(), Hooks(tmp_path_factory.mktemp("family"))
        found[name] = (recipe, train(recipe, dataset, hooks), hooks)
    return found


@pytest.fixture(scope="module")
def shipped(
    trained: dict[str, tuple[Recipe, State, Hooks]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """ "NAME/function" -> its artifact."""
    found = {}
    for name, (recipe, state, _) in trained.items():
        for function, module in recipe.task.shipped(state.nets).items():
            folder = tmp_path_factory.mktemp("artifact") / "model"
            to_onnx(module, card_of(recipe, function), folder)
            found[f"{name}/{function}"] = folder
    return found


def test_there_are_families() -> None:
    assert TINY


@families
def test_it_learns(name: str, trained: dict[str, tuple[Recipe, State, Hooks]], dataset: str) -> None:
    """The first turn's loss over the same pairs, before and after."""
    recipe, after, _ = trained[name]
    before = build_state(recipe.task, recipe.run, CPU)
    assert mean_loss(recipe, after, dataset) < 0.98 * mean_loss(recipe, before, dataset)


def mean_loss(recipe: Recipe, state: State, dataset: str) -> float:
    given = steps(dataset, recipe.data, 0)
    values = []
    for _ in range(8):
        for batch in next(given):
            torch.manual_seed(batch.step)
            tensors = {
                k: torch.from_numpy(v).movedim(-1, -3) / 255 if v.dtype == np.uint8 else torch.from_numpy(v)
                for k, v in batch.tensors.items()
            }
            with torch.no_grad():
                values.append(recipe.task.loss(recipe.task.turns[0].name, state.nets, Batch(tensors, 0)).total.item())
    return float(np.mean(values))


@families
def test_it_resumes_bitwise(
    name: str, trained: dict[str, tuple[Recipe, State, Hooks]], dataset: str, tmp_path: Path
) -> None:
    recipe, whole, hooks = trained[name]
    middle = sorted(hooks.folder.iterdir(), key=lambda f: int(f.name))[1]
    resumed = train(recipe, dataset, Hooks(tmp_path), middle)
    for key, net in whole.nets.items():
        for parameter, value in net.state_dict().items():
            assert torch.equal(value, resumed.nets[key].state_dict()[parameter]), f"{key}/{parameter}"


@families
def test_what_is_validated_is_what_is_served(
    name: str, trained: dict[str, tuple[Recipe, State, Hooks]], shipped: dict[str, Path]
) -> None:
    recipe, state, _ = trained[name]
    for function, module in recipe.task.shipped(state.nets).items():
        spec = recipe.task.specs[function]
        session = artifact.load(shipped[f"{name}/{function}"])
        assert session.card.parity_max_abs is not None
        assert session.card.parity_max_abs < 1e-4
        live, artifact_ = torch_model(module, spec, CPU), session_model(session)
        if spec.kind in ("transform", "burst"):
            given = pictures(spec, 37, 41)
            served, scored = picture_run(artifact_)(*given), picture_run(live)(*given)
            assert np.abs(served.astype(int) - scored.astype(int)).max() <= 1
            assert served.shape == (*(side * spec.scale for side in given[0].shape[-3:-1]), 3)
        else:
            given_f32 = {
                t.name: np.random.default_rng(0)
                .uniform(t.low, t.high, [axis if isinstance(axis, int) else 24 for axis in t.shape])
                .astype(np.float32)
                for t in spec.inputs
            }
            for name_, value in artifact_.forward(given_f32).items():
                np.testing.assert_allclose(value, live.forward(given_f32)[name_], rtol=1e-3, atol=1e-3)


@families
def test_a_batch_of_four_is_four_batches_of_one(name: str, shipped: dict[str, Path]) -> None:
    for folder in (f for key, f in shipped.items() if key.startswith(f"{name}/")):
        session = artifact.load(folder)
        rng = np.random.default_rng(1)
        sides = {"n": 4, "h": 4 * session.card.spec.align * 5, "w": 4 * session.card.spec.align * 3}
        inputs = {
            t.name: rng.uniform(t.low, t.high, [sides.get(a, a) for a in t.shape]).astype(np.float32)  # type: ignore[arg-type]
            for t in session.card.spec.inputs
        }
        batch = session.run(inputs)
        singles = [session.run({k: v[i : i + 1] for k, v in inputs.items()}) for i in range(4)]
        for output, value in batch.items():
            assert np.array_equal(value, np.concatenate([s[output] for s in singles]))


def of_pictures(spec: Spec) -> bool:
    return spec.kind in ("transform", "burst")


def randomised(folder: Path, shipped: nn.Module, halo_px: int | None = None) -> Session:
    """The artifact with random weights, so that far pixels show; with this halo in place of its card's."""
    model, card = onnx.load(folder / "model.onnx"), artifact.load(folder).card
    learnt, rng = {name for name, _ in shipped.named_parameters()}, np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name in learnt:
            fan_in = int(np.prod(tensor.dims[1:]))
            values = rng.normal(0, 1.5 * fan_in**-0.5 if fan_in > 1 else 0.1, tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    if halo_px is not None:
        card = replace(card, spec=replace(card.spec, halo_px=halo_px))
    return artifact.open_model(model.SerializeToString(), card, threads=1, digest="random")


class Cutter:
    """Pictures through a session whole and in tiles, as the engine cuts them."""

    def __init__(self, session: Session) -> None:
        spec = session.card.spec
        assert spec.halo_px is not None
        self.session, self.tile_px = session, -(-4 * spec.halo_px // spec.align) * spec.align
        self.engine = Engine(EngineSettings(tile_px=self.tile_px, whole_max_px=0), load=lambda folder, digest: session)
        self.engine.prepare(session.digest, Path())

    def unlike(self, height: int, width: int) -> set[str]:
        """What of noise of this size is not the same, bit for bit, in tiles and whole."""
        spec, inputs = self.session.card.spec, leads(self.session.card.spec)
        shape = (height, width, sum(map(math.prod, inputs.values())))
        given_u8 = np.random.default_rng(height).integers(0, 256, shape, np.uint8)
        run = imaging.as_one(lambda given: self.session.run(given)[spec.outputs[0].name], inputs)
        whole, tiled = (
            imaging.run_tiled(
                run, imaging.to_nchw_f32(given_u8), scale=spec.scale, tile_px=px, halo_px=spec.halo_px, align=spec.align
            )
            for px in (None, self.tile_px)
        )
        canvas = Canvas(plan(spec, height, width, self.engine.settings), given_u8)
        asyncio.run(self.engine.run(self.session.digest, canvas.tiles, canvas.place, deadline=time.monotonic() + 60))
        found = {"floats": tiled != whole, "engine": canvas.result != imaging.to_hwc_u8(whole)}
        return {name for name, wrong in found.items() if wrong.any()}


def check_any_size(session: Session, examples: int, *, strips_only: bool = False) -> None:
    """Tiled is untiled: at the sizes where a plan changes, and at others drawn."""
    cutter = Cutter(session)
    t = cutter.tile_px
    # ONNX Runtime splits a convolution's sums over more than 128 terms elsewhere where its output has 64 pixels or
    # fewer: 1 ulp. No served tile is so small: one side at least is tile_px, 256.
    thin = 64 * session.card.spec.align**2 // t + 1
    side = st.integers(thin, 2 * t + t // 2)
    strip = st.tuples(st.integers(thin, thin + 9), st.integers(3 * t, 6 * t))
    sizes, named = strip | strip.map(lambda size: size[::-1]), [(thin, 6 * t + 1), (6 * t + 1, thin + 1)]
    if not strips_only:
        sizes |= st.tuples(side, side)
        named += [(1, 1), (t - 1, t // 2 + 1), (t, t), (t + 1, t + 1), (2 * t + 3, t + 5)]

    @settings(max_examples=examples, deadline=None)
    @given(sizes)
    def holds(size: tuple[int, int]) -> None:
        assert cutter.unlike(*size) == set()

    for size in named:
        holds = example(size)(holds)
    try:
        holds()
    finally:
        cutter.engine.close()


@families
def test_it_tiles_exactly_or_says_why_not(
    name: str, trained: dict[str, tuple[Recipe, State, Hooks]], shipped: dict[str, Path]
) -> None:
    recipe, state, _ = trained[name]
    for function, module in recipe.task.shipped(state.nets).items():
        folder, spec = shipped[f"{name}/{function}"], recipe.task.specs[function]
        if spec.halo_px is not None:
            check_any_size(randomised(folder, module), examples=40)
        elif of_pictures(spec):
            assert spec.halo_why_none


@families
def test_a_halo_one_pixel_short_is_caught(
    name: str, trained: dict[str, tuple[Recipe, State, Hooks]], shipped: dict[str, Path]
) -> None:
    """Negative control. Every family's halo is the least, on a grid of more than a pixel too."""
    recipe, state, _ = trained[name]
    for function, module in recipe.task.shipped(state.nets).items():
        spec = recipe.task.specs[function]
        if spec.halo_px is None:
            continue
        cutter = Cutter(randomised(shipped[f"{name}/{function}"], module, halo_px=spec.halo_px - 1))
        try:
            side = 2 * cutter.tile_px + cutter.tile_px // 2
            assert "floats" in cutter.unlike(side, side)  # to eight bits it is seldom seen
        finally:
            cutter.engine.close()


def exact_others() -> dict[str, Recipe]:
    """Of the other recipes whose tiles are exact, one for each net, halo, grid and scale; narrow, as width moves no
    pixel.
    """
    found: dict[tuple[type, Spec], tuple[str, Recipe]] = {}
    for name, make in OTHERS.items():
        recipe = make()
        widths = [path for path, _ in recipes.paths(recipe) if path.endswith((".features", ".growth"))]
        recipe = recipes.override(recipe, [f"{path}=8" for path in widths])
        for function, spec in recipe.task.specs.items():
            if of_pictures(spec) and spec.halo_px is not None and not spec.halo_error:
                found.setdefault(
                    (type(getattr(recipe.task, "generator", recipe.task)), spec), (f"{name}/{function}", recipe)
                )
    return dict(found.values())


@pytest.mark.long
@pytest.mark.parametrize("key", EXACT_OTHERS := exact_others())
def test_every_other_exact_recipe_tiles_exactly(key: str, tmp_path: Path) -> None:
    recipe, function = EXACT_OTHERS[key], key.rpartition("/")[2]
    module = recipe.task.shipped(recipe.task.build(CPU))[function]
    to_onnx(module, card_of(recipe, function), tmp_path / "model")
    check_any_size(randomised(tmp_path / "model", module), examples=1, strips_only=True)


@families
def test_the_route_of_its_role_answers_what_it_says(name: str, shipped: dict[str, Path]) -> None:
    for folder in (f for key, f in shipped.items() if key.startswith(f"{name}/")):
        session = artifact.load(folder, threads=1)
        service = served["Service"](folder, session.digest)
        try:
            served["check_served"](service, "photos", session)
        finally:
            service.gateway.close()


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_recipe_has_its_card_and_takes_a_step(name: str, tmp_path: Path) -> None:
    recipe = OTHERS[name]()
    for function in recipe.task.specs:
        assert card_of(recipe, function).spec.outputs
    rng = np.random.default_rng(0)
    whole = any(
        isinstance(axis, int) for spec in recipe.task.specs.values() for t in spec.outputs for axis in t.shape[2:]
    )
    side = recipe.data.hr_crop_px if whole else 16 * recipe.data.scale
    shapes = sample_shapes(replace(recipe.data, hr_crop_px=side, fit_px=0))
    tensors = {
        name: rng.integers(0, 2 if name == "label" else 256, (2, *shapes[name]), dtype_of(name))
        for name in recipe.task.needs
    }
    batch = MicroBatch(0, 0, tensors, np.zeros((2, 3), np.int64), b"")
    run = RunSettings(total_images=2, precision=recipe.run.precision, channels_last=recipe.run.channels_last)
    state = build_state(recipe.task, run, CPU)
    before = {k: v.clone() for k, v in state.nets[recipe.task.turns[0].nets[0]].state_dict().items()}
    hooks = Hooks(tmp_path)
    fit(replace(recipe, run=run).task, run, state, iter([[batch]]), global_batch=2, shards=1, device=CPU, hooks=hooks)
    after = state.nets[recipe.task.turns[0].nets[0]].state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert np.isfinite(hooks.losses).all()
