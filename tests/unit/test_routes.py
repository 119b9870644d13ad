"""Restoring, generating and the bodies of requests, over real engines: answers are what the models say, to the bit."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import runpy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from rayscale import classical, imaging, latents, metrics, picture
from rayscale.imaging import Limits
from rayscale.serve import body, gateway, transform
from rayscale.serve.api import create_app
from rayscale.serve.methods import MASKED, Merging, Restoring, Upscaling, applicable, compared
from rayscale.serve.table import Release, Table

TESTS = Path(__file__).parents[1]
small, kinds = runpy.run_path(str(TESTS / "small_onnx.py")), runpy.run_path(str(TESTS / "small_kinds.py"))
served = runpy.run_path(str(TESTS / "service.py"))
photo, png, decoded, is_problem = served["photo"], served["png"], served["decoded"], served["is_problem"]
U8 = NDArray[np.uint8]
RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    found = {name: root / name for name in ("photos", "negative", "filler", "generator", "plain", "embedder", "small")}
    small["write"](found["photos"])
    for name in ("negative", "filler", "generator", "embedder"):
        kinds[name](found[name])
    kinds["generator"](found["plain"], classes=False)
    kinds["embedder"](found["small"], side_px=4)
    return found


@pytest.fixture
def service(folders: dict[str, Path]) -> Iterator[Any]:
    from rayscale.artifact import digest_of

    service = served["Service"](folders["photos"], digest_of(folders["photos"]), limits=Limits(max_bytes=200_000))
    service.serve(**{name: folders[name] for name in ("negative", "filler", "generator", "embedder")})
    yield service
    service.gateway.close()


def post(service: Any, path: str, **kwargs: Any) -> Any:
    return service.ask("POST", path, **kwargs)


def rgba(pixels: U8, alpha: U8) -> bytes:
    return bytes(cv2.imencode(".png", cv2.cvtColor(np.dstack([pixels, alpha]), cv2.COLOR_RGBA2BGRA))[1])


def deep(height: int = 40, width: int = 52) -> NDArray[np.uint16]:
    return np.random.default_rng(4).integers(0, 65536, (height, width, 3), np.uint16)


# Restoring


@pytest.mark.parametrize(("height", "width"), [(40, 52), (131, 97)])
def test_restore_answers_what_the_model_says(service: Any, height: int, width: int) -> None:
    sent = photo(height, width)
    response = post(service, "/v1/restore?model=negative", content=png(sent))
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(decoded(response.content), 255 - sent)
    assert response.headers["x-rayscale-model"] == "negative:1"
    assert response.headers["x-rayscale-tiling"] == ("whole" if height == 40 else "tiled 9")
    assert response.headers["x-rayscale-bits"] == "8"


def test_a_mask_is_a_second_part_or_the_pictures_transparency(service: Any) -> None:
    sent, holes = photo(70, 90), np.zeros((70, 90), np.uint8)
    holes[20:40, 50:] = 255
    want = np.where(holes[..., None] > 0, np.uint8(153), sent)
    mask = png(np.repeat(holes[..., None], 3, axis=2))
    parts = {"image": ("a.png", png(sent)), "mask": ("m.png", mask)}
    answers = [
        post(service, "/v1/restore?model=filler", files=parts),
        post(service, "/v1/restore?model=filler", content=rgba(sent, 255 - holes)),
        post(
            service, "/v1/restore?model=filler", json={n: base64.b64encode(d).decode() for n, (_, d) in parts.items()}
        ),
    ]
    for response in answers:
        assert response.status_code == 200, response.text
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(response.content))), want)
    is_problem(post(service, "/v1/restore?model=filler", content=png(sent)), 400, "mask", "part named mask")
    is_problem(post(service, "/v1/restore?model=negative", files=parts), 400, "mask", "takes none")
    parts["mask"] = ("m.png", png(photo(10, 10)))
    is_problem(post(service, "/v1/restore?model=filler", files=parts), 422, "mask", "90x70")
    parts["mask"] = ("m.png", b"no picture")
    is_problem(post(service, "/v1/restore?model=filler", files=parts), 415, "mask")
    is_problem(post(service, "/v1/upscale?model=photos", files=parts), 400, "mask", "no such part")


def test_kinds_of_models_are_told_apart(service: Any) -> None:
    is_problem(post(service, "/v1/upscale?model=negative", content=b""), 404, "restore", "upscale")
    is_problem(post(service, "/v1/restore?model=photos", content=b""), 404, "is for upscale")
    is_problem(post(service, "/v1/generate", json={"model": "photos"}), 404, "is for upscale")
    is_problem(post(service, "/v1/embed?model=generator", content=b""), 404, "is for generate")
    is_problem(post(service, "/v1/restore", content=b""), 400, "negative@champion", "filler@champion")
    assert post(service, "/v1/upscale", content=png(photo())).headers["x-rayscale-model"] == "photos:3"
    assert post(service, "/v1/upscale?scale=2", content=png(photo())).status_code == 200
    is_problem(post(service, "/v1/upscale?scale=4", content=b""), 404, "by 4")
    is_problem(post(service, "/v1/upscale?scale=4&model=photos", content=b""), 400, "enlarges by 2")


def test_a_version_by_its_number(service: Any) -> None:
    warm = Release(name="photos", version=2, digest=service.release.digest, uri="")
    table = service.routing.table
    service.routing.table = Table(routes=table.routes, versions={**table.versions, "w" * 64: warm})
    answer = post(service, "/v1/upscale?model=photos:2", content=png(photo()))
    assert answer.headers["x-rayscale-model"] == "photos:2"
    is_problem(post(service, "/v1/upscale?model=photos:7", content=b""), 404, "photos:7", "photos:")


@pytest.mark.parametrize(("height", "width"), [(40, 52), (131, 97)])
def test_a_burst_becomes_one_picture(service: Any, folders: dict[str, Path], height: int, width: int) -> None:
    kinds["burst"](folders["photos"].parent / f"burst{height}")
    service.serve(burst=folders["photos"].parent / f"burst{height}")
    frames = [photo(height, width, seed=i) for i in range(3)]
    parts = [("image", (str(i), png(frame))) for i, frame in enumerate(frames)]
    response = post(service, "/v1/burst", files=parts)
    assert response.status_code == 200, response.text
    mean = np.mean(np.float32(frames) / np.float32(255), axis=0, dtype=np.float32)
    want = np.rint(mean * np.float32(255)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(decoded(response.content) - want).max() <= 1
    assert np.abs(decoded(response.content) - want).mean() < 0.01
    assert response.headers["x-rayscale-tiling"] == ("whole" if height == 40 else "tiled 9")
    added = post(service, "/v1/burst?method=shift_and_add&scale=2", files=parts)
    shift_and_add = next(m for m in classical.methods("burst", 2) if m.name == "shift_and_add").default()
    np.testing.assert_array_equal(decoded(added.content), shift_and_add(np.stack(frames)))
    is_problem(post(service, "/v1/burst", files=parts[:2]), 400, "2 frames", "takes 3")
    is_problem(post(service, "/v1/burst?method=bicubic", files=parts[:1]), 400, "at least 2")
    parts[1] = ("image", ("x", png(photo(9, 9))))
    is_problem(post(service, "/v1/burst", files=parts), 422, "9x9")


# What a file says beside its colours


def test_alpha_is_enlarged_beside_an_opaque_result(service: Any) -> None:
    sent, alpha = photo(70, 90), np.tile(np.arange(1, 91, dtype=np.uint8) * 2, (70, 1))
    opaque = decoded(post(service, "/v1/upscale", content=png(sent)).content)
    answer = np.asarray(Image.open(io.BytesIO(post(service, "/v1/upscale", content=rgba(sent, alpha)).content)))
    np.testing.assert_array_equal(answer[..., :3], opaque)
    np.testing.assert_array_equal(answer[..., 3], picture.enlarged(alpha, 2))
    jpeg = post(service, "/v1/upscale", content=rgba(sent, np.zeros_like(alpha)), headers={"Accept": "image/jpeg"})
    assert decoded(jpeg.content).min() >= 250  # nothing but the white behind


@pytest.mark.parametrize(("height", "width"), [(40, 52), (131, 97)])
def test_16_bits_go_through_the_model_whole(service: Any, height: int, width: int) -> None:
    sent = deep(height, width)
    response = post(service, "/v1/restore?model=negative", content=png(sent))
    assert response.headers["x-rayscale-bits"] == "16"
    answer = cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert answer.dtype == np.uint16
    off = np.abs(answer.astype(int) - (65535 - sent.astype(int))).max()
    assert off <= 1  # float32 has 24 bits
    jpeg = post(service, "/v1/restore?model=negative", content=png(sent), headers={"Accept": "image/webp"})
    assert jpeg.headers["x-rayscale-bits"] == "8"


def test_16_bits_in_tiles_are_16_bits_whole(service: Any) -> None:
    sent = deep(131, 97)
    tiled = post(service, "/v1/upscale", content=png(sent))
    assert tiled.headers["x-rayscale-tiling"] == "tiled 9"
    session = service.engine._models.fetch(service.release.digest).session
    whole = session.run({"image": sent.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(65535)})["image_out"]
    want = np.rint(whole[0].transpose(1, 2, 0) * np.float32(65535)).astype(np.uint16)
    answer = cv2.imdecode(np.frombuffer(tiled.content, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(answer, want)
    of_8 = post(service, "/v1/upscale", content=png(picture.to_u8(sent))).content
    assert np.abs(decoded(of_8).astype(int) * 257 - want).max() > 100  # what 8 bits would have lost


def test_16_bits_with_a_mask(service: Any) -> None:
    sent, holes = deep(70, 90), np.zeros((70, 90, 3), np.uint8)
    holes[:30] = 255
    parts = {"image": ("a.png", png(sent)), "mask": ("m.png", png(holes))}
    response = post(service, "/v1/restore?model=filler", files=parts)
    answer = cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_allclose(answer[:30], round(0.6 * 65535), atol=1)
    np.testing.assert_array_equal(answer[30:], sent[30:])


def test_a_profile_goes_into_the_answer(service: Any) -> None:
    body = io.BytesIO()
    Image.fromarray(photo()).save(body, "PNG", icc_profile=RGB_PROFILE)
    for media in ("png", "jpeg", "webp"):
        answer = post(service, "/v1/upscale", content=body.getvalue(), headers={"Accept": f"image/{media}"})
        assert Image.open(io.BytesIO(answer.content)).info["icc_profile"] == RGB_PROFILE
    assert "icc_profile" not in Image.open(io.BytesIO(post(service, "/v1/upscale", content=png(photo())).content)).info


def test_contrast_and_sharpening_are_of_the_result(service: Any) -> None:
    plain = decoded(post(service, "/v1/upscale", content=png(photo())).content)
    changed = decoded(post(service, "/v1/upscale?contrast=0.5&sharpen=0.3", content=png(photo())).content)
    np.testing.assert_array_equal(changed, picture.adjusted(plain, contrast=0.5, sharpen=0.3))
    is_problem(post(service, "/v1/upscale?contrast=9", content=b""), 422, "contrast")


# Bodies and answers


def test_a_body_a_form_and_json_are_one_picture(service: Any) -> None:
    data = png(photo())
    text = base64.b64encode(data).decode()
    raw = post(service, "/v1/upscale", content=data).content
    assert post(service, "/v1/upscale", files={"image": ("x.png", data, "image/png")}).content == raw
    for image in (text, f"data:image/png;base64,{text}"):
        assert post(service, "/v1/upscale", json={"image": image}).content == raw
    assert is_problem(post(service, "/v1/upscale", json={"image": [text]}), 400, "base64 in a string")
    answer = post(service, "/v1/upscale", content=data, headers={"Accept": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    assert base64.b64decode(value["data"][0]["b64_json"]) == raw
    assert (value["model"], value["digest"], value["size"]) == ("photos:3", service.release.digest, "104x80")
    assert (value["output_format"], value["tiling"], isinstance(value["created"], int)) == ("png", "whole", True)


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n'


@pytest.mark.parametrize(
    ("content_type", "body", "status", "word"),
    [
        (FORM, b"", 400, "boundary"),
        (FORM, b"junk", 400, "form"),
        (FORM, PART + b"abc", 400, "last boundary"),
        (FORM, PART + b"abc\r\n--x--\r\n", 415, "image"),
        (FORM, PART + b"a\r\n" + PART + b"b\r\n--x--\r\n", 400, "at most 1"),
        (FORM, b'--x\r\nContent-Disposition: form-data; name="picture"\r\n\r\na\r\n--x--\r\n', 400, "no such part"),
        (FORM, b"--x\r\nA: " + b"y" * 9000 + b"\r\n\r\na\r\n--x--\r\n", 400, "form"),
        ("multipart/form-data", b"a", 415, "boundary"),
        ("multipart/mixed; boundary=x", b"a", 415, "multipart/mixed"),
        ("application/json", b"{", 400, "JSON"),
        ("application/json", b"[" * 1000, 400, "JSON"),
        ("application/json", b"[]", 400, "object"),
        ("application/json", b"{}", 400, "has no image"),
        ("application/json", b'{"image": 7}', 400, "base64"),
        ("application/json", b'{"image": "?"}', 422, "base64"),
        ("application/json", b'{"image": ""}', 422, "0 bytes"),
        ("application/json", b'{"scale": "eA=="}', 400, "no such part"),
    ],
)  # fmt: skip
def test_broken_bodies_are_the_clients(service: Any, content_type: str, body: bytes, status: int, word: str) -> None:
    is_problem(post(service, "/v1/upscale", content=body, headers={"Content-Type": content_type}), status, word)


def test_forms_and_json_have_limits_too(service: Any) -> None:
    data = b"x" * 300_000
    is_problem(post(service, "/v1/upscale", files={"image": data}), 413, "bytes")
    is_problem(post(service, "/v1/upscale", json={"image": "A" * 500_000}), 413, "bytes")
    is_problem(post(service, "/v1/upscale", json={"image": "A" * 300_000}), 413, "200000 bytes")  # of the picture
    is_problem(post(service, "/v1/generate", content=b" " * 200_000, headers={"Content-Type": "application/json"}), 413)


# Classical methods


def test_the_methods_are_those_of_the_library() -> None:
    same_size = {m.name for problem in ("denoise", "deblock", "deblur", "inpaint") for m in classical.methods(problem)}
    assert set(get_args(Restoring)) == same_size - {"bm3d"}
    assert set(get_args(Merging)) == {m.name for m in classical.methods("burst")}
    assert set(get_args(Upscaling)) == {m.name for m in classical.methods("upscale")}
    assert {m.name for m in classical.methods("inpaint")} == MASKED


@pytest.mark.parametrize("method", [m for m in get_args(Restoring) if m not in MASKED])
def test_filters_stand_in_for_models(service: Any, method: str) -> None:
    sent = photo(24, 30)
    response = post(service, f"/v1/restore?method={method}", content=png(sent))
    assert response.status_code == 200, response.text
    assert response.headers["x-rayscale-model"] == f"classical:{method}"
    problem: Any = "denoise" if method in {m.name for m in classical.methods("denoise")} else "deblur"
    function = next(m for m in classical.methods(problem) if m.name == method).default()
    np.testing.assert_array_equal(decoded(response.content), function(sent))


def test_methods_enlarge_and_fill(service: Any) -> None:
    sent = photo(20, 30)
    for scale in (1, 2, 3):
        response = post(service, f"/v1/upscale?method=lanczos&scale={scale}", content=png(sent))
        np.testing.assert_array_equal(decoded(response.content), classical.upscale(sent, scale=scale, kind="lanczos"))
    assert decoded(post(service, "/v1/upscale?method=bicubic", content=png(sent)).content).shape == (40, 60, 3)
    holes = np.zeros((20, 30), np.uint8)
    holes[5:9, 5:9] = 255
    filled = decoded(post(service, "/v1/restore?method=telea", content=rgba(sent, 255 - holes)).content)
    np.testing.assert_array_equal(filled, classical.telea(sent, holes[..., None]))
    is_problem(post(service, "/v1/restore?method=telea", content=png(sent)), 400, "mask")
    is_problem(post(service, "/v1/upscale?method=telea", content=b""), 422, "method")
    is_problem(post(service, "/v1/upscale?method=bicubic&model=photos", content=b""), 400, "method")
    service.gateway.settings = service.gateway.settings.__class__(max_method_pixels=599)
    is_problem(post(service, "/v1/upscale?method=bicubic", content=png(sent)), 413, "599")


# Generating


def pictures_of(response: Any) -> list[U8]:
    assert response.status_code == 200, response.text
    return [decoded(base64.b64decode(entry["b64_json"])) for entry in response.json()["data"]]


def test_a_picture_is_a_function_of_seed_and_index(service: Any) -> None:
    many = post(service, "/v1/generate", json={"seed": 7, "n": 20}, headers={"Accept": "application/json"})
    pictures = pictures_of(many)
    assert len({p.tobytes() for p in pictures}) == 20
    assert (many.json()["seed"], many.headers["x-rayscale-seed"]) == (7, "7")
    assert [entry["index"] for entry in many.json()["data"]] == list(range(20))
    some = post(service, "/v1/generate", json={"seed": 7, "n": 3, "first": 9}, headers={"Accept": "application/json"})
    for found, want in zip(pictures_of(some), pictures[9:12], strict=True):
        np.testing.assert_array_equal(found, want)
    one = post(service, "/v1/generate", json={"seed": 7})
    assert one.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(decoded(one.content), pictures[0])
    other = decoded(post(service, "/v1/generate", json={"seed": 8}).content)
    assert (other != pictures[0]).any()
    session = service.engine._models.fetch(service.routing.table.routes["generator@champion"][0][0]).session
    z = latents.latents(7, 1, kinds["LATENT"])
    made = session.run({"z": z, "label": latents.one_hot([0], 3)})["image_out"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(pictures[0], np.rint(made * np.float32(255)))


def test_without_a_seed_one_is_drawn_and_told(service: Any) -> None:
    first, second = (post(service, "/v1/generate") for _ in range(2))
    assert first.content != second.content
    again = post(service, "/v1/generate", json={"seed": int(first.headers["x-rayscale-seed"])})
    assert again.content == first.content


def test_classes_truncation_and_walks(service: Any, folders: dict[str, Path]) -> None:
    as_json = {"Accept": "application/json"}

    def ask(**wish: Any) -> list[U8]:
        return pictures_of(post(service, "/v1/generate", json=wish, headers=as_json))

    turns = ask(seed=1, n=4)
    np.testing.assert_array_equal(ask(seed=1, n=4, **{"class": "rose"})[1], turns[1])
    np.testing.assert_array_equal(ask(seed=1, n=4, **{"class": 0})[3], turns[3])
    assert (ask(seed=1, **{"class": "tulip"})[0] != turns[0]).any()
    middle = ask(seed=1, truncation=0)[0]
    np.testing.assert_array_equal(middle, ask(seed=99, truncation=0)[0])
    walk = ask(seed=1, to_seed=2, n=10, **{"class": 1})
    np.testing.assert_array_equal(walk[0], ask(seed=1, **{"class": 1})[0])
    np.testing.assert_array_equal(walk[-1], ask(seed=2, **{"class": 1})[0])
    steps = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(walk)]
    assert max(steps) < np.abs(walk[0].astype(int) - walk[-1]).mean()
    webp = post(service, "/v1/generate", json={"output_format": "webp"}, headers=as_json).json()
    assert base64.b64decode(webp["data"][0]["b64_json"]).startswith(b"RIFF")
    service.serve(plain=folders["plain"])
    assert len(ask(n=9)) == 9
    is_problem(post(service, "/v1/generate", json={"class": 1}), 400, "no classes")


@pytest.mark.parametrize(
    ("wish", "status", "word"),
    [
        ({"sed": 1}, 422, "sed"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 2**60}, 422, "seed"),
        ({"n": 0}, 422, "n"),
        ({"n": 2}, 400, "application/json"),
        ({"n": 65}, 413, "at most 64"),
        ({"truncation": 5}, 422, "truncation"),
        ({"class": "dasy"}, 400, "did you mean 'daisy'?"),
        ({"class": 3}, 400, "class"),
        ({"seed": 1, "to_seed": 2}, 422, "to_seed"),
        ({"output_format": "webp"}, 400, "Accept"),
        ({"output_format": "gif"}, 422, "output_format"),
    ],
)
def test_wishes_that_cannot_be(service: Any, wish: dict[str, Any], status: int, word: str) -> None:
    is_problem(post(service, "/v1/generate", json=wish), status, word)


def test_wishes_are_json(service: Any) -> None:
    is_problem(post(service, "/v1/generate", files={"image": b"x"}), 415, "JSON")
    is_problem(post(service, "/v1/generate", content=b"{", headers={"Content-Type": "application/json"}), 422, "body")
    curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert post(service, "/v1/generate", content=b'{"seed": 3}', headers=curl).status_code == 200


# Vectors


def test_embed_answers_a_vector_a_picture(service: Any, folders: dict[str, Path]) -> None:
    a, b = photo(30, 40), photo(50, 20, seed=1)
    parts = [("image", ("a", png(a))), ("image", ("b", png(b)))]
    value = post(service, "/v1/embed", files=parts).json()
    assert (value["object"], value["model"]) == ("list", "embedder:1")
    for index, sent in enumerate((a, b)):
        entry = value["data"][index]
        assert (entry["object"], entry["index"]) == ("embedding", index)
        np.testing.assert_allclose(entry["embedding"], sent.mean((0, 1)) / 255, atol=1e-6)
    single = post(service, "/v1/embed", content=png(a))
    assert single.json()["data"] == value["data"][:1]
    assert {"x-rayscale-model", "x-rayscale-digest", "x-rayscale-provider", "server-timing"} <= set(single.headers)
    square = np.asarray(Image.fromarray(a).resize((8, 8), Image.Resampling.BICUBIC)).mean((0, 1)) / 255
    shrunk = post(service, "/v1/embed?side_px=8", content=png(a)).json()["data"][0]["embedding"]
    np.testing.assert_allclose(shrunk, square, atol=1e-6)
    service.serve(small=folders["small"])
    square = np.asarray(Image.fromarray(a).resize((4, 4), Image.Resampling.BICUBIC)).mean((0, 1)) / 255
    fixed = post(service, "/v1/embed", content=png(a)).json()["data"][0]["embedding"]
    np.testing.assert_allclose(fixed, square, atol=1e-6)
    is_problem(post(service, "/v1/embed?side_px=8", content=png(a)), 400, "4x4")


def test_similarity_says_what_the_library_says(service: Any) -> None:
    a = cv2.GaussianBlur(photo(180, 200), (0, 0), 2)
    b = cv2.GaussianBlur(a, (0, 0), 1)
    answer = post(service, "/v1/similarity", files={"a": png(a), "b": png(b)})
    value = answer.json()
    want = compared(a, b, applicable((180, 200), (180, 200)))
    found = value["data"][0]
    assert found.pop("index") == 0
    cosine = found.pop("cosine")
    assert found == want
    assert set(want) == {"mse", "psnr", "euclidean", "ssim", "ms_ssim", "sift"}
    x, y = a.mean((0, 1)), b.mean((0, 1))
    assert abs(cosine - x @ y / np.linalg.norm(x) / np.linalg.norm(y)) < 1e-6
    assert value["model"] == answer.headers["x-rayscale-model"] == "embedder:1"
    same = post(service, "/v1/similarity", files={"a": png(a), "b": png(a)}).json()["data"][0]
    assert (same["mse"], same["psnr"], same["euclidean"], same["ssim"], same["sift"]) == (0, None, 0, 1, 1)


def test_pairs_in_json_and_measures_by_name(service: Any) -> None:
    a, b, c = (png(photo(20 + 5 * (i == 2), 30, seed=i)) for i in range(3))
    entries = [{n: base64.b64encode(d).decode() for n, d in zip("ab", pair, strict=True)} for pair in ((a, b), (a, c))]
    value = post(service, "/v1/similarity?measure=sift&measure=cosine", json={"pairs": entries}).json()
    assert [set(entry) for entry in value["data"]] == [{"index", "sift", "cosine"}] * 2
    value = post(service, "/v1/similarity", json={"pairs": entries}).json()
    assert [set(entry) - {"index"} for entry in value["data"]] == [
        {"mse", "psnr", "euclidean", "ssim", "sift", "cosine"}, {"sift", "cosine"},
    ]  # fmt: skip
    pixels = post(service, "/v1/similarity?measure=psnr", json={"pairs": entries[:1]})
    assert "x-rayscale-model" not in pixels.headers
    is_problem(post(service, "/v1/similarity?measure=psnr", json={"pairs": entries}), 400, "one size")
    is_problem(post(service, "/v1/similarity?measure=ms_ssim", json={"pairs": entries[:1]}), 400)
    is_problem(post(service, "/v1/similarity?measure=psnr&model=embedder", json={"pairs": entries}), 400, "cosine")
    is_problem(post(service, "/v1/similarity?measure=lpips", json={"pairs": entries}), 422, "measure")
    for wrong in ({"pairs": []}, {"pairs": [1]}, {"pairs": "x"}, {"pairs": entries, "a": "x"}, {"a": entries[0]["a"]}):
        is_problem(post(service, "/v1/similarity", json=wrong), 400)
    is_problem(post(service, "/v1/similarity", content=a), 400, "has no b")


def test_without_an_embedding_model_pixels_are_compared(service: Any, folders: dict[str, Path]) -> None:
    service.serve()
    entry = {"a": png(photo()), "b": png(photo(seed=1))}
    value = post(service, "/v1/similarity", files=entry).json()
    assert "cosine" not in value["data"][0]
    is_problem(post(service, "/v1/similarity?measure=cosine", files=entry), 404, "embed")


def test_many_pictures_have_the_limit_of_one(service: Any) -> None:
    limits = Limits(max_bytes=200_000, max_pixels=2500)
    service.gateway.settings = service.gateway.settings.__class__(limits=limits)
    small, large = png(photo(30, 40)), png(photo(40, 40))
    assert post(service, "/v1/embed", files=[("image", small), ("image", small)]).status_code == 200
    is_problem(post(service, "/v1/embed", files=[("image", small), ("image", large)]), 413, "2800 pixels")
    assert post(service, "/v1/similarity", files={"a": small, "b": small}).status_code == 200
    is_problem(post(service, "/v1/similarity", files={"a": small, "b": large}), 413, "2800 pixels")


@pytest.mark.parametrize("name", ["OTEL_SERVICE_NAME", ""])
def test_opentelemetry_is_asked_only_where_it_is_set_up(
    service: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for known in [known for known in os.environ if known.startswith("OTEL_")]:
        monkeypatch.delenv(known)
    if name:
        monkeypatch.setenv(name, "rayscale")
    telemetry = create_app(service.gateway)._telemetry
    assert {telemetry[kind] for kind in ("tracing", "metrics", "logs")} == {bool(name)}


@pytest.mark.parametrize(("decoding", "status"), [(True, 503), (False, 200)])
def test_what_others_have_still_to_decode_counts(
    service: Any, monkeypatch: pytest.MonkeyPatch, decoding: bool, status: int
) -> None:
    """Half a minute's picture is let in, and while it is decoded another such, which has no time left, is not."""
    monkeypatch.setattr(service.engine, "cost_s", lambda digest, units: 35.0)
    cut, go = transform.cut, threading.Event()

    def slow(*args: Any) -> Any:
        if decoding:
            go.wait(20)
        return cut(*args)

    monkeypatch.setattr(transform, "cut", slow)
    body = png(photo(200, 200))

    async def main() -> list[int]:
        async with service.client() as client:
            first = asyncio.create_task(client.post("/v1/upscale", content=body))
            await asyncio.sleep(0.5)
            second = await client.post("/v1/upscale", content=body)
            go.set()
            return [(await first).status_code, second.status_code]

    assert asyncio.run(main()) == [200, status]


