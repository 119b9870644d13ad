"""Labels from a table beside the photos: a CSV or Parquet file keyed by relative path or by file name."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rayscale.errors import ConfigError, nearest
from rayscale.storage import open_store

KEY_COLUMNS = ("key", "path", "file", "file_name", "filename", "image", "name")


class Labels:
    """Looked up by a photo's key, else by its file name, with or without its extension."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = table

    def __call__(self, key: str) -> str | None:
        """The label of a photo, None where the table has none."""
        name = key.rpartition("/")[2]
        for known in (key, name, name.rpartition(".")[0]):
            if known in self._table:
                return self._table[known]
        return None


def read_labels(uri: str, label_column: str, key_column: str) -> tuple[Labels, bytes]:
    """The labels of a table and its bytes; no label (an empty cell) is as good as no row.

    key_column "" takes the first of KEY_COLUMNS that is there.
    Raises: ConfigError for an unreadable table, a missing column, one key with two labels; MissingError.
    """
    folder, _, name = uri.rpartition("/")
    data = open_store(folder or ("/" if uri.startswith("/") else ".")).read(name)
    table = _parse(uri, data)
    key_column = key_column or next((c for c in KEY_COLUMNS if c in table.column_names), "")
    if not key_column:
        rule = f"has no column of {', '.join(KEY_COLUMNS)}"
        raise ConfigError("labels", uri, rule, f"name one with --key-column ({', '.join(table.column_names)})")
    for setting, column in (("label_column", label_column), ("key_column", key_column)):
        if column not in table.column_names:
            raise ConfigError(setting, column, f"{uri} has no such column", nearest(column, table.column_names))
    found: dict[str, str] = {}
    keys, labels = (table[c].cast(pa.string()).to_pylist() for c in (key_column, label_column))
    for key, label in zip(keys, labels, strict=True):
        if key and label and found.setdefault(key.removeprefix("./"), label) != label:
            rule = f"has two labels, {found[key.removeprefix('./')]} and {label}"
            raise ConfigError("labels", key, rule, "keep one of the rows, or use paths instead of file names")
    return Labels(found), data


def _parse(uri: str, data: bytes) -> pa.Table:
    try:
        if uri.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data), use_threads=False)
        # As text: "007" and "1e3" are names.
        header = pa.csv.read_csv(io.BytesIO(data)).column_names
        kinds = dict.fromkeys(header, pa.string())
        return pa.csv.read_csv(io.BytesIO(data), convert_options=pa.csv.ConvertOptions(column_types=kinds))
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        rule = f"cannot be read ({' '.join(str(error).split())[:120]})"
        raise ConfigError("labels", uri, rule, "give a CSV file with a header, or Parquet") from None
