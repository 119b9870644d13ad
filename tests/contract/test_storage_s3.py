"""Every store keeps the same promises: the same tests over a folder and over S3 (moto, over HTTP).

The faults of a network come from a proxy of our own between boto3 and moto.
"""

from __future__ import annotations

import pickle
import re
import runpy
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from rayscale import storage_s3
from rayscale.data.pack import pack
from rayscale.data.parallel import local
from rayscale.data.scan import PackSettings
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, ConflictError, MissingError, UnavailableError
from rayscale.storage import download_dir, join, open_store, ray_filesystem, upload_dir

FaultProxy = runpy.run_path(str(Path(__file__).parents[1] / "fault_proxy.py"))["FaultProxy"]


@pytest.fixture(scope="session")
def swift(tmp_path_factory):
    """(Swift, keys not used yet): an account for each test."""
    module = runpy.run_path(str(Path(__file__).parents[1] / "swift_server.py"))
    if lacking := module["missing"]():
        pytest.skip(f"OpenStack Swift is not installed (no {lacking}): pip install swift, apt-get install memcached")
    server = module["Swift"](tmp_path_factory.mktemp("swift"), 100)
    yield server, [f"a{i}:user" for i in range(100)]
    server.close()


def pytest_generate_tests(metafunc):
    """Each test runs against moto and, as a long one, against Swift; against one of them where it asks for it."""
    if "where" in metafunc.fixturenames:
        local = ["local"] if "uri" in metafunc.fixturenames else []
        moto = [] if "swift" in metafunc.fixturenames else ["moto"]
        asks_for_moto = {"moto", "moto_auth"} & set(metafunc.fixturenames)
        swift = [] if asks_for_moto else [pytest.param("swift", marks=pytest.mark.long)]
        metafunc.parametrize("where", local + moto + swift)


@pytest.fixture
def s3_server(where, request):
    if where == "swift":
        server, keys = request.getfixturevalue("swift")
        yield server.url, keys.pop(), "testing"
    else:
        moto = request.getfixturevalue("moto")
        yield moto, "key", "secret"
        urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST"))


@pytest.fixture
def uri(where, request, tmp_path):
    return str(tmp_path / "set") if where == "local" else request.getfixturevalue("s3")


# ------------------------------------------------------------------------------------- what every store promises


def test_objects_come_back_whole_and_by_range(uri):
    store = open_store(uri)
    data = bytes(range(256)) * 40
    for key in ("a/b/shard.tar", "with space/ünï.jpg", "plain"):
        store.write(key, bytearray(data))
        assert store.read(key) == data
    read = store.read
    assert read("plain", start=10, length=7) == data[10:17]
    assert read("plain", start=10_000) == data[10_000:]
    assert read("plain", start=10_000, length=10_000) == data[10_000:]  # fewer only at the end
    assert read("plain", start=len(data), length=5) == read("plain", length=0) == read("plain", start=10**9) == b""
    store.write("empty", b"")
    assert store.read("empty") == store.read("empty", start=0, length=5) == b""
    store.write("plain", b"new")
    assert store.read("plain") == b"new"


def test_an_object_that_was_overwritten_is_noticed(uri):
    store = open_store(uri)
    store.write("x", b"first bytes")
    data, etag = store.get("x", start=2, length=3)
    assert (data, etag) == (b"rst", next(iter(store.list("x"))).etag)
    for _ in range(3):  # the first GET of a bucket is another one than those that follow
        assert store.read("x", start=6, length=5, etag=etag) == store.read("x", start=6, etag=etag) == b"bytes"
    assert store.read("x", etag=etag) == b"first bytes"
    assert store.read("x", start=11, etag=etag) == store.read("x", start=11, length=5, etag=etag) == b""
    store.write("x", b"other bytes!")
    for asked in ({"start": 2, "length": 3}, {}):
        with pytest.raises(ConflictError, match=r"object=.*/x: was overwritten since it was first read"):
            store.get("x", etag=etag, **asked)
        assert store.get("x", **asked).etag != etag  # negative control: nobody asked for the first one


