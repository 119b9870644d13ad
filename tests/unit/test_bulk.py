"""Many pictures: which, what is left, exact bytes, interruptions, failures; by the model and by an endpoint."""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayscale import artifact, cli, contract, imaging
from rayscale.bulk import work as bulk
from rayscale.bulk.work import Done, Item, Ledger
from rayscale.bulk.workers import Maker, Making
from rayscale.cli import upscale
from rayscale.client import Client
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.observe import log
from rayscale.serve.engine import EngineSettings
from rayscale.serve.table import Release
from rayscale.storage import LocalStore

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
scripted = runpy.run_path(str(Path(__file__).parents[1] / "scripted_server.py"))
Say, problem, MADE_BY = scripted["Say"], scripted["problem"], scripted["MADE_BY"]
U8 = NDArray[np.uint8]

TILED = EngineSettings(device="cpu", threads=1, tile_px=24, whole_max_px=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    small["write"](folder)
    return folder


@pytest.fixture
def server() -> Iterator[Any]:
    server = scripted["ScriptedServer"]()
    yield server
    server.close()


def picture(height: int, width: int, seed: int = 0) -> U8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def pictures(folder: Path, num: int = 5) -> dict[str, U8]:
    """{key: pixels} of PNGs in folders below `folder`."""
    found = {f"{'ab'[i % 2]}/p{i}.png": picture(20 + 13 * i, 31 + 7 * i, i) for i in range(num)}
    for key, pixels in found.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(imaging.encode(pixels, "png"))
    return found


def untiled(model: Path, pixels: U8) -> U8:
    """One run of the whole picture."""
    return imaging.to_hwc_u8(artifact.load(model, threads=1).transform(imaging.to_nchw_f32(pixels)))


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any, str]:
    """(exit code, the JSON of the last line or None, standard error) of `rayscale ...`."""
    monkeypatch.setattr(sys, "argv", ["rayscale", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    line = out.strip().rpartition("\n")[2]
    return int(ended.value.code or 0), json.loads(line) if line.startswith("{") else None, err


# --- which pictures


KEYS = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "a/", "b/"]), st.sampled_from("xyz"), st.sampled_from([".png", ".jpg", ".JPG", ".tif"])
        ),
    ),
    unique=True,
)


@given(keys=KEYS, media=st.sampled_from(["png", "jpeg", "webp"]))
def test_every_picture_has_an_output_of_its_own(keys: list[str], media: Any) -> None:
    named = bulk.outputs(keys, media)
    assert set(named) == set(keys)
    assert len(set(named.values())) == len(keys)
    for key, out in named.items():
        assert out.endswith(bulk.SUFFIXES[media][0])
        assert out.rpartition("/")[0] == key.rpartition("/")[0]


def test_outputs_keep_their_names_and_tell_twins_apart() -> None:
    assert bulk.outputs(["a/x.jpg", "a/y.PNG", "z"], "png") == {
        "a/x.jpg": "a/x.png",
        "a/y.PNG": "a/y.png",
        "z": "z.png",
    }
    twins = bulk.outputs(["x.jpg", "x.png", "y.jpg"], "png")
    assert twins == {"x.jpg": "x.jpg.png", "x.png": "x.png.png", "y.jpg": "y.png"}
    with pytest.raises(ConfigError, match="rename one"):
        bulk.outputs(["x.jpg", "x.png", "x.jpg.webp"], "png")


