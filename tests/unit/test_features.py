"""Feature nets: a file by URI through ONNX Runtime, and what is built in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import skimage.data
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rayscale.distributions import fit_gaussian, frechet
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.features import BATCH, BUILTINS, FeatureNet, open_features, open_maps, resized
from rayscale.imaging import F32, U8
from rayscale.metrics import perceptual

WEIGHTS = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)


def write_net(path: Path, entry: str = "rgb255", sides: tuple[object, ...] = ("n", 3, "h", "w")) -> str:
    """conv -> relu (`layer1`) -> global mean (`features`) -> softmax (`classes`); its digest's first 12 digits."""
    nodes = [
        helper.make_node("Conv", [entry, "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["layer1"]),
        helper.make_node("GlobalAveragePool", ["layer1"], ["b"]),
        helper.make_node("Flatten", ["b"], ["features"]),
        helper.make_node("Softmax", ["features"], ["classes"]),
    ]
    outputs = {"layer1": ["n", 5, None, None], "features": ["n", 5], "classes": ["n", 5]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(entry, TensorProto.FLOAT, list(sides))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    data = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[helper.make_opsetid("", 20)]).SerializeToString()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()[:12]


def layer(picture: U8, high: float) -> F32:
    """The net's layer by SciPy-free numpy: f64[5, h - 2, w - 2]."""
    x = picture.astype(np.float64) / 255 * high
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))
    return np.maximum(np.einsum("hwckl,ockl->ohw", windows, WEIGHTS), 0)


def photos(count: int = 5, side: int = 24) -> list[U8]:
    cat = skimage.data.chelsea()
    return [np.ascontiguousarray(cat[40 * i : 40 * i + side, 60 * i : 60 * i + side]) for i in range(count)]


@pytest.mark.parametrize(("entry", "high"), [("rgb255", 255.0), ("image", 1.0)])
def test_a_file_gives_its_features_by_its_own_range(tmp_path: Path, entry: str, high: float) -> None:
    digest = write_net(tmp_path / "net.onnx", entry)
    net = open_features(FeatureNet(uri=str(tmp_path / "net.onnx")))
    assert net.name == f"net.onnx@{digest} features as is"
    expected = [layer(p, high).mean((1, 2)) for p in photos()]
    np.testing.assert_allclose(net(photos()), expected, rtol=1e-4)
    assert net(np.stack(photos())).dtype == np.float32
    other = [layer(p, 256.0 - high).mean((1, 2)) for p in photos()]
    assert not np.allclose(net(photos()), other, rtol=1e-2)  # negative control


