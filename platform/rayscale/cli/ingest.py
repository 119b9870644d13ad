"""`rayscale ingest`: photos -> shards."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any, Literal

import typer

from rayscale.data.manifest import SPLITS
from rayscale.data.pack import pack
from rayscale.data.parallel import local
from rayscale.data.scan import PackSettings
from rayscale.observe import Progress, log, progress
from rayscale.storage import join, open_store


def ingest(
    source: Annotated[
        str, typer.Argument(help="Photos: a folder or `s3://bucket/prefix`, looked through to its depths.")
    ],
    out: Annotated[
        str, typer.Argument(help="Where the dataset goes: a new folder or `s3://` prefix outside of the photos.")
    ],
    split: Annotated[
        Literal["hash", "folder"],
        typer.Option(
            help="Who decides what is held out. **hash**: a photo's content, so it stays where it is as others come "
            "and go; the first folder level is the label. **folder**: the top folders `train`, `validation` (or "
            "`val`) and `test`; the level below is the label."
        ),
    ] = "hash",
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share to watch training with, for `--split hash`.", show_default="0.05")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share to judge models with, for `--split hash`.", show_default="0.05")
    ] = None,
    min_side: Annotated[
        int, typer.Option(help="Photos with a shorter side, in pixels, are quarantined: no crop fits in them.")
    ] = 64,
    shard_mb: Annotated[
        int, typer.Option(help="Longest shard in MiB; packing holds one in memory. Fewer files, or finer ones.")
    ] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read and check.", show_default="CPUs; 16 from S3")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Look at every photo and report, but write nothing.")] = False,
) -> dict[str, Any]:
    """Pack photos into a dataset: shards, an index, and `manifest.json`, which is written last.

    Every photo is read, decoded to be sure, and kept as it came; equal photos are kept once. What does not decode or
    is too small or large is left out and listed, with the reason, in `quarantine.json`. The same photos and settings
    give the same bytes. Run it again after an interruption and it goes on; run it on a finished dataset and it says so.

    S3 is found as by any AWS tool: `AWS_ACCESS_KEY_ID`, profiles, roles; `AWS_ENDPOINT_URL` for a server of your own.
    """
    settings = PackSettings(
        shard_bytes=shard_mb << 20,
        min_side=min_side,
        split=split,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    with _Bars() as bars:
        report = pack(source, out, settings, mapper=local(workers), on_progress=bars.update, dry_run=dry_run)
    manifest, place = report.manifest, open_store(out).uri
    if report.existed:
        log.info("%s was complete already, with the same photos: nothing to do", place)
    if report.quarantined:
        key, reason = report.quarantined[0]
        log.warning("%d left out, the first: %s (%s); all are in quarantine.json", len(report.quarantined), key, reason)
    return {
        "manifest": join(place, "manifest.json"),
        "digest": manifest.digest,
        **{name: manifest.counts[name] for name in SPLITS},
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "quarantined": len(report.quarantined),
        "duplicates": len(report.duplicates),
        "status": "dry-run" if dry_run else "complete" if report.existed else "packed",
    }


class _Bars(ExitStack):
    """One progress bar for each phase of packing, one after the other."""

    phase = ""
    bar: Progress

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase:
            self.close()
            self.phase, self.bar = phase, self.enter_context(progress(phase, total, "photos"))
        self.bar.update(done)
