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
    "ingest": "rayscale.cli.ingest:ingest",
    "train": "rayscale.cli.train:train",
    "publish": "rayscale.cli.publish:publish",
    "promote": "rayscale.cli.promote:promote",
    "recipes": "rayscale.cli.recipes:recipes",
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
    wanted = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else None
    for name, target in COMMANDS.items():
        if wanted is None or name == wanted:
            module, _, function = target.partition(":")
            app.command(name)(reported(getattr(importlib.import_module(module), function)))
    if wanted is not None:
        app.callback()(lambda: None)  # keep the sub-command's name although it is the only one
    app()