def test_listings_are_sorted_by_whole_key_and_stay_inside(uri):
    store = open_store(uri)
    keys = ["a", "a.txt", "a/b", "a/b.txt", "a0", "sub/deep/x", "Z", "é"]
    for key in reversed(keys[1:]):
        store.write(key, key.encode())
    open_store(uri + "2").write("stranger", b"1")  # a neighbour whose name begins alike
    listed = list(store.list())
    assert [e.key for e in listed] == sorted(keys[1:])
    assert {e.key: e.size for e in listed} == {k: len(k.encode()) for k in keys[1:]}
    assert [e.key for e in store.list("a")] == ["a.txt", "a/b", "a/b.txt", "a0"]
    assert [e.key for e in store.list("a/")] == ["a/b", "a/b.txt"]
    assert [e.key for e in store.list("none/")] == []
    assert list(open_store(join(uri, "nothing")).list()) == []
    before = {e.key: e.etag for e in listed}
    store.write("a/b", b"other bytes")
    after = {e.key: e.etag for e in store.list()}
    assert {k for k in before if before[k] != after[k]} == {"a/b"}


def test_exists_delete_and_missing(uri):
    store = open_store(uri)
    store.write("x/y", b"1")
    assert store.exists("x/y")
    assert not store.exists("x")
    store.delete("x/y")
    store.delete("x/y")  # gone is gone
    assert not store.exists("x/y")
    for act in (lambda: store.read("x/y"), lambda: store.read("x/y", start=1, length=2)):
        with pytest.raises(MissingError) as caught:
            act()
        assert "x/y" in str(caught.value)


def test_if_absent_lets_one_writer_through(uri):
    store = open_store(uri)
    store.write("manifest.json", b"first", if_absent=True)
    with pytest.raises(ConflictError, match="exists already"):
        store.write("manifest.json", b"second", if_absent=True)
    with pytest.raises(ConflictError):  # equal bytes of another writer are no win either: this elects
        store.write("manifest.json", b"first", if_absent=True)
    assert store.read("manifest.json") == b"first"


def test_files_travel_both_ways(uri, tmp_path):
    store, source, back = open_store(uri), tmp_path / "source", tmp_path / "x/back"
    source.write_bytes(bytes(range(256)) * 9000)
    store.upload(source, "big/file")
    store.download("big/file", back)
    assert back.read_bytes() == source.read_bytes()
    with pytest.raises(MissingError):
        store.download("none", tmp_path / "none")
    with pytest.raises(MissingError):
        store.upload(tmp_path / "none", "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "set") == ["source", "x"]
    upload_dir(tmp_path / "x", join(uri, "folder"), last="back")
    download_dir(join(uri, "folder"), tmp_path / "again")
    assert (tmp_path / "again/back").read_bytes() == source.read_bytes()
    with pytest.raises(MissingError, match="holds nothing"):
        download_dir(join(uri, "nowhere"), tmp_path / "again")


def test_stores_travel_to_other_processes(uri):
    store = open_store(uri)
    store.write("x", b"there")
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read('x'))"
    sent = pickle.dumps(store)
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"there"


def test_threads_share_a_store(uri):
    store = open_store(uri)
    for i in range(8):
        store.write(str(i), b"%d" % i)
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda i=i: got.append(store.read(str(i)))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [b"%d" % i for i in range(8)]


# -------------------------------------------------------------------------------------------------- S3 alone


def test_more_objects_than_one_page_and_the_folders_of_consoles(s3, monkeypatch):
    store = open_store(s3)
    for i in range(7):
        store.write(f"p/{i}", b"1")
    storage_s3.client().put_object(Bucket="photos", Key="set/p/", Body=b"")
    real = storage_s3._list_page
    monkeypatch.setattr(storage_s3, "_list_page", lambda query, s3: real({**query, "MaxKeys": 3}, s3))
    assert [e.key for e in store.list("p")] == [f"p/{i}" for i in range(7)]
    assert [e.key for e in open_store("s3://photos").list()] == [f"set/p/{i}" for i in range(7)]


def test_a_missing_bucket_is_told_by_every_act(s3, tmp_path):
    store = open_store("s3://no-such-bucket/x")
    (tmp_path / "f").write_bytes(b"1")
    for act in (lambda: list(store.list()), lambda: store.read("k"), lambda: store.write("k", b"1"),
                lambda: store.upload(tmp_path / "f", "k")):  # fmt: skip
        with pytest.raises(MissingError, match="no such bucket"):
            act()


