"""One face for local folders and S3: list, range read, atomic and conditional write, retries around the body.

Keys are "/"-separated and relative to the store's URI. Stores are values: cheap, picklable, thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rayscale.errors import (
    ConfigError,
    ConflictError,
    MissingError,
    RayscaleError,
    ResourceError,
    UnavailableError,
)

CLOCK_STEP_S = 3.0  # no file system in use tells times apart less finely than by 2 s
TEMPORARY = ".tmp-"  # name prefix of a file that is still being written; never listed
NAME_CHARS = 40  # of the object's name, at the end of such a file's


class Entry(NamedTuple):
    """One object of a listing. `etag` changes when the content does (locally: modification time and size)."""

    key: str
    size: int  # bytes
    etag: str


class Got(NamedTuple):
    """What was read of an object, and the `etag` of the object it was read from."""

    data: bytes
    etag: str


class Store(ABC):
    """A place that holds objects by key. Writes are atomic: a reader sees the old object, the new one, or none."""

    uri: str  # no trailing slash
    remote: ClassVar[bool]  # reads have network latency: worth many at once

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, sorted by key; none where nothing was written yet.

        Raises: MissingError for a missing bucket.
        """

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str = "") -> Got:
        """Bytes [start, start + length) of an object, fewer only at its end.

        Raises: MissingError; ConflictError where `etag` is given and the object is no longer that one.
        """

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str = "") -> bytes:
        """`get` without the etag."""
        return self.get(key, start=start, length=length, etag=etag).data

    def stamp(self, key: str) -> str:
        """What is another one once the object was written to, however that was done; "" where nothing tells."""
        return ""

    @abstractmethod
    def write(self, key: str, data: bytes | bytearray, *, if_absent: bool = False) -> None:
        """Put an object whole or not at all. Raises: ConflictError where `if_absent` and it exists; ResourceError."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """`write` of a file, streamed."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """An object into a file, streamed, whole or not at all. Raises: MissingError, ResourceError."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""

    @abstractmethod
    def sweep(self, folder: str, names: re.Pattern[str]) -> None:
        """Remove what killed writers left in one folder ("" is the top), and the folder below the top once it is empty.

        Only of objects the first NAME_CHARS of whose name match `names`: others may write beside them. For the owner
        of these names: a live writer loses its file.
        """


def open_store(uri: str | Path) -> Store:
    """The store at a local path, `file://` or `s3://bucket[/prefix]`. Nothing is touched yet.

    Raises: ConfigError for any other scheme, or a URI without a bucket.
    """
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(str(Path(text).expanduser().absolute()))
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(str(Path(rest)))
    if scheme == "s3" and rest.strip("/"):
        from rayscale.storage_s3 import S3Store

        return S3Store("s3://" + rest.strip("/"))
    raise ConfigError("uri", text, "no place to read or write", "use a local path, file:///path or s3://bucket/prefix")


def join(uri: str | Path, *parts: str) -> str:
    """`uri` with parts appended, one slash between them."""
    return "/".join([str(uri).rstrip("/"), *(p.strip("/") for p in parts)])


def overlap(a: Store, b: Store) -> bool:
    """Is one of two places the other, or within it? Whatever path leads there: symbolic links are followed."""
    real = [os.path.realpath(store.uri) if isinstance(store, LocalStore) else store.uri for store in (a, b)]
    one, two = (f"{path.rstrip('/')}/" for path in real)
    return one.startswith(two) or two.startswith(one)


def home() -> Path:
    """Where the embedded tracking, registry and caches live: `RAYSCALE_HOME`, or ~/.rayscale."""
    return Path(os.environ.get("RAYSCALE_HOME") or "~/.rayscale").expanduser().absolute()


