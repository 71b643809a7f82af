"""Advice to the kernel and the C library on memory pages. On Linux; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

__all__ = ["clean_file_views", "drop", "keep_freed", "read_ahead", "trim", "trim_kept"]

_WILLNEED: Final = 3  # MADV_* of Linux
_DONTNEED: Final = 4
_M_TRIM_THRESHOLD: Final = -1  # of glibc's mallopt
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 1 << 30
_MAPPED_BYTES: Final = 32 << 20  # the most that glibc takes
_VIEW: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+)")

_keeps_freed = False  # whether `keep_freed` has succeeded


def read_ahead(tensor: Tensor) -> None:
    """Start reading a tensor from the disk, and do not wait for it."""
    _advise(tensor, _WILLNEED)


def drop(tensor: Tensor) -> None:
    """Give back the memory of a tensor that was read; touched again, it is read from the file again.

    Only for a private view of a file that nobody has written to: what was written would be lost.
    """
    _advise(tensor, _DONTNEED)


def trim() -> None:
    """Give back the memory that was freed but is kept for allocations to come; with glibc."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def keep_freed() -> bool:
    """Keep memory that is freed for allocations to come, about 1 GiB of it; with glibc, and whether it is.

    By default large tensors are mapped and unmapped one by one, and what is mapped anew is cleared page by page at its
    first touch. Tensors of more than 32 MiB still are where nothing that is kept has room for them: growing the heap
    for each of them leaves holes that larger ones do not fit into. For the whole process, and for good; `trim` still
    gives everything back.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    global _keeps_freed
    _keeps_freed = bool(libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return _keeps_freed


def trim_kept() -> None:
    """Give back what is kept since `keep_freed`: before work whose tensors have other sizes, and so no room in it."""
    if _keeps_freed and not torch.compiler.is_compiling():
        trim()


def clean_file_views() -> list[tuple[int, int]]:
    """Address ranges that are private views of files to which this process has written nothing: `drop` is safe there.

    A page that was written to is no longer the file's, and the kernel counts it as anonymous memory.
    """
    ranges: list[tuple[int, int]] = []
    view: tuple[int, int] | None = None
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ranges
    for line in lines:
        head = _VIEW.match(line)
        if head is not None:
            begin, end, mode, inode = head.groups()
            view = (int(begin, 16), int(end, 16)) if mode.endswith("p") and inode != "0" else None
        elif view is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            ranges.append(view)
    return ranges


def _advise(tensor: Tensor, advice: int) -> None:
    """For the pages that lie wholly inside the tensor: those at its ends belong to its neighbours too."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
