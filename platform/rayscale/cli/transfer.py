"""`rayscale models import` and `export`: networks made elsewhere in, artifacts out."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rayscale import artifact, contract
from rayscale.cli.disk import check_disks
from rayscale.cli.scoring import read
from rayscale.contract import Lineage, ModelCard, dumps
from rayscale.errors import ConfigError, ConflictError, IntegrityError, RayscaleError
from rayscale.evaluate import Suite
from rayscale.observe import log
from rayscale.registry import foreign
from rayscale.registry.gate import default_for
from rayscale.registry.models import Registry
from rayscale.storage import TEMPORARY, check_free, home, os_errors
from rayscale.tracking import default_uri


def import_model(
    file: Annotated[str, typer.Argument(help="One whole ONNX file, weights inside; a path or `s3://`")],
    name: Annotated[str, typer.Option(help="Name of the model in the registry, e.g. photos-x2")],
    licence: Annotated[str, typer.Option(help="Licence of the network, e.g. BSD-3-Clause")] = "",
    card: Annotated[
        str, typer.Option(help="JSON of a whole card, instead of measuring: for bursts, masks, generators, embeddings")
    ] = "",
    halo: Annotated[
        int | None, typer.Option(min=0, help="How far an output pixel sees, px; is checked.", show_default="measured")
    ] = None,
    untiled: Annotated[str, typer.Option(help="Never cut pictures into tiles for it: the reason, for its card")] = "",
    suite: Annotated[
        str, typer.Option(help="JSON of a suite: what `promote` scores it on", show_default="the version's before it")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print the card, register nothing")] = False,
) -> dict[str, Any]:
    """Bring in an ONNX network made elsewhere, as a version like any other.

    A network of pictures is one float32 input [n, 3, h, w], RGB in [0, 1], and one output alike, a whole number of
    times as large. The rest is measured on it: its scale, the step of its sides (align), whether a batch equals its
    pictures, and how far an output pixel sees: with that halo tiles must equal the whole picture to the bit, or the
    card says why it is not tiled. Sides may be fixed: larger pictures are cut into tiles of that size, smaller ones
    padded to it. One channel is luma (Y of YCbCr, full range): a network around it enlarges the colours bicubically.
    Refused, with the reason: channels last, 8-bit or 0..255 values, classifiers.

    Its parity is measured against ONNX's own reference implementation. `promote` judges it on the suite of the version
    before it, or on `--suite`.
    """
    if card:
        for option, given in (("--licence", licence), ("--halo", halo), ("--untiled", untiled)):
            if given not in ("", None):
                raise ConfigError(option, given, "has no effect beside --card", "write it into the card")
    elif not licence.strip():
        raise ConfigError("--licence", licence, "must not be empty", "state it; the gate lets none pass without")
    if halo is not None and untiled:
        raise ConfigError("--halo", halo, "has no effect beside --untiled", "give one of them")
    model = read(file)
    judged = contract.loads(Suite, read(suite), suite) if suite else None
    check_disks(default_uri(), home(), model_bytes=2 * len(model))
    if card:
        found = _declared(model, file, card)
    else:
        model, original = foreign.adapted(model), model
        recipe = f"imported {Path(file).name}{'' if model is original else ', a network of luma'}"
        found = _measured(model, recipe, licence.strip(), halo, untiled.strip())
    spec = found.spec
    sides = f"steps of {spec.align} px" if spec.fixed_px is None else "{1}x{0} px only".format(*spec.fixed_px)
    tiling = f"not tiled: {spec.halo_why_none}" if spec.halo_px is None else f"halo {spec.halo_px} px"
    log.info("%s: %s x%d, sides in %s, %s", file, spec.kind, spec.scale, sides, tiling)
    result = {"kind": spec.kind, "scale": spec.scale, "align": spec.align, "halo_px": spec.halo_px,
              "halo_why_none": spec.halo_why_none}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artifact"
        digest = foreign.write(folder, model, found)
        artifact.load(folder, expect_digest=digest)  # as it will be loaded: the golden probe passes
        if dry_run:
            print(dumps(found))
            return {"model": name, "version": None, "digest": digest, **result}
        registry = Registry()
        tags = {"imported": Path(file).name} | _judged_by(registry, name, found, judged)
        version = registry.publish(name, folder, tags=tags)
    return {"model": name, "version": version.version, "digest": version.digest, "uri": version.uri, **result}


def export_model(
    model: Annotated[str, typer.Argument(help="NAME:VERSION, NAME@ALIAS, or NAME for its champion")],
    folder: Annotated[Path, typer.Argument(help="A new folder")],
) -> dict[str, Any]:
    """Write a version's artifact as a folder: `model.onnx`, `card.json`, `golden.npz`; its digest is verified.

    Run again it changes nothing. Any ONNX Runtime opens the model; `evaluate` and `upscale` take the folder.
    """
    registry = Registry()
    version = registry.resolve(model)
    result = {"model": version.name, "version": version.version, "digest": version.digest, "folder": str(folder)}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _is(folder, version.digest):
            log.info("%s is %s already", folder, version)
            return result
        raise ConflictError("folder", folder, "something else is there already", "remove it or name another folder")
    source = registry.fetch(version, home() / "cache" / "artifacts")
    check_free(folder.absolute().parent, sum(f.stat().st_size for f in source.iterdir()), f"artifact {version}")
    with os_errors(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = folder.absolute().parent / f"{TEMPORARY}{folder.name}-{os.getpid()}"
        try:
            shutil.copytree(source, partial)
            if not _is(partial, version.digest):
                raise IntegrityError("artifact", version, "was damaged on its way to this folder", "try again")
            partial.rename(folder)  # over nothing, or over an empty folder
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return result


def _measured(model: bytes, recipe: str, licence: str, halo: int | None, untiled: str) -> ModelCard:
    spec = foreign.probed(model, halo_px=halo, why_untiled=untiled)
    lineage = Lineage(recipe=recipe, code_version=contract.code_version())
    parity = foreign.parity(model, spec)
    return ModelCard(family="imported", spec=spec, licence=licence, lineage=lineage, parity_max_abs=parity)


def _declared(model: bytes, file: str, card: str) -> ModelCard:
    found = contract.loads(ModelCard, read(card), card)
    foreign.checked(model, found.spec)
    if not found.licence.strip():
        raise ConfigError("card.licence", found.licence, "must not be empty", "state it in the card")
    lineage = found.lineage
    if not lineage.recipe:
        lineage = dataclasses.replace(lineage, recipe=f"imported {Path(file).name}")
    lineage = dataclasses.replace(lineage, code_version=lineage.code_version or contract.code_version())
    parity = foreign.parity(model, found.spec) if found.parity_max_abs is None else found.parity_max_abs
    return dataclasses.replace(found, licence=found.licence.strip(), lineage=lineage, parity_max_abs=parity)


def _judged_by(registry: Registry, name: str, card: ModelCard, suite: Suite | None) -> dict[str, str]:
    """Tags for `promote`: the suite that was given, or suite and gate of the newest version that does the same."""
    if suite is not None:
        return {"suite": dumps(suite), "suite_digest": suite.digest, "gate": dumps(default_for(card.spec.kind))}
    wanted = {"kind": card.spec.kind, "scale": str(card.spec.scale)}
    for version in registry.versions(name) if name in registry.names() else ():
        if "suite" in version.tags and wanted.items() <= version.tags.items():
            return {key: version.tags[key] for key in ("suite", "suite_digest", "gate") if key in version.tags}
    log.info("no suite to judge it on: `promote` needs one, give --suite")
    return {}


def _is(folder: Path, digest: str) -> bool:
    try:
        return artifact.digest_of(folder) == digest
    except RayscaleError:
        return False
