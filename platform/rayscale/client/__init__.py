"""The client of a Rayscale server, sync and async.

    with Client("http://127.0.0.1:8000", key="...") as client:
        client.upscale("small.png", model="photos-x2").save("large.png")

What the server refuses is raised as the error of `rayscale.errors` that it was there, with its line; the response is
`error.__cause__.response`. 429, 503 and lost connections are tried again when the server says, within one deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import httpx

from rayscale import __version__
from rayscale.client import calls
from rayscale.client.calls import Answer, Call, Embedding, Image, ModelInfo, Models, Picture, Similarity
from rayscale.client.exchange import Patience, Send, Sleep, exchange
from rayscale.errors import ConfigError
from rayscale.imaging import Media

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Embedding",
    "Image",
    "ModelInfo",
    "Models",
    "Patience",
    "Picture",
    "Similarity",
]

T = TypeVar("T")

KEY = "RAYSCALE_API_KEY"  # where commands look for their bearer key: it does not belong on a command line


class _Base:
    """What both clients are made of."""

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
        self._options: dict[str, Any] = {
            "headers": sent,
            "verify": parsed.scheme == "https",  # reading all certificates takes longer than a small request
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }

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


class Client(_Base):
    """The sync client; threads may share it. Close it, or use it in `with`."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._http = httpx.Client(**self._options)

    def upscale(self, image: Image, *, model: str = "", media: Media = "png", **options: object) -> Picture:
        """A larger picture. `options` are further query parameters, here as in the other calls."""
        return self.send(calls.upscale(image, model, media, options))

    def restore(
        self, image: Image, mask: Image | None = None, *, model: str = "", media: Media = "png", **options: object
    ) -> Picture:
        """A picture of the same size, mended; `mask` (255 = missing) where it has holes."""
        return self.send(calls.restore(image, mask, model, media, options))

    def generate(
        self,
        *,
        model: str = "",
        seed: int = 0,
        n: int = 1,
        class_name: str | None = None,
        media: Media = "png",
        **options: object,
    ) -> tuple[Picture, ...]:
        """`n` pictures of a seed; `truncation`, `to_seed` and the like are `options`."""
        return self.send(calls.generate(model, seed, n, class_name, media, options))

    def embed(self, image: Image, *, model: str = "", **options: object) -> Embedding:
        """A picture as a vector."""
        return self.send(calls.embed(image, model, options))

    def similarity(self, a: Image, b: Image, *, model: str = "", **options: object) -> Similarity:
        """How alike two pictures are."""
        return self.send(calls.similarity(a, b, model, options))

    def models(self) -> Models:
        """What is served."""
        return self.send(calls.models())

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

    def _do(self, call: Call[Any], step: Send | Sleep) -> httpx.Response | httpx.TransportError | None:
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
        except httpx.TransportError as error:
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


class AsyncClient(_Base):
    """The async client. Close it with `aclose`, or use it in `async with`."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def upscale(self, image: Image, *, model: str = "", media: Media = "png", **options: object) -> Picture:
        """A larger picture. `options` are further query parameters, here as in the other calls."""
        return await self.send(await asyncio.to_thread(calls.upscale, image, model, media, options))

    async def restore(
        self, image: Image, mask: Image | None = None, *, model: str = "", media: Media = "png", **options: object
    ) -> Picture:
        """A picture of the same size, mended; `mask` (255 = missing) where it has holes."""
        return await self.send(await asyncio.to_thread(calls.restore, image, mask, model, media, options))

    async def generate(
        self,
        *,
        model: str = "",
        seed: int = 0,
        n: int = 1,
        class_name: str | None = None,
        media: Media = "png",
        **options: object,
    ) -> tuple[Picture, ...]:
        """`n` pictures of a seed; `truncation`, `to_seed` and the like are `options`."""
        return await self.send(calls.generate(model, seed, n, class_name, media, options))

    async def embed(self, image: Image, *, model: str = "", **options: object) -> Embedding:
        """A picture as a vector."""
        return await self.send(await asyncio.to_thread(calls.embed, image, model, options))

    async def similarity(self, a: Image, b: Image, *, model: str = "", **options: object) -> Similarity:
        """How alike two pictures are."""
        return await self.send(await asyncio.to_thread(calls.similarity, a, b, model, options))

    async def models(self) -> Models:
        """What is served."""
        return await self.send(calls.models())

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

    async def _do(self, call: Call[Any], step: Send | Sleep) -> httpx.Response | httpx.TransportError | None:
        if isinstance(step, Sleep):
            await asyncio.sleep(step.seconds)
            return None
        request = self._http.build_request(**self._request(call, step.timeout_s))
        try:
            async with asyncio.timeout(step.timeout_s):
                return await self._http.send(request)
        except TimeoutError:
            return httpx.ReadTimeout("no answer in time", request=request)
        except httpx.TransportError as error:
            return error

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