@pytest.mark.parametrize(("busy", "status"), [(True, 503), (False, 200)])
def test_what_waits_for_codecs_has_a_deadline_as_well(service: Any, busy: bool, status: int) -> None:
    service.gateway.settings = replace(service.gateway.settings, timeout_s=1.0)
    go = threading.Event()

    async def main() -> list[int]:
        async with service.client() as client:
            if busy:
                for _ in range(service.gateway.settings.codec_threads):
                    service.gateway._codecs.start(lambda: go.wait(20) and None)
            asked = [("/v1/embed", {"content": png(photo())}), ("/v1/generate", {"json": {"seed": 1}})]
            asked.append(("/v1/upscale?method=bicubic", {"content": png(photo())}))
            answers = await asyncio.gather(*(client.post(route, **body) for route, body in asked))
            for answer in answers:
                assert busy is ("deadline" in answer.text), answer.text
            return [answer.status_code for answer in answers]

    async def timed() -> list[int]:
        async with asyncio.timeout(10):
            return await main()

    try:
        assert asyncio.run(timed()) == [status] * 3
    finally:
        go.set()


@pytest.mark.parametrize("bits", [8, 16])
def test_what_a_deep_picture_has_still_to_run_counts(service: Any, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Of 16 bits the engine gets some tiles at a time, of 8 all of them: they are its own to count then."""
    monkeypatch.setattr(service.engine, "cost_s", lambda digest, units: 35.0)
    coming: list[float] = []
    run = service.engine._run

    def noted(batch: Any) -> None:
        coming.append(service.gateway.codec_load.coming_s(service.engine))
        run(batch)

    monkeypatch.setattr(service.engine, "_run", noted)
    pixels = photo(150, 150).astype(np.uint16) * 257 if bits == 16 else photo(150, 150)
    answer = post(service, "/v1/upscale", content=png(pixels))
    assert answer.status_code == 200, answer.text
    assert set(coming) == {35.0 if bits == 16 else 0.0}
    assert service.gateway.codec_load.coming_s(service.engine) == 0.0


def test_files_are_opened_once_and_no_more_of_them_than_are_read(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    lazily = imaging.open_lazily

    def count(data: bytes, *args: Any, **kwargs: Any) -> Any:
        opened.append(len(data))
        return lazily(data, *args, **kwargs)

    monkeypatch.setattr(imaging, "open_lazily", count)
    for content, times in (
        (imaging.encode(photo(200, 180), "jpeg"), 1),
        (png(photo(40, 30)), 1),
        (png(photo(200, 180)), 2),  # it is not inflated before it is admitted
    ):
        opened.clear()
        assert post(service, "/v1/upscale", content=content).status_code == 200
        assert len(opened) == times
    service.gateway.settings = service.gateway.settings.__class__(limits=Limits(max_pixels=2500))
    opened.clear()
    many = [("image", imaging.encode(photo(30, 40), "webp"))] * 9
    is_problem(post(service, "/v1/embed", files=many), 413, "3600 pixels in 3")
    assert len(opened) == 3  # a WebP's canvas is allocated when it is opened


def test_small_pictures_do_not_wait_for_the_codecs_of_large_ones(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = png(photo(9, 8)), png(photo(140, 130))
    go, held, where = threading.Event(), threading.Semaphore(0), dict[int, set[str]]()
    decode = picture.decode_opened

    def slow(file: Any) -> Any:
        where.setdefault(file.header.width, set()).add(threading.current_thread().name)
        if file.header.width == 130:
            held.release()
            assert go.wait(20)
        return decode(file)

    monkeypatch.setattr(picture, "decode_opened", slow)

    async def main() -> list[int]:
        async with service.client() as client:
            waiting = [asyncio.create_task(client.post("/v1/upscale", content=large)) for _ in range(3)]
            for _ in range(service.gateway.settings.codec_threads):
                assert await asyncio.to_thread(held.acquire, timeout=10)  # all of them are taken
            quick = await asyncio.wait_for(client.post("/v1/upscale", content=small), 10)
            refused = await asyncio.wait_for(client.post("/v1/upscale", content=b"no picture"), 10)
            assert not any(task.done() for task in waiting)
            go.set()
            return [quick.status_code, refused.status_code, *[(await task).status_code for task in waiting]]

    assert asyncio.run(main()) == [200, 415, 200, 200, 200]
    assert where == {8: {"quick_0"}, 130: {"codec_0", "codec_1"}}


@pytest.mark.parametrize("limit", [10**6, 10])
def test_long_bodies_are_not_looked_through_where_others_wait(
    service: Any, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Whatever the picture in them."""
    where: list[str] = []
    parts = body.Body.parts

    def watched(self: body.Body, most: Any) -> Any:
        where.append(threading.current_thread().name.partition("_")[0])
        return parts(self, most)

    monkeypatch.setattr(body.Body, "parts", watched)
    monkeypatch.setattr(gateway, "_QUICK_BYTES", limit)
    assert post(service, "/v1/upscale", content=png(photo(9, 8))).status_code == 200
    assert where == ["quick" if limit > 10 else "codec"]


def test_nothing_heavy_runs_on_the_event_loop(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = png(photo(131, 97)), png(photo(131, 97, seed=1))
    see_through, fine = rgba(photo(), photo()[..., 0]), png(deep(131, 97))
    seen: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread().name.partition("_")[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (picture, "decode_opened"), (picture, "encode"), (picture, "enlarged"), (imaging, "open_lazily"),
        (imaging, "encode"), (latents, "latents"), (metrics, "ssim"), (body.Body, "parts"), (cv2, "imdecode"),
        (np, "empty"), (np, "pad"),
    ):  # fmt: skip
        watch(owner, name)
    answers = [
        post(service, "/v1/upscale", content=see_through),
        post(service, "/v1/upscale", content=good),
        post(service, "/v1/restore?model=negative", content=fine),
        post(service, "/v1/restore?model=filler", files={"image": good, "mask": good}),
        post(service, "/v1/restore?method=median", content=good),
        post(service, "/v1/generate", json={"n": 2}, headers={"Accept": "application/json"}),
        post(service, "/v1/embed", content=good),
        post(service, "/v1/similarity", files={"a": good, "b": other}),
    ]
    assert [r.status_code for r in answers] == [200] * 8
    assert set(seen) >= {
        "decode_opened",
        "encode",
        "enlarged",
        "open_lazily",
        "latents",
        "ssim",
        "parts",
        "imdecode",
        "empty",
    }
    assert {t for threads in seen.values() for t in threads} <= {"quick", "codec", "slow", "engine"}
    imaging.read_header(good)  # negative control: the watch sees who calls
    assert "MainThread" in seen["open_lazily"]


# Models


def test_one_model_with_its_versions_and_card(service: Any) -> None:
    value = service.ask("GET", "/v1/models/generator").json()
    assert value["routes"] == {"champion": {"generator:1": 1.0}}
    version = value["versions"][0]
    assert (version["role"], version["classes"], version["aliases"]) == (
        "generate",
        ["daisy", "rose", "tulip"],
        ["champion"],
    )
    assert version["card"]["spec"]["inputs"][0]["shape"] == ["n", 5]
    assert not {"manifest", "run_id"} & set(version["card"]["lineage"])
    for name in ("generator@champion", "generator:1"):
        assert service.ask("GET", f"/v1/models/{name}").json()["versions"] == value["versions"]
    for name in ("generater", "generator@beta", "generator:2"):
        is_problem(service.ask("GET", f"/v1/models/{name}"), 404, name)
    listed = service.ask("GET", "/v1/models").json()
    assert listed["defaults"] == {
        "upscale": "photos@champion", "generate": "generator@champion", "embed": "embedder@champion",
    }  # fmt: skip
