"""What all routes share: limits, which version answers, admission, threads for what an event loop must not do.

The order of a request is the order of its cost: the model's name before the body, the declared length before the
body, the body's size while it streams, headers before pixels, the engine's backlog before the decoding. No Ray here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from rayscale.contract import ModelCard, Spec
from rayscale.errors import ConfigError, MissingError, TooLargeError, UnavailableError, nearest
from rayscale.imaging import Limits
from rayscale.serve.access import AccessLog
from rayscale.serve.admission import Admission, CodecLoad
from rayscale.serve.batching import Timing, too_late
from rayscale.serve.body import Held
from rayscale.serve.course import Begin, Tiled
from rayscale.serve.engine import Crew, Runner
from rayscale.serve.filters import Filters
from rayscale.serve.keys import Key
from rayscale.serve.meters import Meters
from rayscale.serve.problems import BusyError
from rayscale.serve.table import Release, Table, draw, route_of
from rayscale.serve.threads import Threads

T = TypeVar("T")

Role = Literal["upscale", "restore", "burst", "generate", "embed"]
"""What a model is for; the route of that name takes it."""

_QUICK_BYTES = 1 << 20  # a longer body is split and looked through where it holds nobody up


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """What is accepted and how long it may take."""

    limits: Limits = Limits()
    max_output_pixels: int = 128_000_000  # 200 megapixels are 600 MB and 6 s of PNG
    max_method_pixels: int = 4_000_000  # of a picture for classical filters and comparisons, which are slow and wide
    max_items: int = 64  # pictures generated, embedded or compared in one request
    default_model: str = ""  # "": the only one that fits the route
    max_held_bytes: int = 512 << 20  # of the bodies of all requests together
    timeout_s: float = 60.0
    codec_threads: int = 2
    quality: int = 95  # JPEG and WebP, 1..100
    keys: tuple[Key, ...] = ()  # who may ask; none: everyone


class Routing(Protocol):
    """What the gateway asks of `follower.Follower`."""

    @property
    def table(self) -> Table: ...
    @property
    def held(self) -> Any: ...
    @property
    def watched(self) -> Any: ...
    @property
    def reason(self) -> str: ...


def who_asks(scope: Mapping[str, Any]) -> str:
    """Whom a canary is sticky to: the bearer key by its name, or where there are none the request by its id."""
    return str(scope.get("rayscale.key") or scope.get("rayscale.request_id") or uuid.uuid4())


def role_of(spec: Spec) -> Role:
    """A transform that enlarges is for upscaling, one that does not for restoring."""
    if spec.kind == "transform":
        return "upscale" if spec.scale > 1 else "restore"
    return spec.kind


class Gateway:
    """Chooses the model, guards the engine, and follows a routing table."""

    def __init__(self, settings: GatewaySettings, engine: Runner, routing: Routing, meters: Meters) -> None:
        self.settings, self.engine, self.routing, self.meters = settings, engine, routing, meters
        self.access = AccessLog()
        self.held = Held(settings.max_held_bytes, self._backlog_s)
        self._codecs = Threads(settings.codec_threads, "codec")
        self.codec_load = CodecLoad(settings.codec_threads)
        self._quick = Threads(1, "quick")  # headers, and all of small pictures
        self._filters = Filters(settings.timeout_s)
        self._admissions: dict[Crew, Admission] = {}
        self._defaults: tuple[Table, dict[tuple[object, ...], str]] = Table(), {}  # found so far, in this table

    def close(self) -> None:
        self.access.flush()
        self.engine.close()
        self._filters.close()
        for pool in (self._quick, self._codecs):
            pool.shutdown(wait=False, cancel_futures=True)

    # models

    def resolve(self, model: str, role: Role, scale: int | None = None, *, who: str) -> Release:
        """Which version answers, decided once per request: `name`, `name@alias`, `name:version`, or "" for what fits.

        `who` asks (`who_asks`) decides between a champion and its canary.
        Raises: MissingError for what is not served or not for this; ConfigError where several fit; BusyError.
        """
        self.check_ready()
        table = self.routing.table
        if ":" in model:
            known = {str(release): release for release in table.versions.values()}
            if model not in known:
                raise MissingError("model", model, "is not served here", nearest(model, known))
            release = known[model]
        else:
            route = route_of(model) if model else self._default(table, role, scale)
            alone = len(table.routes.get(route, ())) == 1
            release = table.pick(route, 0.0 if alone else draw(route, who))
        if (card := self._known_card(release.digest)) is not None:
            _check(card, release, role, scale)
        return release

    def check_ready(self) -> None:
        """Raises: BusyError with the reason why nothing is answered yet."""
        if self.routing.reason:
            raise BusyError("replica", "not ready", self.routing.reason, "try again", retry_after_s=2.0)

    def default(self, role: Role) -> str | None:
        """The route that a request without `model` gets, None where there is none or no single one."""
        try:
            return self._default(self.routing.table, role, None)
        except (ConfigError, MissingError):
            return None

    def _default(self, table: Table, role: Role, scale: int | None) -> str:
        if self._defaults[0] is not table:
            self._defaults = table, {}
        known, key = self._defaults[1], (role, scale, self.settings.default_model)
        if key in known:
            return known[key]
        cards = {route: self._known_card(shares[0][0]) for route, shares in table.routes.items()}
        fitting = [r for r, card in cards.items() if card and _fits(card.spec, role, scale)]
        fitting = fitting or [r for r, card in cards.items() if card is None]  # of a pool that is late
        wanted = route_of(self.settings.default_model) if self.settings.default_model else ""
        if wanted in fitting or (
            wanted in cards and cards[wanted] is None
        ):  # nothing stands in for it while it is late
            fitting = [wanted]
        absent = f"; {wanted}, the default, is not promoted" if wanted and wanted not in cards else ""
        if not fitting:
            rule = f"no model that is for {role}{f' by {scale}' if scale else ''} is served here{absent}"
            raise MissingError("model", "(none)", rule, "see /v1/models")
        if len(fitting) > 1:
            rule = f"several models are served for this and none is the default{absent}"
            raise ConfigError("model", "(none)", rule, nearest("", fitting))
        if all(cards.values()):
            known[key] = fitting[0]
        return fitting[0]

    def card(self, release: Release, role: Role, scale: int | None = None) -> ModelCard:
        """The release's card, as the route needs it. Raises: MissingError, UnavailableError."""
        card = self.engine.session(release.digest).card
        _check(card, release, role, scale)
        return card

    def _known_card(self, digest: str) -> ModelCard | None:
        try:
            return self.engine.session(digest).card
        except UnavailableError:
            return None

    # admission

    def deadline(self) -> float:
        """Of a request whose body is here, on time.monotonic()."""
        return time.monotonic() + self.settings.timeout_s

    def admit(self, digest: str, units: int, deadline: float, what: str, *, codec_px: int = 0) -> None:
        """Refuse now what would miss its deadline anyway. Raises: TooLargeError, BusyError.

        `units` as in `Engine.cost_s`; `codec_px`: pixels to be read and written.
        """
        load, cost_s, crew = self.codec_load, self.engine.cost_s(digest, units), self.engine.of(digest)
        if cost_s > self.settings.timeout_s:
            rule = f"takes about {cost_s:.0f} s here, requests have {self.settings.timeout_s:.0f} s"
            remedy = "ask for less, or run the model yourself: rayscale upscale IN OUT --model NAME"
            raise TooLargeError("request", what, rule, remedy)
        admission = self._admissions.get(crew) or self._admissions.setdefault(crew, Admission(self.settings.timeout_s))
        now, who, own_s, servers = time.monotonic(), "engine", cost_s, crew.num_engines
        left_s = deadline - now
        # No price of codecs alone refuses: where nobody is let in, none is learnt.
        codec_s = min(load.cost_s(codec_px), max(0.0, left_s - cost_s) / 2)
        backlog_s = crew.backlog_s() + load.coming_s(crew) / servers
        if codec_px and (waiting_s := load.backlog_s()) > backlog_s:  # where it waits longer
            who, own_s, backlog_s, servers = "codecs", codec_s, waiting_s, load.threads
        wait_s = admission.wait_s(own_s, backlog_s, left_s - (cost_s + codec_s - own_s), now, servers)
        if wait_s is not None:
            raise BusyError(who, f"backlog {backlog_s:.1f} s", "this request would miss its deadline",
                            "try again later", retry_after_s=wait_s)  # fmt: skip

    def _backlog_s(self) -> float:
        """Of whoever has most to do."""
        return max([self.codec_load.backlog_s(), *(crew.backlog_s() for crew in [*self._admissions])])

    # threads

    async def codec(self, deadline: float, work: Callable[..., T], *args: Any) -> tuple[T, float]:
        """`work(*args)` in a thread for codecs; its result and its seconds. Raises: UnavailableError when too late."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):  # what has not begun by then never does
                return await asyncio.get_running_loop().run_in_executor(self._codecs, _timed, work, args)
        except TimeoutError:
            raise too_late() from None

    async def made(
        self,
        digest: str,
        num_bytes: int,
        look: Callable[[], bool],
        begin: Begin,
        end: Callable[[], T],
        spans: dict[str, float],
        deadline: float,
    ) -> T | None:
        """`look`, `begin` and `end` in threads for codecs, the tiles of the second before the last; None without tiles.

        `num_bytes` are what `look` looks at; it says whether the others are quick. `spans` are told where the time
        went, in seconds.

        One thread is for what is quick: small pictures, and what is refused by its headers, wait for no large one's
        codecs, and a small picture is that thread's from its first byte to its last where the device is free.
        """
        pool = self._quick if num_bytes <= _QUICK_BYTES else self._codecs

        def where() -> Threads:
            quick, spans["decode"] = _timed(look, ())
            return pool if quick else self._codecs

        def first() -> Tiled | None:
            tiled, seconds = _timed(begin, ())
            spans["decode"] += seconds
            return tiled

        def last(timing: Timing) -> T:
            spans["queue"], spans["infer"] = timing
            made, spans["encode"] = _timed(end, ())
            return made

        return await self.engine.run_between(digest, pool, first, last, deadline=deadline, look=where)

    async def slow(
        self, kind: str, pixels: int, deadline: float, work: Callable[..., T], *args: Any
    ) -> tuple[T, float]:
        """The same in the one thread for filters and comparisons, which must not hold up the codecs.

        Raises: as `Filters.run`.
        """
        return await self._filters.run(kind, pixels, deadline, partial(work, *args))

    # what is told

    def about(self, release: Release) -> dict[str, str]:
        """The facts of JSON answers."""
        return {"model": str(release), "digest": release.digest}

    def headers(self, release: Release) -> dict[str, str]:
        """The headers of every answer that a model gave."""
        return {
            "X-Rayscale-Model": str(release),
            "X-Rayscale-Digest": release.digest,
            "X-Rayscale-Provider": self.engine.session(release.digest).provider,
        }


def _fits(spec: Spec, role: Role, scale: int | None) -> bool:
    return role_of(spec) == role and scale in (None, spec.scale)


def _check(card: ModelCard, release: Release, role: Role, scale: int | None) -> None:
    if role_of(card.spec) != role:
        mine = f"is for {role_of(card.spec)} (kind {card.spec.kind}, scale {card.spec.scale})"
        raise MissingError("model", release, f"{mine}, this route takes models for {role}", "see /v1/models")
    if scale not in (None, card.spec.scale):
        raise ConfigError("scale", scale, f"{release} enlarges by {card.spec.scale}", "leave it out")


def _timed(work: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, float]:
    started = time.monotonic()
    return work(*args), time.monotonic() - started
