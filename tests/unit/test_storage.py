"""Local storage: atomic writes, keys that stay inside, errors in one line. S3 is under tests/contract."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayscale import storage
from rayscale.errors import ConfigError, ConflictError, MissingError, ResourceError
from rayscale.storage import (
    LocalStore,
    check_free,
    download_dir,
    home,
    join,
    open_store,
    overlap,
    ray_filesystem,
    upload_dir,
)


def files(folder: Path) -> set[str]:
    """Everything below a folder, temporaries too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_open_store_knows_local_paths_and_refuses_other_schemes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("photos").uri == str(tmp_path / "photos")  # absolute: workers run elsewhere
    assert open_store(f"file://{tmp_path}").uri == open_store(tmp_path).uri == str(tmp_path)
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    for wrong in ("gs://bucket/x", "http://host/x", "s3://", "file://relative"):
        with pytest.raises(ConfigError, match="use a local path"):
            open_store(wrong)


def test_join_and_home(monkeypatch, tmp_path):
    assert join("s3://b/", "a", "/c/") == "s3://b/a/c"
    assert join(tmp_path, "x") == f"{tmp_path}/x"
    monkeypatch.setenv("RAYSCALE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("RAYSCALE_HOME")
    assert home() == Path.home() / ".rayscale"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", "a/..", "a\0b"])
def test_keys_that_leave_the_root_are_refused(tmp_path, key):
    store = open_store(tmp_path / "root")
    for act in (store.read, store.exists, store.delete, lambda k: store.write(k, b"x")):
        with pytest.raises(ConfigError, match="must stay inside"):
            act(key)
    assert files(tmp_path) == set()
    store.write("a/..b/x..", b"fine")  # dots inside a name are no escape
    assert store.read("a/..b/x..") == b"fine"


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "photos/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jpg").write_bytes(b"1")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/deep/circle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/broken").symlink_to(tmp_path / "nowhere")
    assert [e.key for e in open_store(tmp_path / "photos").list()] == ["linked/a.jpg"]


@pytest.mark.parametrize("limit_bytes", [1 << 16, 1 << 22])
def test_a_failed_write_leaves_the_old_object_and_nothing_else(tmp_path, limit_bytes):
    """The operating system's limit on file size stands for the full disk; under the larger one all writes pass."""
    store, big = open_store(tmp_path / "store"), tmp_path / "big"
    store.write("shard.tar", b"old")
    big.write_bytes(bytes(1 << 20))
    code = f"""
import resource
from pathlib import Path
from rayscale.errors import ResourceError
from rayscale.storage import open_store
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))
store = open_store({store.uri!r})
store.write("small", bytes(1 << 15))
for act in (lambda: store.write("shard.tar", bytes(1 << 20)), lambda: store.upload(Path({str(big)!r}), "copy")):
    try:
        act()
    except ResourceError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    if limit_bytes > 1 << 20:
        assert lines == []
        assert files(Path(store.uri)) == {"shard.tar", "small", "copy"}
        return
    assert len(lines) == 2
    assert all("cannot be written (File too large); free some space" in line for line in lines)
    assert f"{store.uri}/shard.tar" in lines[0]
    assert f"{store.uri}/copy" in lines[1]
    assert files(Path(store.uri)) == {"shard.tar", "small"}
    assert store.read("shard.tar") == b"old"


def test_a_stamp_is_another_after_every_write(tmp_path, monkeypatch):
    store, file = LocalStore(str(tmp_path)), tmp_path / "x"
    file.write_bytes(b"one")
    assert store.stamp("x") == ""  # so fresh that a second write might bear the same time
    assert store.stamp("none") == ""
    monkeypatch.setattr(storage, "CLOCK_STEP_S", -1.0)
    before, info = store.stamp("x"), file.stat()
    assert before == store.stamp("x") != ""
    file.read_bytes()
    assert store.stamp("x") == before

    def age() -> None:  # size and modification time as they were
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))

    time.sleep(0.02)  # more than a tick of the kernel's clock
    file.write_bytes(b"two")
    age()
    written = store.stamp("x")
    assert written != before
    (tmp_path / "y").write_bytes(b"one")
    (tmp_path / "y").replace(file)
    age()
    assert store.stamp("x") not in ("", before, written)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """ENOSPC itself, from a file system of 1 MiB that a private mount namespace allows us to make."""
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec "
    code = f"""
import os
from rayscale.errors import ResourceError
from rayscale.storage import check_free, open_store
store = open_store({str(tmp_path)!r})
store.write("a", bytes(600 << 10))
for act in (lambda: store.write("b", bytes(600 << 10)), lambda: check_free(store.uri, 600 << 10, "the dataset")):
    try:
        act()
    except ResourceError as error:
        print(error)
print(sorted(os.listdir({str(tmp_path)!r})))
"""
    command = ["unshare", "-rm", "sh", "-c", mount + '"$0" -c "$1"', sys.executable, code]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no private mount namespaces here; test_a_failed_write_... covers the path")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    write, check, left = done.stdout.splitlines()
    assert "No space left on device" in write
    assert "the dataset needs 1 MiB, the disk has 0 MiB free" in check
    assert left == "['a']"


def test_check_free_passes_where_there_is_room_and_looks_at_the_nearest_parent(tmp_path):
    check_free(tmp_path / "not/there/yet", 1 << 20, "a test")
    check_free("s3://bucket/x", 1 << 60, "a test")
    with pytest.raises(ResourceError, match="a test needs"):
        check_free(tmp_path / "not/there/yet", 1 << 60, "a test")


def test_a_writer_killed_half_way_leaves_nothing_that_is_listed_and_sweep_removes_it(tmp_path):
    code = f"""