def test_no_credentials_and_wrong_ones_name_the_setting(s3, moto_auth, monkeypatch):
    store = open_store(s3)
    store.write("x", b"1")
    moto_auth(b"0")  # from now on moto looks the keys up
    try:
        for act in (lambda: store.read("x"), lambda: list(store.list()), lambda: store.exists("x"),
                    lambda: store.write("x", b"2")):  # fmt: skip
            with pytest.raises(ConfigError) as caught:
                act()
            assert caught.value.field == "AWS_ACCESS_KEY_ID"
            assert "refused" in str(caught.value)
            assert "secret" not in str(caught.value)
    finally:
        moto_auth(b"inf")
    assert store.read("x") == b"1"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        ConfigError, match=r"AWS_ACCESS_KEY_ID=\(not in the environment\): Unable to locate credentials"
    ):
        store.read("x")


def test_a_wrong_secret_is_refused_whoever_signs(s3, swift, monkeypatch):
    store = open_store(s3)
    store.write("x", b"1234")
    assert store.read("x", start=1, length=2) == store.read("x", start=1, length=2) == b"23"
    learnt = storage_s3.gets()._addresses
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for addresses in ({}, learnt):  # boto3 asks; its request is repeated
        storage_s3.gets()._addresses = addresses
        with pytest.raises(ConfigError, match=r"AWS_ACCESS_KEY_ID=a\d+:user: access .* was refused"):
            store.read("x", start=1, length=2)


