"""What unit tests share: the classic test sets, where this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def eval_data() -> Path:
    """Folder of Set5 and Set14 (x2, x3, x4; HR and MATLAB's LR). They are not ours to ship: skipped where absent."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RAYSCALE_EVAL_DATA", default)) / "eval"
    if not (folder / "Set5").is_dir():
        pytest.skip(f"no Set5 and Set14 under {folder}: set RAYSCALE_EVAL_DATA to the folder that has eval/")
    return folder
