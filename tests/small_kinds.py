"""Small artifacts of every kind that HTTP serves, built without torch. `runpy.run_path` loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact
from rayscale.contract import ModelCard, Spec, TensorSpec

CLASSES = ("daisy", "rose", "tulip")
LATENT, SIDE = 5, 6


def _model(nodes: Sequence[Any], inputs: dict[str, Any], output: tuple[str, Any], constants: dict[str, Any]) -> bytes:
    def value(name: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    weights = [
        numpy_helper.from_array(np.asarray(v, np.int64 if np.asarray(v).dtype == np.int64 else np.float32), k)
        for k, v in constants.items()
    ]
    edges = [value(*item) for item in inputs.items()], [value(*output)]
    graph = helper.make_graph(list(nodes), "small", *edges, weights)
    return bytes(onnx.ModelProto(
        ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)]
    ).SerializeToString())  # fmt: skip


def _write(folder: Path, model: bytes, card: ModelCard, sides: tuple[int, int] = (8, 9)) -> str:
    rng = np.random.default_rng(1)
    free = {"n": 1, "h": sides[0], "w": sides[1]}
    golden = {
        t.name: rng.random([free[a] if isinstance(a, str) else a for a in t.shape], np.float32)
        for t in card.spec.inputs
    }
    return artifact.write(folder, model, card, golden)


def negative(folder: Path) -> str:
    """A restorer that answers 1 - x, in float32 to the bit."""
    nodes = [helper.make_node("Sub", ["one", "image"], ["image_out"])]
    shape = ["n", 3, "h", "w"]
    model = _model(nodes, {"image": shape}, ("image_out", shape), {"one": 1.0})
    tensors = [TensorSpec(name=name, shape=("n", 3, "h", "w")) for name in ("image", "image_out")]
    spec = Spec(kind="transform", inputs=(tensors[0],), outputs=(tensors[1],), halo_px=0)
    return _write(folder, model, ModelCard(family="negative", spec=spec, licence="MIT"))


def filler(folder: Path) -> str:
    """Inpainting that fills with 0.6: image * (1 - mask) + 0.6 * mask."""
    nodes = [
        helper.make_node("Sub", ["one", "mask"], ["known"]),
        helper.make_node("Mul", ["image", "known"], ["kept"]),
        helper.make_node("Mul", ["grey", "mask"], ["filled"]),
        helper.make_node("Add", ["kept", "filled"], ["image_out"]),
    ]
    inputs = {"image": ["n", 3, "h", "w"], "mask": ["n", 1, "h", "w"]}
    model = _model(nodes, inputs, ("image_out", ["n", 3, "h", "w"]), {"one": 1.0, "grey": np.full((1, 3, 1, 1), 0.6)})
    spec = Spec(
        kind="transform",
        inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")), TensorSpec(name="mask", shape=("n", 1, "h", "w"))),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "h", "w")),),
        halo_px=0,
    )
    return _write(folder, model, ModelCard(family="filler", spec=spec, licence="MIT"))


def burst(folder: Path, *, frames: int = 3) -> str:
    """The mean of so many frames, each pixel twice as wide and high."""
    nodes = [
        helper.make_node("ReduceMean", ["frames", "axes"], ["mean"], keepdims=0),
        helper.make_node("Resize", ["mean", "", "sizes"], ["image_out"], mode="nearest"),
    ]
    constants = {"axes": np.array([1], np.int64), "sizes": np.array([1, 1, 2, 2], np.float32)}
    inputs = {"frames": ["n", frames, 3, "h", "w"]}
    model = _model(nodes, inputs, ("image_out", ["n", 3, "h2", "w2"]), constants)
    spec = Spec(
        kind="burst",
        inputs=(TensorSpec(name="frames", shape=("n", frames, 3, "h", "w")),),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "2*h", "2*w")),),
        scale=2,
        halo_px=0,
    )
    return _write(folder, model, ModelCard(family="mean", spec=spec, licence="MIT"))


def generator(folder: Path, *, classes: bool = True, side_px: int = SIDE) -> str:
    """sigmoid(z W (+ label V)) as pictures of side_px."""
    rng = np.random.default_rng(2)
    size = 3 * side_px**2
    nodes = [helper.make_node("MatMul", ["z", "w"], ["a"])]
    if classes:
        nodes += [helper.make_node("MatMul", ["label", "v"], ["b"]), helper.make_node("Add", ["a", "b"], ["c"])]
    nodes += [
        helper.make_node("Sigmoid", ["c" if classes else "a"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["image_out"]),
    ]
    constants = {"w": rng.standard_normal((LATENT, size)), "shape": np.array([-1, 3, side_px, side_px], np.int64)}
    inputs: dict[str, Any] = {"z": ["n", LATENT]}
    specs = [TensorSpec(name="z", shape=("n", LATENT), low=-4.0, high=4.0)]
    if classes:
        constants["v"] = 2 * rng.standard_normal((len(CLASSES), size))
        inputs["label"] = ["n", len(CLASSES)]
        specs.append(TensorSpec(name="label", shape=("n", len(CLASSES))))
    model = _model(nodes, inputs, ("image_out", ["n", 3, side_px, side_px]), constants)
    spec = Spec(
        kind="generate", inputs=tuple(specs), outputs=(TensorSpec(name="image_out", shape=("n", 3, side_px, side_px)),)
    )
    card = ModelCard(family="small-gan", spec=spec, licence="MIT", classes=CLASSES if classes else ())
    return _write(folder, model, card)


def embedder(folder: Path, *, side_px: int | None = None) -> str:
    """The mean colour, of any size or of one."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["vector"]),
    ]
    sides: tuple[Any, Any] = (side_px, side_px) if side_px else ("h", "w")
    model = _model(nodes, {"image": ["n", 3, *sides]}, ("vector", ["n", 3]), {})
    spec = Spec(
        kind="embed",
        inputs=(TensorSpec(name="image", shape=("n", 3, *sides)),),
        outputs=(TensorSpec(name="vector", shape=("n", 3)),),
    )
    return _write(folder, model, ModelCard(family="colour", spec=spec, licence="MIT"))
