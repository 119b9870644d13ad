"""What Ray adds to the data work: CPU-ms a sample, bare and through Ray Data to the training iterator.

python tests/benchmarks/data.py        # about ten minutes on two cores; the last line is one JSON object

Every figure of Ray is a difference of two runs of unequal length, so that start-up is left out to the last process:
CPU time of the driver and of all that it started. One data task at a time, as the bare loop is one process: two
on two hyperthreads slow each other down. `bare` is one process that reads, decodes, cuts, degrades, stacks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import cv2
import numpy as np
import psutil
import ray
import skimage.data
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from rayscale.data.cut import cut
from rayscale.data.degrade import Bicubic
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pack import pack
from rayscale.data.pairs import DataPlacement, PlanDataConfig, steps
from rayscale.data.plan import DataSettings, Plan, sample_generator
from rayscale.data.presets import real_esrgan
from rayscale.data.sample import render_window
from rayscale.data.scan import PackSettings
from rayscale.imaging import decode_rgb

ROUNDS = 3  # bare and through Ray in turns: the machine's pace changes by more than what Ray adds
BASE = DataSettings(
    hr_crop_px=128, degradation=(), micro_batch=64, virtual_shards=2, window_images=128, crops=1, flips=False
)
WORK = {
    "loader": BASE,
    "bicubic": replace(BASE, degradation=(Bicubic(scale=2),)),
    "second_order": replace(BASE, degradation=real_esrgan(4), hr_crop_px=256),
}


def make_photos(folder: Path, count: int, side: int, suffix: str) -> None:
    """Crops of scikit-image's photos, each another one."""
    folder.mkdir(parents=True)
    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    large = [cv2.resize(s, None, fx=3, fy=3, interpolation=cv2.INTER_LANCZOS4) for s in sources]
    rng = np.random.default_rng(0)
    for i in range(count):
        source = large[i % len(large)]
        y, x = (int(rng.integers(0, source.shape[axis] - side + 1)) for axis in (0, 1))
        picture = source[y : y + side, x : x + side, ::-1]
        noisy = np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:05d}.{suffix}"), noisy)


def dataset(root: Path, name: str, count: int, side: int, suffix: str) -> Mixture:
    make_photos(root / f"{name}-photos", count, side, suffix)
    pack(str(root / f"{name}-photos"), str(root / name), PackSettings(validation_fraction=0.0, test_fraction=0.0))
    return open_mixture((str(root / name),), "train")


def bare_ms(photos: Mixture, settings: DataSettings, samples: int) -> float:
    """CPU-ms a sample of the bare loop: no plan beyond the order, no checksums but the one of reading."""
    window = photos.plan(settings).window(0, 0)
    began, given = time.process_time(), 0
    while given < samples:
        batch = []
        for slot in range(settings.micro_batch):
            image = int(window.images[(given + slot) % settings.window_images])
            photo = decode_rgb(photos.parts[0].read([image])[0])
            tensors, _ = cut(photo, settings, sample_generator(0, 0, image, given))
            batch.append({key: tensor.copy() for key, tensor in tensors.items()})  # not a view that keeps the photo
        stacked = {key: np.stack([sample[key] for sample in batch]) for key in batch[0]}
        given += len(stacked["hr"])
    return (time.process_time() - began) * 1000 / given


