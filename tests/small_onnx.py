"""A small x2 upscaler as an artifact, built without torch: two 3x3 convolutions, random weights, exact halo 2 px.

And a small x3 network of luma, its sides free or fixed: what others make.

`runpy.run_path` loads it where tests need one: test folders are no packages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rayscale import artifact
from rayscale.contract import ModelCard, Spec, TensorSpec


def model_bytes(seed: int, *, fails_at: float | None = None, depth: int = 0) -> bytes:
    """nearest(x) + detail(x), clipped to [0, 1]: f32[n, 3, h, w] -> f32[n, 3, 2h, 2w].

    `fails_at`: ONNX Runtime refuses to run it where the first sample is larger. `depth`: so many more layers, which
    see no farther; each takes a tenth of a second of CPU for 64 x 64 pixels.
    """
    rng, width = np.random.default_rng(seed), 1024 if depth else 8
    constants = {
        "w1": 0.3 * rng.standard_normal((width, 3, 3, 3)),
        "w2": 0.02 * (8 / width) ** 0.5 * rng.standard_normal((12, width, 3, 3)),
        "sizes": np.array([1, 1, 2, 2]),
        "low": np.array(0.0),
        "high": np.array(1.0),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["a"], ["b0"]),
        *(helper.make_node("Conv", [f"b{i}", "deep"], [f"b{i + 1}"]) for i in range(depth)),
        helper.make_node("Conv", [f"b{depth}", "w2"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["c"], ["detail"], blocksize=2, mode="CRD"),
        helper.make_node("Resize", ["image", "", "sizes"], ["base"], mode="nearest"),
        helper.make_node("Add", ["base", "detail"], ["sum"]),
        helper.make_node("Clip", ["sum", "low", "high"], ["image_out" if fails_at is None else "clipped"]),
    ]
    if depth:
        constants["deep"] = width**-0.5 * rng.standard_normal((width, width, 1, 1))
    if fails_at is not None:  # the second of one element
        constants |= {"nothing": np.zeros(1), "bound": np.array(fails_at), "first": np.zeros((1, 4))}
        nodes += [
            helper.make_node("GatherND", ["image", "first"], ["sample"]),
            helper.make_node("Greater", ["sample", "bound"], ["is_larger"]),
            helper.make_node("Cast", ["is_larger"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["nothing", "index"], ["zero"]),
            helper.make_node("Add", ["clipped", "zero"], ["image_out"]),
        ]
    edges = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"]),
        helper.make_tensor_value_info("image_out", TensorProto.FLOAT, ["n", 3, "h2", "w2"]),
    ]
    constants = {k: v.astype(np.int64 if k == "first" else np.float32) for k, v in constants.items()}
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "small", edges[:1], edges[1:], weights)
    model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


def luma_bytes(seed: int, fixed_px: tuple[int, int] | None = None, *, opset: int = 10) -> bytes:
    """nearest(y) + detail(y): f32[n, 1, h, w] -> f32[n, 1, 3h, 3w], which sees 3 px far.

    fixed_px: (h, w) as constants in the graph, as an old exporter leaves them. Equal seeds have equal weights.
    """
    rng = np.random.default_rng(seed)
    w1, w2 = 0.2 * rng.standard_normal((6, 1, 5, 5)), 0.02 * rng.standard_normal((9, 6, 3, 3))
    w1[0], w2[:, 0] = np.eye(25)[12].reshape(1, 5, 5), np.eye(9)[4].reshape(3, 3)  # the pixel itself
    constants = {"w1": w1.astype(np.float32), "w2": w2.astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
    ]
    h, w = fixed_px or ("h", "w")
    if fixed_px is None:
        nodes.append(helper.make_node("DepthToSpace", ["c"], ["y"], blocksize=3))
    else:
        constants |= {"split": np.array([-1, 1, 3, 3, h, w]), "join": np.array([-1, 1, 3 * h, 3 * w])}
        nodes += [
            helper.make_node("Reshape", ["c", "split"], ["d"]),
            helper.make_node("Transpose", ["d"], ["e"], perm=[0, 1, 4, 2, 5, 3]),
            helper.make_node("Reshape", ["e", "join"], ["y"]),
        ]
    tall, wide = ("h3", "w3") if fixed_px is None else (3 * h, 3 * w)
    edges = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, h, w]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, tall, wide]),
    ]
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "luma", edges[:1], edges[1:], weights)
    model = onnx.ModelProto(ir_version=4, graph=graph, opset_import=[helper.make_opsetid("", opset)])
    return bytes(model.SerializeToString())


def card(*, halo_px: int | None = 2, align: int = 1, kind: str = "transform") -> ModelCard:
    spec = Spec(
        kind=kind,  # type: ignore[arg-type]
        inputs=(TensorSpec(name="image", shape=("n", 3, "h", "w")),),
        outputs=(TensorSpec(name="image_out", shape=("n", 3, "2*h", "2*w")),),
        scale=2,
        align=align,
        halo_px=halo_px,
        halo_why_none="" if halo_px is not None else "looks everywhere",
    )
    return ModelCard(family="small", spec=spec, licence="MIT")


def write(folder: Path, seed: int = 0, *, fails_at: float | None = None, depth: int = 0, **changes: object) -> str:
    """Write the artifact; its digest."""
    golden = np.random.default_rng(7).random((1, 3, 12, 16), np.float32)
    model = model_bytes(seed, fails_at=fails_at, depth=depth)
    return artifact.write(folder, model, card(**changes), {"image": golden})  # type: ignore[arg-type]
