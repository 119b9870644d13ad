"""`rayscale recipes`: what can be trained."""

from __future__ import annotations

import inspect
from typing import Any

import rayscale.recipes


def recipes() -> dict[str, Any]:
    """List the recipes that come with rayscale: name, and what it is for."""
    found = {
        name: (inspect.getdoc(make) or "").partition("\n")[0] for name, make in rayscale.recipes.discover().items()
    }
    width = max(map(len, found), default=0)
    for name, about in sorted(found.items()):
        print(f"{name:{width}}  {about}".rstrip())
    return {"recipes": found}