def test_a_folder_is_looked_through_and_a_list_is_read(tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    (tmp_path / "in/notes.md").write_text("no picture")
    (tmp_path / "in/.hidden.png").write_text("not looked at")
    found, foreign = bulk.items(str(tmp_path / "in"), "png")
    assert [item.key for item in found] == ["a/p0.png", "a/p2.png", "a/p4.png", "b/p1.png", "b/p3.png"]
    assert foreign == 1
    assert all(Path(item.uri).read_bytes() and item.etag for item in found)

    (tmp_path / "in/few.txt").write_text(
        f"# some\na/p0.png\n\n{tmp_path}/in/b/p1.png\n{tmp_path}/other/x.jpg\na/p0.png\n"
    )
    listed, _ = bulk.items(str(tmp_path / "in/few.txt"), "webp")
    outside = f"{tmp_path}/other/x".removeprefix("/")
    assert [item.out for item in listed] == ["a/p0.webp", "b/p1.webp", f"{outside}.webp"]
    assert [item.uri for item in listed][:2] == [f"{tmp_path}/in/a/p0.png", f"{tmp_path}/in/b/p1.png"]

    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        with pytest.raises(MissingError, match="holds no files"):
            bulk.items(str(tmp_path / nothing), "png")


# --- what is left


def finish(ledger: Ledger, items: Sequence[Item]) -> None:
    for item in items:
        ledger.store.write(item.out, b"made of " + item.key.encode())
        ledger.add(Done(item, len(b"made of " + item.key.encode())))
    ledger.flush()


def test_what_is_finished_is_not_made_again_and_what_changed_is(tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    items, _ = bulk.items(str(tmp_path / "in"), "png")
    store = LocalStore(str(tmp_path / "out"))

    def left(maker: str = "m") -> list[str]:
        return [item.key for item in Ledger(store, maker).unfinished(bulk.items(str(tmp_path / "in"), "png")[0])]

    assert len(left()) == 5
    finish(Ledger(store, "m"), items[:3])
    assert left() == ["b/p1.png", "b/p3.png"]
    finish(Ledger(store, "m"), items[3:])
    assert left() == []

    assert len(left("another model")) == 5
    (tmp_path / "in/a/p2.png").write_bytes(b"another picture of another size")
    assert left() == ["a/p2.png"]
    (tmp_path / "out/a/p0.png").unlink()
    (tmp_path / "out/b/p3.png").write_bytes(b"cut")
    assert left() == ["a/p0.png", "a/p2.png", "b/p3.png"]


def test_an_output_that_nobody_vouches_for_is_made_again(tmp_path: Path) -> None:
    """Negative control: that a file is there says nothing about what it was made of."""
    pictures(tmp_path / "in", 1)
    store = LocalStore(str(tmp_path / "out"))
    items, _ = bulk.items(str(tmp_path / "in"), "png")
    store.write(items[0].out, b"of unknown origin")
    assert Ledger(store, "m").unfinished(items) == items


def test_what_a_list_names_is_told_from_another_picture_of_the_same_name(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "out"))
    for folder in "pq":
        (tmp_path / folder).mkdir()
        for name in ("x.png", "x.jpg", "list.txt"):
            (tmp_path / folder / name).write_bytes(b"x.png\ns3://bucket/y.png\nno://place/z.png\n")

    def left(folder: str) -> list[str]:
        work, _ = bulk.items(str(tmp_path / folder / "list.txt"), "png")
        found = Ledger(store, "m").unfinished(work)
        finish(Ledger(store, "m"), found)
        return [item.uri for item in found]

    p, q = f"{tmp_path}/p/x.png", f"{tmp_path}/q/x.png"
    assert left("p") == [p, "s3://bucket/y.png", "no://place/z.png"]
    assert left("p") == [], "control"
    assert left("q") == [q]
    (tmp_path / "q/x.png").write_bytes(b"another content")
    assert left("q") == [q]
    (tmp_path / "q/list.txt").write_text("x.jpg\n")
    assert left("q") == [f"{tmp_path}/q/x.jpg"]


def numbered(num: int, etag: str = "e") -> list[Item]:
    return [Item(f"/in/{i}.png", f"{i}.png", etag, f"{i}.png") for i in range(num)]


def fail(ledger: Ledger, items: Sequence[Item], why: str = "no picture") -> None:
    for item in items:
        ledger.add(Done(item, error=why))
    ledger.flush()


def test_what_failed_comes_last_the_longest_ago_first(tmp_path: Path) -> None:
    store, work = LocalStore(str(tmp_path)), numbered(6)
    fail(Ledger(store, "m"), [work[1], work[0]])
    assert Ledger(store, "m").unfinished(work) == [*work[2:], work[1], work[0]]
    finish(Ledger(store, "m"), [work[3]])
    fail(Ledger(store, "m"), [work[1], work[4]], "truncated")
    ledger = Ledger(store, "m")
    assert ledger.unfinished(work) == [work[2], work[5], work[0], work[1], work[4]]
    assert [(d.item.key, d.error) for d in ledger.failures(work)] == [
        ("0.png", "no picture"), ("1.png", "truncated"), ("4.png", "truncated")]  # fmt: skip

    finish(Ledger(store, "m"), [work[0], work[1]])
    ledger = Ledger(store, "m")
    assert [d.item.key for d in ledger.failures(work)] == ["4.png"], "those that were made have failed no more"
    assert ledger.unfinished(work) == [work[2], work[5], work[4]]


def test_another_content_or_model_has_not_failed_yet(tmp_path: Path) -> None:
    """Negative control: a failure says nothing of what was not tried."""
    store, work = LocalStore(str(tmp_path)), numbered(3)
    fail(Ledger(store, "m"), work[:1])
    changed = [*numbered(1, "another"), *work[1:]]
    for ledger, items in ((Ledger(store, "m"), changed), (Ledger(store, "another model"), work)):
        assert ledger.unfinished(items) == items
        assert ledger.failures(items) == []


def test_a_ledger_of_many_parts_becomes_one(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    work = numbered(bulk.PARTS_MAX + 5)
    for item in work:
        finish(Ledger(store, "m"), [item])
    bad = numbered(bulk.PARTS_MAX + 7)[-2:]
    fail(Ledger(store, "m"), bad[::-1])
    assert len(list(store.list(bulk.LEDGER))) <= bulk.PARTS_MAX + 1
    assert Ledger(store, "m").unfinished([*work, *bad]) == bad[::-1]


# --- carrying it out


def test_few_are_in_flight_and_all_come_back() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def worker(item: Item) -> Done:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= 1
        return Done(item)

    taken = []

    def work() -> Iterator[Item]:
        for i in range(50):
            taken.append(i)
            yield Item("", str(i), "", "")

    results = bulk.at_once(worker, work(), 3)
    next(results)
    assert len(taken) <= 12, "the work is not read ahead"
    assert {done.item.key for done in results} | {"0", "1", "2"} == {str(i) for i in range(50)}
    assert most[0] <= 3


def test_giving_up_needs_many_failures_and_most() -> None:
    assert not bulk.hopeless(19, 19, 0.0)
    assert bulk.hopeless(20, 20, 0.0)
    assert bulk.hopeless(39, 20, 0.0)
    assert not bulk.hopeless(40, 20, 0.0)
    assert not bulk.hopeless(100_000, 1000, 0.0)


def test_giving_up_needs_more_failures_than_may_be() -> None:
    assert bulk.hopeless(39, 20, 0.4), "half of them may anyway"
    assert bulk.hopeless(99, 90, 0.9)
    assert not bulk.hopeless(100, 90, 0.9)
    assert not bulk.hopeless(100_000, 100_000, 1.0)


def runs_to_finish(folder: Path, bad: Sequence[bool], *, as_listed: bool = False) -> int | None:
    """How often the command is given until every good picture is made; None: more often than could ever help."""
    store, work = LocalStore(str(folder)), numbered(len(bad))

    def make(items: Sequence[Item]) -> Iterator[Done]:
        for item in items:
            error = "bad" if bad[int(item.key.removesuffix(".png"))] else ""
            if not error:
                store.write(item.out, b"made")
            yield Done(item, 0 if error else 4, error=error)

    for run in range(1, sum(bad) // bulk.FAILED_LEAST + 3):
        ledger = Ledger(store, "m")
        left = ledger.unfinished(work)
        upscale._drive(upscale.How("m", make), [i for i in work if i in left] if as_listed else left, ledger, 0.0)
        if {entry.key for entry in store.list() if entry.key in {i.out for i in work}} == {
            item.out for item, wrong in zip(work, bad, strict=True) if not wrong
        }:
            return run
    return None


@settings(max_examples=12, deadline=None)
@given(bad=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=5))
def test_every_bucket_can_be_finished(bad: list[tuple[bool, int]]) -> None:
    """Wherever the bad ones lie: a run that stops has met 20 that no run before had met, and all runs get past them."""
    bucket = [wrong for wrong, num in bad for _ in range(num)]
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_to_finish(Path(folder), bucket)
    assert runs is not None
    assert runs <= 1 + sum(bucket) // bulk.FAILED_LEAST


def test_a_bucket_is_not_finished_by_beginning_with_the_same_ones(tmp_path: Path) -> None:
    """Negative control: bad ones in front, tried first in every run."""
    bucket = [True] * bulk.FAILED_LEAST + [False]
    assert runs_to_finish(tmp_path / "a", bucket, as_listed=True) is None
    assert runs_to_finish(tmp_path / "b", bucket) == 2


# --- by the model


@pytest.mark.parametrize(("height", "width"), [(7, 5), (24, 24), (25, 24), (61, 43), (20, 150)])
def test_tiled_pictures_are_the_untiled_ones(tmp_path: Path, model: Path, height: int, width: int) -> None:
    pixels = picture(height, width)
    (tmp_path / "x.png").write_bytes(imaging.encode(pixels, "png"))
    release = Release(name="small", version=1, digest=artifact.digest_of(model), uri=str(model))
    making = Making(release=release, out=str(tmp_path / "out"), engine=TILED, cache=str(tmp_path / "cache"))
    maker = Maker(making)
    done = maker(Item(str(tmp_path / "x.png"), "x.png", "", "x.png"))
    maker.close()
    assert (done.error, done.model) == ("", "small:1")
    data = (tmp_path / "out/x.png").read_bytes()
    assert len(data) == done.size
    np.testing.assert_array_equal(imaging.decode_rgb(data), untiled(model, pixels))


def test_a_halo_that_is_too_short_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    digest = small["write"](tmp_path / "model", halo_px=1)
    pixels = picture(61, 43)
    (tmp_path / "x.png").write_bytes(imaging.encode(pixels, "png"))
    release = Release(name="small", version=1, digest=digest, uri=str(tmp_path / "model"))
    maker = Maker(Making(release=release, out=str(tmp_path), engine=TILED, cache=str(tmp_path / "cache")))
    assert not maker(Item(str(tmp_path / "x.png"), "x.png", "", "out.png")).error
    maker.close()
    assert not np.array_equal(
        imaging.decode_rgb((tmp_path / "out.png").read_bytes()), untiled(tmp_path / "model", pixels)
    )


def test_only_the_model_that_was_named_is_run(tmp_path: Path, model: Path) -> None:
    digest = artifact.digest_of(model)
    other = tmp_path / "other"
    small["write"](other, 1)
    wrong = Making(release=Release(name="m", version=1, digest=digest, uri=str(other)), out=str(tmp_path / "out"),
                   cache=str(tmp_path / "cache"))  # fmt: skip
    with pytest.raises(IntegrityError, match="not the files that were published"):
        Maker(wrong)
    (tmp_path / "cache" / digest).mkdir(exist_ok=True)  # a damaged copy in the cache is fetched again
    for name in artifact.FILES:
        (tmp_path / "cache" / digest / name).write_bytes((other / name).read_bytes())
    right = Making(release=Release(name="m", version=1, digest=digest, uri=str(model)), out=str(tmp_path / "out"),
                   cache=str(tmp_path / "cache"))  # fmt: skip
    Maker(right).close()


def test_a_folder_is_made_whatever_is_bad_in_it_and_again_only_where_needed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pictures(tmp_path / "in")
    (tmp_path / "in/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    run = "upscale", tmp_path / "in", tmp_path / "out", "--model", model
    code, result, err = command(monkeypatch, capsys, *run)
    assert code == 1
    assert (result["made"], result["failed"], result["skipped"], result["models"]) == (5, 1, 0, {"small": 5})
    assert "bad.png" in err
    assert "is truncated or damaged" in err
    assert "Traceback" not in err
    (listed,) = json.loads((tmp_path / "out/errors.json").read_text())
    assert listed["key"] == "bad.png"
    for key, pixels in source.items():
        np.testing.assert_array_equal(imaging.decode_rgb((tmp_path / "out" / key).read_bytes()), untiled(model, pixels))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("p*.png")}
    code, result, _ = command(monkeypatch, capsys, *run, "--error-budget", "0.2")
    assert code == 0
    assert (result["made"], result["failed"], result["skipped"]) == (0, 1, 5)
    assert before == {path: path.stat().st_mtime_ns for path in before}

    (tmp_path / "in/bad.png").unlink()
    other = tmp_path / "other"
    small["write"](other, 1)
    code, result, _ = command(monkeypatch, capsys, *run[:-1], other)
    assert (code, result["made"], result["skipped"]) == (0, 5, 0), "another model: nothing of the first is left"
    assert not (tmp_path / "out/errors.json").exists()


@pytest.mark.parametrize("kept", [0, 2])
def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    """Outputs and ledger of `kept` pictures are there, one more output without its word: all but these are made."""
    pictures(tmp_path / "all")
    command(monkeypatch, capsys, "upscale", tmp_path / "all", tmp_path / "whole", "--model", model)
    items, _ = bulk.items(str(tmp_path / "all"), "png")
    (tmp_path / "some.txt").write_text("".join(f"all/{item.key}\n" for item in items[:kept]) or "all/a/p0.png\n")
    out = tmp_path / "out"
    command(monkeypatch, capsys, "upscale", tmp_path / "some.txt", out, "--model", model)
    (out / "all/a/p4.png").write_bytes(b"half")
    (out / f"all/a/.tmp-{'0' * 32}-p4.png").write_bytes(b"half")  # of a killed worker
    (out / f"all/a/.tmp-{'0' * 32}-letter.png").write_bytes(b"of somebody else")
    (tmp_path / "some.txt").write_text("".join(f"all/{item.key}\n" for item in items))
    code, result, _ = command(monkeypatch, capsys, "upscale", tmp_path / "some.txt", out, "--model", model)
    assert (code, result["skipped"], result["made"]) == (0, max(kept, 1), 5 - max(kept, 1))
    for item in items:
        assert (out / "all" / item.out).read_bytes() == (tmp_path / "whole" / item.out).read_bytes()
    others = {p.name for p in out.rglob("*.png")} - {Path(item.out).name for item in items}
    assert others == {f".tmp-{'0' * 32}-letter.png"}


def test_settings_without_effect_are_errors(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "in", 1)
    run = "upscale", tmp_path / "in"
    for words, *args in (
        ("--on", tmp_path / "o", "--url", "http://127.0.0.1:1", "--on", "ray"),
        ("--quality", tmp_path / "o", "--model", model, "--quality", "50"),
        ("--task", tmp_path / "o", "--model", model, "--task", "restore"),
        ("--workers", tmp_path / "o", "--model", model, "--workers", "2"),
        ("--model", tmp_path / "o"),
        ("--masks", tmp_path / "o", "--model", model, "--masks", tmp_path),
        ("OUT", tmp_path / "in", "--model", model),
        ("OUT", tmp_path / "in" / "out", "--model", model),
        ("url", tmp_path / "o", "--url", "127.0.0.1:1"),
    ):
        code, result, err = command(monkeypatch, capsys, *run, *args)
        assert (code, result) == (2, None), err
        assert err.startswith(f"error: {words}="), err
        assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "out", "more"),
    [
        ("B/list.txt", "B", ()),
        ("B/list.txt", "C/../B", ()),
        ("B/crossed.txt", "B/b", ()),
        ("C/../B", "B", ()),
        ("B", "C/../B/out", ()),
        ("link", "B", ()),
        ("B", "link", ()),
        ("links", "B/b", ()),
        ("C/../B/x.png", "B/x.png", ()),
        ("link/x.png", "B", ()),
        ("B/x.png", "link/x.png", ()),
        ("B", "masks", ("--task", "restore", "--masks", "C/../masks")),
    ],
)
def test_no_input_is_written_over(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    source: str, out: str, more: tuple[str, ...],
) -> None:  # fmt: skip
    """Whatever path leads to it; told before anything is asked for."""
    for folder in ("B/b", "C", "links", "masks"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("B/x.png", "B/b/x.png", "masks/x.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "B/list.txt").write_text("x.png\n")
    (tmp_path / "B/crossed.txt").write_text("x.png\nb/x.png\n")  # B/x.png would be written over B/b/x.png
    (tmp_path / "link").symlink_to(tmp_path / "B")
    (tmp_path / "links/x.png").symlink_to(tmp_path / "B/b/x.png")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, result, err = command(monkeypatch, capsys, "upscale", source, out, "--url", server.url, *more)
    assert (code, result, server.asked) == (2, None, [])
    assert err.startswith("error: OUT="), err
    assert tree(tmp_path) == before
    code, _, err = command(monkeypatch, capsys, "upscale", source, "C/out", "--url", server.url, *more)  # control
    assert server.asked, err


# --- by an endpoint


def test_an_endpoint_is_asked_patiently_and_once(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "in")
    busy = problem(503, "busy", "engine=backlog 9 s: no; try again later", Retry_After="0")
    server.script = [busy, Say(then="drop"), busy]
    server.default = Say(headers={**MADE_BY, "Content-Type": "image/webp"})
    monkeypatch.setenv("RAYSCALE_API_KEY", "secret")
    run = ("upscale", tmp_path / "in", tmp_path / "out", "--url", server.url, "--model", "photos", "--format", "webp")
    code, result, err = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["models"]) == (0, 5, {"photos:3": 5}), err
    assert len(server.asked) == 8
    assert {asked.query["model"] for asked in server.asked} == {"photos"}
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer secret"}
    assert {asked.headers["accept"] for asked in server.asked} == {"image/webp"}
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.webp")) == [f"p{i}.webp" for i in range(5)]
    code, result, _ = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["skipped"], len(server.asked)) == (0, 0, 5, 8)


