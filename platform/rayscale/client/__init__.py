"""The client of a Rayscale server, sync and async.

    with Client("http://127.0.0.1:8000", key="...") as client:
        client.upscale("small.png", model="photos-x2").save("large.png")

Every route is a method with the parameters of its function in `calls`, and its answer is one of `answers`.

What the server refuses is raised as the error of `rayscale.errors` that it was there, with its line; the response is
`error.__cause__.response`. 429, 503 and lost connections are tried again when the server says, within one deadline.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from rayscale import __version__
from rayscale.client import calls
from rayscale.client.answers import (
    Answer,
    Embedding,
    Generated,
    ModelDetail,
    ModelInfo,
    Models,
    ModelVersion,
    Picture,
    Similarity,
)
from rayscale.client.calls import Call, Image, Measure, Merging, Restoring, Upscaling
from rayscale.client.exchange import LOST, Outcome, Patience, Send, Sleep, exchange
from rayscale.errors import ConfigError

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Embedding",
    "Generated",
    "Image",
    "Measure",
    "Merging",
    "ModelDetail",
    "ModelInfo",
    "ModelVersion",
    "Models",
    "Patience",
    "Picture",
    "Restoring",
    "Similarity",
    "Upscaling",
]

P = ParamSpec("P")
T = TypeVar("T")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

KEY = "RAYSCALE_API_KEY"  # where commands look for their bearer key: it does not belong on a command line


class _Base(Generic[Http]):
    """What both clients are made of."""

    _open: type[Http]

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        timeout_s: float = 120.0,
        retries: int = 10,
        connect_timeout_s: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`key`: the bearer key; `timeout_s`: of one call, its retries and waits included; `headers`: of every
        request, such as a trace's.

        Raises: ConfigError.
        """
        if not timeout_s > 0:
            raise ConfigError("timeout_s", timeout_s, "must be positive", "e.g. 120")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError("url", url, f"is none ({error})", "e.g. http://127.0.0.1:8000") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError("url", url, "must be http://HOST[:PORT] or https://...", "e.g. http://127.0.0.1:8000")
        if not key.isascii() or any(c.isspace() for c in key):
            raise ConfigError("key", "(hidden)", "must be ASCII without spaces", "check the key")
        self.url = url.rstrip("/")
        self.patience = Patience(timeout_s=timeout_s, retries=retries, connect_timeout_s=connect_timeout_s)
        sent = {"User-Agent": f"rayscale/{__version__}", **(headers or {})}
        if key:
            sent["Authorization"] = f"Bearer {key}"
        # Deadlines are per call; the pool never makes a request wait.
        self._http: Http = self._open(
            headers=sent,
            verify=parsed.scheme == "https",  # reading all certificates takes longer than a small request
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def _request(self, call: Call[Any], timeout_s: float) -> dict[str, Any]:
        left_s = max(timeout_s, 1e-3)
        return {
            "method": call.method,
            "url": self.url + call.path,
            "params": call.params or None,
            "headers": call.headers,
            "timeout": httpx.Timeout(left_s, connect=min(left_s, self.patience.connect_timeout_s)),
            **call.body,
        }


def _show_as(ask: Callable[..., Any], build: Callable[..., Call[Any]]) -> None:
    """For `help`: `ask` has the name, the docstring and the parameters of `build`, and gives what its Call is of."""
    functools.update_wrapper(ask, build, assigned=("__name__", "__doc__"))
    shown = inspect.signature(build)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    result = str(shown.return_annotation).removeprefix("Call[").removesuffix("]")
    shown = shown.replace(parameters=[itself, *shown.parameters.values()], return_annotation=result)
    ask.__signature__ = shown  # type: ignore[attr-defined]


def _sync(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """The method that makes a call and carries it out."""

    def ask(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    _show_as(ask, build)
    return ask


def _async(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """The same; pictures are read and encoded beside the event loop."""

    async def ask(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(await asyncio.to_thread(build, *args, **kwargs))

    _show_as(ask, build)
    return ask


class Client(_Base[httpx.Client]):
    """The sync client; threads may share it. Close it, or use it in `with`."""

    _open = httpx.Client

    upscale = _sync(calls.upscale)
    restore = _sync(calls.restore)
    burst = _sync(calls.burst)
    generate = _sync(calls.generate)
    embed = _sync(calls.embed)
    embeddings = _sync(calls.embeddings)
    similarity = _sync(calls.similarity)
    similarities = _sync(calls.similarities)
    models = _sync(calls.models)
    model = _sync(calls.model)

    def send(self, call: Call[T]) -> T:
        """Carry out one call. Raises: as `exchange.exchange`; IntegrityError for an answer that cannot be read."""
        talk = exchange(self.patience)
        step = next(talk)
        while True:
            try:
                step = talk.send(self._do(call, step))
            except StopIteration as done:
                response, spent = done.value
                break
        return call.read(response, spent)

    def _do(self, call: Call[Any], step: Send | Sleep) -> Outcome:
        if isinstance(step, Sleep):
            time.sleep(step.seconds)
            return None
        until = time.monotonic() + step.timeout_s
        request = self._http.build_request(**self._request(call, step.timeout_s))
        try:
            response = self._http.send(request, stream=True)
            try:
                return _collected(response, until)
            finally:
                response.close()
        except LOST as error:
            return error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _collected(response: httpx.Response, until: float) -> httpx.Response:
    """The response with its body read. httpx's own timeout is of every chunk, this one of all of them."""
    chunks = []
    for chunk in response.iter_raw():
        chunks.append(chunk)
        if time.monotonic() > until:
            raise httpx.ReadTimeout("the body did not end in time", request=response.request)
    return httpx.Response(
        response.status_code, headers=response.headers, content=b"".join(chunks), request=response.request
    )


class AsyncClient(_Base[httpx.AsyncClient]):
    """The async client: the same methods, to be awaited. Close it with `aclose`, or use it in `async with`."""

    _open = httpx.AsyncClient

    upscale = _async(calls.upscale)
    restore = _async(calls.restore)
    burst = _async(calls.burst)
    generate = _async(calls.generate)
    embed = _async(calls.embed)
    embeddings = _async(calls.embeddings)
    similarity = _async(calls.similarity)
    similarities = _async(calls.similarities)
    models = _async(calls.models)
    model = _async(calls.model)

    async def send(self, call: Call[T]) -> T:
        """Carry out one call. Raises: as `exchange.exchange`; IntegrityError for an answer that cannot be read."""
        talk = exchange(self.patience)
        step = next(talk)
        while True:
            outcome = await self._do(call, step)
            try:
                step = talk.send(outcome)
            except StopIteration as done:
                response, spent = done.value
                break
        return call.read(response, spent)

    async def _do(self, call: Call[Any], step: Send | Sleep) -> Outcome:
        if isinstance(step, Sleep):
            await asyncio.sleep(step.seconds)
            return None
        request = self._http.build_request(**self._request(call, step.timeout_s))
        try:
            async with asyncio.timeout(step.timeout_s):
                return await self._http.send(request)
        except TimeoutError:
            return httpx.ReadTimeout("no answer in time", request=request)
        except LOST as error:
            return error

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
