"""Hostile and odd files: the right picture or the right refusal, and a refusal costs next to nothing."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import runpy
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from rayscale import containers, imaging, picture
from rayscale.errors import ImageError, MediaTypeError, TooLargeError
from rayscale.imaging import Limits

ROOT = Path(__file__).parents[2]
tools = runpy.run_path(str(ROOT / "tests" / "service.py"))
small = runpy.run_path(str(ROOT / "tests" / "small_onnx.py"))

CPU_S, MEMORY = 0.010, 5 << 20  # what a refusal may cost

# --- how such files are made

PHOTO = tools["photo"](24, 32)
RGB = Image.fromarray(PHOTO)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MEGABYTE = zlib.compress(b"a" * 1_000_000, 9)  # in a thousand bytes


def saved(picture: Image.Image, codec: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, codec, **settings)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(*before: bytes, after: bytes = b"", width: int = 32, height: int = 24, idat: bytes | None = None) -> bytes:
    """RGB's PNG with chunks before and after its pixels; or one that claims another size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PHOTO))
    pixels = chunk(b"IDAT", rows) if idat is None else idat
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(before) + pixels + after + chunk(b"IEND")


JPEG = saved(RGB, "JPEG")
PROGRESSIVE = saved(RGB, "JPEG", progressive=True, restart_marker_blocks=1)
WEBP = saved(RGB, "WEBP", lossless=True)
TIFF = saved(RGB, "TIFF")
BMP = saved(RGB, "BMP")
PPM = saved(RGB, "PPM")


