"""Versions of models in the MLflow registry: publish, resolve, move an alias, fetch.

A Version never changes and is known by its artifact's digest; aliases (`champion`, `challenger`) move. The
registry lives where the runs live (`tracking.default_uri`). Torch is not needed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayscale import contract
from rayscale.artifact import CARD, digest_of
from rayscale.contract import SCHEMA, ModelCard
from rayscale.errors import ConfigError, IntegrityError, MissingError, RayscaleError, ResourceError, nearest
from rayscale.observe import log
from rayscale.storage import open_store
from rayscale.tracking import Tracker, answering, artifact_uri, connect, download, error_code, remove

CHAMPION = "champion"
JOURNAL = "--releases"  # after a model's name: the registered model that is its journal
FETCH_ATTEMPTS = 3  # networks do flip bits and cut bodies
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}$")
_ALIAS = re.compile(r"^(?!latest$|v\d+$)[A-Za-z0-9_\-]{1,100}$", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Version:
    """One published model. `digest` says what it is, `uri` where its artifact lies."""

    name: str
    version: int
    digest: str
    uri: str
    run_id: str
    aliases: tuple[str, ...] = ()
    created: str = ""  # UTC, ISO 8601
    tags: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


class Registry:
    """The model registry of one MLflow database or server. Cheap to make; raises where MLflow is away."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.client = connect(tracking_uri)
        self.uri = str(self.client.tracking_uri)

    def publish(
        self,
        name: str,
        folder: Path,
        *,
        run_id: str | None = None,
        experiment: str = "models",
        tags: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Version:
        """Upload an artifact folder under a run (None: a new one) and register it as the next version.

        The version comes last: an interrupted call leaves none, and calling again completes it. An artifact
        with this digest that is there already is returned as it is. `texts` are written beside, in the run.
        Raises: ConfigError (name), MissingError (no artifact, no run), UnavailableError.
        """
        if not _NAME.match(name) or name.endswith(JOURNAL):
            rule = f"must be letters, digits and _.- (at most 200), not ending with {JOURNAL}"
            raise ConfigError("--name", name, rule, "e.g. photos-x2")
        digest = digest_of(folder)
        if known := self._with_digest(name, digest):
            log.info("%s is published already as %s", digest[:12], known)
            return known
        card = contract.loads(ModelCard, (folder / CARD).read_bytes(), CARD)
        tracker = None
        if run_id is None:
            tracker = Tracker.start(experiment, f"publish {name}", uri=self.uri)
            run_id = tracker.run_id
        where = f"models/{name}-{digest[:12]}"
        with answering(self.uri):
            for file, text in (texts or {}).items():
                self.client.log_text(run_id, text, f"{where}-{file}")
            self.client.log_artifacts(run_id, str(folder), where)
            with unless("RESOURCE_ALREADY_EXISTS"):
                self.client.create_registered_model(name)
            made = self.client.create_model_version(
                name,
                source=artifact_uri(self.client, run_id, where),
                run_id=run_id,
                tags=_tags(card, digest) | dict(tags or {}),
            )
        if tracker is not None:
            tracker.finish()
        version = _version(made)
        log.info("published %s (%s)", version, digest[:12])
        return version

    def _with_digest(self, name: str, digest: str) -> Version | None:
        found = [v for v in self._search(name) if v.digest == digest]
        return min(found, key=lambda v: v.version, default=None)

    def resolve(self, reference: str) -> Version:
        """The version of "name@alias", "name:3" or "name" (its champion).

        Raises: MissingError with the nearest that exists; ConfigError for a malformed reference.
        """
        name, mark, wanted = _parse(reference)
        with answering(self.uri):
            try:
                if mark == "@":
                    found = self.client.get_model_version_by_alias(name, wanted)
                else:
                    found = self.client.get_model_version(name, wanted)
            except Exception as error:
                # MLflow says INVALID_PARAMETER_VALUE for an alias that is not there.
                if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                self._say_missing(name, mark, wanted)
        if not _published(found):
            raise ConfigError("model", reference, "was not published by rayscale: it has no digest of ours",
                              "publish it with `rayscale publish`")  # fmt: skip
        return _version(found)

    def _say_missing(self, name: str, mark: str, wanted: str) -> None:
        if name not in (names := self.names()):
            raise MissingError("model", name, "no such model in the registry", nearest(name, names)) from None
        if mark == "@":
            known = self.aliases(name)
            raise MissingError("alias", f"{name}@{wanted}", "no such alias", nearest(wanted, known)) from None
        known_versions = [str(v.version) for v in self.versions(name)]
        remedy = f"there are {', '.join(reversed(known_versions)) or 'none'}"
        raise MissingError("version", f"{name}:{wanted}", "no such version", remedy) from None

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number of one model."""
        with answering(self.uri):
            return {k: int(v) for k, v in self.client.get_registered_model(name).aliases.items()}

    def standing(self) -> dict[str, dict[str, int]]:
        """Of all registered models, by name, their aliases and where these point; their journals are none."""
        with answering(self.uri):
            found = sorted(pages(self.client.search_registered_models), key=lambda model: str(model.name))
        models = {str(m.name): {k: int(v) for k, v in m.aliases.items()} for m in found}
        return {name: aliases for name, aliases in models.items() if not name.endswith(JOURNAL)}

    def names(self) -> tuple[str, ...]:
        """All registered models, by name."""
        return tuple(self.standing())

    def versions(self, name: str) -> tuple[Version, ...]:
        """The versions of one model that rayscale published, newest first. Raises: MissingError."""
        aliases: dict[int, tuple[str, ...]] = {}
        try:
            for alias, number in sorted(self.aliases(name).items()):
                aliases[number] = (*aliases.get(number, ()), alias)
        except MissingError:
            raise MissingError("model", name, "no such model in the registry", nearest(name, self.names())) from None
        found = sorted(self._search(name), key=lambda v: -v.version)
        return tuple(dataclasses.replace(v, aliases=aliases.get(v.version, ())) for v in found)

    def overview(self) -> dict[str, tuple[Version, ...]]:
        """All models that rayscale published, their versions newest first: two questions, however many there are."""
        with answering(self.uri):
            models = {str(m.name): dict(m.aliases) for m in pages(self.client.search_registered_models)}
            found = [_version(v) for v in pages(self.client.search_model_versions) if _published(v)]
        versions: dict[str, list[Version]] = {}
        for one in sorted(found, key=lambda v: (v.name, -v.version)):
            names = sorted(alias for alias, at in models.get(one.name, {}).items() if int(at) == one.version)
            versions.setdefault(one.name, []).append(dataclasses.replace(one, aliases=tuple(names)))
        return {name: tuple(them) for name, them in versions.items()}

    def _search(self, name: str) -> list[Version]:
        with answering(self.uri):
            found = pages(self.client.search_model_versions, filter_string=f"name='{name}'")
            return [_version(v) for v in found if _published(v)]

    def delete(self, version: Version) -> None:
        """Take a version out of the registry for good, and its artifact out of the store.

        The version goes first: what is interrupted leaves files that nothing names, not a version without files.
        """
        with answering(self.uri):
            self.client.delete_model_version(version.name, str(version.version))
        remove(self.uri, version.uri)

    def fetch(self, version: Version, cache: Path) -> Path:
        """The version's artifact as a local folder, `cache/DIGEST`: verified, then renamed into place.

        A cached one is believed when sizes and times are those at its verification, hashed again when not, and
        fetched again when damaged. What runs is checked once more: `artifact.load(folder, expect_digest=...)`
        hashes the bytes that it loads.
        Raises: IntegrityError when what lies at `version.uri` is not this digest; MissingError, ResourceError;
        ConfigError for a digest that is none.
        """
        if not _DIGEST.fullmatch(version.digest):  # it may come from elsewhere, and what it names may be deleted
            raise ConfigError("digest", version.digest, "must be 64 hex digits", "publish the model again")
        folder, seal = cache / version.digest, cache / f"{version.digest}.json"
        if folder.is_dir():
            if _sealed(folder, seal):
                return folder
            with contextlib.suppress(RayscaleError):
                if digest_of(folder) == version.digest:
                    _write_seal(folder, seal)
                    return folder
            log.warning("the cached artifact of %s is damaged, fetching it again", version)
            shutil.rmtree(folder)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch, _disk(cache):
            fetched = self._download(version, Path(scratch))
            try:
                fetched.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same bytes
                    raise
        _write_seal(folder, seal)
        return folder

    def _download(self, version: Version, scratch: Path) -> Path:
        found = ""
        for attempt in range(FETCH_ATTEMPTS):
            try:
                fetched = download(self.uri, version.uri, scratch / str(attempt))
                found = digest_of(fetched)
            except MissingError:
                raise MissingError("artifact", version.uri, f"{version} has no artifact there any more",
                                   "publish it again or restore the artifact store") from None  # fmt: skip
            except IntegrityError:
                found = "incomplete"
            if found == version.digest:
                return fetched
            log.warning("%s came with digest %s instead of %s", version, found[:12], version.digest[:12])
        rule = f"{version} is {version.digest[:12]}, these bytes are {found[:12]}"
        raise IntegrityError("artifact", version.uri, rule, "the artifact store was changed: publish it again")


def check_alias(alias: str) -> None:
    """Raises: ConfigError for a name that MLflow reserves or refuses."""
    if not _ALIAS.match(alias):
        rule = "must be letters, digits and _-, not `latest` or `v1`"
        raise ConfigError("--alias", alias, rule, f"e.g. {CHAMPION}")


def _parse(reference: str) -> tuple[str, str, str]:
    name, mark, wanted = re.match(r"^([^@:]*)([@:]?)(.*)$", reference, re.DOTALL).groups()  # type: ignore[union-attr]
    if not mark:
        mark, wanted = "@", CHAMPION
    good = _NAME.match(name) and (wanted.isascii() and wanted.isdigit() if mark == ":" else _ALIAS.match(wanted))
    if not good:
        raise ConfigError("model", reference, "must be NAME, NAME@ALIAS or NAME:VERSION", "e.g. photos-x2@champion")
    return name, mark, wanted


def _tags(card: ModelCard, digest: str) -> dict[str, str]:
    return {
        "digest": digest,
        "kind": card.spec.kind,
        "family": card.family,
        "scale": str(card.spec.scale),
        "parity_max_abs": "" if card.parity_max_abs is None else f"{card.parity_max_abs:.3g}",
        "licence": card.licence,
        "recipe": card.lineage.recipe,
        "recipe_digest": card.lineage.recipe_digest,
        "manifest_digest": card.lineage.manifest_digest,
        "code_version": card.lineage.code_version,
    }


def _published(found: Any) -> bool:
    """Whether rayscale published it. Anybody may write a tag, and the digest becomes the name of a folder."""
    return _DIGEST.fullmatch(found.tags.get("digest", "")) is not None


def _version(found: Any) -> Version:
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    return Version(
        name=str(found.name),
        version=int(found.version),
        digest=found.tags["digest"],
        uri=str(found.source),
        run_id=str(found.run_id or ""),
        aliases=tuple(sorted(found.aliases or ())),
        created=created,
        tags=dict(found.tags),
    )


def pages(search: Any, **query: Any) -> Iterator[Any]:
    """All that one of MLflow's searches finds, page by page."""
    token = None
    while True:
        page = search(**query, max_results=200, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def unless(code: str) -> Iterator[None]:
    """Let MLflow's error of this code pass."""
    try:
        yield
    except Exception as error:
        if error_code(error) != code:
            raise


@contextmanager
def _disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError("cache", cache, "the disk is full", "free some space or set RAYSCALE_HOME") from None


def _stamp(folder: Path) -> dict[str, list[int]]:
    stats = {path.name: path.stat() for path in sorted(folder.iterdir())}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def _write_seal(folder: Path, seal: Path) -> None:
    open_store(seal.parent).write(seal.name, json.dumps(_stamp(folder)).encode())


def _sealed(folder: Path, seal: Path) -> bool:
    try:
        return bool(json.loads(seal.read_text()) == _stamp(folder))
    except (OSError, ValueError):
        return False
