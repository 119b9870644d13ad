"""A shipped function, however it is run: an ONNX Runtime session, or a torch module while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayscale.contract import Spec
from rayscale.errors import DivergedError
from rayscale.imaging import F32, U8, as_one, run_tiled, to_hwc_u8

if TYPE_CHECKING:  # scoring an artifact needs no torch, and training no ONNX Runtime
    import torch
    from torch import nn

    from rayscale.artifact import Session

Run = Callable[..., U8]
"""What makes one picture: lr u8[h, w, 3] -> sr u8[h * scale, w * scale, 3]; bursts take u8[T, h, w, 3], inpainting a
mask u8[h, w, 1] besides. Raises DivergedError where its picture is not finite."""

Forward = Callable[[Mapping[str, F32]], Mapping[str, F32]]


class Model(NamedTuple):
    """The tensors of `spec.inputs` by name -> those of `spec.outputs`."""

    spec: Spec
    forward: Forward


def session_model(session: Session) -> Model:
    """An artifact: the very path of serving."""
    return Model(session.card.spec, session.run)


def torch_model(module: nn.Module, spec: Spec, device: torch.device) -> Model:
    """A module, for validation while it trains: float32, no autocast. Each submodule's mode is put back."""
    import torch

    def forward(inputs: Mapping[str, F32]) -> dict[str, F32]:
        modes = [(m, m.training) for m in module.modules()]  # mixed: an averaged copy is always in eval mode
        module.eval()
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                found = module(*(torch.from_numpy(inputs[tensor.name]).to(device) for tensor in spec.inputs))
        finally:
            for submodule, mode in modes:
                submodule.training = mode
        outputs = found if isinstance(found, tuple | list) else (found,)
        return {t.name: value.float().cpu().numpy() for t, value in zip(spec.outputs, outputs, strict=True)}

    return Model(spec, forward)


def picture_run(model: Model, tile_px: int | None = None) -> Run:
    """A model of pictures as a `Run`; without `tile_px` (or a halo) pictures run whole, if it takes any size."""
    spec, output = model.spec, model.spec.outputs[0].name

    def run(*inputs: U8) -> U8:
        planes = np.concatenate([_planes(picture) for picture in inputs])[None]
        leads = {t.name: (*p.shape[:-3], p.shape[-1]) for t, p in zip(spec.inputs, inputs, strict=True)}
        forward = as_one(lambda given: model.forward(given)[output], leads)
        tiling: dict[str, Any] = {"scale": spec.scale, "halo_px": spec.halo_px, "align": spec.align}
        return finite_u8(run_tiled(forward, planes, tile_px=tile_px, fixed_px=spec.fixed_px, **tiling))

    return run


def session_run(session: Session, tile_px: int | None = None) -> Run:
    """An artifact as a `Run`."""
    return picture_run(session_model(session), tile_px)


def torch_run(module: nn.Module, device: torch.device, spec: Spec) -> Run:
    """A module as a `Run`: whole pictures."""
    return picture_run(torch_model(module, spec, device))


def finite_u8(nchw: F32) -> U8:
    """The first picture of f32[n, 3, h, w] as u8[h, w, 3].

    Raises: DivergedError for NaN and infinities, which as uint8 would look like a picture.
    """
    if not np.isfinite(nchw).all():
        bad = int(nchw.size - np.isfinite(nchw).sum())
        raise DivergedError("picture", f"{bad} of {nchw.size} values are NaN or infinite", "must be finite",
                            "the weights are broken: go back to an earlier checkpoint")  # fmt: skip
    return to_hwc_u8(nchw)


def _planes(picture: U8) -> F32:
    """u8[h, w, c] or u8[T, h, w, c] -> f32[T * c, h, w] in [0, 1]."""
    planes = np.moveaxis(picture, -1, -3).reshape(-1, *picture.shape[-3:-1])
    return np.ascontiguousarray(planes, np.float32) / np.float32(255)
