"""The client and `rayscale upscale` against the real gateway over HTTP: what it says, and equal bytes without it."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from rayscale import artifact, cli, imaging
from rayscale.client import Client
from rayscale.errors import ConfigError, ImageError, MissingError, TooLargeError, UserError
from rayscale.imaging import Limits
from rayscale.serve.keys import Key

TESTS = Path(__file__).parents[1]
small, kinds, service = (runpy.run_path(str(TESTS / f"{name}.py")) for name in ("small_onnx", "small_kinds", "service"))
photo, png = service["photo"], service["png"]
KINDS = "filler", "burst", "generator", "embedder"


class Live:
    """An ASGI application in a thread of this process."""

    def __init__(self, app: Any) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of every kind."""
    root = tmp_path_factory.mktemp("artifacts")
    small["write"](root / "photos")
    for name in KINDS:
        kinds[name](root / name)
    return {name: root / name for name in ("photos", *KINDS)}


@pytest.fixture(scope="module")
def live(folders: dict[str, Path]) -> Iterator[Live]:
    photos = folders["photos"]
    made = service["Service"](photos, artifact.digest_of(photos), limits=Limits(max_pixels=200_000))
    made.serve(**{name: folder for name, folder in folders.items() if name != "photos"})
    live = Live(made.app)
    yield live
    live.close()
    made.gateway.close()


def untiled(folder: Path, pixels: Any) -> Any:
    return imaging.to_hwc_u8(artifact.load(folder, threads=1).transform(imaging.to_nchw_f32(pixels)))


def test_a_picture_is_that_of_the_session(live: Live, folders: dict[str, Path]) -> None:
    pixels = photo(90, 110)
    with Client(live.url) as client:
        answer = client.upscale(pixels, model="photos")
        assert client.upscale(png(pixels)).data == answer.data
        bicubic = client.upscale(pixels, method="bicubic", scale=2)
    np.testing.assert_array_equal(answer.pixels, untiled(folders["photos"], pixels))
    assert (answer.model, answer.version, answer.tiling, answer.bits) == ("photos", 3, "tiled 6", 8)
    assert (answer.provider, len(answer.request_id)) == ("CPUExecutionProvider", 32)
    assert answer.digest == artifact.digest_of(folders["photos"])
    assert {"decode", "queue", "infer", "encode"} <= set(answer.timing_ms)
    assert (bicubic.model, bicubic.version, bicubic.provider) == ("classical:bicubic", None, "classical")
    assert not np.array_equal(bicubic.pixels, answer.pixels)


def test_every_route_answers_the_client(live: Live) -> None:
    pixels, mask = photo(20, 24), np.zeros((20, 24), np.uint8)
    mask[5:9, 3:11] = 255
    with Client(live.url) as client:
        filled = client.restore(pixels, mask, model="filler").pixels
        np.testing.assert_array_equal(filled[mask == 0], pixels[mask == 0])
        assert (filled[mask == 255] == 153).all()

        frames = [photo(12, 16, seed) for seed in range(3)]
        merged = client.burst(frames, model="burst")
        mean = np.repeat(np.repeat(np.mean(frames, axis=0), 2, axis=0), 2, axis=1)
        np.testing.assert_allclose(merged.pixels, mean, atol=0.51)
        laid = client.burst(frames, method="shift_and_add", scale=3)
        assert (laid.model, laid.pixels.shape) == ("classical:shift_and_add", (36, 48, 3))

        two = client.generate(model="generator", seed=7, n=2, class_name="rose", truncation=0.7)
        (one,) = client.generate(model="generator", seed=7, class_name="rose", truncation=0.7)
        np.testing.assert_array_equal(one.pixels, two[0].pixels)
        assert not np.array_equal(two[0].pixels, two[1].pixels)
        assert one.model == two[1].model == "generator"
        assert [(p.seed, p.index) for p in (one, *two)] == [(7, 0), (7, 0), (7, 1)]
        (drawn,) = client.generate(model="generator", class_name=1)
        (again,) = client.generate(model="generator", class_name=1, seed=drawn.seed)
        assert (again.data, again.seed) == (drawn.data, drawn.seed)
        (later,) = client.generate(model="generator", seed=7, first=1, class_name="rose", truncation=0.7)
        np.testing.assert_array_equal(later.pixels, two[1].pixels)
        walk = client.generate(model="generator", seed=7, to_seed=8, n=3, class_name="rose", truncation=0.7)
        np.testing.assert_array_equal(walk[0].pixels, one.pixels)

        vector = client.embed(pixels, model="embedder").vector
        np.testing.assert_allclose(vector, pixels.mean((0, 1)) / 255, atol=1e-4)
        alike = client.similarity(pixels, pixels, model="embedder").measures
        assert (alike["mse"], alike["ssim"]) == (0.0, pytest.approx(1.0))
        assert alike["cosine"] == pytest.approx(1.0, abs=1e-4)
        assert set(client.similarity(pixels, pixels, measure=["mse"]).measures) == {"mse"}

        others = [pixels, 255 - pixels]
        several = client.embeddings(others, model="embedder", side_px=16)
        for picture, found in zip(others, several, strict=True):
            alone = client.embed(picture, model="embedder", side_px=16)
            np.testing.assert_array_equal(found.vector, alone.vector)
        assert not np.array_equal(several[0].vector, several[1].vector)
        same, inverse = client.similarities([(pixels, pixels), tuple(others)], measure=["mse", "psnr"])
        assert same.measures == {"mse": 0.0, "psnr": None}
        assert inverse.measures == client.similarity(*others, measure=["mse", "psnr"]).measures

        found = client.models()
        detail = client.model("photos@champion")
    assert {info.name for info in found.models} == {"photos", *KINDS}
    assert detail.routes == {"champion": {"photos:3": 1.0}}
    assert (detail.versions[0].aliases, detail.versions[0].provider) == (("champion",), "CPUExecutionProvider")
    assert detail.versions[0].card is not None
    assert detail.versions[0].card["spec"]["scale"] == detail.versions[0].scale == 2
    generator = next(info for info in found.models if info.name == "generator")
    assert (generator.role, generator.classes) == ("generate", ("daisy", "rose", "tulip"))
    assert found.defaults["upscale"] == "photos@champion"


