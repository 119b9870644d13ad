"""Near duplicates: photos that were resized, encoded again or toned, found by a perceptual hash.

The hash is 256 signs: of the 16 x 16 lowest frequencies (DCT) of the photo's gray means over 32 x 32 cells. Copies at
half to one and a half times the size, as JPEG from quality 25 or WebP from 30, lie at most 18 bits apart; of the 9.3
million pairs among 4,317 photos of flowers none that is not the same picture lies closer than 70. Crops, mirrored and
turned copies are other photos here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from rayscale.imaging import U8

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

CELLS, SIDE = 32, 16
BITS = SIDE * SIDE
NEAR_BITS = 24  # that two hashes of one picture differ in, at most
_LEAST_DETAIL = 1.0  # size of a coefficient; most are below in blank walls and skies, whose signs are noise


def perceptual_hash(gray: U8) -> str:
    """64 hex digits for u8[h, w]; "" where a picture has too little detail to be told from another."""
    frequencies = cv2.dct(_cell_means(gray))[:SIDE, :SIDE].ravel()
    if np.count_nonzero(np.abs(frequencies) < _LEAST_DETAIL) > BITS // 2:
        return ""
    signs = frequencies > 0
    signs[0] = False  # the mean: brightness says nothing
    return np.packbits(signs).tobytes().hex()


def _cell_means(gray: U8) -> NDArray[np.float32]:
    """Exact means over CELLS x CELLS equal areas, which may end within a pixel: so that the size does not matter."""
    sums = cv2.integral(gray, sdepth=cv2.CV_32S if gray.size < 1 << 23 else cv2.CV_64F)
    for side in gray.shape:
        below, above, share = _edges(side)
        at_edges = sums[below] * (1 - share) + sums[above] * share
        sums = (at_edges[1:] - at_edges[:-1]).T  # rows, then columns
    means: NDArray[np.float32] = (sums * (CELLS * CELLS / gray.size)).astype(np.float32)
    return means


@functools.lru_cache(maxsize=1 << 12)
def _edges(side: int) -> tuple[I64, I64, NDArray[np.float64]]:
    """Of the cells along one side: the pixel below each edge, the next one, and how far it lies towards that."""
    edges = np.linspace(0, side, CELLS + 1)
    below = np.minimum(edges.astype(np.int64), side - 1)
    return below, below + 1, (edges - below)[:, None]


def group(hashes: Sequence[str]) -> I64:
    """For each hash the smallest index of its group: those linked, also through others, by at most NEAR_BITS bits.

    Links of at most 15 bits are all found, nearly all of the others: candidates agree in one of 16 rows or 16 columns
    of signs. "" is a group of its own. A million hashes take seconds.
    """
    leader = np.arange(len(hashes), dtype=np.int64)
    known = np.array([i for i, h in enumerate(hashes) if h], np.int64)
    if not len(known):
        return leader
    packed = np.frombuffer(bytes.fromhex("".join(hashes[i] for i in known)), np.uint8).reshape(-1, BITS // 8)
    _, first, inverse = np.unique(packed.view(f"V{BITS // 8}").ravel(), return_index=True, return_inverse=True)
    roots = _components(np.ascontiguousarray(packed[first]))
    # Indices, smallest of a group first: np.unique names the first of equal hashes, but components know no order.
    smallest = np.full(len(first), len(hashes), np.int64)
    np.minimum.at(smallest, roots[inverse.ravel()], known)
    leader[known] = smallest[roots[inverse.ravel()]]
    return leader


def _components(packed: U8) -> I64:
    """u8[n, 32], all different -> one root for each."""
    words = packed.view(np.uint64)
    root = np.arange(len(packed), dtype=np.int64)
    for band in _bands(packed):
        order = np.argsort(band, kind="stable")
        band, columns = band[order], [np.ascontiguousarray(words[order, i]) for i in range(words.shape[1])]
        rows = np.arange(len(order) - 1)
        for lag in range(1, len(order)):  # pairs at this distance in the sorted band, until no bucket is so long
            rows = rows[rows < len(order) - lag]
            rows = rows[band[rows] == band[rows + lag]]
            if not len(rows):
                break
            near, bits = rows, np.zeros(len(rows), np.uint16)
            for column in columns:  # most are told by their first 64 bits
                bits = bits + np.bitwise_count(column[near] ^ column[near + lag])
                near, bits = near[bits <= NEAR_BITS], bits[bits <= NEAR_BITS]
            a, b = order[near], order[near + lag]
            apart = root[a] != root[b]
            if apart.any():
                _link(root, a[apart], b[apart])
    return root


def _bands(packed: U8) -> Iterator[NDArray[np.uint16]]:
    """The 16 rows of signs, then the 16 columns, 16 bits each."""
    columns = np.empty_like(packed)
    for start in range(0, len(packed), 1 << 16):
        signs = np.unpackbits(packed[start : start + (1 << 16)], axis=1).reshape(-1, SIDE, SIDE)
        columns[start : start + (1 << 16)] = np.packbits(signs.transpose(0, 2, 1).reshape(-1, BITS), axis=1)
    for signs in (packed, columns):
        for i in range(SIDE):
            yield np.ascontiguousarray(signs.view(np.uint16)[:, i])


def _link(root: I64, a: I64, b: I64) -> None:
    """Join the components of each pair, in place; every root stays its own."""
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        first, second = int(root[i]), int(root[j])
        while root[first] != first:
            first = int(root[first])
        while root[second] != second:
            second = int(root[second])
        root[max(first, second)] = min(first, second)
    while not np.array_equal(flat := root[root], root):
        root[:] = flat