def jpeg(inserted: bytes, of: bytes = JPEG) -> bytes:
    """A JPEG with something between its first marker and the rest."""
    return of[:2] + inserted + of[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_claiming(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 2 megapixels, all one colour, whose last scan is there so many times."""
    data = saved(Image.new("RGB", (1600, 1200), "teal"), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<L", following)


def tiff(tail: bytes = b"\x80" * 768, following: int = 0, **changes: tuple[int, int, int]) -> bytes:
    """32x24 gray, its only strip behind the directory. `changes`: tag_NUMBER=(type, count, value)."""
    tags = {256: (4, 1, 32), 257: (4, 1, 24), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1),
            278: (4, 1, 24), 279: (4, 1, 768)}  # fmt: skip
    tags |= {int(name.removeprefix("tag_")): value for name, value in changes.items()}
    tags.setdefault(273, (4, 1, 8 + 2 + 12 * (len(tags) + 1) + 4))
    return b"II*\0" + struct.pack("<L", 8) + ifd([(t, *tags[t]) for t in sorted(tags)], following) + tail


def exif_loop() -> bytes:
    """Directories that name themselves and each other, and values that are nowhere."""
    first = ifd([(0x0112, 3, 1, 1), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0x010E, 2, 2**31, 2**31)], following=8)
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + first


def bmp(width: int, height: int, compression: int, body: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(1024) + body


def animation(codec: str, frames: int, side: int = 24) -> bytes:
    pictures = [Image.new("RGB", (side, side), (i % 256, i // 256, 7)) for i in range(frames)]
    return saved(pictures[0], codec, save_all=True, append_images=pictures[1:], lossless=True, method=0)


def deep(inserted: bytes) -> bytes:
    """A PNG of 16 bits with something behind its header."""
    data = saved(Image.fromarray(PHOTO[..., 0].astype("uint16") * 257), "PNG")
    return data[:33] + inserted + data[33:]


def raw() -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in PHOTO)


def idat() -> bytes:
    return chunk(b"IDAT", zlib.compress(raw()))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("picture.png", bytes(10_000_000))
    return buffer.getvalue()


LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 9))

REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "empty": (lambda: b"", 422, "0 bytes"),
    "one byte": (lambda: b"\x89", 415, "not read"),
    "text": (lambda: b"hello, I am no picture", 415, "not read"),
    "html": (lambda: b"<!DOCTYPE html><script>alert(1)</script>", 415, "not read"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9'/>", 415, "SVG"),
    "svg of a billion laughs": (
        lambda: f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a0 "ha">{LAUGHS}]><svg>&a8;</svg>'.encode(), 415, "SVG"
    ),
    "zip bomb": (zipped, 415, "not read"),
    "gzip bomb": (lambda: zlib.compress(bytes(10_000_000), 9, 31), 415, "not read"),
    "gif of 500 frames": (lambda: animation("GIF", 500), 415, "GIF"),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(40), 415, "HEIF"),
    "pdf with a png in it": (lambda: b"%PDF-1.7\n" + png(), 415, "PDF"),
    "bigtiff": (lambda: b"II+\0" + bytes(60), 415, "not read"),
    "png 2^31": (lambda: png(width=2**31 - 1, height=2**31 - 1), 413, "2147483647x2147483647"),
    "png 30000": (lambda: png(width=30_000, height=30_000), 413, "30000x30000"),
    "png of no width": (lambda: png(width=0), 422, ""),
    "jpeg 64k": (lambda: jpeg_claiming(65_535, 65_535), 413, "65535x65535"),
    "jpeg of no height": (lambda: jpeg_claiming(32, 0), 422, ""),
    "webp 16M": (lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xff" * 6, 413, "16777216x16777216"),
    "tiff 4G": (lambda: tiff(tag_256=(4, 1, 2**32 - 1), tag_257=(4, 1, 2**32 - 1)), 413, "4294967295x4294967295"),
    "bmp 2^31": (lambda: bmp(2**31 - 1, 2**31 - 1, 0, b""), 413, "2147483647x2147483647"),
    "ppm 10^9": (lambda: b"P6 1000000000 1000000000 255\n", 413, "1000000000x1000000000"),
    "ppm with an endless comment": (lambda: b"P6 #" + b" " * 1_000_000, 422, "4096"),
    "png whose size has a wrong checksum": (lambda: SIGNATURE + chunk(b"IHDR", bytes(13), crc=1), 422, "damaged"),
    "png without pixels": (lambda: png(idat=b""), 422, ""),
    "png of a chunk of pixels and nothing else": (lambda: SIGNATURE + chunk(b"IDAT")[:12], 422, ""),
    "png of garbage pixels": (lambda: png(idat=chunk(b"IDAT", b"\x78\x9cgarbage")), 422, "damaged"),
    "png of 100,000 chunks": (lambda: png(*[chunk(b"prIv")] * 100_000), 422, "chunks"),
    "png of 100,000 empty pixel chunks": (lambda: png(idat=chunk(b"IDAT") * 100_000), 422, "chunks"),
    "jpeg of 250,000 segments": (lambda: jpeg(segment(0xE5, b"") * 250_000), 422, "segments"),
    "jpeg of padding": (lambda: jpeg(b"\xff" * 1_000_000), 422, "segments"),
    "jpeg with a megabyte between segments": (lambda: jpeg(segment(0xE5, b"") + bytes(1_000_000)), 422, "between"),
    "jpeg of 100 Exif segments": (lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 100), 422, "Exif"),
    "jpeg of 200 scans": (lambda: many_scans(200), 422, "scans"),
    "tiff of 60,000 tags": (lambda: tiff(**{f"tag_{1000 + i}": (7, 9, 2**31) for i in range(60_000)}), 422, "tags"),
    "tiff of a million strips": (lambda: tiff(bytes(4_000_000), tag_273=(4, 10**6, 122)), 422, "strips"),
    "tiff whose directory is nowhere": (lambda: b"II*\0" + struct.pack("<L", 2**31) + bytes(99), 422, ""),
    "animated webp": (lambda: animation("WEBP", 200), 422, "frames"),
    "animated webp of a large canvas": (lambda: animation("WEBP", 2, 4000), 422, "frames"),
    "animated png": (lambda: animation("PNG", 50), 422, "frames"),
    "png of 2^31 frames": (lambda: png(chunk(b"acTL", struct.pack(">II", 2**31, 0))), 422, "frames"),
    "tiff of 50 pages": (lambda: animation("TIFF", 50), 422, "frames"),
    "tiff whose pages go round": (lambda: tiff(following=8), 422, "frames"),
    "run-length bmp": (lambda: bmp(2000, 2000, 1, b"\1\0" * 1_000_000), 422, "run-length"),
    "ppm that is decoded in Python": (lambda: b"P6 4000 300 254\n" + bytes(3_600_000), 422, "maximum"),
    **{
        f"half a {kind}": (lambda data=data: data[: len(data) // 2], 422, "damaged")  # type: ignore[misc]
        for kind, data in (("png", png()), ("jpeg", JPEG), ("webp", WEBP), ("tiff", TIFF), ("bmp", BMP), ("ppm", PPM))
    },
}  # fmt: skip

SAME: dict[str, tuple[Callable[[], bytes], bytes]] = {  # a file, and a plain one that shows the same picture
    "jpeg and html": (lambda: JPEG + b"<html><script>alert(1)</script></html>", JPEG),
    "jpeg and zip": (lambda: JPEG + zipped(), JPEG),
    "png and pdf": (lambda: png() + b"%PDF-1.7", png()),
    "jpeg with php in a comment": (lambda: jpeg(segment(0xFE, b"<?php system($_GET[0]); ?>")), JPEG),
    "jpeg whose exif loops": (lambda: jpeg(segment(0xE1, exif_loop())), JPEG),
    "jpeg with a little padding": (lambda: jpeg(b"\xff" * 9), JPEG),
    "jpeg of 16 profile parts": (lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 16), JPEG),
    "progressive jpeg with restarts": (lambda: PROGRESSIVE, saved(RGB, "JPEG", restart_marker_blocks=1)),
    "png of 60 MB of text": (lambda: png(*[chunk(b"zTXt", b"k\0\0" + MEGABYTE)] * 60), png()),
    "png of 500 MB of nameless text": (lambda: png(*[chunk(b"zTXt", b"\0\0" + MEGABYTE)] * 500), png()),
    "png of 500 MB of text behind": (lambda: png(after=chunk(b"iTXt", b"\0\1\0\0\0" + MEGABYTE) * 500), png()),
    "png of one text of 100 MB": (lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))), png()),
    "png whose exif loops": (lambda: png(chunk(b"eXIf", exif_loop()[6:])), png()),
    "png whose text has a wrong checksum": (lambda: png(chunk(b"tEXt", b"k\0v", crc=1)), png()),
    "png of a hundred pixel chunks": (lambda: png(idat=chunk(b"IDAT") * 100 + idat()), png()),
    "png with 23 MB more pixels": (lambda: png(idat=chunk(b"IDAT", zlib.compress(raw() + bytes(23_000_000)))), png()),
    "png of 300 times all pixels": (lambda: png(idat=(idat() + chunk(b"sRGB", b"\0")) * 300), png()),
    "png of 16 bits and 100 MB of text": (lambda: deep(chunk(b"zTXt", b"k\0\0" + MEGABYTE) * 100), deep(b"")),
    "tiff with a broken exif directory": (lambda: tiff(tag_34665=(4, 1, 8)), tiff()),
}  # fmt: skip


# --- what they cost


def memory(key: str) -> int:
    """VmHWM (the peak since it was last reset) or VmRSS of this process, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(key + ":")[2].split()[0]) << 10


def cost(work: Callable[[], Any], tries: int = 5) -> tuple[float, int]:
    """Least CPU seconds and largest growth of the peak memory of several tries."""
    seconds, growth = [], []
    for _ in range(tries):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, started = memory("VmRSS"), time.process_time()
        work()
        seconds.append(time.process_time() - started)
        growth.append(memory("VmHWM") - before)
    return min(seconds), max(growth)


needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Target:
    """The application, called with nothing in between: what is measured is its own work."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.service = tools["Service"](folder, small["write"](folder), **settings)
        self.service.meters.add = lambda *_, **__: None  # it would remember every request

    async def ask(self, body: bytes, path: str = "/v1/upscale", content_type: str = "image/*") -> Answer:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("t", 1),
            "server": ("t", 80), "headers": [(b"content-type", content_type.encode())],
        }  # fmt: skip
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []
        forever = asyncio.Event()

        async def receive() -> Any:
            if not incoming:
                await forever.wait()
            return incoming.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await self.service.app(scope, receive, send)
        start = next(m for m in sent if m["type"] == "http.response.start")
        headers = {k.decode(): v.decode() for k, v in start["headers"]}
        return Answer(start["status"], headers, b"".join(m.get("body", b"") for m in sent))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("hostile") / "a")
    yield made
    made.service.gateway.close()


def is_refusal(answer: Any, status: int, word: str) -> None:
    assert answer.status == status, answer.body[:300]
    assert answer.headers["content-type"] == "application/problem+json"
    body = json.loads(answer.body)
    assert body["status"] == status
    assert word in body["detail"]
    assert "\n" not in body["detail"]
    assert len(body["detail"]) < 500
    assert "Traceback" not in body["detail"]


def measure(folder: str) -> None:
    """Print the cost of every case as JSON: of a refusal over HTTP, and of decoding a picture that hides something."""
    service = Target(Path(folder))
    with asyncio.Runner() as runner:

        def ask(data: bytes) -> None:
            runner.run(service.ask(data))

        for plain in {data for _, data in SAME.values()} | {WEBP, BMP, PPM}:  # a library's first use maps its pages
            ask(plain)
        found = {case: cost(functools.partial(ask, make())) for case, (make, _, _) in REFUSED.items()}
        found |= {case: cost(functools.partial(picture.decode, make())) for case, (make, _) in SAME.items()}
    service.service.gateway.close()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int]]:
    """Measured in a process of their own: here the threads of other tests take memory too."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['measure'](sys.argv[2])"
    command = [sys.executable, "-c", code, __file__, str(tmp_path_factory.mktemp("costs") / "a")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, tuple[float, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_right(service: Target, case: str) -> None:
    make, status, word = REFUSED[case]
    data = make()
    is_refusal(asyncio.run(service.ask(data)), status, word)
    expected = {413: TooLargeError, 415: MediaTypeError, 422: ImageError}[status]
    with pytest.raises(expected) as error:  # the same without HTTP
        picture.decode(data)
    assert word in str(error.value)


@needs_proc
@pytest.mark.parametrize("case", [*REFUSED, *SAME])
def test_it_is_cheap(costs: dict[str, tuple[float, int]], case: str) -> None:
    seconds, growth = costs[case]
    assert seconds < CPU_S, f"{1e3 * seconds:.1f} ms"
    assert growth < MEMORY, f"{growth >> 10} KiB"


BOMBS = {
    "text": lambda: png(*[chunk(b"zTXt", b"\0\0" + MEGABYTE)] * 100),
    "segments": REFUSED["jpeg of 250,000 segments"][0],
    "scans": REFUSED["jpeg of 200 scans"][0],
}


@needs_proc
@pytest.mark.parametrize("case", BOMBS)
def test_the_bombs_go_off_elsewhere(case: str) -> None:
    """Negative control: Pillow alone pays for what is refused or left out here."""
    data = BOMBS[case]()

    def work() -> None:
        Image.open(io.BytesIO(data)).load()

    seconds, growth = cost(work, 1)
    assert seconds > 5 * CPU_S
    assert growth > MEMORY or case != "segments"


@pytest.mark.parametrize("case", SAME)
def test_what_hides_in_a_picture_does_not_change_it(service: Target, case: str) -> None:
    make, plain = SAME[case]
    data = make()
    assert data != plain

    async def main() -> list[Any]:
        return [await service.ask(body) for body in (data, plain)]

    got, wanted = asyncio.run(main())
    assert (got.status, wanted.status) == (200, 200), got.body[:300]
    assert got.body == wanted.body
    assert got.headers["content-type"] == "image/png"


MODES = {
    "cmyk jpeg": lambda: saved(RGB.convert("CMYK"), "JPEG"),
    "cmyk tiff": lambda: saved(RGB.convert("CMYK"), "TIFF"),
    "gray": lambda: saved(RGB.convert("L"), "PNG"),
    "one bit": lambda: saved(RGB.convert("1"), "PNG"),
    "palette": lambda: saved(RGB.convert("P"), "PNG"),
    "lzw tiff": lambda: saved(RGB, "TIFF", compression="tiff_lzw"),
    "interlaced": lambda: saved(RGB, "PNG", interlace=1),
    "alpha": lambda: saved(RGB.convert("RGBA"), "PNG"),
    "gray with alpha": lambda: saved(RGB.convert("LA"), "PNG"),
    "palette with alpha": lambda: saved(RGB.convert("P"), "PNG", transparency=3),
    "webp with alpha": lambda: saved(RGB.convert("RGBA"), "WEBP"),
    "16-bit gray": lambda: deep(b""),
    "16-bit gray tiff": lambda: saved(Image.fromarray(PHOTO[..., 0].astype("uint16") * 257), "TIFF"),
    "one pixel": lambda: saved(RGB.crop((0, 0, 1, 1)), "PNG"),
}


@pytest.mark.parametrize("case", MODES)
def test_odd_but_honest_pictures_are_answered(service: Target, case: str) -> None:
    data = MODES[case]()
    sent = Image.open(io.BytesIO(data))
    answer = asyncio.run(service.ask(data))
    assert answer.status == 200, answer.body[:300]
    served = Image.open(io.BytesIO(answer.body))
    assert served.size == (2 * sent.width, 2 * sent.height)


FORM = "multipart/form-data; boundary=x"


def form(count: int) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; name=image\r\n\r\n\r\n" * count + b"--x--\r\n"


BODIES = {  # bytes, Content-Type, words of the refusal
    "50,000 parts": (lambda: form(50_000), FORM, "at most 1"),
    "a part of 50,000 headers": (lambda: b"--x\r\n" + b"A: b\r\n" * 50_000 + b"\r\n\r\n--x--\r\n", FORM, "header"),
    "boundaries that nearly are": (lambda: b"--x\r\n\r\n" + b"\r\n--" * 300_000, FORM, "boundary"),
    "a thousand brackets": (lambda: b'{"image":' + b"[" * 1000, "application/json", "recursion"),
    "a hundred thousand brackets": (lambda: b'{"image":' + b"[" * 100_000, "application/json", "too many values"),
    "empty lists in a list": (
        lambda: b'{"image":[[]' + b",[]" * 300_000 + b"]}",
        "application/json",
        "too many values",
    ),
    "a name of a megabyte": (lambda: b'{"' + b"a" * 1_000_000 + b'":"aa=="}', "application/json", "no such part"),
    "a number of a million digits": (lambda: b'{"image":' + b"1" * 1_000_000 + b"}", "application/json", "digits"),
    "half a surrogate pair": (lambda: b'{"\\ud800":"aa"}', "application/json", "\\ud800"),
}


@needs_proc
@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_all_structure_is_refused_cheaply(service: Target, case: str) -> None:
    make, content_type, word = BODIES[case]
    data = make()
    answers: list[Answer] = []

    async def main() -> float:
        seconds = []
        for _ in range(5):
            started = time.process_time()
            answers.append(await service.ask(data, content_type=content_type))
            seconds.append(time.process_time() - started)
        return min(seconds)

    assert asyncio.run(main()) < CPU_S
    for answer in answers:
        is_refusal(answer, answer.status, word)
        assert 400 <= answer.status < 500


# --- mutations

BASES = [png(), JPEG, PROGRESSIVE, WEBP, TIFF, BMP, PPM, tiff(), jpeg(segment(0xE1, exif_loop())),
         saved(RGB.convert("P"), "PNG"), png(chunk(b"zTXt", b"k\0\0" + MEGABYTE), chunk(b"eXIf", exif_loop()[6:])),
         saved(RGB.convert("RGBA"), "WEBP"), saved(RGB, "TIFF", compression="tiff_lzw")]  # fmt: skip


def checked(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums again, so that the damage behind them is met."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        out += data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return out + data[at:]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid picture after one to six cuts, copies, insertions and changed bytes, most of them near its start."""
    data = bytearray(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))
        length = draw(st.integers(0, 40))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
            case 1:
                data[at:at] = draw(st.binary(max_size=40))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case _:
                del data[at:]
    done = bytes(data)
    return checked(done) if done.startswith(SIGNATURE) and draw(st.booleans()) else done


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=mutated())
def test_mutated_pictures_are_decoded_or_refused(data: bytes) -> None:
    limits = Limits(max_pixels=100_000)
    try:
        header = imaging.read_header(data, limits)
        pixels = imaging.decode_rgb(data, limits)
        assert pixels.shape == (header.height, header.width, 3)
        kept = picture.decode(data, limits)
    except (ImageError, MediaTypeError, TooLargeError):
        return
    assert kept.rgb.shape == pixels.shape


@pytest.fixture(scope="module")
def wary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("wary") / "a", limits=Limits(max_pixels=50_000))
    yield made
    made.service.gateway.close()


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(data=mutated())
def test_mutated_bodies_never_make_an_error_of_ours(wary: Target, data: bytes) -> None:
    answer = asyncio.run(wary.ask(data))
    assert answer.status in (200, 413, 415, 422), answer.body[:300]
    if answer.status != 200:
        is_refusal(answer, answer.status, "")


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(data=mutated(), kind=st.sampled_from(["png", "jpeg", "tiff", "bmp", "ppm"]))
def test_the_structure_of_any_bytes_is_judged(data: bytes, kind: str) -> None:
    try:
        lean = containers.lean(kind, data, "image").data
    except ImageError:
        return
    assert len(lean) <= len(data)
    assert containers.lean(kind, lean, "image").data == lean


# --- a long day

CHATTY = """
import runpy, sys, warnings
hostile = runpy.run_path(sys.argv[1])
from PIL import TiffImagePlugin
from rayscale import imaging
for control in (False, True):
    if control:
        warnings.resetwarnings()
    for count in range(2, 30):  # an orientation of so many values
        tiff = b"II*\\0\\x08\\0\\0\\0" + hostile["ifd"]([(274, 3, count, 26)]) + bytes(2 * count)
        imaging.read_header(hostile["jpeg"](hostile["segment"](0xE1, b"Exif\\0\\0" + tiff)))
    remembered = getattr(TiffImagePlugin, "__warningregistry__", {})
    print(len([key for key in remembered if key != "version"]))
"""


def test_what_pillow_warns_of_is_not_remembered() -> None:
    """Python keeps every distinct warning for good, and files from outside choose the words."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "PYTHONWARNINGS": ""}
    command = [sys.executable, "-c", CHATTY, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0", "28"]  # the second: without our filter, as a control


SOAK = """
import asyncio, runpy, sys
from pathlib import Path
hostile = runpy.run_path(sys.argv[1])
target = hostile["Target"](Path(sys.argv[2]))
good = [hostile["saved"](hostile["RGB"].crop((0, 0, 8 + i, 9)), "PNG") for i in range(4)]
bad = [case[0]() for case in [*hostile["REFUSED"].values(), *hostile["SAME"].values()]]
bad = [data for data in bad if len(data) < 20_000]

def rss():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

async def main():
    seen, statuses = {}, set()
    for request in range(1, 20_001):
        body = bad[request // 4 % len(bad)] if request % 4 == 0 else good[request % 4]
        tail = b"" if request % 4 else request.to_bytes(4, "big")  # no two alike
        statuses.add((await target.ask(body + tail)).status)
        if 4_900 < request <= 5_000 or request > 19_900:
            seen.setdefault(request > 10_000, []).append(rss())
    print(*sorted(seen[False])[50:51], *sorted(seen[True])[50:51], *sorted(statuses))

asyncio.run(main())
target.service.gateway.close()
"""


@pytest.mark.long
@needs_proc
def test_memory_does_not_grow_with_requests(tmp_path: Path) -> None:
    """Pictures and hostile files by turns: resident memory at request 20,000 is within 2 % of that at 5,000."""
    arguments = [__file__, str(tmp_path / "a")]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", SOAK, *arguments], capture_output=True, text=True, timeout=280, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    early, late, *statuses = map(int, done.stdout.split())
    assert statuses == [200, 413, 415, 422]
    assert late < 1.02 * early, f"{early} -> {late} KiB"
