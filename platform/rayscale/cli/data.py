"""`rayscale data ...`: photos -> a dataset, and what is done with one. `jobs/ingest.py` is `pack`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal, TypeVar

import typer

from rayscale.contract import to_json
from rayscale.data import drop as dropping
from rayscale.data import overview as looking
from rayscale.data import pack as packing
from rayscale.data import verify as verifying
from rayscale.data.manifest import SPLITS
from rayscale.data.parallel import Mapper, local
from rayscale.data.scan import PackSettings
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.imaging import Limits, encode
from rayscale.observe import Progress, log, progress
from rayscale.storage import Store, join, open_store

T = TypeVar("T")
R = TypeVar("R")

WORTH_A_CLUSTER = 4  # pieces of work, each of some fifty photos or one shard

Data = Annotated[str, typer.Argument(help="A packed dataset: a folder or `s3://bucket/prefix`.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Photos worked on at once, on this machine.", show_default="CPUs")
]
Where = Annotated[
    Literal["auto", "ray", "local"],
    typer.Option(
        "--on",
        help="Where the work is done. **auto**: on the whole Ray cluster that `RAY_ADDRESS` names, as within `ray job "
        "submit`; else, with `--workers`, and for local folders on a cluster of several nodes, on this machine.",
    ),
]


def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Photos: a folder or `s3://bucket/prefix`, looked through to its depths. Of `.tar` files the members "
            "are photos (WebDataset's too, with labels in `.cls`, `.json` or `.txt` beside them)."
        ),
    ],
    out: Annotated[
        str, typer.Argument(help="Where the dataset goes: a new folder or `s3://` prefix outside of the photos.")
    ],
    split: Annotated[
        Literal["hash", "folder"],
        typer.Option(
            help="Who decides what is held out. **hash**: a photo's content, so it stays where it is as others come "
            "and go, and photos that look alike stay together; the first folder level is the label. **folder**: the "
            "top folders `train`, `validation` (or `val`) and `test`; the level below is the label."
        ),
    ] = "hash",
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share to watch training with, for `--split hash`.", show_default="0.05")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share to judge models with, for `--split hash`.", show_default="0.05")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Labels from a `.csv` or `.parquet` table instead of folders; photos it lacks are told.")
    ] = "",
    label_column: Annotated[
        str, typer.Option(help="Column of the table, or field of a `.json` beside a photo in a tar.")
    ] = "label",
    key_column: Annotated[
        str,
        typer.Option(
            help="Column with the photo's path below the source, or its file name.", show_default="key, path, file, ..."
        ),
    ] = "",
    min_side: Annotated[
        int, typer.Option(help="Photos with a shorter side, in pixels, are quarantined: no crop fits in them.")
    ] = 64,
    max_megapixels: Annotated[
        float, typer.Option(help="Larger photos are quarantined; a worker holds one decoded, 3 bytes a pixel.")
    ] = 64.0,
    tile_px: Annotated[
        int | None,
        typer.Option(
            help="Cut photos with a longer side into lossless PNG tiles of at most this side, e.g. `2048`, all in "
            "their photo's split: reading a crop then does not decode the whole.",
            show_default="whole photos",
        ),
    ] = None,
    shard_mb: Annotated[
        int, typer.Option(help="Longest shard in MiB; for S3 each worker holds one. Fewer files, or finer ones.")
    ] = 64,
    workers: Workers = None,
    on: Where = "auto",
    dry_run: Annotated[bool, typer.Option(help="Look at every photo and report, but write nothing.")] = False,
) -> dict[str, Any]:
    """Pack photos into a dataset: shards, an index, and `manifest.json`, which is written last.

    Every photo (JPEG, PNG, WebP, TIFF, BMP, PPM) is read, decoded to be sure, and kept as it came; equal photos are
    kept once. Training reads 8-bit RGB: orientation is applied, gray, palette and CMYK are converted, of 16 bits the
    high 8 count, alpha is laid over white. What does not decode or is too small or large is left out and listed, with
    the reason, in `quarantine.json`; duplicates, groups of near duplicates (resized, encoded again, toned) and photos
    without a label are listed there too. The same photos and settings give the same bytes. Run it again after an
    interruption and it goes on: finished shards are not made twice. Run on a finished dataset it says so.

    S3 is found as by any AWS tool: `AWS_ACCESS_KEY_ID`, profiles, roles; `AWS_ENDPOINT_URL` for a server of your own.
    """
    settings = PackSettings(
        shard_bytes=shard_mb << 20,
        min_side=min_side,
        tile_px=tile_px,
        labels=labels,
        label_column=label_column,
        key_column=key_column,
        split=split,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        limits=Limits(max_pixels=int(max_megapixels * 1e6), max_bytes=max(64 << 20, int(max_megapixels * 4e6))),
    )
    place = open_store(out)
    spread = _mapper(on, workers, open_store(source), place)
    with _Bars() as bars:
        report = packing.pack(source, out, settings, mapper=spread, on_progress=bars.update, dry_run=dry_run)
    manifest = report.manifest
    if report.existed:
        log.info("%s was complete already, with the same photos: nothing to do", place.uri)
    if report.quarantined:
        key, reason = report.quarantined[0]
        log.warning("%d left out, the first: %s (%s); all are in quarantine.json", len(report.quarantined), key, reason)
    if report.unlabelled:
        log.warning("%d without a label, the first: %s; all are in quarantine.json", *_first(report.unlabelled))
    return {
        "manifest": join(place.uri, "manifest.json"),
        "digest": manifest.digest,
        **{name: manifest.counts[name] for name in SPLITS},
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "quarantined": len(report.quarantined),
        "duplicates": len(report.duplicates),
        "near_duplicate_groups": len(report.near),
        "unlabelled": len(report.unlabelled),
        "status": "dry-run" if dry_run else "complete" if report.existed else "packed",
    }


def verify(data: Data, workers: Workers = None, on: Where = "auto") -> dict[str, Any]:
    """Check every byte of a dataset: each photo's checksum, the tars around them, the index, the manifest.

    What is damaged is listed in the result and the exit code is 1; `rayscale data repair` mends it.
    """
    store = open_store(data)
    with _Bars() as bars:
        damage = verifying.verify(data, mapper=_mapper(on, workers, store), on_progress=bars.update)
    result = {"data": store.uri, "status": "damaged" if damage else "sound", "damage": [d._asdict() for d in damage]}
    return _told(result, store, [f"{d.file} {d.key} {d.problem}" for d in damage], "run `rayscale data repair`")


def repair(
    data: Data,
    source: Annotated[
        str, typer.Option(help="Where the photos are now.", show_default="where they were packed from")
    ] = "",
    workers: Workers = None,
    on: Where = "auto",
) -> dict[str, Any]:
    """Make damaged or missing shards, or a lost index, again: byte for byte what they were, or not at all.

    Photos that are sound stay; the others are read from where they came from. What cannot be had any more is listed
    and the exit code is 1; nothing is changed for it.
    """
    store, _ = verifying.open_dataset(data)
    with _Bars() as bars:
        spread = _mapper(on, workers, store)
        mended, left = verifying.repair(data, source, mapper=spread, on_progress=bars.update)
    status = "damaged" if left else "repaired" if mended else "sound"
    result = {"data": store.uri, "status": status, "repaired": mended, "damage": [d._asdict() for d in left]}
    remedy = "name the photos' place with --source, or `rayscale data drop` them"
    return _told(result, store, [f"{d.file} {d.key} {d.problem}" for d in left], remedy)


def inspect(
    data: Data,
    out: Annotated[str, typer.Option(help="Folder for the pictures and `summary.json`.")] = "inspect",
    count: Annotated[int, typer.Option(help="Photos on the contact sheet.")] = 48,
) -> dict[str, Any]:
    """Look at a dataset: a contact sheet, and histograms of sizes, formats, labels and splits.

    Writes `contact_sheet.png`, `histograms.png` and `summary.json`, the same figures.
    """
    seen, place = looking.overview(data, count), open_store(out)
    place.write("contact_sheet.png", encode(seen.sheet, "png"))
    place.write("histograms.png", encode(seen.histograms, "png"))
    place.write("summary.json", json.dumps(seen.facts, indent=2).encode())
    few = {name: value for name, value in seen.facts.items() if name not in ("labels", "shorter_side_px")}
    return {"out": place.uri, **few, "labels": len(seen.facts["labels"])}


def drop(
    data: Data,
    key: Annotated[
        list[str] | None,
        typer.Option(
            help="A photo's key, or its path in the source: it stands for all tiles, that of a duplicate for the equal "
            "photo that was kept. May be repeated."
        ),
    ] = None,
    keys_from: Annotated[str, typer.Option(help="A file with one of them a line.")] = "",
    out: Annotated[str, typer.Option(help="A new place for the dataset without them; the old one stays.")] = "",
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="Change the dataset itself and delete the old bytes, as a deletion asks.")
    ] = False,
    workers: Workers = None,
    on: Where = "auto",
) -> dict[str, Any]:
    """Make the dataset without some photos; its manifest names the old one as its parent.

    Shards that hold one are written anew, the others stay as they are (copied for `--out`). With `--rewrite` nothing
    of the photos is left in the place, nor their names; runs that were trained on it are refused from then on. A
    bucket that keeps old versions of objects keeps these too, until they expire.
    """
    if bool(out) == rewrite:
        given = "both" if rewrite else "none"
        raise ConfigError("out", given, "either --out or --rewrite must be given", "choose one of them")
    unwanted = {*(key or ()), *(_lines(keys_from) if keys_from else ())}
    if not unwanted:
        raise ConfigError("key", "(none)", "no photo is named", "give --key or --keys-from")
    store = open_store(data)
    target = store if rewrite else open_store(out)
    with _Bars() as bars:
        spread = _mapper(on, workers, store, target)
        done = dropping.drop(data, unwanted, None if rewrite else out, mapper=spread, on_progress=bars.update)
    if done.unknown:
        log.warning("%d are not in this dataset, the first: %s", *_first(done.unknown))
    return {
        "manifest": join(target.uri, "manifest.json"),
        "digest": done.manifest.digest,
        "parent": done.manifest.parent,
        **{name: done.manifest.counts[name] for name in SPLITS},
        "dropped": len(done.names),
        "unknown": len(done.unknown),
        "shards_rewritten": done.shards,
    }


def export_pairs(
    recipe: Annotated[str, typer.Option(help="`module:function`; `rayscale recipes` lists them")],
    data: Annotated[str, typer.Option(help="A packed dataset: a folder or `s3://bucket/prefix`.")],
    out: Annotated[str, typer.Option(help="Folder for the pictures and their parameters.")] = "pairs",
    count: Annotated[int, typer.Option(help="Samples to write.")] = 16,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="`path=value`, e.g. `data.hr_crop_px=128`; may be repeated")
    ] = None,
) -> dict[str, Any]:
    """Write training samples of a recipe as pictures to look at, to the bit as training gets them.

    Every tensor is a PNG `KEY-NAME.png` (a burst's frames are numbered); `pairs.json` says what was drawn for each;
    `sheet.png` shows all of them.
    """
    from rayscale import recipes
    from rayscale.data.preview import preview
    from rayscale.data.shards import open_split

    photos = open_split(data, split)
    shown, place = preview(photos, recipes.load(recipe, settings or ()).data, count), open_store(out)
    described = []
    for sample in shown.samples:
        files = {}
        for name, tensor in sample.tensors.items():
            frames = tensor if tensor.ndim == 4 else tensor[None]
            files[name] = [f"{sample.key}-{name}{f'-{i}' if len(frames) > 1 else ''}.png" for i in range(len(frames))]
            for file, frame in zip(files[name], frames, strict=True):
                pixels = frame if frame.shape[-1] == 3 else frame.repeat(3, axis=-1)
                place.write(file, encode(pixels, "png"))
        described.append({"key": sample.key, "files": files, "drawn": to_json(sample.drawn)})
    place.write("sheet.png", encode(shown.sheet, "png"))
    place.write("pairs.json", json.dumps({"recipe": recipe, "samples": described}, indent=2, default=float).encode())
    return {"out": place.uri, "samples": len(described), "sheet": join(place.uri, "sheet.png")}


def _mapper(on: Literal["auto", "ray", "local"], workers: int | None, *stores: Store) -> Mapper:
    """Raises: ConfigError where `workers` would have no effect."""
    if on == "ray" and workers is not None:
        raise ConfigError("workers", workers, "has no effect on a Ray cluster, which is used whole", "leave it out")
    here = local(workers)
    if on == "local" or workers is not None or (on == "auto" and not os.environ.get("RAY_ADDRESS")):
        return here

    def mapped(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        if on == "auto" and len(items) < WORTH_A_CLUSTER:
            return here(function, items)
        from rayscale.cli.cluster import spread  # not before: importing Ray takes longer than a few photos

        return spread(*stores, anyway=on == "ray")(function, items)

    return mapped


def _told(result: dict[str, Any], store: Store, damage: list[str], remedy: str) -> dict[str, Any]:
    """`result`, or, where there is damage, the same line and an error. Raises: IntegrityError."""
    if not damage:
        return result
    for line in damage[:20]:
        log.warning("%s", line)
    print(json.dumps(result), flush=True)
    raise IntegrityError("data", store.uri, f"is damaged in {len(damage)} places, the first: {damage[0]}", remedy)


def _lines(uri: str) -> list[str]:
    folder, _, name = uri.rpartition("/")
    try:
        text = open_store(folder or ("/" if uri.startswith("/") else ".")).read(name).decode()
    except UnicodeDecodeError:
        raise ConfigError("keys_from", uri, "is no UTF-8 text", "give one key a line") from None
    except MissingError:
        raise MissingError("keys_from", uri, "is not there", "give a file with one key a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _first(names: list[str] | tuple[str, ...]) -> tuple[int, str]:
    return len(names), names[0]


class _Bars(ExitStack):
    """One progress bar for each phase of work, one after the other."""

    phase = ""
    bar: Progress

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase:
            self.close()
            # What an earlier run had finished counts neither as work nor for the rate.
            self.phase, self.skipped, self.started = phase, done, time.monotonic()
            self.bar = self.enter_context(progress(phase, total - self.skipped, "photos"))
        worked = done - self.skipped
        self.bar.update(worked, f"{worked / max(time.monotonic() - self.started, 1e-3):.0f}/s")
