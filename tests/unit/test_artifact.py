"""An artifact runs as it was published, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rayscale.artifact import Abort, axis_of, bind, digest_of, load, open_model, write
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    MissingError,
    RayscaleError,
    ResourceError,
    UnavailableError,
)

OLD = Path(__file__).parents[1] / "golden" / "artifact_v1"  # by tests/golden/make_artifact.py, once
OLD_DIGEST = "35176a573a0554d5573d504eb80a7ae8dfc58d3d52e7d37b602398bf7a1296f8"


def upscaler(*, seed: int = 0, convolutions: int = 1, side: int | str = "h", name: str = "image") -> bytes:
    """x2: 3x3 convolutions, depth to space, clip. Made by hand, as an artifact may come from anywhere."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], name
    for i in range(convolutions):
        out = 12 if i == convolutions - 1 else 3
        w = rng.normal(0, 0.1, (out, 3, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"x{i}"], pads=[1, 1, 1, 1]))
        last = f"x{i}"
    bounds = (("low", 0.0), ("high", 1.0))
    weights += [numpy_helper.from_array(np.array(value, np.float32), key) for key, value in bounds]
    nodes.append(helper.make_node("DepthToSpace", [last], ["shuffled"], blocksize=2, mode="CRD"))
    nodes.append(helper.make_node("Clip", ["shuffled", "low", "high"], ["image_out"]))
    given = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, side, "w"])
    found = helper.make_tensor_value_info("image_out", TensorProto.FLOAT, ["n", 3, "H", "W"])
    graph = helper.make_graph(nodes, "g", [given], [found], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def card_of(**spec: object) -> ModelCard:
    image = TensorSpec(name="image", shape=("n", 3, "h", "w"))
    out = TensorSpec(name="image_out", shape=("n", 3, "2*h", "2*w"))
    fields: dict[str, object] = {"kind": "transform", "inputs": (image,), "outputs": (out,), "scale": 2, "halo_px": 1}
    return ModelCard(family="made-by-hand", licence="MIT", spec=Spec(**(fields | spec)))  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


PROBE = {"image": noise(1, 3, 7, 5)}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write(tmp_path / "model", upscaler(), card_of(), PROBE)
    return tmp_path / "model"


def one_line(error: pytest.ExceptionInfo[RayscaleError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite_golden(folder: Path, **changed: np.ndarray) -> None:
    with np.load(folder / "golden.npz") as stored:
        arrays = {k: stored[k] for k in stored.files} | changed
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (folder / "golden.npz").write_bytes(buffer.getvalue())


def test_what_is_written_is_what_runs(tmp_path: Path) -> None:
    digest = write(tmp_path / "model", upscaler(), card_of(), PROBE)
    session = load(tmp_path / "model", expect_digest=digest)
    assert (session.card, session.digest, session.provider) == (card_of(), digest, "CPUExecutionProvider")
    output = session.transform(PROBE["image"])
    assert output.shape == (1, 3, 14, 10)
    assert 0 <= output.min() < output.max() <= 1
    with np.load(tmp_path / "model" / "golden.npz") as golden:
        np.testing.assert_array_equal(golden["in/image"], PROBE["image"])
        np.testing.assert_array_equal(golden["out/image_out"], output)
        assert golden["tolerance/CPUExecutionProvider"] == 1e-4
        assert golden["tolerance/CUDAExecutionProvider"] == 1 / 255
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing is left beside it"


def test_the_digest_is_of_files_and_can_be_recomputed_without_us(made: Path) -> None:
    files = {
        name: hashlib.sha256((made / name).read_bytes()).hexdigest()
        for name in ("card.json", "golden.npz", "model.onnx")
    }
    text = json.dumps(files, indent=2, sort_keys=True) + "\n"
    assert digest_of(made) == hashlib.sha256(text.encode()).hexdigest()


def test_equal_things_are_equal_bytes_and_another_is_refused(made: Path) -> None:
    digest = digest_of(made)
    with zipfile.ZipFile(made / "golden.npz") as archive:
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}, "no clock in the bytes"
    assert write(made, upscaler(), card_of(), PROBE) == digest
    with pytest.raises(ConflictError) as error:
        write(made, upscaler(seed=1), card_of(), PROBE)
    assert str(made) in one_line(error)
    assert digest_of(made) == digest
    assert [p.name for p in made.parent.iterdir()] == ["model"]


def test_an_empty_folder_is_filled_and_a_folder_of_other_things_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", upscaler(), card_of(), PROBE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConflictError):
        write(tmp_path / "full", upscaler(), card_of(), PROBE)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the model is larger: its write fails half-way
    try:
        with pytest.raises(ResourceError) as error:
            write(tmp_path / "model", upscaler(), card_of(), PROBE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "model") in one_line(error)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model", upscaler(), card_of(), PROBE)


def test_a_model_that_gives_nan_is_no_artifact(tmp_path: Path) -> None:
    model = onnx.load_from_string(upscaler())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((12, 3, 3, 3), np.nan, np.float32), "w0"))
    model.graph.node.pop()
    model.graph.node[-1].output[0] = "image_out"  # ONNX leaves open what a clip makes of NaN
    with pytest.raises(IntegrityError, match="finite"):
        write(tmp_path / "model", model.SerializeToString(), card_of(), PROBE)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_found(made: Path) -> None:
    digest = digest_of(made)
    data = bytearray((made / "model.onnx").read_bytes())
    weights = numpy_helper.to_array(onnx.load_from_string(bytes(data)).graph.initializer[0])
    data[bytes(data).index(weights.tobytes()) + 3] ^= 0x40  # the top exponent bit of the first weight
    (made / "model.onnx").write_bytes(data)

    with pytest.raises(IntegrityError) as error:
        load(made, expect_digest=digest)
    assert "model.onnx" in one_line(error)
    assert digest in one_line(error)
    with pytest.raises(IntegrityError) as error:
        load(made)  # no digest to compare with: the probe finds it
    assert "model.onnx output image_out" in one_line(error)
    assert load(made, check_golden=False).provider  # negative control: ONNX Runtime itself loads it gladly


