"""Freed memory stays with a process that asked for that."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from rayscale.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(20 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(20 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_a_picture_that_is_freed_is_not_mapped_again_page_by_page() -> None:
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60
        )
        faults[how] = int(done.stdout)
    if faults["leave"] < 200:  # 20 pictures, whose pages may be huge ones
        pytest.skip(f"this system keeps freed memory by itself: {faults['leave']} page faults")
    assert faults["keep"] < faults["leave"] / 10
