"""Who makes a picture: an endpoint that is asked, or the model in this process, by the very path of serving."""

from __future__ import annotations

import asyncio
import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from rayscale.bulk.work import Done, Item, mask_uri, split
from rayscale.client import Client, Picture
from rayscale.contract import Spec
from rayscale.errors import ConfigError, IntegrityError, MissingError, RayscaleError
from rayscale.imaging import Limits, Media
from rayscale.observe import log
from rayscale.serve import follower
from rayscale.serve.answers import Format
from rayscale.serve.batching import leads
from rayscale.serve.body import Body, Parts
from rayscale.serve.engine import Engine, EngineSettings
from rayscale.serve.gateway import Gateway, GatewaySettings, role_of
from rayscale.serve.table import Release, Table
from rayscale.serve.transform import Finish, by_model
from rayscale.storage import home, open_store

FOREVER_S = 1e9  # nobody waits for an answer here


@dataclass(frozen=True, kw_only=True)
class Making:
    """All that a worker on another machine needs to know."""

    release: Release  # by digest: an alias that moves meanwhile changes nothing
    out: str
    masks: str = ""  # where the masks lie, under the outputs' names with .png
    media: Media = "png"
    quality: int = 95  # of JPEG and WebP
    limits: Limits = Limits()
    max_output_pixels: int = 1 << 30  # the result is held as 3 bytes a pixel
    engine: EngineSettings = EngineSettings()
    at_once: int = 2  # pictures in one worker: others are decoded and encoded beside the one that is run
    tracking_uri: str | None = None
    cache: str = ""  # of fetched artifacts; "": under RAYSCALE_HOME of where the worker is


class Maker:
    """The model in this process: a gateway and an engine without the HTTP, so results are those of an endpoint.

    Made where it runs: it fetches, verifies and warms its session.
    """

    def __init__(self, making: Making) -> None:
        """Raises: MissingError, IntegrityError, UnavailableError, ResourceError."""
        self.making = making
        self._out, engine, release = open_store(making.out), Engine(making.engine), making.release
        cache = Path(making.cache) if making.cache else home() / "cache" / "artifacts"
        folder = follower.fetch(release, cache, making.tracking_uri)
        try:
            engine.prepare(release.digest, folder)
        except IntegrityError:  # the cache's copy is damaged: once more, from where it came
            shutil.rmtree(folder, ignore_errors=True)
            engine.prepare(release.digest, follower.fetch(release, cache, making.tracking_uri))
        settings = GatewaySettings(
            limits=making.limits,
            max_output_pixels=making.max_output_pixels,
            timeout_s=FOREVER_S,
            codec_threads=making.at_once,
            quality=making.quality,
        )
        self._gateway = Gateway(settings, engine, _NoRouting(), _NoMeters())
        self._role = role_of(engine.session(release.digest).card.spec)
        self._finish = Finish(format=Format(media=making.media))

    def __call__(self, item: Item) -> Done:
        """Make one picture. Errors are values: the others go on."""
        release = self.making.release
        try:
            mask = _read_mask(self.making.masks, item)
            body = _Files(_read(item.uri), mask=mask)
            data = asyncio.run(by_model(self._gateway, body, release, self._role, self._finish)).body
            self._out.write(item.out, data)
        except Exception as error:
            return _failed(item, error)
        made_by = str(release) if release.version else release.name
        return Done(item, len(data), hashlib.sha256(data).hexdigest(), made_by)

    def close(self) -> None:
        self._gateway.close()


@dataclass(frozen=True)
class _Files(Body):
    """What a request would carry, as it was read."""

    mask: bytes | None = None

    def parts(self, most: object) -> Parts:
        return {"image": [self.data], **({} if self.mask is None else {"mask": [self.mask]})}


class _NoRouting:
    """The release is known."""

    table, held, watched, reason = Table(), dict[str, str](), dict[str, str](), ""


class _NoMeters:
    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Nobody looks at them."""


class Asker:
    """An endpoint: `route` is one of the client's, "upscale" or "restore"."""

    def __init__(self, client: Client, route: str, model: str, media: Media, out: str, masks: str = "") -> None:
        self._client, self._route, self._model, self._media = client, route, model, media
        self._out, self._masks = open_store(out), masks

    def __call__(self, item: Item) -> Done:
        """Ask for one picture and write it. Errors are values."""
        try:
            answer = self._ask(item)
            self._out.write(item.out, answer.data)
        except Exception as error:
            return _failed(item, error)
        model = answer.model if answer.version is None else f"{answer.model}:{answer.version}"
        return Done(item, len(answer.data), hashlib.sha256(answer.data).hexdigest(), model)

    def _ask(self, item: Item) -> Picture:
        data = _read(item.uri)
        if self._route == "upscale":
            answer = self._client.upscale(data, model=self._model, media=self._media)
        else:
            mask = _read_mask(self._masks, item)
            answer = self._client.restore(data, mask, model=self._model, media=self._media)
        if answer.media_type.partition(";")[0].strip().lower() != f"image/{self._media}":
            rule = f"is not the image/{self._media} that was asked for"
            raise IntegrityError("answer", answer.media_type, rule, "is this a rayscale server?")
        return answer


def check(spec: Spec, masks: str) -> None:
    """Raises: ConfigError for a function that makes no picture of what is given."""
    if spec.kind != "transform":
        raise ConfigError("model", f"of kind {spec.kind}", "must make one picture of one", "name a transform model")
    if masks and sum(math.prod(lead) for lead in leads(spec).values()) < 4:
        raise ConfigError("--masks", masks, "the model takes none", "leave them out")


def _failed(item: Item, error: Exception) -> Done:
    """What is wrong with this picture only, be it of some library."""
    if isinstance(error, RayscaleError):
        return Done(item, error=str(error))
    log.error("%s: %r", item.uri, error, exc_info=error)
    return Done(item, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _read_mask(masks: str, item: Item) -> bytes | None:
    if not masks:
        return None
    return _read(mask_uri(masks, item), "mask", "put one there, under the picture's path with .png")


def _read(uri: str, field: str = "picture", remedy: str = "it was listed and is gone") -> bytes:
    folder, name = split(uri)
    try:
        return open_store(folder).read(name)
    except MissingError as error:
        raise MissingError(field, uri, error.rule, remedy) from None
