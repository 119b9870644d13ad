"""The journal on a real MLflow: racing promoters, every step the last, a server that dies in the middle."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayscale.cli.models import history, list_models, rollback
from rayscale.cli.promote import _champion, _passed_before
from rayscale.errors import ConfigError, ConflictError, MissingError, UnavailableError
from rayscale.observe import log
from rayscale.registry import canary, journal
from rayscale.registry.journal import DONE, EXTERNAL, FORCED, INTENT, PROMOTE, Entry, Journal, gated
from rayscale.registry.models import Registry
from rayscale.serve.rollout import Desired, read_desired

TESTS = Path(__file__).parents[1]
shared = runpy.run_path(str(TESTS / "interrupted.py"))
Killed, Interrupted = shared["Killed"], shared["Interrupted"]
promoters = runpy.run_path(str(TESTS / "promoters.py"))
model, agreed, raced = promoters["model"], promoters["agreed"], promoters["raced"]
FaultProxy = runpy.run_path(str(TESTS / "fault_proxy.py"))["FaultProxy"]
ALIAS = "champion"


@pytest.fixture
def registry(mlflow_home: Path) -> Registry:
    return Registry()


# --- races ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("races", [8, pytest.param(200, marks=pytest.mark.long)])
def test_of_two_promoters_at_once_one_wins(registry: Registry, races: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "HASTE_S", 60.0)  # other tests may run beside
    versions, before, lost = model(registry, "m0"), None, []
    with ThreadPoolExecutor(2) as pool:
        for i in range(races):
            if i % 20 == 19:
                versions, before = model(registry, f"m{i}"), None
            name = versions[1].name
            told = raced(registry, versions, before, pool)
            won = [one for one in told if isinstance(one, Entry)]
            lost += [one for one in told if not isinstance(one, Entry)]
            assert len(won) <= 1
            counted = agreed(registry, name)
            before = registry.aliases(name).get(ALIAS)
            assert [e.kind for e in counted] == [INTENT, DONE] * (len(counted) // 2)
            assert before == won[0].to == counted[-1].to
    assert len(lost) == races
    assert all(isinstance(one, ConflictError) and "(promote)" in str(one) for one in lost), lost


def test_without_the_journals_check_both_win(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    both, versions = threading.Barrier(2), model(registry, "m")
    registry.client.set_registered_model_alias("m", ALIAS, "1")
    monkeypatch.setattr(journal, "HASTE_S", 60.0)
    monkeypatch.setattr(Journal, "_check", lambda self, intent: both.wait(60) and None)
    monkeypatch.setattr(Journal, "_concluded", lambda self, intent: intent)
    with ThreadPoolExecutor(2) as pool:
        told = raced(registry, versions, 1, pool)
    assert sorted(one.to for one in told) == [2, 3]


# --- crashes, and MLflow away -----------------------------------------------------------------------------------


def test_every_step_may_be_the_last(registry: Registry) -> None:
    """Killed, or MLflow away, after request k; the next command heals, the one after it moves."""
    for k in range(20):
        versions = model(registry, f"m{k}")
        name, interrupted = versions[1].name, Registry(registry.uri)
        error = Killed() if k % 2 else ConnectionError("refused")
        interrupted.client = Interrupted(registry.client, k, late=True, error=error)
        try:
            Journal(interrupted, name).move(ALIAS, versions[1], before=None, decision=PROMOTE)
        except (Killed, UnavailableError):
            counted, stands = agreed(registry, name), registry.aliases(name).get(ALIAS)
            assert stands == (None if k < 7 else 1)
            assert [e.kind for e in counted] == ([] if k < 4 else [INTENT, DONE if stands else "abandoned"])
            Journal(registry, name).move(ALIAS, versions[2], before=stands, decision=PROMOTE)
            assert registry.aliases(name) == {ALIAS: 2}
        else:
            break
    assert interrupted.client.sent == [
        "search_model_versions", "get_registered_model", "create_model_version", "create_registered_model",
        "create_model_version", "search_model_versions", "get_registered_model", "set_registered_model_alias",
        "get_registered_model", "create_model_version", "search_model_versions"]  # fmt: skip


class Server:
    """`mlflow server` on a database, that can be killed and started again at its port."""

    def __init__(self, database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}",
                        "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else it starts a dozen processes
        self.process = subprocess.Popen(self.command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
        waited = threading.Event()
        while not self.answers():
            assert self.process.poll() is None, "the server ended"
            waited.wait(0.1)

    def answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=1).status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(mlflow_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(mlflow_home / "mlflow.db")
    made.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield made
    made.kill()


class Watched:
    """A client that calls `then` before a request of this name."""

    def __init__(self, client: Any, name: str, then: Callable[[], None]) -> None:
        self.client, self.name, self.then = client, name, then

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            self.name = ""
            self.then()
        return getattr(self.client, name)


@pytest.mark.long
def test_a_server_that_is_killed_in_the_middle_loses_nothing(server: Server) -> None:
    """Before the alias is set, and after."""
    registry = Registry(server.url)
    versions = model(registry, "m")
    Journal(registry, "m").move(ALIAS, versions[1], before=None, decision=PROMOTE)
    cut = Registry(server.url)
    cut.client = Watched(registry.client, "set_registered_model_alias", server.kill)
    with pytest.raises(UnavailableError):
        Journal(cut, "m").move(ALIAS, versions[2], before=1, decision=PROMOTE)
    server.start()
    assert [e.kind for e in agreed(registry, "m")] == [INTENT, DONE, INTENT, "abandoned"]
    assert registry.aliases("m") == {ALIAS: 1}

    def set_then_die(*args: Any) -> None:
        registry.client.set_registered_model_alias(*args)
        server.kill()

    cut.client = Watched(registry.client, "", server.kill)
    cut.client.set_registered_model_alias = set_then_die
    with pytest.raises(UnavailableError):
        Journal(cut, "m").move(ALIAS, versions[2], before=1, decision=PROMOTE)
    server.start()
    assert [e.kind for e in agreed(registry, "m")][-2:] == [INTENT, DONE]
    assert registry.aliases("m") == {ALIAS: 2}


@pytest.mark.long
def test_requests_whose_answers_are_lost_are_sent_twice_and_count_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultProxy(server.url)
    registry = Registry(server.url)
    versions = model(registry, "m")
    Journal(registry, "m").move(ALIAS, versions[1], before=None, decision=PROMOTE)
    flaky = Registry(proxy.url)
    proxy.seen.clear()
    proxy.script += ["", "", "lost", "", "", "", "lost", "", "lost"]
    Journal(flaky, "m").move(ALIAS, versions[2], before=1, decision=PROMOTE)
    assert sum("lost" in one for one in proxy.seen) == 3
    proxy.close()
    assert len(Journal(registry, "m").read()) > 4  # control: some were sent twice
    assert [e.kind for e in agreed(registry, "m")] == [INTENT, DONE] * 2
    assert registry.aliases("m") == {ALIAS: 2}


# --- what users see ---------------------------------------------------------------------------------------------


def test_a_hand_is_obeyed_and_told_and_taken_up(registry: Registry) -> None:
    versions = model(registry, "m")
    book = Journal(registry, "m")
    for number in (1, 2):
        book.move(ALIAS, versions[number], before=number - 1 or None, decision=PROMOTE)
    registry.client.set_registered_model_alias("m", ALIAS, "3")
    assert history("m")["moved_by_hand"] == {ALIAS: 3}
    with pytest.raises(ConflictError, match="moved from 2 to 3 by hand"):
        book.move(ALIAS, versions[1], before=2, decision=PROMOTE)
    assert registry.aliases("m") == {ALIAS: 3}
    rival = _passed_before(registry, versions[3], ALIAS)  # whom `promote m:3` is to hold it against
    assert rival is not None
    assert (rival.version, gated(registry, "m", versions[3].digest, ALIAS)) == (2, False)
    told = history("m")
    assert told["moved_by_hand"] == {}
    assert [(m["decision"], m["version"], m["moved"]) for m in told["moves"]] == [
        (PROMOTE, 1, True), (PROMOTE, 2, True), (EXTERNAL, 3, True)]  # fmt: skip


def test_journals_are_no_models(registry: Registry, tmp_path: Path) -> None:
    versions = model(registry, "m")
    Journal(registry, "m").move(ALIAS, versions[1], before=None, decision=PROMOTE)
    assert {m.name for m in registry.client.search_registered_models()} == {"m", "m--releases"}  # control
    assert registry.names() == ("m",)
    assert list(list_models()["models"]) == ["m"]
    assert read_desired(registry, ("*@champion",)).names == {"m"}
    with pytest.raises(ConfigError, match="was not published by rayscale"):
        registry.resolve("m--releases:1")
    with pytest.raises(ConfigError, match="not ending with --releases"):
        registry.publish("m--releases", tmp_path)
    with pytest.raises(MissingError):
        history("m--release")


def test_with_require_gate_only_what_passed_or_was_forced_is_followed(registry: Registry) -> None:
    from rayscale.serve.app import AppArgs

    def read(require_gate: bool) -> Desired:
        """What an application follows."""
        return AppArgs(tracking_uri=registry.uri, require_gate=require_gate).source().ask()

    versions = model(registry, "m")
    registry.client.set_registered_model_alias("m", ALIAS, "1")
    strict = read(True)
    assert (strict.routes, strict.names) == ({}, {"m"})
    assert "m:1 passed no gate" in strict.refused["m@champion"]
    assert "rayscale promote m:1 --alias champion" in strict.refused["m@champion"]
    assert read(False).routes["m@champion"].version == 1  # control: not required

    book = Journal(registry, "m")
    for before, to, decision in ((1, 2, PROMOTE), (2, 3, FORCED), (3, 1, "rollback"), (1, 2, "rollback")):
        book.move(ALIAS, versions[to], before=before, decision=decision)
        strict = read(True)
        assert [r.version for r in strict.routes.values()] == ([to] if to != 1 else [])
    registry.client.set_registered_model_alias("m", ALIAS, "1")
    assert list(read(True).refused) == ["m@champion"]
    assert not gated(registry, "other", "2" * 64, ALIAS)


def test_a_gate_that_was_passed_for_one_alias_opens_no_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rayscale.serve.app import AppArgs

    def read() -> Desired:
        return AppArgs(tracking_uri=registry.uri, require_gate=True).source().ask()

    versions = model(registry, "m")
    book = Journal(registry, "m")
    book.move(ALIAS, versions[1], before=None, decision=PROMOTE)
    book.move("challenger", versions[2], before=None, decision=PROMOTE)
    book.move("scratch", versions[3], before=None, decision=FORCED, why="demo")
    for number in (2, 3):
        registry.client.set_registered_model_alias("m", ALIAS, str(number))
        assert (read().routes, list(read().refused)) == ({}, ["m@champion"])
        registry.client.set_registered_model_alias("m", ALIAS, "1")
        canary.start(registry, versions[number], ALIAS, weight=5)
        found = read()
        assert (found.routes["m@champion"].version, bool(found.canaries)) == (1, number == 2)
        assert list(found.refused) == ([] if number == 2 else ["m@champion-canary"])
    canary.end(registry, "m", ALIAS, decision=canary.STOPPED, why="")
    book.move(ALIAS, versions[2], before=1, decision=PROMOTE)  # control: it passes for this alias too
    assert (read().routes["m@champion"].version, read().refused) == (2, {})

    monkeypatch.setattr("rayscale.cli.models.artifact.load", lambda *_, **__: None)  # there are no artifacts here
    monkeypatch.setattr(Registry, "fetch", lambda *_: None)
    monkeypatch.setattr(log, "propagate", True)
    for number in (3, 1):
        caplog.clear()
        rollback("m", "green skies", to=number)
        told = [r.getMessage() for r in caplog.records if "never passed the gate for champion" in r.getMessage()]
        assert len(told) == (number == 3)
        assert [r.version for r in read().routes.values()] == ([] if number == 3 else [1])


def test_a_first_challenger_is_held_against_the_champion_or_whom_it_came_after(registry: Registry) -> None:
    versions = model(registry, "m")
    assert _champion(registry, versions[2]) is None
    for number in (1, 2):
        Journal(registry, "m").move(ALIAS, versions[number], before=number - 1 or None, decision=PROMOTE)
    rivals = [_champion(registry, registry.resolve(f"m:{number}")) for number in (1, 2, 3)]
    assert [rival and rival.version for rival in rivals] == [2, 1, 2]
    registry.client.set_model_version_tag("m", "3", "scale", "4")
    assert _champion(registry, registry.resolve("m:3")) is None  # what does something else cannot be compared


def test_a_rollback_finds_the_version_before_a_hand(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = model(registry, "m")
    Journal(registry, "m").move(ALIAS, versions[1], before=None, decision=PROMOTE)
    registry.client.set_registered_model_alias("m", ALIAS, "3")
    monkeypatch.setattr("rayscale.cli.models.artifact.load", lambda *_, **__: None)  # there are no artifacts here
    monkeypatch.setattr(Registry, "fetch", lambda *_: None)
    assert rollback("m", "green skies")["version"] == 1
    assert [(m["decision"], m["before"], m["version"]) for m in history("m")["moves"]] == [
        (PROMOTE, None, 1), (EXTERNAL, 1, 3), ("rollback", 3, 1)]  # fmt: skip
    assert journal.user() in {m["who"] for m in history("m")["moves"]}
