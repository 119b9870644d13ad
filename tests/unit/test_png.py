"""PNG files as written: what three readers see, and how large they are."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from rayscale import png


def by_opencv(data: bytes) -> NDArray[np.generic]:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return cv2.cvtColor(found, cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from((3, 4)),
    dtype=st.sampled_from((np.uint8, np.uint16)),
    seed=st.integers(0, 99),
)
def test_every_reader_sees_the_same_samples(height: int, width: int, channels: int, dtype: type, seed: int) -> None:
    limit = np.iinfo(dtype).max + 1
    hwc = np.random.default_rng(seed).integers(0, limit, (height, width, channels)).astype(dtype)
    hwc = hwc[::-1, :, ::-1]  # strides are no matter
    data = png.write(hwc)
    np.testing.assert_array_equal(by_opencv(data), hwc)
    picture = Image.open(io.BytesIO(data))
    picture.verify()  # the checksum of each chunk
    if dtype is np.uint8:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), hwc)


def test_parts_of_a_large_one_are_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    hwc = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    whole = png.write(hwc)
    monkeypatch.setattr(png, "PART_BYTES", 1000)
    parts = png.write(hwc)
    assert (whole.count(b"IDAT"), parts.count(b"IDAT")) == (1, 8)
    np.testing.assert_array_equal(by_opencv(parts), hwc)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_photos_are_about_as_large_as_opencv_makes_them(name: str) -> None:
    photo = getattr(skimage.data, name)()
    for hwc in (photo, cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)):
        theirs = cv2.imencode(".png", cv2.cvtColor(hwc, cv2.COLOR_RGB2BGR))[1]
        assert len(png.write(hwc)) < 1.05 * len(theirs)
