"""Processes that outlive the command that started them, known by id and stopped by id with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

MARK = (
    "RAYSCALE_STACK"  # set for every process of a stack, inherited by all that it starts; the value is its state folder
)
PATIENCE_S = 10.0


class Processes:
    """The processes of one stack: `pids/NAME.json` says which, `logs/NAME.log` is what they say."""

    def __init__(self, state: Path) -> None:
        self._pids, self.logs, self._mark = state / "pids", state / "logs", str(state)

    def find(self, name: str) -> psutil.Process | None:
        """The running process of that name; an id that another process has meanwhile is not taken for it."""
        try:
            kept = json.loads((self._pids / f"{name}.json").read_text())
            process = psutil.Process(kept["pid"])
            same = abs(process.create_time() - kept["created"]) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, KeyError, psutil.Error):
            return None

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], user: str | None = None) -> None:
        """In a session of its own, with its output in its log. user: whom to run as, where we are root."""
        for folder in (self._pids, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd=self._mark, env={**env, MARK: self._mark}, user=user, group=user, extra_groups=[] if user else None,
            )  # fmt: skip
        kept = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        (self._pids / f"{name}.json").write_text(json.dumps(kept))

    def stop(self, names: Mapping[str, int]) -> list[str]:
        """Send each name's process its signal, all at once, and wait; what is left of their families is killed.

        Returns those that ran.
        """
        families = {name: _family(process) for name in names if (process := self.find(name)) is not None}
        for name, family in families.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                family[0].send_signal(names[name])
        gone_or_killed([family[0] for family in families.values()], PATIENCE_S)
        gone_or_killed([process for family in families.values() for process in family[1:]], 5.0)
        return list(families)

    def kill(self, name: str) -> bool:
        """SIGKILL to the process of that name and its whole family at once, as when a machine dies."""
        if (process := self.find(name)) is None:
            return False
        family = _family(process)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=PATIENCE_S)
        return True

    def stray(self) -> list[psutil.Process]:
        """Processes of this stack whose parents are gone (HAProxy outlives Serve)."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def tail(self, name: str, lines: int = 3) -> str:
        """The end of its log, in one line."""
        try:
            text = (self.logs / f"{name}.log").read_text(errors="replace")
        except OSError:
            return ""
        return " | ".join(line.strip() for line in text.splitlines()[-lines:])


def gone_or_killed(processes: Iterable[psutil.Process], patience_s: float) -> None:
    """Wait for processes that were asked to end; kill those that do not. Zombies of others have ended."""
    left, deadline = list(processes), time.monotonic() + patience_s
    while left := [process for process in left if _runs(process)]:
        if time.monotonic() > deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            deadline = time.monotonic() + PATIENCE_S
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return [process]
