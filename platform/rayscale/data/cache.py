"""Photos read from afar, kept on the node's own disk and shared by its processes.

Training sees a dataset in another random order each epoch. Where it is larger than the cache, a cache that forgets the
least recently used photo forgets each one before it is seen again. So this one keeps what fits: photos are admitted
until it is full, then no more, and that share of every later epoch is read from the disk. Only datasets that no process
uses any longer make room.

The unit is the photo, kept at its place in a sparse copy of its shard. Whole shards would make the first window of a
run wait for a shard a photo; a file a photo costs more to write (0.7 ms against 0.5 for 300 KB) and 5 s to count for a
million. Nothing here is trusted: the reader verifies each photo, so a half-written one is only read from afar again.

Set by RAYSCALE_CACHE_GB (unset or 0: no cache) and RAYSCALE_CACHE_DIR (a folder below the system's temporary one).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from rayscale.errors import ConfigError
from rayscale.observe import log

HEAD_BYTES = 16  # of a photo; zeros are a hole, for no format begins with them
BLOCK_BYTES = 4096  # what a disk gives out
FULL_S = 60.0  # after it was found full, nobody looks for room


def open_cache(digest: str) -> Cache | None:
    """This process's cache of one dataset's photos; None where none is wanted. Raises: ConfigError."""
    wanted, folder = os.environ.get("RAYSCALE_CACHE_GB", ""), os.environ.get("RAYSCALE_CACHE_DIR", "")
    try:
        limit_bytes = int(float(wanted or 0) * 1e9)
    except (ValueError, OverflowError):
        limit_bytes = -1
    if limit_bytes < 0:
        raise ConfigError("RAYSCALE_CACHE_GB", wanted, "is no size", "give gigabytes, such as 200; 0 for no cache")
    if not limit_bytes:
        if folder:
            raise ConfigError("RAYSCALE_CACHE_DIR", folder, "has no effect alone", "set RAYSCALE_CACHE_GB as well")
        return None
    return _opened(os.getpid(), folder or f"{tempfile.gettempdir()}/rayscale-cache-{os.getuid()}", limit_bytes, digest)


@functools.lru_cache(maxsize=16)
def _opened(_pid: int, folder: str, limit_bytes: int, digest: str) -> Cache:
    return Cache(Path(folder), limit_bytes, digest)


class Cache:
    """Photos of one dataset on this disk. Thread-safe. Where the disk fails it is told once, and done without.

    Processes agree by locks that the kernel takes from the dead: `used` while the count of bytes in use is changed,
    `in-use` (of the cache, of each dataset) for as long as a process lives. The count errs upwards only: by blocks that
    two photos share, and by what killed writers had announced. Who finds nobody else here counts anew.
    """

    def __init__(self, folder: Path, limit_bytes: int, digest: str) -> None:
        self._root, self._limit, self._place = folder, limit_bytes, folder / digest[:32]
        self._threads = threading.Lock()
        self._full_until = 0.0
        self._reads = self._writes = True  # as far as is known, the disk does
        with self._stepping_aside("is not used", reads=False):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError("it belongs to another user")
            self._used = _open(folder / "used")
            self._enter()

    def get(self, shard: str, offset: int, size: int) -> bytes | None:
        """The bytes that are kept of a photo, whatever they are; None where there are none."""
        found = None
        if self._reads:
            with self._stepping_aside("is not read any more", reads=False), _there(self._place / shard) as file:
                if file is not None and any(os.pread(file.fileno(), HEAD_BYTES, offset)):
                    found = os.pread(file.fileno(), size, offset)
        return found

    def put(self, shard: str, offset: int, photo: bytes) -> None:
        """Keep a photo that was verified, where there is room."""
        if not self._writes or time.monotonic() < self._full_until:
            return
        with self._stepping_aside("takes no more photos", reads=self._reads), _open(self._place / shard) as file:
            blocks = -(-(offset + len(photo)) // BLOCK_BYTES) - offset // BLOCK_BYTES
            if any(os.pread(file.fileno(), HEAD_BYTES, offset)) or self._reserve(blocks * BLOCK_BYTES):
                os.pwrite(file.fileno(), photo, offset)

    @property
    def used_bytes(self) -> int:
        """What all processes of the node keep here, of all datasets."""
        return int(os.pread(self._used.fileno(), 32, 0) or b"0")

    @contextlib.contextmanager
    def _stepping_aside(self, what: str, *, reads: bool) -> Iterator[None]:
        """A full or failing disk costs the cache, never the run."""
        try:
            yield
        except OSError as error:
            if self._writes or (self._reads and not reads):
                log.warning("cache %s %s: %s", self._root, what, error)
            self._reads, self._writes = reads, False

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Alone on this node to change the count, or who is here."""
        with self._threads:
            fcntl.flock(self._used, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._used, fcntl.LOCK_UN)

    def _enter(self) -> None:
        with self._counting():
            self._here = _open(self._root / "in-use")
            if _alone(self._here):
                self._count(_disk_bytes(self._root))
            fcntl.flock(self._here, fcntl.LOCK_SH)
            self._place.mkdir(exist_ok=True)
            self._reading = _open(self._place / "in-use")
            fcntl.flock(self._reading, fcntl.LOCK_SH)
            os.utime(self._place / "in-use")
            self._make_room(0)

    def _reserve(self, need_bytes: int) -> bool:
        with self._counting():
            if self._make_room(need_bytes):
                self._count(self.used_bytes + need_bytes)
                return True
        self._full_until = time.monotonic() + FULL_S
        return False

    def _make_room(self, need_bytes: int) -> bool:
        """Whether `need_bytes` more fit, once datasets that nobody uses are gone, those first that were used least."""
        if self.used_bytes + need_bytes <= self._limit:
            return True
        others = [marker for marker in self._root.glob("*/in-use") if marker.parent != self._place]
        for marker in sorted(others, key=lambda path: path.stat().st_mtime_ns):
            with _open(marker) as used:
                if _alone(used):
                    freed = _disk_bytes(marker.parent)
                    shutil.rmtree(marker.parent)
                    self._count(max(self.used_bytes - freed, 0))
            if self.used_bytes + need_bytes <= self._limit:
                return True
        return False

    def _count(self, used_bytes: int) -> None:
        os.pwrite(self._used.fileno(), b"%-32d" % used_bytes, 0)


def _open(path: Path) -> FileIO:
    """A file to read and write, made where it is not there."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")


def _there(path: Path) -> contextlib.AbstractContextManager[FileIO | None]:
    """The file to read; None where there is none."""
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return contextlib.nullcontext()


def _alone(file: FileIO) -> bool:
    """Whether no other process holds a lock on the file; this one does, then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk_bytes(folder: Path) -> int:
    """What the copies of shards below a folder really take."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*.tar"))
