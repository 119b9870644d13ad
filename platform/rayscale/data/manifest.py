"""What a dataset is: its manifest, and the columns of its index.

A dataset is a folder: tar files of the encoded originals as they came (any tar or WebDataset tool reads them; a shard
holds one split), a Parquet index beside them, `quarantine.json` (what was left out, and why), `origin.json` (by which
a second run knows the photos again), and `manifest.json`, written last: without it there is no dataset. Shards and
index carry a digest of their content in their names, so two runs never write different bytes to one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from rayscale import contract
from rayscale.errors import MissingError
from rayscale.storage import Store, join

SPLITS = ("train", "validation", "test")
KEY_CHARS = 24  # of the sha256: 96 bits, and no two photos of a dataset are equal
TRIES = 5  # reads of a photo whose bytes are not what its digest says: on a bad day two in five are not

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # the member's name in the tar, without its extension
        ("shard", pa.string()),
        ("offset", pa.int64()),  # of the photo's bytes in the tar
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("sha256", pa.binary(32)),
        ("split", pa.string()),
        ("source_key", pa.string()),
        ("format", pa.string()),  # as imaging names it
        ("group", pa.string()),  # key that leads its near duplicates, or names a tile's photo; "" for one alone
        ("box", pa.string()),  # of a tile in its photo (top, left, height, width), "" for a whole photo
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file, its name relative to the dataset."""

    name: str
    size: int  # bytes
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset is. `digest` identifies its content, however it is cut into shards."""

    shards: tuple[ShardInfo, ...]
    counts: Mapping[str, int]  # train, validation, test -> samples
    source: str  # URI of the photos
    digest: str  # SHA-256 over the sorted (sha256, split, label) of all samples
    index_sha256: str
    parent: str = ""  # digest of the dataset this one was made from
    schema: int = contract.SCHEMA

    @property
    def index_name(self) -> str:
        return f"index-{self.index_sha256[:16]}.parquet"


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a dataset, None where there is no (whole) one.

    Nothing vouches for its bytes, as it does for all others. So from afar it is read until an answer comes again.
    """
    try:
        seen = set[bytes]()
        for _ in range(2 * TRIES):
            data = store.read("manifest.json")
            if data in seen or not store.remote:
                break
            seen.add(data)
        return contract.loads(Manifest, data, join(store.uri, "manifest.json"))
    except MissingError as error:
        if error.field == "bucket":
            raise
        return None
