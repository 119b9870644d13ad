"""Disks that are too small: told before the work where that can be known, and in one line where it cannot."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayscale.errors import ResourceError
from rayscale.storage import check_free

ROOM_BYTES = 16 << 20  # for a database, pictures and reports; a model's own size comes on top


def check_disks(tracking_uri: str, *places: str | Path, model_bytes: int = 0) -> None:
    """Room in the temporary folder, beside an embedded MLflow database, and in `places`. Raises: ResourceError."""
    check_free(tempfile.gettempdir(), ROOM_BYTES + model_bytes, "scratch (TMPDIR)")
    if tracking_uri.startswith("sqlite:///"):
        folder = Path(tracking_uri.removeprefix("sqlite:///")).absolute().parent
        check_free(folder, ROOM_BYTES + model_bytes, "MLflow with its artifacts")
    for place in places:
        check_free(place, ROOM_BYTES + model_bytes, "this command")


@contextmanager
def full_disk_told() -> Iterator[None]:
    """A disk that fills up under some library. Raises: ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space, or set TMPDIR and RAYSCALE_HOME to other disks"
        where = error.filename or tempfile.gettempdir()
        raise ResourceError("disk", where, f"cannot be written ({error.strerror})", remedy) from None
