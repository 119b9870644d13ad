"""The `rayscale` command. One file per command; `jobs/` runs the same functions through `ray job submit`.

A command is a typed function that returns a dict; the dict is printed as one JSON object on the last line of
standard output. A mistake of the user's is one line on standard error and exit code 2.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from rayscale.cli.disk import full_disk_told
from rayscale.errors import RayscaleError
from rayscale.observe import setup_logging

COMMANDS = {  # `rayscale NAME` -> module:function, imported only when it is called
    "data pack": "rayscale.cli.data:pack",
    "data verify": "rayscale.cli.data:verify",
    "data repair": "rayscale.cli.data:repair",
    "data inspect": "rayscale.cli.data:inspect",
    "data drop": "rayscale.cli.data:drop",
    "data export-pairs": "rayscale.cli.data:export_pairs",
    "ingest": "rayscale.cli.data:pack",  # the short name
    "train": "rayscale.cli.train:train",
    "publish": "rayscale.cli.publish:publish",
    "promote": "rayscale.cli.promote:promote",
    "evaluate": "rayscale.cli.evaluate:evaluate",
    "models list": "rayscale.cli.models:list_models",
    "models show": "rayscale.cli.models:show",
    "models compare": "rayscale.cli.compare:compare",
    "models promote": "rayscale.cli.promote:promote",
    "models history": "rayscale.cli.models:history",
    "models rollback": "rayscale.cli.models:rollback",
    "models canary": "rayscale.cli.canary:canary",
    "models import": "rayscale.cli.transfer:import_model",
    "models export": "rayscale.cli.transfer:export_model",
    "models gc": "rayscale.cli.models:gc",
    "recipes": "rayscale.cli.recipes:recipes",
    "upscale": "rayscale.cli.upscale:upscale",
    "bench": "rayscale.cli.bench:bench",
}

GROUPS = {
    "data": "Photos to a dataset: pack it, check it, mend it, look at it, take photos out of it.",
    "models": "What is in the registry: look at it, compare, try out, bring in, take out, move an alias and back.",
}


def run_one(command: Callable[..., dict[str, Any]]) -> None:
    """Run one command as a script: parse the arguments, run, print the result, exit."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command()(reported(command))
    app()


def reported(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """`command`, with its result on the last line of standard output and its errors as one line."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        setup_logging()
        try:
            with full_disk_told():
                result = command(*args, **kwargs)
        except RayscaleError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print(
                "interrupted: nothing half-done was published; the same command goes on from here",
                file=sys.stderr,
                flush=True,
            )
            raise typer.Exit(130) from None
        print(json.dumps(result), flush=True)

    return wrapper


def main() -> None:
    """Entry point of the `rayscale` command."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="From a bucket of high-resolution photos to quality-gated image endpoints, on Ray end to end.",
    )
    groups: dict[str, typer.Typer] = {}
    for name in _wanted(sys.argv[1:]):
        module, _, function = COMMANDS[name].partition(":")
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, help=GROUPS[group])
            app.add_typer(groups[group], name=group)
        parent = groups[group] if group else app
        parent.command(last)(reported(getattr(importlib.import_module(module), function)))
    for alone in (a for a in (app, *groups.values()) if len(a.registered_commands) + len(a.registered_groups) == 1):
        alone.callback()(lambda: None)  # keep the sub-command's name although it is the only one
    app()


def _wanted(arguments: list[str]) -> list[str]:
    """The commands that these arguments can mean: only their modules are imported."""
    for num in (2, 1):
        found = [name for name in COMMANDS if arguments[:num] == name.split()[:num]]
        if found:
            return found
    return list(COMMANDS)
