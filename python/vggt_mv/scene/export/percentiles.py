"""Percentiles of more values than fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["streamed_percentiles"]

_BITS = 16


def streamed_percentiles(chunks: Callable[[], Iterable[NDArray[Any]]], percents: Sequence[float]) -> list[float] | None:
    """``numpy.percentile`` of float32 values that come in chunks, in memory that does not depend on how many there are.

    Exact, by counting: a first pass over the values finds the upper half of the bits of the values wanted, a second
    pass the lower half.

    Args:
        chunks: called twice; gives finite float32 values of any shape, the same each time.
        percents: in [0, 100].

    Returns:
        One number per percent, or None where there are no values.

    Example:
        >>> parts = [np.array([4.0, 1.0], dtype=np.float32), np.array([3.0, 2.0, 5.0], dtype=np.float32)]
        >>> streamed_percentiles(lambda: parts, [0, 50, 75])
        [1.0, 3.0, 4.0]
    """
    upper = np.zeros(1 << _BITS, dtype=np.int64)
    for chunk in chunks():
        upper += np.bincount(_ordered_bits(chunk) >> _BITS, minlength=1 << _BITS)
    ends = np.cumsum(upper)
    count = int(ends[-1])
    if count == 0:
        return None
    places = [(count - 1) * percent / 100 for percent in percents]
    ranks = sorted({rank for place in places for rank in (int(place), min(int(place) + 1, count - 1))})
    buckets = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
    lower = {bucket: np.zeros(1 << _BITS, dtype=np.int64) for bucket in buckets.values()}
    for chunk in chunks():
        bits = _ordered_bits(chunk)
        for bucket, counts in lower.items():
            counts += np.bincount(bits[bits >> _BITS == bucket] & 0xFFFF, minlength=1 << _BITS)
    values = {}
    for rank, bucket in buckets.items():
        within = rank - int(ends[bucket] - upper[bucket])
        low = int(np.searchsorted(np.cumsum(lower[bucket]), within, side="right"))
        values[rank] = _value_of(bucket << _BITS | low)
    result = []
    for place in places:
        first, second = values[int(place)], values[min(int(place) + 1, count - 1)]
        # By numpy itself, so that rounding is its own.
        result.append(float(np.percentile(np.array([first, second], np.float32), 100 * (place - int(place)))))
    return result


def _ordered_bits(values: NDArray[Any]) -> NDArray[np.int64]:
    """Whole numbers in [0, 2^32) that are ordered as the float32 values are."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    negative = bits >> 31 == 1
    return np.where(negative, ~bits, bits | np.uint32(0x80000000)).astype(np.int64)


def _value_of(bits: int) -> np.float32:
    plain = bits & 0x7FFFFFFF if bits >> 31 else ~bits & 0xFFFFFFFF
    return np.array([plain], dtype=np.uint32).view(np.float32)[0]