def test_what_the_endpoint_refuses_is_listed_and_the_rest_is_made(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "in")
    line = "image=9x9: sides have at most 8 px; send a smaller picture"
    server.script = [problem(413, "too-large", line)]
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", server.url
    code, result, err = command(monkeypatch, capsys, *run, "--concurrency", "1")
    assert (code, result["made"], result["failed"], len(server.asked)) == (1, 4, 1, 5)
    assert json.loads((tmp_path / "out/errors.json").read_text()) == [{"key": "a/p0.png", "error": line}]
    assert line in err
    code, result, _ = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["skipped"]) == (0, 1, 4)


def test_an_odd_answer_costs_its_picture_only(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "in")
    odd = "image/svg+xml", "image/webp", "text/html"
    server.script = [Say(body=b"<svg/>", headers={**MADE_BY, "Content-Type": kind}) for kind in odd]
    server.script.append(Say(headers={**MADE_BY, "Content-Type": "image/PNG; q=1"}))  # control: it is what was asked
    read = Client.upscale

    def surprised(self: Client, image: bytes, **asked: Any) -> Any:
        answer = read(self, image, **asked)
        if image == (tmp_path / "in/b/p3.png").read_bytes():
            raise KeyError("nobody thought of it")
        return answer

    monkeypatch.setattr(Client, "upscale", surprised)
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", server.url, "--concurrency", "1"
    code, result, _ = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["failed"]) == (1, 1, 4)
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == ["p1.png"]
    rule = "is not the image/png that was asked for; is this a rayscale server?"
    assert {one["key"]: one["error"] for one in json.loads((tmp_path / "out/errors.json").read_text())} == {
        "a/p0.png": f"answer=image/svg+xml: {rule}",
        "a/p2.png": f"answer=image/webp: {rule}",
        "a/p4.png": "answer of /v1/upscale=text/html, 6 bytes: is no picture; is this a rayscale server?",
        "b/p3.png": "KeyError: 'nobody thought of it'",
    }


