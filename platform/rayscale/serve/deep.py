"""Pictures of 16 bits through a model: in float32 from end to end, a tile a call.

The engine's own tiles are of 8 bits.
"""

from __future__ import annotations

import numpy as np

from rayscale import picture
from rayscale.contract import Spec
from rayscale.imaging import F32, U8
from rayscale.picture import Samples
from rayscale.serve import calls
from rayscale.serve.batching import Timing
from rayscale.serve.calls import Ask
from rayscale.serve.engine import Plan
from rayscale.serve.gateway import Gateway


class DeepCanvas:
    """What `engine.Canvas` is for 8 bits."""

    def __init__(self, plan: Plan, spec: Spec, rgb: Samples, mask: U8 | None) -> None:
        """rgb: u16[plan.height, plan.width, 3]; mask: u8[plan.height, plan.width], 255 where pixels are missing."""
        self.plan, self._names = plan, [t.name for t in spec.inputs]
        padding = ((0, plan.padded_height - plan.height), (0, plan.padded_width - plan.width))
        self._rgb = np.pad(rgb, (*padding, (0, 0)), mode="edge")
        self._mask = None if mask is None else np.pad(mask, padding, mode="edge")
        self._out = np.empty((plan.padded_height * plan.scale, plan.padded_width * plan.scale, 3), np.uint16)

    def inputs(self, index: int) -> dict[str, F32]:
        """A tile as the model takes it: samples / 65535, the mask as 0 or 1."""
        tile = self.plan.tiles[index]
        window = slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width)
        image = np.ascontiguousarray(self._rgb[window].transpose(2, 0, 1)[None], np.float32) / np.float32(65535)
        if self._mask is None:
            return {self._names[0]: image}
        return {self._names[0]: image, self._names[1]: (self._mask[window] // 255).astype(np.float32)[None, None]}

    def place(self, index: int, result: F32) -> None:
        """Keep what tile `index` contributes, of f32[1, 3, h * scale, w * scale]."""
        tile, scale = self.plan.tiles[index], self.plan.scale
        ys = slice((tile.keep_top - tile.y) * scale, (tile.keep_bottom - tile.y) * scale)
        xs = slice((tile.keep_left - tile.x) * scale, (tile.keep_right - tile.x) * scale)
        self._out[
            tile.keep_top * scale : tile.keep_bottom * scale, tile.keep_left * scale : tile.keep_right * scale
        ] = picture.to_u16(result[0, :, ys, xs]).transpose(1, 2, 0)

    @property
    def result(self) -> Samples:
        """u16[height * scale, width * scale, 3], contiguous."""
        scale = self.plan.scale
        return np.ascontiguousarray(self._out[: self.plan.height * scale, : self.plan.width * scale])


async def run(gateway: Gateway, canvas: DeepCanvas, digest: str, output: str, deadline: float) -> Timing:
    """Every tile of the canvas. Raises: as `Engine.call`."""

    async def tile(ask: Ask, index: int) -> None:
        inputs, _ = await gateway.codec(deadline, canvas.inputs, index)
        outputs = await ask(inputs)
        await gateway.codec(deadline, canvas.place, index, outputs[output])

    return await calls.run(gateway.engine, digest, tile, len(canvas.plan.tiles), deadline)