def test_the_probe_holds_its_tolerance_and_no_more(made: Path) -> None:
    output = load(made).transform(PROBE["image"])
    for off, fails in ((0.9e-4, False), (1.1e-4, True), (np.nan, True)):
        rewrite_golden(made, **{"out/image_out": output + np.float32(off)})
        if fails:
            with pytest.raises(IntegrityError, match=r"golden\.npz"):
                load(made)
        else:
            load(made)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "card.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_files_are_named(made: Path, name: str, damage: str) -> None:
    path = made / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(RayscaleError) as error:
        load(made)
    assert name in one_line(error)
    path.write_bytes(data)
    load(made)


def test_a_probe_of_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    model = upscaler(name="photo")
    card = card_of(inputs=(TensorSpec(name="photo", shape=("n", 3, "h", "w")),))
    write(tmp_path / "other", model, card, {"photo": PROBE["image"]})
    shutil.copy(tmp_path / "other" / "golden.npz", made / "golden.npz")
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        load(made)


def test_no_artifact_is_the_callers_mistake(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingError) as error:
            load(folder)
        assert error.value.exit_code == 2
        one_line(error)


def test_a_newer_card_is_refused_in_one_line(made: Path) -> None:
    card = json.loads((made / "card.json").read_text()) | {"schema": 2, "invented_later": {"a": [1]}}
    (made / "card.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError) as error:
        load(made)
    assert "card.json.schema=2" in one_line(error)
    assert "upgrade" in one_line(error)


def test_a_card_must_be_of_its_model() -> None:
    wide = TensorSpec(name="image", shape=("n", 3, "h", "w"))
    for model, card, says in (
        (upscaler(name="photo"), card_of(), "photo"),
        (upscaler(side=16), card_of(), "16"),  # a fixed side that the card calls free
        (upscaler(), card_of(inputs=(replace(wide, shape=("n", "h", "w")),)), "'h', 'w'"),
        (upscaler(), card_of(inputs=(replace(wide, shape=("n", 1, "h", "w")),)), "1"),
        (upscaler(), card_of(outputs=(replace(wide, name="other"),)), "other"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            open_model(model, card)
        one_line(error)
    half = onnx.load_from_string(upscaler())
    half.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(RayscaleError):
        open_model(half.SerializeToString(), card_of())


def test_weights_in_a_second_file_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(upscaler())
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(IntegrityError, match="weights inside"):
        write(tmp_path / "model", tmp_path / "m.onnx", card_of(), PROBE)
    write(tmp_path / "model", upscaler(), card_of(), PROBE)


@pytest.mark.parametrize(
    ("shapes", "align", "says"),
    [
        ({"image": (1, 3, 4, 4), "mask": (1, 1, 4, 4)}, 1, "the model takes image"),
        ({"photo": (1, 3, 4, 4)}, 1, "the model takes image"),
        ({"image": (3, 4, 4)}, 1, "3 axes"),
        ({"image": (1, 4, 4, 4)}, 1, "axis 1 must be 3"),
        ({"image": (0, 3, 4, 4)}, 1, "axis 0"),
        ({"image": (1, 3, 4, 6)}, 4, "axis 3 must be a multiple of 4"),
    ],
)
def test_inputs_unlike_the_card_are_named(shapes: dict[str, tuple[int, ...]], align: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        bind(card_of(align=align), shapes)
    one_line(error)


def test_free_axes_are_bound_across_inputs() -> None:
    pair = (TensorSpec(name="image", shape=("n", 3, "h", "w")), TensorSpec(name="guide", shape=("n", 1, "2*h", "2*w")))
    card = card_of(inputs=pair)
    assert bind(card, {"image": (2, 3, 5, 7), "guide": (2, 1, 10, 14)}) == {"n": 2, "h": 5, "w": 7}
    with pytest.raises(ConfigError, match="axis 3 must be 14"):
        bind(card, {"image": (2, 3, 5, 7), "guide": (2, 1, 10, 12)})
    with pytest.raises(ConfigError, match="multiple of 2"):
        bind(card, {"image": (2, 3, 5, 7), "guide": (2, 1, 10, 15)})


def test_axis_expressions() -> None:
    assert [axis_of(a) for a in (3, "n", "2*h", "10*w")] == [(3, ""), (1, "n"), (2, "h"), (10, "w")]
    for wrong in ("h*2", "2h", "", "*h", "0*h", "-1*h", "h/2"):
        with pytest.raises(ConfigError, match="spec axis"):
            axis_of(wrong)


def test_only_float32_runs_and_only_transforms_transform(made: Path) -> None:
    session = load(made)
    with pytest.raises(ConfigError, match="must be float32"):
        session.run({"image": PROBE["image"].astype(np.float64)})  # type: ignore[dict-item]
    embedder = open_model(upscaler(), card_of(kind="embed", halo_px=None))
    with pytest.raises(ConfigError, match="no transform"):
        embedder.transform(PROBE["image"])
    assert embedder.run(PROBE)["image_out"].shape == (1, 3, 14, 10)


def test_cuda_asked_for_is_cuda_or_an_error(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceError) as error:  # conftest hides any GPU
        load(made, device="cuda")
    assert "CUDA did not start" in one_line(error)
    assert load(made, device="auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr().out == "", "a command's standard output is its result"
    with pytest.raises(ConfigError, match="cpu, cuda or auto"):
        load(made, device="gpu")  # type: ignore[arg-type]


def test_threads_share_a_session(made: Path) -> None:
    session = load(made, threads=2)
    pictures = [noise(1, 3, 40 + i, 33, seed=i) for i in range(12)]
    alone = [session.transform(p) for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(session.transform, pictures))
    single = load(made, threads=1)
    for a, b, picture in zip(alone, together, pictures, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, single.transform(picture))


def test_a_run_is_aborted_from_another_thread_and_the_session_lives() -> None:
    session = open_model(upscaler(convolutions=150), card_of(), threads=1)
    large, abort = {"image": noise(1, 3, 600, 600)}, Abort()
    started = time.monotonic()
    session.run(large)
    whole_s = time.monotonic() - started
    threading.Timer(whole_s / 10, abort.now).start()
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="aborted"):
        session.run(large, abort)
    assert time.monotonic() - started < 0.7 * whole_s
    assert session.transform(PROBE["image"]).shape == (1, 3, 14, 10)


def test_an_artifact_of_the_first_version_still_says_the_same() -> None:
    session = load(OLD, expect_digest=OLD_DIGEST)
    assert session.card.family == "compact"
    assert session.card.lineage.images_seen == 1
    with np.load(OLD / "golden.npz") as golden:
        given, expected = golden["in/image"], golden["out/image_out"]
    assert expected.std() > 0.05, "a constant would prove nothing"
    np.testing.assert_allclose(session.transform(given), expected, rtol=0, atol=1e-4)
    assert digest_of(OLD) == OLD_DIGEST
