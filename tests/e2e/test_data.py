"""The data stream through Ray: one sequence, whatever the workers and tasks, from any position, through kills."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayscale.data import pairs, presets
from rayscale.data.mixture import Mixture, open_mixture
from rayscale.data.pack import pack
from rayscale.data.pairs import DataPlacement, PlanDataConfig, steps
from rayscale.data.plan import DataSettings, Plan
from rayscale.data.sample import MicroBatch, render_window
from rayscale.data.scan import PackSettings
from rayscale.errors import IntegrityError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SETTINGS = DataSettings(hr_crop_px=48, micro_batch=2, virtual_shards=4, window_images=8, crops=2)
END = 90  # global steps: more than eleven windows of each of the four virtual shards

Chain = dict[int, str]  # after this step -> SHA-256 over the micro-batches up to it


@pytest.fixture(scope="module")
def photos(dataset: str) -> Mixture:
    return open_mixture((dataset,), "train")


@pytest.fixture(scope="module")
def plan(photos: Mixture) -> Plan:
    return photos.plan(SETTINGS)


def sums(batches: Iterator[MicroBatch]) -> dict[tuple[int, int], bytes]:
    """(step, shard) -> SHA-256 of what arrived, computed here; asserts that nothing came twice."""
    found: dict[tuple[int, int], bytes] = {}
    for batch in batches:
        if batch.weight > 0:
            assert (batch.step, batch.shard) not in found
            assert batch.checksum() == batch.sha256
            found[batch.step, batch.shard] = batch.sha256
    return found


@pytest.fixture(scope="module")
def planned(photos: Mixture, plan: Plan) -> dict[tuple[int, int], bytes]:
    """All of it, without Ray."""
    windows = itertools.product(range(-(-END // plan.rows)), range(SETTINGS.virtual_shards))
    return sums(b for w, v in windows for b in render_window(photos, plan, w, v, 0, plan.rows))


def chain(found: dict[tuple[int, int], bytes], start: int) -> str:
    expected = [(step, shard) for step in range(start, END) for shard in range(SETTINGS.virtual_shards)]
    assert [key for key in sorted(found) if start <= key[0] < END] == expected, "each micro-batch once"
    return hashlib.sha256(b"".join(found[key] for key in expected)).hexdigest()


def consume(
    photos: Mixture,
    plan: Plan,
    start: int,
    workers: int,
    tasks: int | None,
    each: Callable[[int], None] = lambda _: None,
) -> dict[tuple[int, int], bytes]:
    """What `workers` receive, each in a thread of its own, from step `start` to the end."""
    config = PlanDataConfig(photos, plan, END, lambda: start, DataPlacement(tasks=tasks))
    splits = config.configure({"train": None}, workers, None, None)

    def receive(rank: int) -> dict[tuple[int, int], bytes]:
        tables = iter(splits[rank]["train"].iter_batches(batch_size=None, batch_format="pyarrow"))
        given = steps(tables, plan, start_step=start, end_step=END, rank=rank, world_size=workers)

        def flat() -> Iterator[MicroBatch]:
            for batches in given:
                each(batches[0].step)
                yield from batches

        return sums(flat())

    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(receive, range(workers)))
    merged = {key: value for part in parts for key, value in part.items()}
    assert len(merged) == sum(map(len, parts)), "no micro-batch went to two workers"
    return merged


POSITIONS = sorted(random.Random(20).sample(range(1, END - 1), 10))
FEW = [(1, 1, 0), (2, None, 0), (3, 1, 0), (4, None, 0)] + [
    (1 + i % 4, (None, 1)[i // 2 % 2], position) for i, position in enumerate(POSITIONS[::2])
]
ALL = list(itertools.product((1, 2, 3, 4), (None, 1), (0, *POSITIONS)))


@pytest.mark.parametrize(
    ("workers", "tasks", "start"),
    [pytest.param(*c, marks=() if c in FEW else pytest.mark.long) for c in ALL],
)
def test_one_sequence(
    photos: Mixture, plan: Plan, planned: dict[tuple[int, int], bytes], workers: int, tasks: int | None, start: int
) -> None:
    """3 workers do not divide the 4 micro-batches of a step; spare ones of weight 0 fill up."""
    found = consume(photos, plan, start, workers, tasks)
    assert chain(found, start) == chain(planned, start)


@pytest.mark.parametrize("degradation", [presets.inpaint(), presets.burst(2, 3)], ids=["mask", "burst"])
def test_a_mixture_and_other_tensors_travel_as_well(
    dataset: str, photo_folder: Path, tmp_path: Path, degradation: presets.Degradation
) -> None:
    """On 3 workers, so that blocks with and without tensors follow each other."""
    pack(str(photo_folder / "train"), str(tmp_path / "out"), PackSettings(validation_fraction=0, test_fraction=0.3))
    both = open_mixture((dataset, str(tmp_path / "out")), "train")
    plan = both.plan(replace(SETTINGS, degradation=degradation, weights=(2, 1), window_images=4, crops=2))
    windows = itertools.product(range(-(-END // plan.rows)), range(SETTINGS.virtual_shards))
    planned = sums(b for w, v in windows for b in render_window(both, plan, w, v, 0, plan.rows))
    found = consume(both, plan, 7, 3, None)
    assert chain(found, 7) == chain(planned, 7)


@pytest.mark.long
@pytest.mark.parametrize("tasks", [1, None])
def test_tasks_bounds_how_many_render_at_once(photos: Mixture, plan: Plan, tmp_path: Path, tasks: int | None) -> None:
    patience = 0.05 if tasks == 1 else 20.0  # the control waits for company

    class Counting(Mixture):  # local, so that it travels to the workers by value
        def read_each(self, images: Any) -> Any:
            mine, until = tmp_path / f"running-{os.getpid()}", time.monotonic() + patience
            mine.touch()
            while time.monotonic() < until and not (tmp_path / "seen-2").exists():
                (tmp_path / f"seen-{len(list(tmp_path.glob('running-*')))}").touch()
                time.sleep(0.01)
            mine.unlink()
            return Mixture.read_each(self, images)

    consume(Counting(photos.parts), plan, 0, 2, tasks)
    seen = {path.name for path in tmp_path.glob("seen-*")}
    assert ("seen-2" in seen) == (tasks is None)
    assert "seen-1" in seen


def test_a_broken_order_never_trains(photos: Mixture, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same stream with its blocks in another order."""
    ordered = pairs.training_data

    def shuffled(*arguments: Any) -> Any:
        return ordered(*arguments).randomize_block_order(seed=1)

    monkeypatch.setattr(pairs, "training_data", shuffled)
    with pytest.raises(IntegrityError, match="position=step"):
        consume(photos, plan, 0, 2, None)


def test_killed_map_tasks_are_repeated(
    photos: Mixture, plan: Plan, planned: dict[tuple[int, int], bytes], tmp_path: Path
) -> None:
    """SIGKILL for whichever process renders a block, several times over the run."""

    class Slow(Mixture):  # local, so that it travels to the workers by value
        def read_each(self, images: Any) -> Any:
            mine = tmp_path / str(os.getpid())
            mine.touch()
            time.sleep(0.1)  # something to be killed in
            mine.unlink()
            return Mixture.read_each(self, images)

    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        rng = random.Random(3)
        while len(killed) < 4 and not done.wait(rng.uniform(0.05, 0.2)):
            if rendering := sorted(path for path in tmp_path.iterdir() if int(path.name) not in killed):
                killed.append(int(rng.choice(rendering).name))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        found = consume(Slow(photos.parts), plan, 0, 2, None)
    finally:
        done.set()
        thread.join()
    assert len(killed) >= 2
    assert chain(found, 0) == chain(planned, 0)