def test_refusals_are_our_own_errors(live: Live) -> None:
    with Client(live.url) as client:
        with pytest.raises(TooLargeError, match=r"^image=500x500: at most 200000 pixels are read; "):
            client.upscale(photo(500, 500))
        with pytest.raises(ImageError, match="truncated or damaged"):
            client.upscale(png(photo(40, 40))[:-500])
        with pytest.raises(MissingError, match=r"did you mean 'photos@champion'"):
            client.upscale(photo(8, 8), model="phots")
        with pytest.raises(MissingError, match=r"did you mean 'photos'"):
            client.model("phots")
        with pytest.raises(ConfigError, match=r"2 frames: burst:1 takes 3"):
            client.burst([photo(8, 8)] * 2, model="burst")


def test_a_key_opens_the_door(folders: dict[str, Path]) -> None:
    key = Key(name="app", sha256=hashlib.sha256(b"secret").hexdigest())
    made = service["Service"](folders["photos"], artifact.digest_of(folders["photos"]), keys=(key,))
    live = Live(made.app)
    with Client(live.url, key="secret") as client:
        assert client.upscale(photo(8, 8)).model == "photos"
    for wrong in ("", "guess"):
        with Client(live.url, key=wrong) as client, pytest.raises(UserError, match="answers to its keys"):
            client.upscale(photo(8, 8))
    live.close()
    made.gateway.close()


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """The JSON of the last line of `rayscale ...`."""
    monkeypatch.setattr(sys, "argv", ["rayscale", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return dict(json.loads(out.strip().rpartition("\n")[2]))


def test_a_folder_by_the_endpoint_and_by_the_model_is_the_same(
    live: Live, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every byte: gray, JPEG, alpha and 16 bits too, pictures that serving tiles and those it does not."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "large.png").write_bytes(png(photo(90, 130)))
    Image.fromarray(photo(30, 20)).save(source / "photo.jpg", quality=90)
    Image.fromarray(photo(30, 20)[:, :, 0]).save(source / "gray.png")
    Image.fromarray(np.dstack([photo(30, 20), photo(30, 20, 1)[:, :, :1]])).save(source / "alpha.png")
    (source / "deep.png").write_bytes(png(photo(70, 80).astype(np.uint16) * 201))
    made = command(monkeypatch, capsys, "upscale", source, tmp_path / "url", "--url", live.url, "--model", "photos")
    assert made["models"] == {"photos:3": 5}
    made = command(monkeypatch, capsys, "upscale", source, tmp_path / "model", "--model", folders["photos"])
    assert made["models"] == {"photos": 5}
    for path in source.iterdir():
        by_url, by_model = (tmp_path / name / f"{path.stem}.png" for name in ("url", "model"))
        assert by_url.read_bytes() == by_model.read_bytes(), path.name
    assert Image.open(tmp_path / "model/alpha.png").mode == "RGBA"
    assert (tmp_path / "model/deep.png").read_bytes()[24] == 16


def test_holes_are_filled_by_the_endpoint_and_by_the_model(
    live: Live, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mask = np.zeros((30, 40), np.uint8)
    mask[4:9, 7:20] = 255
    for folder in ("in/a", "masks/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "in/a/x.jpg").write_bytes(imaging.encode(photo(30, 40), "jpeg"))
    Image.fromarray(mask).save(tmp_path / "masks/a/x.png")
    run = "upscale", tmp_path / "in"
    masks = "--masks", tmp_path / "masks"
    command(
        monkeypatch, capsys, *run, tmp_path / "1", "--url", live.url, "--model", "filler", "--task", "restore", *masks
    )
    command(monkeypatch, capsys, *run, tmp_path / "2", "--model", folders["filler"], *masks)
    data = (tmp_path / "1/a/x.png").read_bytes()
    assert data == (tmp_path / "2/a/x.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert (pixels[mask == 255] == 153).all()
    given = imaging.decode_rgb((tmp_path / "in/a/x.jpg").read_bytes())
    np.testing.assert_array_equal(pixels[mask == 0], given[mask == 0])
