"""Advice to the kernel on the memory pages of mapped tensors. On Linux; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Final

from torch import Tensor

__all__ = ["drop", "read_ahead"]

_WILLNEED: Final = 3  # MADV_* of Linux
_DONTNEED: Final = 4


def read_ahead(tensor: Tensor) -> None:
    """Start reading a tensor from the disk, and do not wait for it."""
    _advise(tensor, _WILLNEED)


def drop(tensor: Tensor) -> None:
    """Give back the memory of a tensor that was read; touched again, it is read from the file again.

    Only for a private view of a file that nobody has written to: what was written would be lost.
    """
    _advise(tensor, _DONTNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    """For the pages that lie wholly inside the tensor: those at its ends belong to its neighbours too."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
