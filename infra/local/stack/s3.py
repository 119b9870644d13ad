"""OpenStack Swift's S3 API on one machine: its rings and files, and the commands that run it.

Unlike moto it checks signatures, checksums and conditions. Standard library only: the storage tests use it too.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SERVERS = ("account", "container", "object", "proxy")
PARTS = ("memcached", *SERVERS)
REGION = "us-east-1"  # Swift answers for one region only


def missing() -> list[str]:
    """Programs that must be installed first."""
    needed = ["memcached", "swift-ring-builder", *(f"swift-{name}-server" for name in SERVERS)]
    return [name for name in needed if program(name) is None]


def program(name: str) -> str | None:
    """Where a program is: on the path, or beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def commands(folder: Path, ports: Mapping[str, int], users: Mapping[str, str]) -> dict[str, list[str]]:
    """Write what is not there yet, and say what runs it: a command for each of `PARTS`, in that order.

    users: "ACCOUNT:USER", which is the access key, to its secret. Each account is a place of its own.
    """
    (folder / "disks/d0").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = rayscale\n")
    for name in SERVERS:
        (folder / f"{name}.conf").write_text(_conf(name, ports, folder, users))
        if name != "proxy" and not (folder / f"{name}.ring.gz").exists():
            _ring(folder, name, ports[name])
    as_user = ["-u", "nobody"] if getpass.getuser() == "root" else []
    memcached = [str(program("memcached")), "-l", "127.0.0.1", "-p", str(ports["memcached"]), "-U", "0", *as_user]
    servers = {name: [str(program(f"swift-{name}-server")), str(folder / f"{name}.conf")] for name in SERVERS}
    return {"memcached": memcached} | servers


def _ring(folder: Path, name: str, port: int) -> None:
    builder = folder / f"{name}.builder"
    builder.unlink(missing_ok=True)
    for step in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d0", "1"], ["rebalance"]):
        done = subprocess.run([str(program("swift-ring-builder")), str(builder), *step], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"swift-ring-builder: {done.stdout}{done.stderr}")


def _conf(name: str, ports: Mapping[str, int], folder: Path, users: Mapping[str, str]) -> str:
    common = f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {ports[name]}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
workers = 0
log_name =
user = {getpass.getuser()}
"""
    if name != "proxy":
        return f"{common}\n[pipeline:main]\npipeline = {name}-server\n\n[app:{name}-server]\nuse = egg:swift#{name}\n"
    logins = "\n".join(f"user_{key.replace(':', '_')} = {secret} .admin" for key, secret in users.items())
    return f"""{common}
[pipeline:main]
# s3api before tempauth: the other way round every request is refused
pipeline = catch_errors cache s3api tempauth copy slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true

[filter:s3api]
use = egg:swift#s3api
location = {REGION}
s3_acl = false

[filter:tempauth]
use = egg:swift#tempauth
{logins}

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{ports["memcached"]}

[filter:catch_errors]
use = egg:swift#catch_errors
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
"""