def test_a_corrected_mask_is_used(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_and_good(tmp_path / "in", 0, 2)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/000.png").write_bytes(b"first mask")
    monkeypatch.chdir(tmp_path)
    run = "upscale", "in", "out", "--url", server.url, "--task", "restore", "--masks", "masks"

    def once() -> tuple[int, int, int]:
        _, result, _ = command(monkeypatch, capsys, *run)
        return result["made"], result["skipped"], result["failed"]

    assert once() == (1, 0, 1)
    (listed,) = json.loads((tmp_path / "out/errors.json").read_text())
    assert listed["error"] == (f"mask={tmp_path}/masks/001.png: cannot be used (No such file or directory); "
                               "put one there, under the picture's path with .png")  # fmt: skip
    (tmp_path / "masks/001.png").write_bytes(b"second mask")
    assert once() == (1, 1, 0)
    assert once() == (0, 2, 0), "control"
    (tmp_path / "masks/000.png").write_bytes(b"first mask, corrected")
    assert once() == (1, 1, 0)
    assert [b"first mask, corrected" in asked.body for asked in server.asked] == [False, False, True]


def test_workers_are_told_where_masks_lie_whatever_folder_they_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = runpy.run_path(str(Path(__file__).parents[1] / "small_kinds.py"))
    kinds["filler"](tmp_path / "filler")
    bad_and_good(tmp_path / "in", 0, 1)
    monkeypatch.chdir(tmp_path)
    told: list[tuple[str, list[str]]] = []

    def by_model(making: Making, on: str, stores: Any, *_: object) -> upscale.How:
        told.append((making.masks, [store.uri for store in stores]))
        return upscale.How("m", lambda items: (Done(item) for item in items))

    monkeypatch.setattr(upscale, "_by_model", by_model)
    upscale.upscale("in", "out", model="filler", masks="masks")
    assert told == [(f"{tmp_path}/masks", [f"{tmp_path}/{name}" for name in ("in", "out", "masks")])]


def test_names_that_are_no_utf8_fail_and_are_made_like_others(
    tmp_path: Path, picky: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(log, "propagate", True)  # to `caplog`
    bad_and_good(tmp_path / "in", 0, 0)
    names = [os.fsdecode(b"caf\xe9.png"), "café.png"]
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"bad")
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", picky.url
    code, result, err = command(monkeypatch, capsys, *run)
    assert (code, result["failed"]) == (1, 2), err
    text = (tmp_path / "out/errors.json").read_bytes()
    assert {one["key"] for one in json.loads(text)} == set(names)
    assert "café".encode() in text
    assert {r"caf\udce9.png", "café.png"} == {line.partition(":")[0] for line in caplog.messages if "caf" in line}
    (tmp_path / "in" / names[0]).write_bytes(b"good")
    code, result, err = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["failed"]) == (1, 1, 1), err
    code, result, err = command(monkeypatch, capsys, *run)
    assert (code, result["skipped"], result["failed"]) == (1, 1, 1), err
    assert upscale._maker(names[0]) != upscale._maker(names[1])
    assert upscale._maker("a", 1) == contract.digest(["a", 1])[:16]


