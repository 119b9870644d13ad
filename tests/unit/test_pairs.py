"""Blocks: micro-batches come back as they went in, memory does not grow, and a broken order never trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from rayscale.data.mixture import open_mixture
from rayscale.data.pairs import Render, advice, check_block, pack, padded_shards, steps, unpack
from rayscale.data.plan import DataSettings, Plan
from rayscale.data.sample import MicroBatch, render_window
from rayscale.errors import ConfigError, IntegrityError

SETTINGS = DataSettings(hr_crop_px=24, micro_batch=2, virtual_shards=3, window_images=4, crops=2)


@pytest.fixture
def render(dataset: str) -> Render:
    photos = open_mixture((dataset,), "train")
    return Render(photos, photos.plan(SETTINGS), start_step=3, end_step=9, world_size=2)


def test_micro_batches_come_back_as_they_went_in(render: Render) -> None:
    given = list(render_window(render.photos, render.plan, 0, 1, 0, 4))
    table = pack(given, ("lr", "hr"))
    for row, batch in enumerate(given):
        back = unpack(table, row)
        assert (back.step, back.shard, back.sha256, back.weight) == (batch.step, 1, batch.sha256, 1.0)
        assert np.array_equal(back.ids, batch.ids)
        assert all(np.array_equal(back.tensors[name], batch.tensors[name]) for name in ("lr", "hr"))
        assert back.checksum() == batch.sha256
        assert not back.tensors["hr"].flags.writeable, "a view into the block, not a copy"


def blocks_of(render: Render, rank: int) -> Iterator[pa.Table]:
    """What `streaming_split(world_size, equal=True)` deals to that rank."""
    return (render.block(number) for number in range(rank, render.num_blocks, render.world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_together_hold_every_step_once(render: Render, world_size: int) -> None:
    of = Render(render.photos, render.plan, 3, 9, world_size)
    seen: dict[tuple[int, int], bytes] = {}
    spares = 0
    for rank in range(world_size):
        given = steps(blocks_of(of, rank), of.plan, start_step=3, end_step=9, rank=rank, world_size=world_size)
        for batches in given:
            for batch in batches:
                spares += batch.weight == 0
                if batch.weight:
                    assert (batch.step, batch.shard) not in seen
                    seen[batch.step, batch.shard] = batch.sha256
    assert sorted(seen) == [(step, shard) for step in range(3, 9) for shard in range(3)]
    assert spares == 6 * (padded_shards(3, world_size) - 3)
    alone = Render(render.photos, render.plan, 0, 12, 1)
    whole = {(b.step, b.shard): b.sha256 for n in range(alone.num_blocks) for b in rows(alone.block(n))}
    assert all(whole[key] == sha for key, sha in seen.items()), "from any start the same"


def rows(table: pa.Table) -> Iterator[MicroBatch]:
    return (unpack(table, row) for row in range(table.num_rows))


def test_a_broken_order_never_trains(render: Render) -> None:
    blocks = list(blocks_of(render, 0))
    blocks[0], blocks[1] = blocks[1], blocks[0]
    with pytest.raises(IntegrityError, match=r"position=step 3, micro-batch 2: the plan is at step 3, micro-batch 0"):
        next(steps(iter(blocks), render.plan, start_step=3, end_step=9, rank=0, world_size=2))
    shifted = blocks_of(Render(render.photos, render.plan, 4, 9, 2), 0)
    with pytest.raises(IntegrityError, match="the plan is at step 3"):
        next(steps(shifted, render.plan, start_step=3, end_step=9, rank=0, world_size=2))


def test_a_block_beyond_its_bound_is_refused_with_the_figure(render: Render) -> None:
    check_block(render.plan)
    large = DataSettings(hr_crop_px=512, micro_batch=8, window_images=16, crops=8)
    with pytest.raises(
        ConfigError, match=r"data\.window_images=16: x data\.crops=8 makes blocks of 120 MiB, beyond 64"
    ):
        check_block(Plan((100,), large))


GROWTH = """
import numpy as np
from rayscale.data.pairs import pack
from rayscale.data.sample import MicroBatch

def kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def one(i):
    tensors = {"lr": np.full((8, 128, 128, 3), i % 256, np.uint8), "hr": np.full((8, 256, 256, 3), i % 256, np.uint8)}
    return pack([MicroBatch(i, 0, tensors, np.zeros((8, 3), np.int64), b"")], ("lr", "hr"))

for i in range(20):
    one(i)
before = kib()
for i in range(100):
    one(i)
print(kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_packing_frees_what_it_packed() -> None:
    """100 blocks of 2 MB each: a column built from memoryviews kept them all."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000


def test_a_run_that_outpaces_the_coordinator_is_told_what_to_raise() -> None:
    plan = Plan((100,), SETTINGS)
    a_block = SETTINGS.window_images * SETTINGS.crops
    assert advice(plan, 49 * a_block) == ""
    assert advice(plan, 90 * a_block).startswith("90 blocks a second")
    assert f"data.crops={SETTINGS.crops}" in advice(plan, 90 * a_block)