def check_free(path: str | Path, need_bytes: int, what: str) -> None:
    """Raises: ResourceError where the disk of a local path cannot hold `need_bytes` more; s3:// always can."""
    store = open_store(path)
    if not isinstance(store, LocalStore):
        return
    there = next(p for p in (Path(store.uri), *Path(store.uri).parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < need_bytes:
        rule = f"{what} needs {need_bytes / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free"
        raise ResourceError("disk", store.uri, rule, "free some space or choose another place")


def overwritten(uri: str | Path) -> ConflictError:
    """What `Store.get` raises where the object is no longer the one that was asked for."""
    return ConflictError("object", uri, "was overwritten since it was first read", "restore it, or start anew")


def upload_dir(path: str | Path, uri: str | Path, *, last: str = "") -> None:
    """A whole folder, names in sorted order, the file named `last` (relative, "/"-separated) at the very end.

    Raises: MissingError for a folder without files, or without `last`.
    """
    source, target = LocalStore(str(Path(path).absolute())), open_store(uri)
    keys = [entry.key for entry in source.list()]
    if not keys or (last and last not in keys):
        raise MissingError("folder", path, f"holds no {last or 'files'}", "check the path")
    for key in sorted(keys, key=lambda k: (k == last, k)):
        target.upload(source.path(key), key)


def download_dir(uri: str | Path, path: str | Path) -> None:
    """Everything under `uri` into a folder.

    Raises: MissingError where there is nothing; ConfigError for a key that would leave the folder.
    """
    source, target = open_store(uri), LocalStore(str(Path(path).absolute()))
    keys = [entry.key for entry in source.list()]
    if not keys:
        raise MissingError("uri", uri, "holds nothing", "check the address")
    for key in keys:
        source.download(key, target.path(key))


def ray_filesystem(uri: str | Path) -> tuple[Any, str]:
    """(filesystem, path) for `ray.train.RunConfig(storage_filesystem, storage_path)`.

    (None, absolute path) for a local one; for s3:// a `pyarrow.fs.S3FileSystem` at AWS_ENDPOINT_URL and bucket/prefix.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore):
        return None, store.uri
    from rayscale.storage_s3 import arrow_filesystem

    path = store.uri.removeprefix("s3://")
    return arrow_filesystem(path.partition("/")[0]), path


# ------------------------------------------------------------------------------------------------ local folders


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder. It need not exist before the first write. Symbolic links are followed."""

    uri: str
    remote: ClassVar[bool] = False

    def path(self, key: str) -> Path:
        """The file of a key. Raises: ConfigError for a key that would leave the folder."""
        if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
            raise ConfigError("key", key, f"must stay inside {self.uri}", "use a relative key without '..'")
        return Path(self.uri, key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        start = self.path(folder) if folder else Path(self.uri)
        for entry in _walk(start, f"{folder}/" if folder else "", frozenset()):
            if entry.key.startswith(prefix):
                yield entry

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str = "") -> Got:
        path = self.path(key)
        with os_errors(path), path.open("rb") as file:
            now = _etag(os.fstat(file.fileno()))
            if etag not in ("", now):
                raise overwritten(path)
            file.seek(start)
            return Got(file.read() if length is None else file.read(length), now)

    def stamp(self, key: str) -> str:
        try:
            info = self.path(key).stat()
        except OSError:
            return ""
        if time.time() - info.st_ctime < CLOCK_STEP_S:  # the next write may bear the same time
            return ""
        return f"{info.st_dev:x}-{info.st_ino:x}-{info.st_ctime_ns:x}-{_etag(info)}"

    def write(self, key: str, data: bytes | bytearray, *, if_absent: bool = False) -> None:
        with whole(self.path(key), if_absent=if_absent) as temporary:
            temporary.write_bytes(data)

    def upload(self, path: Path, key: str) -> None:
        with whole(self.path(key)) as temporary:
            shutil.copyfile(path, temporary)

    def download(self, key: str, path: Path) -> None:
        with whole(path) as temporary:
            shutil.copyfile(self.path(key), temporary)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def delete(self, key: str) -> None:
        with os_errors(self.path(key)):
            self.path(key).unlink(missing_ok=True)

    def sweep(self, folder: str, names: re.Pattern[str]) -> None:
        place = self.path(folder) if folder else Path(self.uri)
        for path in place.glob(f"{TEMPORARY}*"):
            left = _TEMPORARY_NAME.fullmatch(path.name)
            if left and names.fullmatch(left[1]):
                with os_errors(path):
                    path.unlink(missing_ok=True)
        if folder:
            with contextlib.suppress(OSError):  # it is not empty, not there, or a symbolic link
                place.rmdir()


def _walk(folder: Path, base: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    """Files under a folder in the order of their whole keys, as S3 lists them: "a.txt" before "a/b"."""
    try:
        identity = (folder.stat().st_dev, folder.stat().st_ino)
        found = [(e.name + "/" if e.is_dir() else e.name, e) for e in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _told(error, folder) from None
    if identity in above:  # a symbolic link to a folder that holds it
        return
    for name, entry in sorted(found, key=lambda pair: pair[0]):
        if name.endswith("/"):
            yield from _walk(folder / name, base + name, above | {identity})
        elif entry.is_file() and not name.startswith(TEMPORARY):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                info = entry.stat()
                yield Entry(base + name, info.st_size, _etag(info))


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}"


_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{32}}-(.*)", re.DOTALL)


@contextlib.contextmanager
def whole(target: Path, *, if_absent: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to; on success flushed to disk and renamed, otherwise removed."""
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name[:NAME_CHARS]}")
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            if if_absent:
                os.link(temporary, target)  # unlike a rename, fails where the target exists
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raises: MissingError, ConflictError, ResourceError, UnavailableError for what the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise _told(error, path) from None


def _told(error: OSError, path: Path) -> RayscaleError:
    """The operating system's refusal in our words."""
    culprit = path if TEMPORARY in str(error.filename or TEMPORARY) else error.filename
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR | errno.EACCES | errno.EPERM | errno.EROFS:
            rule = f"cannot be used ({error.strerror})"
            return MissingError("path", culprit, rule, "check the path and its permissions")
        case errno.EEXIST:
            return ConflictError("path", path, "exists already", "choose another name or remove it first")
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            rule = f"cannot be written ({error.strerror})"
            return ResourceError("disk", path, rule, "free some space and run again")
    return UnavailableError("path", culprit, f"cannot be used ({error})", "check the disk and try again")
