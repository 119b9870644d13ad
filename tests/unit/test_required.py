"""What CI installs must be there: a test that is skipped without it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPING = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("NO BROWSER: `apt-get install chromium`")

def test_in_a_fixture(browser): ...

@pytest.mark.skipif(True, reason="chromium is not installed")
def test_by_a_mark(): ...

def test_of_something_else():
    pytest.skip("no memcached")
"""


@pytest.mark.parametrize(
    ("require", "outcome"),
    [
        (None, "3 skipped"),
        ("", "3 skipped"),
        ("chrom", "3 skipped"),  # no word of theirs
        ("hadolint,memcached", "1 failed, 2 skipped"),
        ("chromium", "1 skipped, 2 errors"),
    ],
)
def test_a_skip_for_want_of_what_is_required_fails(tmp_path: Path, require: str | None, outcome: str) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    env = {name: value for name, value in os.environ.items() if name != "RAYSCALE_REQUIRE"}
    if require is not None:
        env["RAYSCALE_REQUIRE"] = require
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1].startswith(f"{outcome} in "), done.stdout
    assert (done.returncode == 0) == (outcome == "3 skipped")
    if "errors" in outcome:
        assert "RAYSCALE_REQUIRE=chromium: must be here. Skipped: NO BROWSER" in done.stdout
