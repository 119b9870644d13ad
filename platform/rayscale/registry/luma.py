"""A network of luma made one of RGB pictures: what it changes of the luma is added to the bicubic picture.

    rgb -> bicubic -> up;    out = up + (network(luma(rgb)) - luma(up)), clamped to [0, 1]

YCbCr is linear in RGB, so this is Y through the network, Cb and Cr enlarged bicubically, and back. Luma is that of
BT.601 over the full range, as JPEG and Pillow have it; bicubic is that of Pillow and MATLAB (Keys, a = -0.5).
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rayscale.errors import ConfigError

WEIGHTS = (0.299, 0.587, 0.114)  # of R, G, B
_REACH_PX = 2  # of bicubic interpolation, at any scale
_LEAST_OPSET = 7  # before it, operators do not broadcast


def as_rgb(model: bytes, scale: int) -> bytes:
    """f32[n, 1, h, w] -> f32[n, 1, h * scale, w * scale], as ONNX, with 3 channels on both sides, RGB in [0, 1].

    Batch and sides stay as they are, free or fixed. Raises: ConfigError for operators older than ONNX 1.2.
    """
    proto = onnx.load_from_string(model)
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ConfigError("model opset", opset, f"must be at least {_LEAST_OPSET} for a network of luma",
                          "convert it (onnx.version_converter)")  # fmt: skip
    graph, stored = proto.graph, {t.name for t in proto.graph.initializer}
    given = next(i for i in graph.input if i.name not in stored)
    made = graph.output[0]
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | stored

    def fresh(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    image, out = fresh("image"), fresh("image_out")
    constants: list[TensorProto] = []

    def constant(name: str, value: object, dtype: type = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), fresh(name)))
        return constants[-1].name  # type: ignore[no-any-return]

    nodes: list[NodeProto] = []

    def node(kind: str, *inputs: str, to: str = "", **attributes: object) -> str:
        to = to or fresh(f"rgb_{kind.lower()}")
        nodes.append(helper.make_node(kind, list(inputs), [to], name=to, **attributes))
        return to

    luma = constant("luma", np.reshape(WEIGHTS, (1, 3, 1, 1)))
    node("Conv", image, luma, to=given.name)
    before, nodes = nodes, []
    up = image
    if scale > 1:
        pads = [0, 0, _REACH_PX, _REACH_PX] * 2
        if opset < 11:
            padded = node("Pad", image, mode="edge", pads=pads)
        else:
            padded = node("Pad", image, constant("pads", pads, np.int64), mode="edge")
        phases = node("Conv", padded, constant("bicubic", _bicubic(scale)))
        up = node("DepthToSpace", phases, blocksize=scale)
    changed = node("Add", up, node("Sub", made.name, node("Conv", up, luma)))
    if opset < 11:
        node("Clip", changed, to=out, min=0.0, max=1.0)
    else:
        node("Clip", changed, constant("low", 0), constant("high", 1), to=out)

    inner = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *inner, *nodes])
    graph.initializer.extend(constants)
    for edge, name in ((given, image), (made, out)):
        edge.name = name
        edge.type.tensor_type.shape.dim[1].dim_value = 3
    proto.ir_version = max(proto.ir_version, 4)  # constants need not be inputs any more
    return bytes(proto.SerializeToString())


def _bicubic(scale: int) -> NDArray[np.float64]:
    """Kernels of the s * s pixels that each one becomes, in the order of `DepthToSpace`: f64[3 * s * s, 3, k, k]."""
    taps = np.arange(-_REACH_PX, _REACH_PX + 1)
    at = (np.arange(scale) + 0.5) / scale - 0.5  # where the new pixels' centres lie around the old one's
    x = np.abs(taps[None] - at[:, None])
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    lines = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    kernels = np.einsum("yi,xj->yxij", lines, lines).reshape(scale * scale, 1, 1, len(taps), len(taps))
    every: NDArray[np.float64] = kernels * np.eye(3)[None, :, :, None, None]
    return every.reshape(3 * scale * scale, 3, len(taps), len(taps))
