"""What is to be made of a place full of pictures, what was made already, and when to give up. No model, no Ray.

A result is whole or not there (stores write atomically), and counts as finished where the ledger beside it says that
it was made of this very input by this very maker, and it still has the size that was written. So the same command
goes on after an interruption, makes anew what has changed, and leaves no picture of another model behind. What failed
is on record there too and is tried again last, so that bad pictures never keep a run from the good ones after them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rayscale.errors import ConfigError, MissingError
from rayscale.imaging import Media
from rayscale.observe import log
from rayscale.storage import TEMPORARY, LocalStore, Store, join, open_store

SUFFIXES: dict[Media, tuple[str, ...]] = {"png": (".png",), "jpeg": (".jpg", ".jpeg"), "webp": (".webp",)}
"""Of what is written; the first is given where none is asked for."""
READ = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"})
LIST = ".txt"
ERRORS = "errors.json"
LEDGER = ".rayscale/ledger/"  # names with a dot in front are not looked at when a folder is read
FLUSH_S = 5.0  # of finished work that a killed run may do again
PARTS_MAX = 50  # of a ledger; more are made one
FAILED_LEAST = 20  # before a run is given up


class Item(NamedTuple):
    """One picture to be made."""

    uri: str  # of the input
    key: str  # its path below the source
    etag: str  # of its content, or of where it lies and what is known of its content; and of its mask
    out: str  # the output's key


class Done(NamedTuple):
    """What became of it."""

    item: Item
    size: int = 0  # bytes written
    sha256: str = ""
    model: str = ""  # name:version that made it
    error: str = ""  # why there is none, one line


Worker = Callable[[Item], Done]
"""Makes one picture; errors come as values."""


# --- which pictures


def items(source: str, media: Media) -> tuple[list[Item], int]:
    """Pictures of a folder, an `s3://` prefix or a list, and how many other files lie there.

    A list is a `.txt` with a path (from where the list is) or URI a line; what it names of s3:// is taken to stay as
    it is.
    Raises: MissingError where there is none; ConfigError where two would have one name.
    """
    found = list(_listed(source) if source.endswith(LIST) else _below(open_store(source)))
    pictures = [one for one in found if suffix(one[1]) in READ]
    if not pictures:
        rule = f"holds {len(found)} files and no picture" if found else "holds no files"
        raise MissingError("source", source, rule, f"name a folder, s3:// prefix or {LIST} list of pictures")
    names = outputs([key for _, key, _ in pictures], media)
    return [Item(uri, key, etag, names[key]) for uri, key, etag in pictures], len(found) - len(pictures)


def _below(store: Store) -> Iterator[tuple[str, str, str]]:
    """(uri, key, etag)"""
    for entry in store.list():
        if "/." not in f"/{entry.key}":
            yield f"{store.uri}/{entry.key}", entry.key, entry.etag


def _listed(uri: str) -> Iterator[tuple[str, str, str]]:
    folder, name = split(uri)
    store = open_store(folder)
    for line in dict.fromkeys(store.read(name).decode().splitlines()):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if "://" in entry or entry.startswith("/"):
            below = entry.startswith(f"{store.uri}/")
            key = entry.removeprefix(f"{store.uri}/") if below else re.sub(r"^\w+://|^/", "", entry)
            yield entry, key, _identity(entry)
        else:
            yield f"{store.uri}/{entry}", entry, _identity(f"{store.uri}/{entry}")


def _identity(uri: str) -> str:
    """Where a picture lies: another list may have another one under the same key. With its time and size if local."""
    with contextlib.suppress(OSError, ValueError, ConfigError):  # told when it is read
        store = open_store(uri)
        if isinstance(store, LocalStore):
            info = Path(store.uri).stat()
            return f"{uri} {info.st_mtime_ns:x}-{info.st_size:x}"
    return uri


def outputs(keys: Sequence[str], media: Media) -> dict[str, str]:
    """{key: key of its output}: another suffix, or one more where two pictures differ in it alone.

    Raises: ConfigError where even that gives two one name.
    """
    ending = SUFFIXES[media][0]
    short = {key: key.removesuffix(suffix(key, lower=False)) + ending for key in keys}
    times = Counter(short.values())
    named = {key: name if times[name] == 1 else key + ending for key, name in short.items()}
    times = Counter(named.values())
    if clash := next((name for name, n in times.items() if n > 1), ""):
        both = " and ".join(sorted(key for key, name in named.items() if name == clash)[:2])
        raise ConfigError("source", both, f"would both be written to {clash}", "rename one of them")
    return named


def check_kept(place: Store, work: Sequence[Item], masks: str) -> None:
    """Raises: ConfigError where an output would be written over a picture or mask, by whatever path that is named."""
    folder_of = functools.cache(real)  # few folders hold many pictures

    def file_of(uri: str) -> str:
        folder, name = split(uri)
        path = join(folder_of(folder), name)
        return real(path) if Path(path).is_symlink() else path

    inputs = {}
    for uri in [one.uri for one in work] + [mask_uri(masks, one) for one in work if masks]:
        with contextlib.suppress(ValueError, ConfigError):  # of no place at all: told when it is read
            inputs[file_of(uri)] = uri
    for one in work:
        path = str(place.path(one.out)) if isinstance(place, LocalStore) else join(place.uri, one.out)
        if lost := inputs.get(file_of(path)):
            raise ConfigError("OUT", path, f"would be written over the input {lost}", "name a place of its own")


def real(uri: str) -> str:
    """A local path without links and "..", other URIs as they are: equal where two names are of one place.

    Raises: ConfigError for what is no place; ValueError for a path with a NUL in it.
    """
    store = open_store(uri)
    return os.path.realpath(store.uri) if isinstance(store, LocalStore) else store.uri


def masked(work: Sequence[Item], masks: str) -> list[Item]:
    """The same, where the masks have a part in what was made already. Raises: MissingError for a missing bucket."""
    store = open_store(masks)
    etags = {f"{store.uri}/{entry.key}": entry.etag for entry in store.list()}
    return [one._replace(etag=f"{one.etag} mask {etags.get(mask_uri(store.uri, one), '')}") for one in work]


def mask_uri(masks: str, item: Item) -> str:
    """Where the mask of a picture lies: its path, with .png."""
    key, dot, _ = item.key.rpartition(".")
    return f"{masks.rstrip('/')}/{key if dot else item.key}.png"


def split(uri: str) -> tuple[str, str]:
    """(URI of the folder, name) of a file."""
    folder, slash, name = uri.rstrip("/").rpartition("/")
    return (folder or slash or "."), name


def suffix(key: str, *, lower: bool = True) -> str:
    """ ".jpg" of "a/b.JPG", "" where there is none."""
    stem, dot, suffix = key.rpartition("/")[2].rpartition(".")
    found = dot + suffix if stem else ""
    return found.lower() if lower else found


# --- what was made already


Entry = tuple[str, str, int | str]
"""Of an output: its input's etag, its maker, and its bytes or, in a line, why there is none."""


