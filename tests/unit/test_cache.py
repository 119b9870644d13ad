"""The node-local cache: it never holds more than it may, whoever writes or dies, and never stands in the way."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rayscale.data import cache as module
from rayscale.data.cache import Cache, open_cache
from rayscale.errors import ConfigError

BLOCK = 4096


def photo(number: int, size: int = 3 * BLOCK) -> bytes:
    return hashlib.shake_128(b"%d" % number).digest(size)


def disk_bytes(folder: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*.tar"))


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_what_was_put_is_there_and_nothing_else(tmp_path):
    cache = Cache(tmp_path / "cache", 10**6, "a" * 64)
    assert cache.get("s.tar", 512, 100) is None
    cache.put("s.tar", 512, photo(1))
    cache.put("s.tar", 512 + 5 * BLOCK, photo(2))
    for reader in (cache, Cache(tmp_path / "cache", 10**6, "a" * 64)):
        assert reader.get("s.tar", 512, 3 * BLOCK) == photo(1)
        assert reader.get("s.tar", 512 + 5 * BLOCK, 3 * BLOCK) == photo(2)
        assert reader.get("s.tar", 512 + 3 * BLOCK, 3 * BLOCK) is None  # a hole between them
        assert reader.get("s.tar", 10**9, 100) is None
        assert reader.get("other.tar", 512, 3 * BLOCK) is None
    assert Cache(tmp_path / "cache", 10**6, "b" * 64).get("s.tar", 512, 3 * BLOCK) is None
    assert (tmp_path / "cache").stat().st_mode & 0o77 == 0


def test_what_fits_is_kept_and_the_rest_not_admitted(tmp_path, monkeypatch):
    """An epoch in any order: what was kept of the first is there in all others."""
    limit = 40 * 4 * BLOCK
    cache = Cache(tmp_path, limit, "a" * 64)
    monkeypatch.setattr(module, "FULL_S", 0.0)
    kept = None
    for epoch in range(3):
        numbers = random.Random(epoch).sample(range(100), 100)
        hits = {n for n in numbers if cache.get("s.tar", 512 + n * 4 * BLOCK, 3 * BLOCK) == photo(n)}
        kept = hits if epoch == 1 else kept
        assert hits == (kept or set())
        for n in numbers:
            cache.put("s.tar", 512 + n * 4 * BLOCK, photo(n))
        assert disk_bytes(tmp_path) <= cache.used_bytes <= limit
    assert kept is not None
    assert len(kept) == 40


WRITER = """
import hashlib, os, signal, sys, threading
from pathlib import Path
from rayscale.data.cache import Cache
folder, limit, digest, first, kill = sys.argv[1:]
cache = Cache(Path(folder), int(limit), digest * 64)
def write(thread):
    for n in range(int(first) + thread, int(first) + 60, 3):
        cache.put("s.tar", 512 + n * 4 * 4096, hashlib.shake_128(b"%d" % n).digest(3 * 4096))
        if kill == "kill" and n > int(first) + 30:
            os.kill(os.getpid(), signal.SIGKILL)
threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print("done", flush=True)
if kill == "stay":
    sys.stdin.read()
