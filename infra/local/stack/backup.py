"""What must not be lost, out of the stack and back: MLflow's database and the bucket.

The database goes first: a version is registered after its artifact was uploaded, so the bucket has what the dump names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from parts import pg, s3_client
from settings import BUCKET, DATABASE, Settings

from rayscale.errors import ConflictError, IntegrityError, MissingError

DUMP, OBJECTS, LIST = "database.dump", "objects", "objects.json"


def save(settings: Settings, folder: Path) -> None:
    """Into an empty folder; `objects.json`, written last, makes it whole. Raises: ConflictError."""
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError("backup", folder, "the folder is not empty", "choose a new one")
    (folder / OBJECTS).mkdir(parents=True)
    with (folder / DUMP).open("wb") as file:
        pg(settings, "pg_dump", "--format=custom", DATABASE, stdout=file)
    client, digests = s3_client(settings), {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", ()):
            data = client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
            digests[found["Key"]] = hashlib.sha256(data).hexdigest()
            (folder / OBJECTS / digests[found["Key"]]).write_bytes(data)  # equal objects are kept once
    (folder / LIST).write_text(json.dumps(digests, indent=0))
    print(f"saved {DATABASE} and {len(digests)} objects to {folder}")


def load(settings: Settings, folder: Path) -> None:
    """Database and bucket as they were. Raises: MissingError, ConflictError (it is not empty), IntegrityError."""
    if not (folder / LIST).exists():
        raise MissingError("restore", folder, "is no whole backup", "take one with `backup`")
    digests = json.loads((folder / LIST).read_text())
    tables = pg(settings, "psql", "-d", DATABASE, "-Atc", "select count(*) from pg_tables where schemaname='public'")
    client = s3_client(settings)
    if int(tables) or client.list_objects_v2(Bucket=BUCKET, MaxKeys=1).get("Contents"):
        raise ConflictError("restore", settings.state, "the stack holds data already", "`wipe` it first")
    for key, digest in digests.items():
        data = (folder / OBJECTS / digest).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError("restore", key, "is damaged in the backup", "take another backup")
        client.put_object(Bucket=BUCKET, Key=key, Body=data)
    with (folder / DUMP).open("rb") as file:
        pg(settings, "pg_restore", "--exit-on-error", "--no-owner", "-d", DATABASE, stdin=file)
    print(f"restored {DATABASE} and {len(digests)} objects from {folder}")
