"""Packing against two plain processes that decode, checksum and append the same photos.

    python tests/benchmarks/pack.py [--photos 5000] [--rounds 5]

Both sides take turns, so that a busy machine is busy for both; medians are told. CPU seconds are those of the whole
process tree. The plain side writes one file a process and knows nothing of limits, EXIF, near duplicates, splits,
kills or the index; the decoder is OpenCV's, which most loaders use. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

SOURCES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
PR_SET_CHILD_SUBREAPER = 36
PACK = "from rayscale.cli import run_one; from rayscale.cli.data import pack; run_one(pack)"


def make_photos(folder: Path, num: int, seed: int = 0) -> None:
    """JPEG and PNG crops of real photos, sides 200 to 800 px, in ten folders."""
    import skimage.data

    pictures = [getattr(skimage.data, name)()[:, :, ::-1] for name in SOURCES]
    rng = np.random.default_rng(seed)
    for i in range(num):
        picture = pictures[rng.integers(len(pictures))]
        scale = rng.uniform(1.0, 1.5)  # so that no two are equal
        height, width = (int(side) for side in rng.integers(200, 801, 2))
        rows, columns = (min(int(n / scale), m) for n, m in zip((height, width), picture.shape, strict=False))
        top, left = rng.integers(0, picture.shape[0] - rows + 1), rng.integers(0, picture.shape[1] - columns + 1)
        crop = np.ascontiguousarray(picture[top : top + rows, left : left + columns])
        crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_CUBIC)
        path = folder / f"class{i % 10}" / f"{i:06d}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), crop)


def append(paths: list[Path], out: Path) -> None:
    """What one plain process does."""
    cv2.setNumThreads(1)
    with out.open("wb") as file:
        for path in paths:
            data = path.read_bytes()
            assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
            file.write(hashlib.sha256(data).digest())
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def plain(photos: Path, out: Path) -> None:
    """Two processes, each with half of the photos."""
    paths = sorted(p for p in photos.rglob("*") if p.is_file())
    out.mkdir()
    workers = [multiprocessing.Process(target=append, args=(paths[i::2], out / str(i))) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def timed(command: list[str]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the whole process tree). Orphans come to this process, which waits for them too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        plain(*given.plain)
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder = Path(tempfile.mkdtemp(prefix="rayscale-pack-"))
    try:
        make_photos(folder / "photos", given.photos)
        sides: dict[str, list[tuple[float, float]]] = {"plain": [], "pack": []}
        for _ in range(given.rounds):
            for side, command in (
                ("plain", [__file__, "--plain", folder / "photos", folder / "out"]),
                ("pack", ["-c", PACK, folder / "photos", folder / "out", "--workers", "2"]),
            ):
                sides[side].append(timed([sys.executable, *map(str, command)]))
                print(f"{side}: {sides[side][-1][0]:.2f} s wall, {sides[side][-1][1]:.2f} s CPU", flush=True)
                shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder)
    wall, cpu = ({side: statistics.median(t[i] for t in times) for side, times in sides.items()} for i in (0, 1))
    result = {
        "pack_photos_per_s": round(given.photos / wall["pack"], 1),
        "plain_photos_per_s": round(given.photos / wall["plain"], 1),
        "ratio": round(wall["plain"] / wall["pack"], 3),
        "pack_cpu_ms": round(cpu["pack"] / given.photos * 1e3, 3),
        "plain_cpu_ms": round(cpu["plain"] / given.photos * 1e3, 3),
        "cpu_ratio": round(cpu["plain"] / cpu["pack"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