def bad_and_good(folder: Path, bad: int, good: int) -> None:
    """An endpoint that only knows bodies is told which are bad: they come first by their names."""
    folder.mkdir()
    for i in range(bad + good):
        (folder / f"{i:03d}.png").write_bytes(b"bad" if i < bad else b"good")


@pytest.fixture
def picky(server: Any) -> Any:
    """It refuses what is bad."""
    refusal = problem(422, "image", "image=3 bytes: is no picture; send a whole one")
    good, heard = server.default, server.next
    server.next = lambda asked: refusal if heard(asked) and asked.body == b"bad" else good
    return server


def test_bad_pictures_in_front_do_not_keep_a_run_from_those_behind(
    tmp_path: Path, picky: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run stops at them, the second begins behind them and tries them again."""
    bad, good = 25, 12
    bad_and_good(tmp_path / "in", bad, good)
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", picky.url, "--concurrency", "1"

    def once(*more: str) -> tuple[int, Any, str, list[str]]:
        code, result, err = command(monkeypatch, capsys, *run, *more)
        listed = json.loads((tmp_path / "out/errors.json").read_text())
        return code, result, err, [one["key"] for one in listed]

    code, result, err, listed = once()
    assert (code, result["made"], result["failed"]) == (1, 0, 20)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: --error-budget=0.0: 20 of the 20 pictures that were tried failed, 17 were not tried; "
    )
    assert "the last: image=3 bytes: is no picture" in err
    assert listed == [f"{i:03d}.png" for i in range(20)]

    code, result, err, listed = once()
    assert (code, result["made"], result["failed"]) == (1, good, bad), "all is tried, and all that can be is made"
    assert "error: pictures=25 of 37: could not be made" in err
    assert listed == [f"{i:03d}.png" for i in range(bad)]

    before = len(picky.asked)
    code, result, err, listed = once("--error-budget", "0.7")
    assert (code, result["skipped"], result["failed"], len(listed)) == (0, good, bad, bad), "25 of 37 are 0.68"
    assert "stopped: 20 of 20 failed" in err
    assert len(picky.asked) - before < bad, "what failed before is not tried without end, and counts nevertheless"
    (tmp_path / "in/024.png").write_bytes(b"good")
    code, result, err, listed = once("--error-budget", "0.7")
    assert (code, result["made"], result["failed"], len(listed)) == (0, 1, bad - 1, bad - 1)


def test_a_run_that_tried_all_has_not_stopped(
    tmp_path: Path, picky: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_and_good(tmp_path / "in", bulk.FAILED_LEAST, 0)
    code, result, err = command(monkeypatch, capsys, "upscale", tmp_path / "in", tmp_path / "out", "--url", picky.url)
    assert (code, result["failed"]) == (1, bulk.FAILED_LEAST)
    assert "error: pictures=20 of 20: could not be made" in err
    assert "stopped" not in err


def test_a_budget_of_one_never_stops(
    tmp_path: Path, picky: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_and_good(tmp_path / "in", 30, 2)
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", picky.url
    for skipped, tried in ((0, 32), (2, 30)):
        before = len(picky.asked)
        code, result, err = command(monkeypatch, capsys, *run, "--error-budget", "1")
        assert (code, result["made"] + result["skipped"], result["failed"], result["skipped"]) == (0, 2, 30, skipped)
        assert len(picky.asked) - before == tried
        assert "stopped" not in err


def test_an_endpoint_that_refuses_everything_is_not_asked_for_ever(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In no run, as long as a budget does not allow it; then, in the right settings, all are made at once."""
    bad_and_good(tmp_path / "in", 0, 60)
    good = server.default
    server.default = problem(401, "unauthorized", "key=(none): this server wants one; set RAYSCALE_API_KEY")
    run = "upscale", tmp_path / "in", tmp_path / "out", "--url", server.url, "--error-budget", "0.95"
    for known in (20, 40, 60, 60):
        before = len(server.asked)
        code, result, err = command(monkeypatch, capsys, *run)
        assert (code, result["made"], result["failed"]) == (1, 0, known)
        assert len(server.asked) - before < 40
        assert ("error: --error-budget=0.95: 20 of the 20 pictures" in err) == (known < 60), err
        assert ("error: pictures=60 of 60" in err) == (known == 60)
    server.default = good
    code, result, _ = command(monkeypatch, capsys, *run)
    assert (code, result["made"], result["failed"], (tmp_path / "out/errors.json").exists()) == (0, 60, 0, False)


def test_one_picture_goes_to_a_file(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.png").write_bytes(b"x")
    run = "upscale", tmp_path / "small.png"
    server.script = [Say(headers={**MADE_BY, "Content-Type": "image/jpeg"})]
    code, result, _ = command(monkeypatch, capsys, *run, tmp_path / "large.jpg", "--url", server.url)
    assert (code, result["out"]) == (0, str(tmp_path / "large.jpg"))
    assert server.asked[0].headers["accept"] == "image/jpeg"
    assert (tmp_path / "large.jpg").read_bytes() == server.default.body
    command(monkeypatch, capsys, *run, tmp_path / "folder", "--url", server.url, "--task", "restore")
    assert server.asked[1].path == "/v1/restore"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["small.png"]
    server.default = problem(422, "image", "image=1 bytes: no; send more")
    code, _, err = command(monkeypatch, capsys, *run, tmp_path / "none.png", "--url", server.url)
    assert (code, (tmp_path / "none.png").exists()) == (1, False)
    assert "image=1 bytes: no; send more" in err


# --- load


def test_bench_measures_an_endpoint(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [Say(status=502, body=b"Bad Gateway")]
    monkeypatch.setattr(sys, "argv", ["rayscale", "bench", server.url, "--rate", "40", "--seconds", "0.5",
                                      "--size", "24x16", "--model", "photos"])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr().out
    found = json.loads(out.strip().rpartition("\n")[2])
    assert ended.value.code in (0, None)
    assert (found["sent"], found["answered"], found["errors"]) == (20, 19, {"502": 1})
    assert found["models"] == {"photos:3": 19}
    assert set(found["latency_ms"]) == {"p50", "p90", "p95", "p99", "max"}
    for row in ("latency", "sent late", "1 x 502", "19 by photos:3"):
        assert row in out
    bodies = [asked.body for asked in server.asked]
    assert len(set(bodies)) == 16, "different pictures, so that nothing is answered from memory"
    assert imaging.decode_rgb(bodies[0]).shape == (16, 24, 3)

    server.default = problem(401, "unauthorized", "key=(none): this server wants one; set RAYSCALE_API_KEY")
    code, _, err = command(monkeypatch, capsys, "bench", server.url, "--rate", "20", "--seconds", "0.2")
    assert code == 1
    assert "this server wants one" in err
    code, _, err = command(monkeypatch, capsys, "bench", server.url, "--size", "big")
    assert (code, len(err.splitlines())) == (2, 1)