def tree_seconds() -> float:
    """CPU seconds so far of this process and of all below it."""
    total = 0.0
    for process in [own := psutil.Process(), *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def through_ray(photos: Mixture, settings: DataSettings, num_steps: int) -> tuple[float, int]:
    """(CPU seconds of all processes, samples) of one stream, from its start to its end."""
    plan = photos.plan(settings)
    began = tree_seconds()
    config = PlanDataConfig(photos, plan, num_steps, lambda: 0, DataPlacement(tasks=1))
    split = config.configure({"train": None}, 1, None, None)[0]["train"]
    tables = iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    given = sum(
        len(batch.ids)
        for batches in steps(tables, plan, start_step=0, end_step=num_steps, rank=0, world_size=1)
        for batch in batches
    )
    time.sleep(0.5)
    return tree_seconds() - began, given


def ray_ms(photos: Mixture, settings: DataSettings, short: int, long: int) -> float:
    """CPU-ms a sample, start-up left out."""
    (few_s, few), (many_s, many) = (through_ray(photos, settings, n) for n in (short, long))
    return (many_s - few_s) * 1000 / (many - few)


def rendered_ms(photos: Mixture, settings: DataSettings, windows: int) -> float:
    """CPU-ms a sample of our own windows, without Ray, all threads counted."""
    plan = photos.plan(settings)
    began = time.process_time()
    count = sum(len(b.ids) for w in range(windows) for b in render_window(photos, plan, w, 0, 0, plan.rows))
    return (time.process_time() - began) * 1000 / count


@contextmanager
def s3_server() -> Iterator[str]:
    """moto in a process of its own: its CPU time is not ours."""
    code = (
        "import time; from moto.server import ThreadedMotoServer as T; s = T(ip_address='127.0.0.1', port=0);"
        " s.start(); print('port', s.get_host_and_port()[1], flush=True); time.sleep(10**6)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        try:
            port = next(line.split()[1] for line in server.stdout if line.startswith(b"port"))
            yield f"http://127.0.0.1:{int(port)}"
        finally:
            server.kill()


def s3_over_local(local: Mixture, root: Path) -> float:
    """CPU time of our process for the loader's work from S3, over the same from the local disk."""
    from rayscale.storage import upload_dir

    settings, ratios = replace(BASE, crops=4), []
    with s3_server() as url:
        os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/bench", method="PUT"))
        upload_dir(Path(local.uri), "s3://bench/set", last="manifest.json")
        remote = open_mixture(("s3://bench/set",), "train")
        rendered_ms(remote, settings, 1)
        for _ in range(5):
            ratios.append(rendered_ms(remote, settings, 2) / rendered_ms(local, settings, 2))
    return median(ratios)


def stall_peak_fraction(photos: Mixture) -> float:
    """Peak of the object store over the byte budget, while the consumer takes nothing for 12 s."""
    settings, budget = replace(WORK["bicubic"], micro_batch=16, window_images=64, virtual_shards=4), 64 << 20
    plan: Plan = photos.plan(settings)
    config = PlanDataConfig(photos, plan, 400, lambda: 0, DataPlacement(memory_budget=budget))
    split = config.configure({"train": None}, 1, None, None)[0]["train"]
    peak, done = 0, threading.Event()
    state = get_state_from_address(ray.get_runtime_context().gcs_address)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, get_memory_info_reply(state).store_stats.object_store_bytes_used)

    thread = threading.Thread(target=watch)
    thread.start()
    tables = iter(split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    next(tables)
    time.sleep(12)
    for _ in zip(range(40), tables, strict=False):
        pass
    done.set()
    thread.join()
    return peak / budget


def main() -> None:
    cv2.setNumThreads(1)
    root = Path(tempfile.mkdtemp(prefix="rs-bench"))
    temp = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    try:
        png, jpeg = dataset(root, "png", 512, 480, "png"), dataset(root, "jpeg", 256, 768, "jpg")
        result: dict[str, float] = {}
        ray.init(
            num_cpus=2, object_store_memory=500 << 20, include_dashboard=False, logging_level="ERROR",
            log_to_driver=False, _temp_dir=temp,
        )  # fmt: skip
        for name, settings in WORK.items():
            through_ray(png, settings, 4)  # workers that have seen the libraries
            pairs = [(bare_ms(png, settings, 256), ray_ms(png, settings, 4, 24)) for _ in range(ROUNDS)]
            result[f"{name}_bare_ms"], result[f"{name}_ray_ms"] = map(median, zip(*pairs, strict=True))
            print(name, {k: round(v, 3) for k, v in result.items() if k.startswith(name)}, flush=True)
        crops = replace(WORK["bicubic"], window_images=128)
        once, every = (median(rendered_ms(jpeg, replace(crops, crops=k), 2) for _ in range(3)) for k in (4, 1))
        result["decode_once_speedup"] = every / once
        result["stall_peak_fraction"] = stall_peak_fraction(png)
        ray.shutdown()
        result["s3_over_local"] = s3_over_local(png, root)
        print(json.dumps({name: round(value, 3) for name, value in result.items()}))
    finally:
        ray.shutdown()
        for folder in (root, Path(temp)):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
