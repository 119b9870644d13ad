"""Bearer keys: who may ask, how often and how much at once. Only hashes are stored; limits are per replica.

One key a line, `#` begins a comment:

    mobile-app 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824 per_s=5 at_once=4

The second word is the SHA-256 of the key, which is random and long (openssl rand -hex 32), so that no salt is needed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rayscale import storage
from rayscale.errors import ConfigError
from rayscale.serve.lean import header, route_path
from rayscale.serve.problems import problem

ENVIRONMENT = "RAYSCALE_API_KEYS"
GUARDED = "/v1/"  # pages and health are open
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, by its hash. 0: no limit."""

    name: str
    sha256: str
    per_s: float = 0.0  # requests a second, on average; as many at once, at least one
    at_once: int = 0  # requests being answered


def load(uri: str) -> tuple[Key, ...]:
    """The keys of a file by URI, or those of the environment's variable; () where there is neither: all may ask.

    Raises: ConfigError, and MissingError or UnavailableError as the store does.
    """
    if uri:
        folder, _, name = uri.rpartition("/")
        text = storage.open_store(folder or ".").read(name).decode("utf-8", "replace")
    else:
        text = os.environ.get(ENVIRONMENT, "")
    found = parse(text)
    if (uri or text.strip()) and not found:
        raise ConfigError("keys", uri or ENVIRONMENT, "names no key", "add one, or leave the setting out")
    return found


def parse(text: str) -> tuple[Key, ...]:
    """Raises: ConfigError that names the line and not what is in it."""
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        limits = dict(word.partition("=")[::2] for word in words[2:])
        try:
            if len(words) < 2 or not _HASH.fullmatch(words[1]) or not set(limits) <= {"per_s", "at_once"}:
                raise ValueError
            per_s, at_once = float(limits.get("per_s", 0)), int(limits.get("at_once", 0))
            if not (0 <= per_s < math.inf) or at_once < 0:
                raise ValueError
        except ValueError:
            rule = "must be: name, SHA-256 in 64 small hex digits[, per_s=N][, at_once=N]"
            raise ConfigError("keys", f"line {number}", rule, "printf %s KEY | sha256sum") from None
        keys.append(Key(name=words[0], sha256=words[1], per_s=per_s, at_once=at_once))
    if len({key.sha256 for key in keys}) < len(keys) or len({key.name for key in keys}) < len(keys):
        raise ConfigError("keys", f"{len(keys)} lines", "names and hashes must differ", "remove one")
    return tuple(keys)


@dataclass(eq=False)
class _Use:
    """What a key has used: a bucket that fills by `per_s`, and what is being answered."""

    key: Key
    tokens: float = field(init=False)
    filled: float = 0.0  # when
    running: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    @property
    def burst(self) -> float:
        return max(1.0, self.key.per_s)

    def wait_s(self, now: float) -> float:
        """0 where one more may come, which is then counted; else when to come back."""
        if self.key.at_once and self.running >= self.key.at_once:
            return 1.0
        if self.key.per_s:
            self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.key.per_s)
            self.filled = now
            if self.tokens < 1:
                return (1 - self.tokens) / self.key.per_s
            self.tokens -= 1
        self.running += 1
        return 0.0


class Guard:
    """ASGI middleware: requests under `GUARDED` need one of the keys, within its limits."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key], clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self._clock = app, clock
        self._uses = {key.sha256: _Use(key) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not route_path(scope).startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        scheme, _, secret = header(scope, b"authorization").partition(" ")
        use = self._uses.get(hashlib.sha256(secret.strip().encode("latin-1", "replace")).hexdigest())
        if scheme.lower() != "bearer" or use is None:
            shown = "(none)" if not secret else "a key that is not known"
            detail = f"Authorization={shown}: this service answers to its keys; send Authorization: Bearer KEY"
            refusal = problem(Request(scope), 401, "unauthorized", detail, "Authorization",
                              {"WWW-Authenticate": 'Bearer realm="rayscale"'})  # fmt: skip
            await refusal(scope, receive, send)
            return
        if wait_s := use.wait_s(self._clock()):
            per_s = [f"{use.key.per_s:g} requests a second"] if use.key.per_s else []
            limits = ", ".join([*per_s, *([f"{use.key.at_once} at once"] if use.key.at_once else [])])
            detail = f"key={use.key.name}: it may ask for {limits}; come back as Retry-After says"
            refusal = problem(Request(scope), 429, "too-many-requests", detail, "key",
                              {"Retry-After": str(max(1, math.ceil(wait_s)))})  # fmt: skip
            await refusal(scope, receive, send)
            return
        scope["rayscale.key"] = use.key.name
        try:
            await self.app(scope, receive, send)
        finally:
            use.running -= 1