def test_an_endpoint_that_is_no_url_or_not_there(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL=localhost:9000"):
        open_store(s3).read("x")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(storage_s3, "TRIES", 1)
        with pytest.raises(UnavailableError, match="failed 1 times"):
            open_store(s3).read("x")


def test_ray_writes_through_pyarrow_to_the_same_place(s3):
    filesystem, path = ray_filesystem(join(s3, "runs"))
    assert path == "photos/set/runs"
    with pickle.loads(pickle.dumps(filesystem)).open_output_stream(f"{path}/a/checkpoint.json") as stream:
        stream.write(b"{}")
    assert open_store(s3).read("runs/a/checkpoint.json") == b"{}"


@pytest.mark.long
def test_what_ray_writes_waits_for_a_store_that_is_away(moto, s3, monkeypatch):
    """Ray Train ends a run whose list of checkpoints cannot be written."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    filesystem = pickle.loads(pickle.dumps(ray_filesystem(s3)[0]))
    usual = fs.S3FileSystem(region="us-east-1", endpoint_override=f"127.0.0.1:{port}", scheme="http")
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):  # negative control
        usual.get_file_info("photos")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    back = threading.Timer(5.0, server.start)  # pyarrow's own three attempts take 3 s at most
    back.start()
    try:
        with filesystem.open_output_stream("photos/late") as stream:
            stream.write(b"kept")
        assert open_store("s3://photos").read("late") == b"kept"
    finally:
        back.join()
        server.stop()


def test_ranged_reads_repeat_what_boto3_sent_with_credentials_that_may_change(s3, monkeypatch):
    store, sent = open_store(s3), []
    store.write("with space/ünï+~.jpg", bytes(range(100)))
    assert store.read("with space/ünï+~.jpg", start=1, length=2) == b"\1\2"  # boto3, to learn the address
    gets = storage_s3.gets()
    monkeypatch.setattr(gets, "_ask", lambda *_: pytest.fail("asked boto3"))
    address = gets._addresses["photos"]
    real = address.connections.get
    monkeypatch.setattr(address.connections, "get", lambda *asked: (sent.append(asked), real(*asked))[1])
    assert store.read("with space/ünï+~.jpg", start=3, length=2) == b"\3\4"
    path, headers = sent[0]
    assert path == "/photos/set/with%20space/%C3%BCn%C3%AF%2B~.jpg"
    signed = headers["authorization"]
    assert "/us-east-1/s3/aws4_request, SignedHeaders=host;range;x-amz-content-sha256;x-amz-date" in signed
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of a role")
    assert store.read("with space/ünï+~.jpg", start=3, length=2) == b"\3\4"  # other settings, another client
    assert len(sent) == 1
    token = storage_s3.gets()
    assert token is not gets
    assert token._credentials.token == "of a role"


def test_connections_stay_open_and_those_that_a_server_closed_are_opened_anew(faults, s3):
    store = open_store(s3)
    store.write("x", b"1234")
    for _ in range(4):
        assert store.read("x", start=1, length=2) == b"23"
    connections = storage_s3.gets()._addresses["photos"].connections
    (kept,) = connections.idle
    assert store.read("x", start=1, length=2) == b"23"
    assert connections.idle == [kept]
    kept.sock.shutdown(socket.SHUT_RDWR)
    faults.script += ["", "slow"]  # no try of ours is counted
    assert store.read("x", start=1, length=2) == b"23"
    assert connections.idle != [kept]
    assert len(faults.script) == 1
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: store.read("x", start=1, length=2), range(40))) == {b"23"}
    assert len(connections.idle) <= 8


def test_an_answer_in_chunks_is_left_to_boto3(faults, s3, caplog):
    store = open_store(s3)
    store.write("x", b"1234")
    assert store.read("x", start=1, length=2) == b"23"
    learnt = storage_s3.gets()._addresses
    assert learnt["photos"] is not None
    faults.script += ["chunks", "chunks"]
    assert [store.read("x", start=1, length=2) for _ in range(3)] == [b"23"] * 3
    assert learnt == {"photos": None}
    assert faults.seen[-4:] == ["GET chunks", "GET chunks", "GET", "GET"]
    assert [r.getMessage() for r in caplog.records if r.name == "rayscale"] == [
        "s3://photos/set/x: a body of unknown length: boto3 reads this bucket from here on"
    ]


def test_a_server_with_tls_is_known_by_the_authorities_that_boto3_trusts(s3, moto, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    what = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "certificate"]
    subprocess.run(["openssl", *what, *names], cwd=tmp_path, check=True, capture_output=True)
    open_store(s3).write("x", b"1234")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    proxy = FaultProxy(moto, context)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(storage_s3, "TRIES", 1)
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        open_store(s3).read("x", start=1, length=2)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate"))
    for _ in range(2):
        assert open_store(s3).read("x", start=1, length=2) == b"23"
    gets = storage_s3.gets()
    gets._authorities = True  # negative control: the repeated request looks at the certificate, too
    gets._addresses["photos"] = gets._learn("set/x")
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        open_store(s3).read("x", start=1, length=2)
    proxy.close()


def test_a_proxy_of_the_environment_is_left_to_boto3(s3, moto, monkeypatch):
    open_store(s3).write("x", b"1234")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.amazonaws.com")
    monkeypatch.setenv("HTTP_PROXY", moto)
    for _ in range(2):
        assert open_store(s3).read("x", start=1, length=2) == b"23"
    assert storage_s3.gets()._addresses == {"photos": None}


# ------------------------------------------------------------------------------------------- a bad network


DATA = bytes(range(256)) * 400


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "lost", "page"])
def test_reads_come_back_whole_through_faults(faults, s3, fault, tmp_path):
    store = open_store(s3)
    store.write("x", DATA)
    faults.script += [fault] * 4  # more than botocore's own three
    assert store.read("x", start=1000, length=50_000) == DATA[1000:51_000]
    faults.script += [fault] * 2
    assert store.read("x") == DATA
    faults.script += [fault] * 2
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert faults.seen.count(f"GET {fault}") == 8


def test_a_flipped_bit_of_a_whole_object_is_found_by_its_checksum(faults, s3, moto, tmp_path):
    """Where the server keeps one, as AWS and moto do; Swift does not."""
    store = open_store(s3)
    store.write("x", DATA)
    faults.script += ["flip"] * 2
    assert store.read("x") == DATA
    faults.script += ["flip"] * 2
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    faults.script += ["flip"]  # negative control: a part has none, so its reader must know what to expect
    assert store.read("x", length=1000) != DATA[:1000]


def test_failures_are_told_one_line_each_and_end(faults, s3, monkeypatch, caplog):
    store = open_store(s3)
    store.write("x", DATA)
    store.read("x", length=9)
    faults.script += ["cut", "page", "503"]
    assert store.read("x", length=9) == DATA[:9]
    told = [record.getMessage() for record in caplog.records if record.name == "rayscale"]
    assert len(told) == 3
    for i, (line, why) in enumerate(zip(told, ("IncompleteRead", "no object", "503"), strict=True)):
        assert re.search(rf"set/x: failed \(.*{why}.*\); try {i + 2} of 10 in 0\.\d s$", line), line
    monkeypatch.setattr(storage_s3, "GIVE_UP_S", 0.0)  # no time for another try
    faults.script += ["cut"]
    with pytest.raises(UnavailableError, match="failed 1 times"):
        store.read("x", length=9)
    assert faults.script == []


def test_a_truncated_body_is_not_retried_by_botocore_itself(faults, s3):
    """Negative control: without our own retries around the body the same fault is an error."""
    open_store(s3).write("x", DATA)
    faults.script += ["cut"]
    with pytest.raises(Exception, match=r"(?i)read|broken|incomplete"):
        storage_s3.client().get_object(Bucket="photos", Key="set/x")["Body"].read()


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_writes_arrive_through_faults(faults, s3, fault, tmp_path):
    store = open_store(s3)
    faults.script += [fault] * 2
    store.write("x", DATA, if_absent=True)
    (tmp_path / "f").write_bytes(DATA)
    faults.script += [fault] * 2
    store.upload(tmp_path / "f", "f")
    assert store.read("x") == store.read("f") == DATA


def test_a_won_write_whose_answer_was_lost_is_no_conflict(faults, s3):
    store = open_store(s3)
    faults.script += ["lost"]
    store.write("lock", b"mine", if_absent=True)
    assert faults.seen == ["PUT lost", "PUT", "GET"]  # tried again, refused, looked: the object is ours
    faults.script += ["lost"]
    with pytest.raises(ConflictError):  # the same with another's object there
        store.write("lock", b"other", if_absent=True)


def test_a_server_that_only_fails_is_unavailable(faults, s3, monkeypatch, tmp_path):
    monkeypatch.setattr(storage_s3, "TRIES", 2)
    store = open_store(s3)
    store.write("x", DATA)
    faults.script += ["cut"] * 20
    with pytest.raises(UnavailableError, match="failed 2 times") as caught:
        store.download("x", tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ datasets on S3

SETTINGS = PackSettings(shard_bytes=60_000, min_side=32, validation_fraction=0.2, test_fraction=0.2)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (50, 60 + i, 3), np.uint8)
        (folder / f"{i:02}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return folder


def test_a_bucket_gives_the_same_dataset_as_a_folder(s3, photos, tmp_path):
    upload_dir(photos, join(s3, "in"))
    here = pack(str(photos), str(tmp_path / "out"), SETTINGS).manifest
    remote = pack(join(s3, "in"), join(s3, "out"), SETTINGS, mapper=local(5)).manifest
    assert remote.source == join(s3, "in")
    assert replace(remote, source=here.source) == here
    download_dir(join(s3, "out"), tmp_path / "back")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {p.name for p in (tmp_path / "back").iterdir()} == names
    for name in names - {"manifest.json", "origin.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert pack(join(s3, "in"), join(s3, "out"), SETTINGS).existed
    open_store(join(s3, "in")).write("new.png", (photos / "00.png").read_bytes() + b"more")
    with pytest.raises(ConflictError, match="other photos"):
        pack(join(s3, "in"), join(s3, "out"), SETTINGS)


def test_an_empty_or_missing_bucket_has_no_photos(s3, photos):
    for source in (join(s3, "in"), "s3://photos", "s3://no-such-bucket"):
        with pytest.raises(MissingError):
            pack(source, "s3://photos2/out")
    with pytest.raises(MissingError, match="no such bucket"):  # told before the photos are looked at
        pack(str(photos), "s3://no-such-bucket/out", on_progress=lambda *_: pytest.fail("scanned"))
    with pytest.raises(MissingError, match="no such bucket"):
        open_split("s3://no-such-bucket/out", "train")
