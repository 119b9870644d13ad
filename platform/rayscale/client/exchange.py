"""One call and its retries, without I/O: what is sent and slept is yielded, what came of it is sent in.

Requests are pure functions of their bodies, so a lost answer is asked for again. What the server says is wrong with
a request is never sent twice.
"""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from rayscale import errors
from rayscale.errors import ConfigError, RayscaleError, UnavailableError, UserError

AGAIN = frozenset({429, 502, 503, 504})  # nothing is wrong with the request
PROBLEM = "urn:rayscale:problem:"
_LINE = re.compile(r"(.+?)=(.*?): (.*); (.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long one call may take and how it is tried again."""

    timeout_s: float = 120.0  # of the whole call: attempts, waits, bodies
    connect_timeout_s: float = 5.0  # of one attempt
    retries: int = 10
    backoff_s: float = 0.25  # first wait where the server names none; doubles
    backoff_max_s: float = 8.0


class Send(NamedTuple):
    """Send the request; it has so long."""

    timeout_s: float


class Sleep(NamedTuple):
    seconds: float


class Spent(NamedTuple):
    """What an answer took."""

    attempts: int
    elapsed_s: float


Lost = httpx.TransportError | httpx.DecodingError
"""No whole answer came: the connection raised it, or the body is not what its Content-Encoding says."""
LOST = httpx.TransportError, httpx.DecodingError

Outcome = httpx.Response | Lost | None
"""Of a Send: a response with its body read, or why there is none. Of a Sleep: None."""

Exchange = Generator[Send | Sleep, Outcome, tuple[httpx.Response, Spent]]


def exchange(
    patience: Patience,
    *,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Exchange:
    """Until a successful response. Waits are those of `Retry-After`, else they double; both with some chance in them,
    so that many clients do not come back at once.

    Raises: the typed error of `told` where the request is wrong, or where there is no time or try left.
    """
    started, attempt = clock(), 0
    while True:
        outcome = yield Send(started + patience.timeout_s - clock())
        attempt += 1
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return outcome, Spent(attempt, clock() - started)
        assert outcome is not None
        wait_s = _wait_s(outcome, attempt, patience, draw())
        left_s = started + patience.timeout_s - clock()
        if wait_s is None or attempt > patience.retries or wait_s >= left_s:
            raise told(outcome, patience) from _cause(outcome)
        yield Sleep(wait_s)


def _wait_s(outcome: httpx.Response | Lost, attempt: int, patience: Patience, draw: float) -> float | None:
    """Seconds until the next attempt, None where there is none to make."""
    after_s = None
    if isinstance(outcome, httpx.Response):
        if outcome.status_code not in AGAIN:
            return None
        after_s = retry_after_s(outcome.headers.get("Retry-After", ""), time.time())
    elif isinstance(outcome, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return None
    if after_s is not None:
        return after_s + draw * (0.05 + 0.1 * after_s)
    return min(patience.backoff_max_s, patience.backoff_s * 2.0 ** (attempt - 1)) * (0.5 + 0.5 * draw)


def retry_after_s(header: str, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or a date (`now`: of the epoch). None: nothing."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return None


# --- what went wrong, in our errors


def told(outcome: httpx.Response | Lost, patience: Patience) -> RayscaleError:
    """The server's own line as the error that it was there; the connection's trouble as UnavailableError."""
    if isinstance(outcome, httpx.Response):
        return _refusal(outcome)
    url = str(outcome.request.url.copy_with(query=None, userinfo=b""))
    if isinstance(outcome, httpx.UnsupportedProtocol):
        return ConfigError("url", url, "must begin with http:// or https://", "e.g. http://127.0.0.1:8000")
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(outcome, httpx.ConnectTimeout):
        rule = f"no answer within {patience.timeout_s:g} s"
        return UnavailableError("url", url, rule, "give it more time, or a smaller picture")
    why = " ".join(str(outcome).split()) or type(outcome).__name__
    if isinstance(outcome, httpx.DecodingError):
        why = f"the answer is damaged ({why})"
    return UnavailableError("url", url, why, "check the address and that the server runs")


def _cause(outcome: httpx.Response | Lost) -> Exception:
    """The response stays at hand: `error.__cause__.response` has its headers."""
    if not isinstance(outcome, httpx.Response):
        return outcome
    return httpx.HTTPStatusError(outcome.reason_phrase, request=outcome.request, response=outcome)


def _refusal(response: httpx.Response) -> RayscaleError:
    found = problem(response)
    kind = str(found.get("type", "")).removeprefix(PROBLEM)
    cls = _KINDS.get(kind) or _by_status(response.status_code)
    line = " ".join(str(found.get("detail") or f"{response.reason_phrase}; ask whoever runs the server").split())
    if parts := _LINE.fullmatch(line):
        return cls(*parts.groups())
    rule, _, remedy = line.rpartition("; ")
    return cls("server", response.status_code, rule or line, remedy if rule else "see its log")


def problem(response: httpx.Response) -> dict[str, Any]:
    """What a refusal says of itself; {} where it is none of ours."""
    if "json" not in response.headers.get("content-type", ""):
        return {}
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _by_status(status: int) -> type[RayscaleError]:
    if status in AGAIN:
        return UnavailableError
    exact = {cls.http_status: cls for cls in reversed(_KINDS.values()) if issubclass(cls, UserError)}
    return exact.get(status) or (UserError if 300 <= status < 500 else RayscaleError)


def _kinds() -> dict[str, type[RayscaleError]]:
    """ "too-large" -> TooLargeError: how the server names its errors."""
    found = {}
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, RayscaleError):
            found[re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.removesuffix("Error")).lower()] = cls
    return found


_KINDS: dict[str, type[RayscaleError]] = {
    "busy": UnavailableError,
    "validation": ConfigError,
    "internal": RayscaleError,
    **_kinds(),
}