import time
from rayscale import storage
with storage.whole(storage.open_store({str(tmp_path)!r}).path("x/shard.tar")) as temporary:
    temporary.write_bytes(b"half")
    print("written", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    store = open_store(tmp_path)
    assert len(files(tmp_path)) == 1  # it is there ...
    assert list(store.list()) == []  # ... but no object
    assert not store.exists("x/shard.tar")
    store.write("kept", b"1")
    for folder, names in (("x", "other.tar"), ("", "shard.tar"), ("none", "shard.tar")):  # of another writer, or place
        store.sweep(folder, re.compile(names))
    assert len(files(tmp_path)) == 2
    store.sweep("x", re.compile(r"shard\.tar"))
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["kept"]


def test_sweep_leaves_what_is_not_by_our_naming(tmp_path):
    others = {"x/.tmp-mine", f"x/.tmp-{'0' * 31}-a", f"x/.tmp-{'0' * 32}-b", f"x/y/.tmp-{'0' * 32}-a", "x/a"}
    for name in (*others, f"x/.tmp-{'0' * 32}-a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "x/empty").mkdir()
    open_store(tmp_path).sweep("x", re.compile("a"))
    assert files(tmp_path) == others
    assert (tmp_path / "x/empty").is_dir()


def test_places_overlap_by_whatever_path_they_are_named(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    within = [("a", "a"), ("a", "a/b"), ("link", "a/b"), ("link/new", "a"), ("a/b/../../link", "a/b/c"), ("/", "a")]
    apart = [("a", "a-b"), ("a/b", "a/c"), ("link", "link-2"), ("link/..", "a-b"), ("link", "a/bb")]
    for pairs, expected in ((within, True), (apart, False)):
        for one, two in pairs:
            places = [open_store(os.path.join(tmp_path, name)) for name in (one, two)]  # noqa: PTH118  keeps the ".."
            assert overlap(*places) == overlap(*places[::-1]) == expected, (one, two)
    assert overlap(open_store("s3://bucket/a"), open_store("s3://bucket"))
    assert not overlap(open_store("s3://bucket/a"), open_store("s3://bucket/ab"))


def test_of_many_writers_with_if_absent_exactly_one_wins(tmp_path):
    store, won, start = open_store(tmp_path), [], threading.Barrier(8)

    def race(who: int) -> None:
        start.wait()
        try:
            store.write("lock", b"%d" % who, if_absent=True)
            won.append(who)
        except ConflictError:
            pass

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("lock") == b"%d" % won[0]
    assert files(tmp_path) == {"lock"}


def test_errors_of_the_operating_system_are_told_in_one_line(tmp_path):
    store = open_store(tmp_path)
    store.write("file", b"1")
    (tmp_path / "folder").mkdir()
    for act in (lambda: store.read("none"), lambda: store.read("folder"), lambda: store.read("file/below"),
                lambda: store.download("none", tmp_path / "to"), lambda: store.upload(tmp_path / "none", "k"),
                lambda: store.write("folder", b"1")):  # fmt: skip
        with pytest.raises(MissingError) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert ".tmp-" not in str(caught.value)
    with pytest.raises(MissingError, match="/none: cannot be used"):
        store.download("none", tmp_path / "to")
    with pytest.raises(ConflictError):
        store.write("file/below", b"1")
    assert files(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MissingError, match="permissions"):
        open_store(tmp_path).write("x", b"1")


def test_folders_travel_whole_and_the_last_file_last(tmp_path):
    source, uploaded = tmp_path / "source", []
    for name in ("card.json", "golden.npz", "model.onnx", "sub/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())

    class Recording(LocalStore):
        def upload(self, path, key):
            uploaded.append(key)
            super().upload(path, key)

    upload_dir(source, tmp_path / "a")
    assert files(tmp_path / "a") == files(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayscale.storage.open_store", lambda uri: Recording(str(uri)))
        upload_dir(source, tmp_path / "b", last="card.json")
    assert uploaded == ["golden.npz", "model.onnx", "sub/x", "card.json"]
    download_dir(tmp_path / "b", tmp_path / "c")
    assert {n: (tmp_path / "c" / n).read_bytes() for n in files(source)} == {n: n.encode() for n in files(source)}
    for act in (lambda: upload_dir(tmp_path / "none", tmp_path / "d"), lambda: download_dir(tmp_path / "none", "x"),
                lambda: upload_dir(source, tmp_path / "d", last="manifest.json")):  # fmt: skip
        with pytest.raises(MissingError):
            act()
    assert not (tmp_path / "d").exists()


def test_stores_are_values(tmp_path):
    store = open_store(tmp_path)
    assert pickle.loads(pickle.dumps(store)) == store
    assert pickle.loads(pickle.dumps(open_store("s3://b/p"))) == open_store("s3://b/p")


def test_ray_filesystem_of_a_local_path(tmp_path):
    assert ray_filesystem(tmp_path) == (None, str(tmp_path))
    assert ray_filesystem(f"file://{tmp_path}/runs") == (None, f"{tmp_path}/runs")
