"""OpenStack Swift's S3 API on this machine: unlike moto it checks signatures, checksums and conditions.

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

SECRET = "testing"
SERVERS = ("account", "container", "object", "proxy")


def missing() -> str:
    """What must be installed first; "" where all is there."""
    needed = ["memcached", "swift-ring-builder", *(f"swift-{name}-server" for name in SERVERS)]
    return ", ".join(name for name in needed if _program(name) is None)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


class Swift:
    """Its servers, in a folder; each of `accounts` is a place of its own with the key "NAME:user"."""

    def __init__(self, folder: Path, accounts: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
        *ports, memcached = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        self.url = f"http://127.0.0.1:{ports[3]}"
        (folder / "disks/d0").mkdir(parents=True)
        (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
        for name, port in zip(SERVERS, ports, strict=True):
            (folder / f"{name}.conf").write_text(_conf(name, port, folder, memcached, accounts))
        for name, port in zip(SERVERS[:3], ports, strict=False):
            self._ring(name, port)
        self._start("memcached", "-l", "127.0.0.1", "-p", str(memcached), "-U", "0", "-u", "nobody")
        for name in SERVERS:
            self._start(f"swift-{name}-server", str(folder / f"{name}.conf"))
        for port in ports:
            self._wait(port)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def _ring(self, name: str, port: int) -> None:
        builder = str(self._folder / f"{name}.builder")
        for step in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d0", "1"], ["rebalance"]):
            command = [str(_program("swift-ring-builder")), builder, *step]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    def _start(self, name: str, *arguments: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            command = [str(_program(name)), *arguments]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait(self, port: int) -> None:
        for _ in range(300):
            if socket.socket().connect_ex(("127.0.0.1", port)) == 0:
                return
            time.sleep(0.1)
        logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in self._folder.glob("*.log"))
        raise RuntimeError(f"Swift does not answer on port {port}:\n{logs}")


def _conf(name: str, port: int, folder: Path, memcached: int, accounts: int) -> str:
    common = f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
workers = 0
log_name =
user = {__import__("getpass").getuser()}
"""
    if name != "proxy":
        return f"{common}\n[pipeline:main]\npipeline = {name}-server\n\n[app:{name}-server]\nuse = egg:swift#{name}\n"
    users = "\n".join(f"user_a{i}_user = {SECRET} .admin" for i in range(accounts))
    return f"""{common}
[pipeline:main]
pipeline = catch_errors cache s3api tempauth copy slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false

[filter:tempauth]
use = egg:swift#tempauth
{users}

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}

[filter:catch_errors]
use = egg:swift#catch_errors
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
"""