"""


def test_processes_and_threads_together_keep_the_limit(tmp_path):
    limit = 50 * 4 * BLOCK
    running = [python(WRITER, tmp_path, limit, *what, "") for what in ("a0", "a0", ("a", 40), "b0")]
    assert [p.wait(60) for p in running] == [0] * 4
    assert 45 * 4 * BLOCK < disk_bytes(tmp_path) <= limit
    cache = Cache(tmp_path, limit, "a" * 64)
    assert disk_bytes(tmp_path) <= cache.used_bytes <= limit
    for n in range(100):
        assert cache.get("s.tar", 512 + n * 4 * BLOCK, 3 * BLOCK) in (None, photo(n))


def test_a_killed_writer_leaves_nothing_wrong(tmp_path, monkeypatch):
    limit = 50 * 4 * BLOCK
    for i in range(3):
        assert python(WRITER, tmp_path, limit, "a", 10 * i, "kill").wait(60) == -signal.SIGKILL
    (tmp_path / "used").write_bytes(b"12345678901")  # as if killed ones had announced much
    cache = Cache(tmp_path, limit, "a" * 64)  # who is alone counts anew
    assert disk_bytes(tmp_path) <= cache.used_bytes <= limit
    before = cache.used_bytes
    half = photo(777)[: 2 * BLOCK] + bytes(BLOCK)
    cache.put("s.tar", 512 + 99 * 4 * BLOCK, half)  # what a kill in the middle of a write leaves
    assert cache.get("s.tar", 512 + 99 * 4 * BLOCK, 3 * BLOCK) == half  # its reader verifies
    grown = cache.used_bytes
    cache.put("s.tar", 512 + 99 * 4 * BLOCK, photo(777))
    assert cache.get("s.tar", 512 + 99 * 4 * BLOCK, 3 * BLOCK) == photo(777)
    assert before < grown == cache.used_bytes  # mended in place


def test_datasets_that_nobody_uses_make_room_the_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FULL_S", 0.0)
    limit = 30 * 4 * BLOCK

    def fill(digest: str, count: int, stay: str = "") -> subprocess.Popen[str]:
        code = WRITER.replace("+ 60, 3", f"+ {count}, 3")
        command = [sys.executable, "-c", code, str(tmp_path), str(limit), digest, "0", stay]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    for digest in "ab":
        assert fill(digest, 10).wait(60) == 0
    user = fill("c", 8, "stay")
    assert user.stdout.readline() == "done\n"
    cache = Cache(tmp_path, limit, "d" * 64)
    there = lambda: {p.parent.name[0] for p in tmp_path.glob("*/s.tar")}  # noqa: E731
    for n in range(9):  # the oldest makes room
        cache.put("s.tar", 512 + n * 4 * BLOCK, photo(n))
    assert there() == {"b", "c", "d"}
    for n in range(9, 30):
        cache.put("s.tar", 512 + n * 4 * BLOCK, photo(n))
    assert there() == {"c", "d"}  # in use: it stays
    assert disk_bytes(tmp_path) <= cache.used_bytes <= limit
    missing = [n for n in range(30) if cache.get("s.tar", 512 + n * 4 * BLOCK, 3 * BLOCK) is None]
    assert missing
    user.communicate(timeout=60)
    for n in missing:  # nobody's any more
        cache.put("s.tar", 512 + n * 4 * BLOCK, photo(n))
    assert there() == {"d"}


def test_a_smaller_limit_admits_nothing_more(tmp_path):
    Cache(tmp_path, 10**6, "a" * 64).put("s.tar", 512, photo(1))
    cache = Cache(tmp_path, 2 * BLOCK, "a" * 64)
    cache.put("s.tar", 512 + 4 * BLOCK, photo(2))
    assert cache.get("s.tar", 512 + 4 * BLOCK, 3 * BLOCK) is None
    assert cache.get("s.tar", 512, 3 * BLOCK) == photo(1)


def test_a_disk_that_fails_costs_the_cache_and_one_line(tmp_path, monkeypatch, caplog):
    cache = Cache(tmp_path / "cache", 10**6, "a" * 64)
    cache.put("s.tar", 512, photo(1))
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > 100:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    threads = [threading.Thread(target=cache.put, args=("s.tar", 512 + i * 4 * BLOCK, photo(i))) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get("s.tar", 512, 3 * BLOCK) == photo(1)  # what is there still serves
    assert cache.get("s.tar", 512 + 4 * BLOCK, 3 * BLOCK) is None
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert all(f"cache {tmp_path}/cache takes no more photos: [Errno 28]" in line for line in told)
    cache.put("s.tar", 512 + 40 * BLOCK, photo(3))
    assert [record.getMessage() for record in caplog.records] == told  # said, and done with


@pytest.mark.parametrize("kind", ["file", "stranger"])
def test_a_place_that_cannot_be_used_is_done_without(tmp_path, monkeypatch, caplog, kind):
    if kind == "file":
        (tmp_path / "cache").write_text("not a folder")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    cache = Cache(tmp_path / "cache", 10**6, "a" * 64)
    cache.put("s.tar", 0, photo(1))
    assert cache.get("s.tar", 0, 3 * BLOCK) is None
    assert len(caplog.records) == 1
    assert "is not used" in caplog.text


def test_the_environment_decides(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYSCALE_CACHE_GB", raising=False)
    monkeypatch.delenv("RAYSCALE_CACHE_DIR", raising=False)
    assert open_cache("a" * 64) is None
    monkeypatch.setenv("RAYSCALE_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"RAYSCALE_CACHE_DIR=.*has no effect alone"):
        open_cache("a" * 64)
    monkeypatch.setenv("RAYSCALE_CACHE_GB", "0.5")
    cache = open_cache("a" * 64)
    assert cache is open_cache("a" * 64) is not open_cache("b" * 64)
    assert (tmp_path / ("a" * 32)).is_dir()
    for wrong in ("-1", "much", "nan", "inf"):
        monkeypatch.setenv("RAYSCALE_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=f"RAYSCALE_CACHE_GB={wrong}: is no size"):
            open_cache("a" * 64)
    monkeypatch.setenv("RAYSCALE_CACHE_GB", "1")
    monkeypatch.delenv("RAYSCALE_CACHE_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(module.tempfile, "tempdir", None)
    open_cache("a" * 64)
    assert (tmp_path / f"rayscale-cache-{os.getuid()}").is_dir()
