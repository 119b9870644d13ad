"""`rayscale upscale`, `jobs/upscale.py`: a picture, a folder or a bucket of them, by an endpoint or by the model."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from rayscale import artifact, contract
from rayscale.artifact import CARD, Device
from rayscale.bulk import work as bulk
from rayscale.bulk.work import Done, Item, Ledger
from rayscale.bulk.workers import Asker, Maker, Making, check
from rayscale.cli.disk import check_disks
from rayscale.client import KEY, Client
from rayscale.contract import ModelCard
from rayscale.errors import ConfigError, DamageError
from rayscale.imaging import Limits, Media
from rayscale.observe import log, progress
from rayscale.serve.engine import EngineSettings
from rayscale.serve.table import Release
from rayscale.storage import Store, home, join, open_store
from rayscale.tracking import default_uri

URL_IN_FLIGHT, WORKER_AT_ONCE = 4, 2  # pictures; in a worker one is decoded or encoded beside the one that is run
SHOWN = 20  # failures that are listed on the screen

Route = Literal["upscale", "restore"]
Where = Literal["auto", "ray", "local"]
Results = Generator[Done, None, None]


class How(NamedTuple):
    """Who makes the pictures: a digest of all that decides one but its input, and how many are made."""

    maker: str
    make: Callable[[Sequence[Item]], Results]


def upscale(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A picture, a folder or `s3://bucket/prefix` looked through to its depths, or a `.txt` list with a "
            "path or URI a line.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="For one picture a file or folder, else a folder or `s3://` prefix.")
    ],
    url: Annotated[
        str, typer.Option(help=f"Of an endpoint that does the work, e.g. `http://host:8000`. Its key is ${KEY}.")
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="With `--url`: what it serves (by default its default). Without: NAME@ALIAS, NAME:VERSION or the "
            "folder of an artifact, which is run here or on the Ray cluster."
        ),
    ] = "",
    task: Annotated[Route, typer.Option(help="Which route of the endpoint is asked.")] = "upscale",
    masks: Annotated[
        str, typer.Option(help="Inpainting: where the masks (255 = missing) lie, under the pictures' paths with .png.")
    ] = "",
    media: Annotated[
        Media | None, typer.Option("--format", help="Of the results.", show_default="that of OUT's name, or png")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of JPEG and WebP, without `--url`.", show_default="95")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures at once: asked of the endpoint, or in one worker.",
            show_default=f"{URL_IN_FLIGHT}, or {WORKER_AT_ONCE} without `--url`",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Of a picture, retries included; seconds.")] = 120.0,
    max_megapixels: Annotated[float, typer.Option(help="Larger pictures fail, without `--url`.")] = 64.0,
    device: Annotated[Device, typer.Option(help="Without `--url`. On Ray, cuda is a GPU for each worker.")] = "auto",
    on: Annotated[
        Where,
        typer.Option(
            "--on",
            help="Where a model runs. **auto**: on the Ray cluster that `RAY_ADDRESS` names, as within `ray job submit`"
            ", but for local folders on a cluster of several nodes; else in this process.",
        ),
    ] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="On Ray, at most.", show_default="what fits")] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="On Ray; also ONNX Runtime's threads.")] = 1,
    error_budget: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the pictures that may fail with exit code 0. A run also stops where more than it, more than "
            f"half and at least {bulk.FAILED_LEAST} of those tried have failed; with 1 it never does.",
        ),
    ] = 0.0,
) -> dict[str, Any]:
    """Upscale (or restore) many pictures: with `--url` by an endpoint, else by the model itself, with equal bytes.

    The same command goes on after an interruption: what is finished is skipped, what has changed (the picture, the
    format, the model; of an endpoint only its name counts) is made again. Results appear whole or not at all. Pictures
    that fail do not stop the others: they are listed at the end and in `OUT/errors.json`, the same command tries them
    again after all others, and the exit code is 1 where they are more than `--error-budget`. Where most fail, it stops.
    """
    started = time.monotonic()
    masks = masks and open_store(masks).uri  # a worker is in a folder of its own
    place, pictures, media, foreign, single = _work(source, out, media, masks)
    if url:
        _refuse_idle("with --url", {"--quality": quality, "--max-megapixels": max_megapixels != 64.0,
                     "--device": device != "auto", "--on": on != "auto", "--workers": workers,
                     "--cpus-per-worker": cpus_per_worker != 1})  # fmt: skip
        how = _by_endpoint(url, model, task, media, masks, place, timeout_s, concurrency or URL_IN_FLIGHT)
    else:
        _refuse_idle("without --url", {"--task": task != "upscale", "--timeout": timeout_s != 120.0})
        _refuse_idle("on png", {"--quality": quality and media == "png"})
        check_disks(default_uri(), home())
        release, tracking_uri = _release(model, masks)
        making = Making(release=release, tracking_uri=tracking_uri, out=place.uri, masks=masks, media=media,
                        quality=quality or 95, limits=_limits(max_megapixels), engine=EngineSettings(device=device),
                        at_once=concurrency or WORKER_AT_ONCE)  # fmt: skip
        stores = [open_store(source), place, *([open_store(masks)] if masks else [])]
        how = _by_model(making, on, stores, workers, cpus_per_worker)
    ledger = None if single else Ledger(place, how.maker)
    left = ledger.unfinished(pictures) if ledger else pictures
    made, failures = _drive(how, left, ledger, error_budget)
    tried, failed = sum(made.values()) + len(failures), len(failures)
    if ledger:
        failures = ledger.failures(pictures)  # of earlier runs too, where this one stopped before it came to them
    if len(made) > 1:
        log.warning("several versions answered: %s", ", ".join(f"{n} x {name}" for name, n in made.most_common()))
    result = {
        "out": join(place.uri, pictures[0].out) if single else place.uri,
        "pictures": len(pictures),
        "made": sum(made.values()),
        "skipped": len(pictures) - len(left),
        "failed": len(failures),
        "other_files": foreign,
        "models": dict(made),
        "seconds": round(time.monotonic() - started, 3),
    }
    if not single:
        bulk.sweep(place, pictures)
        bulk.write_errors(place, failures)
    untried = len(left) - sum(made.values()) - len(failures)
    if untried or len(failures) > error_budget * len(pictures):
        print(json.dumps(result), flush=True)
        raise _stopped(error_budget, failed, tried, untried) if untried else _unmade(failures, len(left), single)
    return result


def _refuse_idle(when: str, options: Mapping[str, object]) -> None:
    """A setting without effect is an error. Raises: ConfigError."""
    if idle := next((name for name, given in options.items() if given), ""):
        raise ConfigError(idle, "(given)", f"has no effect {when}", "leave it out")


def _limits(max_megapixels: float) -> Limits:
    return Limits(max_pixels=int(max_megapixels * 1e6), max_bytes=max(64 << 20, int(max_megapixels * 4e6)),
                  max_side=1 << 17)  # fmt: skip


def _work(source: str, out: str, media: Media | None, masks: str = "") -> tuple[Store, list[Item], Media, int, bool]:
    """(where results go, what they are made of, their format, other files, whether it is one picture).

    Raises: MissingError; ConfigError where inputs would be overwritten.
    """
    folder, name = bulk.split(source)
    if bulk.suffix(name) in bulk.READ and open_store(folder).exists(name):
        parent, last = bulk.split(out)
        named = next((m for m, known in bulk.SUFFIXES.items() if bulk.suffix(last) in known), None)
        if named is not None and media not in (None, named):
            raise ConfigError("--format", media, f"OUT is {last}", "name it after its format, or leave --format out")
        media = media or named or "png"
        key = last if named else bulk.outputs([name], media)[name]
        place = open_store(parent if named else out)
        pictures = [Item(join(open_store(folder).uri, name), name, "", key)]
        bulk.check_kept(place, pictures, masks)
        return place, pictures, media, 0, True
    place = open_store(out)
    if not source.endswith(bulk.LIST):
        one, other = f"{bulk.real(source)}/", f"{bulk.real(out)}/"
        if one.startswith(other) or other.startswith(one):
            raise ConfigError("OUT", out, "and IN lie in one another", "name a place of its own")
    pictures, foreign = bulk.items(source, media or "png")
    bulk.check_kept(place, pictures, masks)
    if masks:
        pictures = bulk.masked(pictures, masks)
    return place, pictures, media or "png", foreign, False


def _by_endpoint(
    url: str, model: str, task: Route, media: Media, masks: str, place: Store, timeout_s: float, in_flight: int
) -> How:
    if masks and task != "restore":
        raise ConfigError("--masks", masks, "only restoring takes masks", "add --task restore")
    Client(url, timeout_s=timeout_s).close()  # a wrong setting is told before the work

    def make(pictures: Sequence[Item]) -> Results:
        with Client(url, key=os.environ.get(KEY, ""), timeout_s=timeout_s) as client:
            yield from bulk.at_once(Asker(client, task, model, media, place.uri, masks), pictures, in_flight)

    return How(_maker(url, task, model, media, masks), make)


def _maker(*parts: str | int) -> str:
    """Digest of all that decides an output but its input."""
    text = [p.encode(errors="backslashreplace").decode() if isinstance(p, str) else p for p in parts]  # of any path
    return contract.digest(text)[:16]


def _release(model: str, masks: str) -> tuple[Release, str | None]:
    """What `--model` names, by digest, and where its registry is. Raises: ConfigError, MissingError."""
    if not model:
        raise ConfigError("--model", "(none)", "without --url a model is needed", "e.g. --model photos-x2@champion")
    folder, tracking_uri = Path(model), None
    if (folder / CARD).is_file():
        digest, path = artifact.digest_of(folder), folder.resolve()
        release = Release(name=path.name, version=0, digest=digest, uri=str(path))
        card = contract.loads(ModelCard, (folder / CARD).read_bytes(), CARD)
    else:
        from rayscale.registry.models import Registry  # imports MLflow

        registry = Registry()
        version, tracking_uri = registry.resolve(model), registry.uri
        release = Release(name=version.name, version=version.version, digest=version.digest, uri=version.uri)
        fetched = registry.fetch(version, home() / "cache" / "artifacts")
        card = contract.loads(ModelCard, (fetched / CARD).read_bytes(), CARD)
    check(card.spec, masks)
    return release, tracking_uri


def _by_model(making: Making, on: Where, stores: Sequence[Store], workers: int | None, cpus_per_worker: int) -> How:
    maker = _maker(making.release.digest, making.media, making.quality, making.masks)
    if on == "local" or (on == "auto" and not os.environ.get("RAY_ADDRESS")):
        _refuse_idle("on this machine", {"--workers": workers, "--cpus-per-worker": cpus_per_worker != 1})

        def here(pictures: Sequence[Item]) -> Results:
            with closing(Maker(making)) as worker:
                yield from bulk.at_once(worker, pictures, making.at_once)

        return How(maker, here)

    def spread(pictures: Sequence[Item]) -> Results:
        from rayscale.cli import cluster  # importing Ray takes longer than a few pictures

        if cluster.better_alone(*stores, anyway=on == "ray"):
            yield from _by_model(making, "local", stores, None, 1).make(pictures)
            return
        from rayscale.bulk.pool import on_ray

        cpus, gpus = cluster.sizes()
        cuda = making.engine.device == "cuda" or (making.engine.device == "auto" and gpus > 0)
        engine = replace(making.engine, device="cuda" if cuda else "cpu", threads=cpus_per_worker)
        fit = max(1, int(gpus) if cuda else int(cpus) // cpus_per_worker)
        yield from on_ray(replace(making, engine=engine), pictures, workers=workers or fit,
                          num_cpus=cpus_per_worker, num_gpus=float(cuda))  # fmt: skip

    return How(maker, spread)


def _drive(how: How, left: Sequence[Item], ledger: Ledger | None, budget: float) -> tuple[Counter[str], list[Done]]:
    """Make what is left: ({model: pictures}, failures). Stops where most fail, and more than may."""
    made: Counter[str] = Counter()
    failures: list[Done] = []
    if not left:
        return made, failures
    try:
        with progress("pictures", len(left), "pictures") as bar, closing(how.make(left)) as results:
            for num, done in enumerate(results, 1):
                if done.error:
                    failures.append(done)
                else:
                    made[done.model] += 1
                if ledger is not None:
                    ledger.add(done)
                bar.update(num, f"{len(failures)} failed" if failures else "")
                if num < len(left) and bulk.hopeless(num, len(failures), budget):
                    log.warning("stopped: %d of %d failed, the last: %s", len(failures), num, failures[-1].error)
                    break
    finally:
        if ledger is not None:
            ledger.flush()
    return made, failures


def _stopped(budget: float, failed: int, tried: int, untried: int) -> DamageError:
    rule = f"{failed} of the {tried} pictures that were tried failed, {untried} were not tried"
    remedy = f"mend what OUT/{bulk.ERRORS} says; the same command goes on with the others, with 1 to the end"
    return DamageError("--error-budget", budget, rule, remedy)


def _unmade(failures: Sequence[Done], left: int, single: bool) -> DamageError:
    """The failures listed, and the error that ends the command."""
    if single:
        return DamageError("picture", failures[0].item.uri, "could not be made", failures[0].error)
    for one in failures[:SHOWN]:
        log.error("%s: %s", one.item.key, one.error)
    if len(failures) > SHOWN:
        log.error("and %d more", len(failures) - SHOWN)
    remedy = f"OUT/{bulk.ERRORS} says why; the same command tries them again"
    return DamageError("pictures", f"{len(failures)} of {left}", "could not be made", remedy)
