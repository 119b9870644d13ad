"""`make stack`: PostgreSQL, Swift, MLflow, Ray, Serve and Prometheus on this machine, in the shape of production.

No Docker. Everything lives in one folder, `.rayscale/stack`, and is stopped by its id. Ray's own ports, the replicas'
and HAProxy's figures listen on every interface, the rest on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import backup
import parts
from parts import Part
from processes import PATIENCE_S, Processes, gone_or_killed
from settings import ROOT, Settings

from rayscale.errors import ConfigError, RayscaleError, UnavailableError

UP_TIMEOUT_S = 240.0  # for one part to become healthy


def main() -> None:
    """Parse the command, carry it out, leave an exit code."""
    parser = argparse.ArgumentParser(prog="stack", description=__doc__)
    parser.add_argument("--state", type=Path, default=ROOT / ".rayscale/stack", help="folder of all that it keeps")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("up", "start what is not healthy, in order, and wait for it"),
                       ("stop", "stop a part"), ("restart", "stop a part and start it again"),
                       ("kill", "SIGKILL a part and all that it started, as when its machine dies")):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "parts", nargs="*" if name == "up" else "+", metavar="PART", help="by its name in `status`"
        )
    commands.add_parser("down", help="stop everything; what is stored stays")
    commands.add_parser("status", help="one line for each part; exit code 1 where one is not healthy")
    commands.add_parser("wipe", help="stop everything and delete all that is stored")
    for name, text in (
        ("backup", "database and bucket into a folder"),
        ("restore", "them back, into a wiped stack, and up"),
    ):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    flags = parser.parse_args()
    try:
        sys.exit(carry_out(flags))
    except RayscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:  # a program of theirs that failed, with what it said
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def carry_out(flags: argparse.Namespace) -> int:
    """The command's exit code."""
    state = flags.state.resolve()
    if flags.command in ("down", "wipe", "status") and not (state / "settings.json").exists():
        print(f"there is no stack at {state}")
        return int(flags.command == "status")
    stack = Stack(Settings.open(state))
    if flags.command == "up":
        stack.up(flags.parts)
    elif flags.command in ("stop", "kill", "restart"):
        for part in stack.chosen(flags.parts):
            stack.end(part, kill=flags.command == "kill")
        if flags.command == "restart":
            stack.up(flags.parts)
    elif flags.command == "status":
        return stack.status()
    elif flags.command == "backup":
        backup.save(stack.settings, flags.folder.resolve())
    elif flags.command == "restore":
        stack.restore(flags.folder.resolve())
    else:
        stack.down()
        if flags.command == "wipe":
            shutil.rmtree(state)
    return 0


class Stack:
    """The parts of one stack and their processes."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.processes = settings, Processes(settings.state)
        self.groups = parts.groups(settings)
        self.parts = [part for group in self.groups for part in group]

    def chosen(self, names: list[str]) -> list[Part]:
        """Raises: ConfigError for a name that no part has."""
        known = {part.name: part for part in self.parts}
        for name in names:
            if name not in known:
                raise ConfigError("PART", name, "no such part", f"there are {', '.join(known)}")
        return [known[name] for name in names]

    def up(self, names: list[str]) -> None:
        """Start what is not healthy, and wait. Raises: UnavailableError with the end of its log."""
        if lines := parts.missing():
            raise UnavailableError("stack", f"{len(lines)} missing", ", ".join(lines), "then `make stack`")
        short = self.settings.short
        if not short.is_symlink():
            short.symlink_to(self.settings.state)
        wanted, began = self.chosen(names) or self.parts, time.monotonic()
        for group in self.groups:
            self._up([part for part in group if part in wanted])
        env = self.settings.write_env()
        if not names:
            print(f"up after {time.monotonic() - began:.0f} s; `. {env}` sets a shell up for it")
            print(f"  {'logs':10} {self.processes.logs}")
            for name in ("http", "dashboard", "mlflow", "s3", "prometheus"):
                print(f"  {name:10} {self.settings.url(name)}")

    def _up(self, group: list[Part]) -> None:
        began = time.monotonic()
        for part in group:
            if part.command is not None and self.processes.find(part.name) is None:
                env = self.settings.node(part.name)
                self.processes.start(part.name, part.command(), env, part.user)
            elif part.command is None and part.healthy():
                part.ready()
        waiting = list(group)
        while waiting:
            for part in list(waiting):
                if not (wrong := part.healthy()):
                    if part.command is not None:
                        part.ready()
                    waiting.remove(part)
                    print(f"{part.name:13} healthy after {time.monotonic() - began:.1f} s", flush=True)
                elif time.monotonic() - began > UP_TIMEOUT_S or not self._runs(part):
                    said = f"{wrong}; its log ends: {self.processes.tail(part.name)}"
                    raise UnavailableError(part.name, "not healthy", said, f"see {self.processes.logs}/{part.name}.log")
            time.sleep(0.25)

    def _runs(self, part: Part) -> bool:
        return part.command is None or self.processes.find(part.name) is not None

    def end(self, part: Part, kill: bool) -> None:
        if part.command is None:
            raise ConfigError("PART", part.name, "has no process of its own", "choose another part")
        done = self.processes.kill(part.name) if kill else self.processes.stop({part.name: part.stop})
        print(f"{part.name}: {'killed' if kill else 'stopped'}" if done else f"{part.name}: did not run", flush=True)

    def status(self) -> int:
        """One line for each part, and those that nobody started. Exit code 1 where one is not healthy."""
        bad = 0
        for line in parts.missing():
            print(f"missing       {line}")
            bad += 1
        for part in self.parts:
            wrong = part.healthy() if self._runs(part) else "does not run"
            process = self.processes.find(part.name)
            who = "" if process is None else f"process {process.pid}"
            print(f"{part.name:13} {wrong or 'healthy':40} {who}".rstrip())
            bad += bool(wrong)
        return int(bad > 0)

    def down(self) -> None:
        """Stop all parts, those that need others first, and whatever they left behind."""
        began = time.monotonic()
        for group in reversed(self.groups):
            self.processes.stop({part.name: part.stop for part in group})
        left = self.processes.stray()
        for process in left:
            process.terminate()
        gone_or_killed(left, PATIENCE_S / 6)
        self.settings.short.unlink(missing_ok=True)
        print(f"down after {time.monotonic() - began:.0f} s")

    def restore(self, folder: Path) -> None:
        """Database and bucket from a backup, before anything uses them; then everything up."""
        self.up([part.name for part in self.groups[0] if part.name != "ray-head"])
        backup.load(self.settings, folder)
        self.up([])


if __name__ == "__main__":
    main()