def test_another_output_and_the_layers(tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx", "image")
    net = FeatureNet(uri=f"file://{tmp_path}/net.onnx", output="classes")
    found = open_features(net)(photos())
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    maps = open_maps(FeatureNet(uri=str(tmp_path / "net.onnx")))
    (layer1,) = maps(photos())
    np.testing.assert_allclose(layer1, [layer(p, 1.0) for p in photos()], atol=1e-5)
    assert "layer1" in maps.name
    photo = photos(1)[0]
    noise = np.random.default_rng(0).normal(0, 1, photo.shape)
    worse = [np.clip(photo + s * noise, 0, 255).astype(np.uint8) for s in (0, 5, 20, 80)]
    distances = perceptual(maps([photo] * 4), maps(worse))
    assert distances[0] == 0.0
    assert (np.diff(distances) > 0).all()


def test_pictures_are_brought_to_one_side_by_a_named_filter(tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx")
    uri = str(tmp_path / "net.onnx")
    mixed = [photos()[0], skimage.data.chelsea()[:90, :130]]
    with pytest.raises(ConfigError, match="must be of one size; set side_px"):
        open_features(FeatureNet(uri=uri))(mixed)
    rows = {}
    for how in ("box", "bilinear", "bicubic", "lanczos"):
        net = open_features(FeatureNet(uri=uri, side_px=24, filter=how))  # type: ignore[arg-type]
        assert net.name.endswith(f"features 24 px {how}")
        rows[how] = net(mixed)
    for how, row in rows.items():  # the first has that side: no filter touches it
        np.testing.assert_array_equal(row[0], rows["box"][0])
        assert how == "box" or np.abs(row[1] - rows["box"][1]).max() > 0.1


def test_shrinking_is_low_pass() -> None:
    """A chequered picture turns gray; OpenCV's plain bicubic is the negative control."""
    chequered = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    for how in ("box", "bilinear", "bicubic", "lanczos"):
        assert np.ptp(resized(chequered, 32, how)[4:-4, 4:-4].astype(int)) <= 60  # type: ignore[arg-type]
    assert np.ptp(cv2.resize(chequered, (32, 32), interpolation=cv2.INTER_CUBIC).astype(int)) > 100


@pytest.mark.parametrize("uri", ["file", *BUILTINS])
def test_a_batch_equals_its_pictures_to_the_bit(uri: str, tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx")
    net = open_features(FeatureNet(uri=str(tmp_path / "net.onnx") if uri == "file" else uri, side_px=20))
    pictures = photos(3) * (BATCH // 3 + 5)
    together = net(pictures)
    assert together.shape[0] == len(pictures) > BATCH
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([net([p]) for p in pictures]))


def test_a_net_of_fixed_size_says_which(tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx", sides=(1, 3, 20, 20))
    uri = str(tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"side_px=0: this net takes 20x20 px only; set side_px=20"):
        open_features(FeatureNet(uri=uri))
    assert open_features(FeatureNet(uri=uri, side_px=20))(photos()).shape == (5, 5)  # one by one


def test_the_squeezenet_file_equals_onnxs_own_evaluator(eval_data: Path) -> None:
    path = eval_data.parent / "models" / "squeezenet11_features.onnx"
    if not path.exists():
        pytest.skip(f"no {path}")
    net = open_features(FeatureNet(uri=str(path), side_px=35))
    picture = photos(1, 35)
    (expected,) = ReferenceEvaluator(str(path)).run(
        ["features"], {"rgb255": picture[0].transpose(2, 0, 1)[None].astype(np.float32)}
    )
    np.testing.assert_allclose(net(picture), expected, rtol=1e-3, atol=1e-3)
    assert len(open_maps(FeatureNet(uri=str(path)))(picture)) == 4


def test_pixels_and_colours_are_what_they_say() -> None:
    pictures = photos()
    pixels = open_features(FeatureNet(uri="builtin:pixels"))(pictures)
    np.testing.assert_allclose(pixels, np.stack(pictures).reshape(5, -1) / 255, rtol=1e-6)
    histograms = open_features(FeatureNet(uri="builtin:colour-histogram"))(pictures)
    for picture, row in zip(pictures, histograms, strict=True):
        expected = np.histogramdd(picture.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0] / picture[..., 0].size
        np.testing.assert_allclose(np.square(row), expected.ravel(), atol=1e-6)


def test_colour_texture_holds_means_and_directions() -> None:
    net = open_features(FeatureNet())
    assert net.name == "builtin:colour-texture as is"
    picture = photos(1, 32)[0]
    row = net([picture])[0]
    colours = picture / 255 @ np.array([[0.25, 1, 0], [0.5, -1, -1], [0.25, 0, 1]])
    cells = colours.reshape(4, 8, 4, 8, 3)
    np.testing.assert_allclose(row[:48], cells.mean((1, 3)).ravel(), atol=1e-5)
    np.testing.assert_allclose(row[48:96], cells.std((1, 3)).ravel(), atol=1e-3)
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    upright, lying = (net([p])[0][96:224].reshape(16, 8) for p in (stripes, stripes.transpose(1, 0, 2)))
    assert (upright.argmax(1) == 0).all()  # gradients along x
    assert (lying.argmax(1) == 4).all()
    assert net([np.full((32, 32, 3), 77, np.uint8)])[0][48:] == pytest.approx(np.zeros(361 - 48), abs=1e-3)


def test_colour_texture_sees_blur_and_noise() -> None:
    """What makes it of use in a Frechet distance: worse pictures are further away."""
    rng = np.random.default_rng(0)
    cat, coffee = skimage.data.chelsea(), skimage.data.coffee()
    corners = [(p, *rng.integers(0, (p.shape[0] - 32, p.shape[1] - 32))) for p in (cat, coffee) for _ in range(100)]
    crops = [p[y : y + 32, x : x + 32] for p, y, x in corners]
    net = open_features(FeatureNet())

    def distance(change: list[U8]) -> float:
        return frechet(fit_gaussian(net(crops)), fit_gaussian(net(change)))

    assert distance(crops) < 1e-6
    blurred = [distance([cv2.GaussianBlur(c, (0, 0), s) for c in crops]) for s in (1.0, 3.0)]
    noisy = [
        distance([np.clip(c + rng.normal(0, s, c.shape), 0, 255).astype(np.uint8) for c in crops]) for s in (20, 60)
    ]
    assert 0.01 < blurred[0] < blurred[1]
    assert 0.01 < noisy[0] < noisy[1]


def test_mistakes_are_named(tmp_path: Path) -> None:
    write_net(tmp_path / "net.onnx")
    uri = str(tmp_path / "net.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    write_net(tmp_path / "gray.onnx", sides=("n", 1, "h", "w"))
    for settings, match in (
        ({"uri": "builtin:colour-textures"}, "did you mean 'builtin:colour-texture'"),
        ({"side_px": -1}, r"features.side_px=-1"),
        ({"filter": "bicubicc"}, "did you mean 'bicubic'"),
        ({"output": "x"}, "leave it out"),
        (
            {"uri": uri, "output": "feature"},
            r"features.output=feature: is no output of rank 2.*did you mean 'features'",
        ),
        ({"uri": str(tmp_path / "gray.onnx")}, r"its input is \[0, 1, 0, 0\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            open_features(FeatureNet(**settings))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="is no ONNX file"):
        open_features(FeatureNet(uri=str(tmp_path / "bad.onnx")))
    with pytest.raises(MissingError):
        open_features(FeatureNet(uri=str(tmp_path / "none.onnx")))
    with pytest.raises(ConfigError, match="has no layers"):
        open_maps(FeatureNet())
    with pytest.raises(ConfigError, match="sides must be 8 px or more; set side_px"):
        open_features(FeatureNet())(photos(2, 7))
    with pytest.raises(ConfigError, match="pictures=0"):
        open_features(FeatureNet())([])
