"""Python's side of the emulated machine: registers tensors, runs launchers, turns reports into exceptions."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation_build import CannotBuild, build_library

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
ROLES = {"input": 0, "output": 1, "in_out": 2}
GUARD_BYTES = 4096


class EmulationError(AssertionError):
    """A kernel did what the hardware does not define, or what no caller wants; `reports` has a line for each."""

    def __init__(self, reports: list[str]) -> None:
        super().__init__("\n".join(reports))
        self.reports = reports


@dataclass(frozen=True)
class AccessSite:
    """A load or store statement: how many warp requests it made and what they cost.

    `units` are shared-memory wavefronts (`ideal_units`: without bank conflicts) or 32-byte sectors of global memory
    (`ideal_units`: as many as the bytes fill).
    """

    place: str
    space: str
    bytes: int
    requests: int
    units: int
    ideal_units: int


def guarded(shape: tuple[int, ...], dtype: torch.dtype, fill: float = float("nan")) -> torch.Tensor:
    """A contiguous tensor amid poison: what lies before and after it is NaN and belongs to no registered buffer."""
    count = 1
    for size in shape:
        count *= size
    guard = GUARD_BYTES // dtype.itemsize
    storage = torch.full((guard + count + guard,), float("nan"), dtype=dtype)
    tensor = storage[guard : guard + count].view(shape)
    tensor.fill_(fill)
    return tensor


def guarded_copy(source: torch.Tensor) -> torch.Tensor:
    """`source`, contiguous, amid poison."""
    tensor = guarded(tuple(source.shape), source.dtype)
    tensor.copy_(source)
    return tensor


def far_apart(source: torch.Tensor, dim: int) -> torch.Tensor:
    """`source` with 2^31 and some elements from one to the next along `dim`; only pages that are touched exist."""
    stride = 2**31 + 64
    strides = list(source.contiguous().stride())
    strides[dim] = stride
    length = 1 + sum((size - 1) * step for size, step in zip(source.shape, strides, strict=True))
    return torch.empty(length, dtype=source.dtype).as_strided(source.shape, strides).copy_(source)


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last, gaps of its strides included."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


class EmulatedDevice:
    """One emulated library. Use :meth:`session` for every run."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_reports.restype = ctypes.c_char_p
        self.library.emulator_statistics.restype = ctypes.c_char_p
        self.library.emulator_launches.restype = ctypes.c_longlong
        self.library.emulator_configure.argtypes = [
            ctypes.c_int,
            ctypes.c_ulonglong,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_ulonglong,
        ]
        self.library.emulator_register.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_char_p, ctypes.c_int]
        self._alive: list[torch.Tensor] = []

    @contextmanager
    def session(
        self,
        order: str = "forward",
        seed: int = 0,
        *,
        count_accesses: bool = False,
        multiprocessors: int = 4,
        max_shared_bytes: int = 227 * 1024,
    ) -> Iterator[EmulatedDevice]:
        """Runs what is in the block in the given order of fibers; raises EmulationError at its end if need be."""
        self.library.emulator_clear()
        self.library.emulator_configure(ORDERS[order], seed, int(count_accesses), multiprocessors, max_shared_bytes)
        self._alive.clear()
        yield self
        reports = self.reports()
        if reports:
            raise EmulationError(reports)

    def buffer(self, tensor: torch.Tensor, name: str, role: str = "input") -> int:
        """Registers a tensor's memory for the session and returns its address."""
        self._alive.append(tensor)
        self.library.emulator_register(tensor.data_ptr(), span_bytes(tensor), name.encode(), ROLES[role])
        return tensor.data_ptr()

    def reports(self) -> list[str]:
        return self.library.emulator_reports().decode().splitlines()

    def launches(self) -> int:
        """Kernels started in this session."""
        return int(self.library.emulator_launches())

    def access_sites(self) -> list[AccessSite]:
        """What ``count_accesses=True`` counted."""
        rows: list[dict[str, Any]] = json.loads(self.library.emulator_statistics().decode())
        return [AccessSite(**row) for row in rows]


def build_device(sources: Sequence[Path], *flags: str) -> EmulatedDevice:
    """The device of these sources; skips the test, or fails it if emulation is required, where none can be built."""
    try:
        return EmulatedDevice(build_library(sources, flags))
    except CannotBuild as reason:
        if os.environ.get("VGGT_MV_REQUIRE_EMULATION") == "1":
            pytest.fail(f"VGGT_MV_REQUIRE_EMULATION=1, but {reason}", pytrace=False)
        pytest.skip(f"CUDA kernels cannot be emulated here: {reason}")
