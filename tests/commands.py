"""Command lines against the commands they name: parsed as `rayscale` would, and nothing is run."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import typer
from typer.testing import CliRunner

from rayscale.cli import COMMANDS


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of `rayscale WORDS...`. Raises: ValueError with what is wrong with them."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        raise ValueError(f"there is no `rayscale {name}`")
    module, _, function = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), function)
    app = typer.Typer()
    seen: dict[str, Any] = {}

    @app.command()
    @functools.wraps(command)
    def parse(**kwargs: Any) -> None:
        seen.update(kwargs)

    result = CliRunner().invoke(app, words[len(name.split()) :])
    if result.exit_code:
        raise ValueError(result.output)
    return seen
