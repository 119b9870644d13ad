"""Where photos come from: files of a folder or bucket, and the members of tars (WebDataset's too) among them."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rayscale.data.parallel import Mapper, threads
from rayscale.errors import MissingError
from rayscale.storage import Entry, Store

TAR = ".tar"
LABEL_CHARS = 200  # a longer text beside a photo is a caption, not a label
READERS = 8  # photos read ahead by one worker, where the store is remote
_BUFFER = 256 << 10  # bytes, of one read while hopping from header to header
_LABELS = {"cls": 0, "json": 1, "txt": 2}  # what may stand beside a photo in a tar; the first that says a label counts


class Item(NamedTuple):
    """One file that may be a photo."""

    key: str  # path below the source; inside a tar: the tar's path / the member's
    size: int  # bytes
    etag: str  # of the file, or of its tar
    tar: str = ""  # path of the tar, "" for a file of its own
    offset: int = 0  # of its bytes in the tar
    label: str | None = None  # what stands beside it in the tar

    @property
    def file(self) -> str:
        """Key of what the store holds: itself, or its tar."""
        return self.tar or self.key


def listing(store: Store, mapper: Mapper, label_field: str = "label") -> list[Item]:
    """All that may be a photo, sorted by key; names that begin with a dot are not looked at, as everywhere.

    label_field: of the `.json` beside a photo in a tar. Raises: MissingError where there is nothing.
    """
    entries = [entry for entry in store.list() if _visible(entry.key)]
    tars = [entry for entry in entries if entry.key.endswith(TAR)]
    found = [Item(*entry) for entry in entries if not entry.key.endswith(TAR)]
    for members in mapper(functools.partial(members_of, store, label_field=label_field), tars):
        found += members
    if not found:
        raise MissingError("source", store.uri, "holds no files", "give a folder or s3://bucket/prefix of photos")
    return sorted(found)


def _visible(key: str) -> bool:
    return "/." not in f"/{key}"


def members_of(store: Store, entry: Entry, label_field: str = "label") -> list[Item]:
    """The photos of a tar with their labels; where it cannot be read to its end, the tar itself too, as no photo."""
    photos: list[Item] = []
    labels: dict[str, tuple[int, str]] = {}
    try:
        raw = io.BufferedReader(_Ranges(store, entry), _BUFFER)
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or not _visible(name := member.name.removeprefix("./")):
                    continue
                base, _, extension = name.rpartition("/")[2].partition(".")
                stem = f"{name.rpartition('/')[0]}/{base}"  # WebDataset's key: up to the first dot
                if extension.lower() in _LABELS:
                    rank = _LABELS[extension.lower()]
                    text = _label(extension.lower(), tar.extractfile(member), label_field)
                    if text and rank < labels.get(stem, (9, ""))[0]:
                        labels[stem] = rank, text
                else:
                    photos.append(Item(f"{entry.key}/{name}", member.size, entry.etag, entry.key, member.offset_data))
    except (tarfile.TarError, MissingError):
        photos.append(Item(*entry))

    def labelled(photo: Item) -> Item:
        path = photo.key.removeprefix(f"{entry.key}/")
        stem = f"{path.rpartition('/')[0]}/{path.rpartition('/')[2].partition('.')[0]}"
        return photo._replace(label=labels[stem][1]) if stem in labels else photo

    return [labelled(photo) for photo in photos]


def _label(kind: str, file: Any, label_field: str) -> str:
    text = file.read(1 << 20).decode(errors="replace").strip()
    if kind == "json":
        try:
            value = json.loads(text)
        except ValueError:
            return ""
        text = str(value.get(label_field, "")).strip() if isinstance(value, dict) else ""
    return text if len(text) <= LABEL_CHARS and "\n" not in text else ""


class _Ranges(io.RawIOBase):
    """A file of a store, read by ranges."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._at = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        length = min(len(into), self._entry.size - self._at)
        if length <= 0:
            return 0
        data = self._store.read(self._entry.key, start=self._at, length=length)
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def locate(store: Store, key: str) -> Item | None:
    """The item with this key as the store has it now, None where it has none."""
    found = next((entry for entry in store.list(key) if entry.key == key), None)
    if found is not None:
        return Item(*found)
    parts = key.split("/")
    for i, part in enumerate(parts[:-1], 1):
        if part.endswith(TAR):
            tar = "/".join(parts[:i])
            for entry in (e for e in store.list(tar) if e.key == tar):
                return next((item for item in members_of(store, entry) if item.key == key), None)
    return None


def read(store: Store, item: Item) -> bytes:
    """The bytes of an item. Raises: MissingError."""
    if not item.tar:
        return store.read(item.key)
    return store.read(item.tar, start=item.offset, length=item.size)


def read_all(store: Store, items: list[Item]) -> Iterator[bytes | MissingError]:
    """The bytes of many, in order, a few read ahead where the store is remote; the error of one that is gone."""
    fetch: Callable[[Item], bytes | MissingError] = functools.partial(_fetch, store)
    return threads(READERS)(fetch, items) if store.remote else map(fetch, items)


def _fetch(store: Store, item: Item) -> bytes | MissingError:
    try:
        return read(store, item)
    except MissingError as error:
        return error
