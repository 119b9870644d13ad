"""The S3 server of the local stack (`infra/local/stack/s3.py`) for tests, stopped with them.

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

import runpy
import socket
import subprocess
import time
from pathlib import Path

s3 = runpy.run_path(str(Path(__file__).parents[1] / "infra/local/stack/s3.py"))
SECRET = "testing"


def missing() -> str:
    """What must be installed first; "" where all is there."""
    return ", ".join(s3["missing"]())


class Swift:
    """Its servers, in a folder; each of `accounts` is a place of its own with the key "NAME:user"."""

    def __init__(self, folder: Path, accounts: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in s3["PARTS"]}
        ports = {name: s.getsockname()[1] for name, s in sockets.items()}
        for s in sockets.values():
            s.close()
        self.url = f"http://127.0.0.1:{ports['proxy']}"
        users = {f"a{i}:user": SECRET for i in range(accounts)}
        for name, command in s3["commands"](folder, ports, users).items():
            with (folder / f"{name}.log").open("wb") as log:
                self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        for port in ports.values():
            self._wait(port)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def _wait(self, port: int) -> None:
        for _ in range(300):
            if socket.socket().connect_ex(("127.0.0.1", port)) == 0:
                return
            time.sleep(0.1)
        logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in self._folder.glob("*.log"))
        raise RuntimeError(f"Swift does not answer on port {port}:\n{logs}")