class Ledger:
    """What lies in a place and how it was made, or why it is not there: kept in parts beside it."""

    def __init__(self, store: Store, maker: str) -> None:
        """`maker`: digest of all that decides the output but the input."""
        self.store, self.maker = store, maker
        self._known: dict[str, Entry] = {}  # by output, in the order in which they were tried last
        self._new: dict[str, Entry] = {}
        self._flushed = time.monotonic()
        parts = [entry.key for entry in store.list(LEDGER)]
        for part in parts:
            for out, *entry in json.loads(store.read(part)):
                self._note(out, tuple(entry))
        if len(parts) > PARTS_MAX:
            self._new = dict(self._known)
            self.flush()
            for part in parts:
                store.delete(part)

    def unfinished(self, work: Sequence[Item]) -> list[Item]:
        """What is left to make: what is new or has changed, then what failed, the longest ago first."""
        if not self._known:
            return list(work)
        there = {entry.key: entry.size for entry in self.store.list()}
        left = [i for i in work if self._known.get(i.out) != (i.etag, self.maker, there.get(i.out, -1))]
        again = sum(one.out in self._known and one.out in there for one in left)
        if again:
            log.info("%d were made of other pictures, by another model or with other settings: made again", again)
        turn = {out: num for num, out in enumerate(self._known, 1)}
        return sorted(left, key=lambda one: turn[one.out] if self._why(one) else 0)

    def failures(self, work: Sequence[Item]) -> list[Done]:
        """What of it failed when it was tried last, in this run or before."""
        return [Done(one, error=why) for one in work if (why := self._why(one))]

    def _why(self, one: Item) -> str:
        match self._known.get(one.out):
            case (one.etag, self.maker, str(why)):
                return why
        return ""

    def _note(self, out: str, entry: Entry) -> None:
        self._known.pop(out, None)
        self._known[out] = entry

    def add(self, done: Done) -> None:
        """Note what became of one; kept every few seconds."""
        entry = (done.item.etag, self.maker, done.error or done.size)
        self._note(done.item.out, entry)
        self._new[done.item.out] = entry
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._new:
            part = json.dumps([[out, *how] for out, how in self._new.items()])
            self.store.write(f"{LEDGER}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json", part.encode())
        self._new, self._flushed = {}, time.monotonic()


# --- carrying it out


def at_once(worker: Worker, work: Iterable[Item], num: int) -> Iterator[Done]:
    """`worker` in `num` threads of this process, results as they come; few items in flight whatever their number."""
    left = iter(work)
    with ThreadPoolExecutor(num, thread_name_prefix="bulk") as threads:
        flying: set[Future[Done]] = set()
        try:
            while True:
                flying |= {threads.submit(worker, one) for one in islice(left, 2 * num - len(flying))}
                if not flying:
                    return
                finished, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            for future in flying:
                future.cancel()


def hopeless(tried: int, failed: int, budget: float) -> bool:
    """Whether more of the work would fail too: not a few pictures are bad, something else is.

    `budget`: the share that may fail; half of them may anyway.
    """
    return failed >= FAILED_LEAST and failed > max(0.5, budget) * tried


def sweep(store: Store, work: Sequence[Item]) -> None:
    """Remove what killed workers left beside these outputs. `Store.sweep` would also look at what is not ours."""
    if not isinstance(store, LocalStore):
        return
    names: defaultdict[Path, set[str]] = defaultdict(set)
    for path in (store.path(one.out) for one in work):
        names[path.parent].add(path.name[:40])
    for folder, ours in names.items():
        for path in folder.glob(f"{TEMPORARY}*"):
            unique, _, name = path.name.removeprefix(TEMPORARY).partition("-")
            if name in ours and len(unique) == 32:
                path.unlink(missing_ok=True)


def write_errors(store: Store, failures: Sequence[Done]) -> None:
    """`errors.json` beside the output: what is not there, and why. None where nothing failed."""
    if failures:
        listed = [{"key": one.item.key, "error": one.error} for one in sorted(failures, key=lambda d: d.item.key)]
        text = json.dumps(listed, indent=1, ensure_ascii=False) + "\n"
        store.write(ERRORS, text.encode(errors="backslashreplace"))  # of names that are not UTF-8: JSON's own escapes
    else:
        store.delete(ERRORS)
