"""Read and write ``.safetensors``: 8 bytes of header size, a JSON header, then the bytes of every tensor.

Reading maps the file privately: a tensor takes no memory until it is touched, and writing to it never reaches the
file. Written here and not taken from a library so that every fault of a file is reported with its path and key, that
writing needs memory for one tensor only, and that a machine without the library reads the files too.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vggt_mv.weights.errors import WeightsFileError

__all__ = ["looks_like_safetensors", "read_safetensors", "write_safetensors"]

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER: Final = 100_000_000  # bytes, the limit of the format
_PART: Final = 1 << 20  # elements converted at a time: buffers this small the allocator reuses
_ALIGN: Final = 64  # the data starts at a multiple of this: mapped tensors then suit vector loads


def looks_like_safetensors(path: Path) -> bool:
    """Whether the file starts like one, whatever its suffix."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file: tensors by name, and the metadata of its header.

    Raises:
        WeightsFileError: truncated, or a header that is not one or contradicts the file.
    """
    size = path.stat().st_size
    header, start = _read_header(path, size)
    raw = header.pop("__metadata__", {})
    metadata = {str(key): str(value) for key, value in raw.items()} if isinstance(raw, dict) else {}
    ranges = {name: _check(path, name, field, size - start) for name, field in header.items()}
    _check_overlaps(path, {name: (begin, end) for name, (_, _, begin, end) in ranges.items()})
    if not ranges:
        return {}, metadata
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for name, (dtype, shape, begin, end) in ranges.items():
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        part = storage[start + begin : start + end]
        if (start + begin) % dtype.itemsize:  # some writers do not align; vector loads and views need it
            part = part.clone()
        tensors[name] = torch.empty(0, dtype=dtype).set_(part).view(shape)
    return tensors, metadata


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise WeightsFileError(
                f"{path} is truncated: {size} bytes are too few for a safetensors header; fetch it again"
            )
        length = struct.unpack("<Q", head)[0]
        if length > _MAX_HEADER:
            raise WeightsFileError(f"{path} is not a safetensors file: its header would be {length} bytes long")
        if 8 + length > size:
            raise WeightsFileError(
                f"{path} is truncated: its header takes {8 + length} bytes, the file has {size}; fetch it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(f"{path} is corrupt: its header is not valid JSON ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise WeightsFileError(f"{path} is corrupt: its header must be a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _check(path: Path, name: str, field: Any, available: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        code, shape, (begin, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        integers = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsFileError(f"{path} is corrupt: the header of {name!r} must have dtype, shape, data_offsets") from (
            error
        )
    if not integers:
        raise WeightsFileError(f"{path} is corrupt: {name!r} has shape {list(shape)} at bytes {begin}..{end}")
    if code not in _DTYPES:
        raise WeightsFileError(f"{path}: {name!r} has dtype {code!r}; known are {', '.join(_DTYPES)}")
    dtype = _DTYPES[code]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsFileError(
            f"{path} is corrupt: {name!r} of shape {list(shape)} and dtype {code} takes "
            f"{math.prod(shape) * dtype.itemsize} bytes, the header gives it {end - begin}"
        )
    if end > available:
        raise WeightsFileError(
            f"{path} is truncated: {name!r} ends at byte {end} of the data, the file has {available} bytes of it; "
            "fetch it again"
        )
    return dtype, shape, begin, end


def _check_overlaps(path: Path, ranges: dict[str, tuple[int, int]]) -> None:
    last, before = 0, ""
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin == end:
            continue
        if begin < last:
            raise WeightsFileError(f"{path} is corrupt: {before!r} and {name!r} share bytes")
        last, before = end, name


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    release: Callable[[Tensor], None] | None = None,
) -> None:
    """Write a file tensor by tensor, under a temporary name that replaces `path` when it is complete.

    A reader of an older file of this name (also one that has it mapped) keeps the old contents; an interrupted write
    leaves the old file alone.

    Args:
        path: where to; the folder must exist.
        tensors: dense tensors on any device; moved one at a time.
        metadata: strings for the header; ``format: pt`` is added.
        dtype: convert floating-point tensors to this dtype, one at a time.
        progress: called with (bytes written, bytes in all).
        release: called with each tensor once it is written.
    """
    dtypes = {name: _stored_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    # Wide dtypes first: all stay aligned. Else as given, which is the order in which a model will read them.
    order = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    total = 0
    for name in order:
        size = tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [total, total + size]}
        total += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            done = 0
            for name in order:
                for part in tensors[name].detach().reshape(-1).split(_PART):
                    data = part.to(device="cpu", dtype=dtypes[name])
                    file.write(data.view(torch.uint8).numpy().data)
                    done += data.nbytes
                if release is not None:
                    release(tensors[name])
                if progress is not None:
                    progress(done, total)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if stored not in _NAMES:
        raise WeightsFileError(f"cannot write {name!r}: safetensors has no dtype {stored}")
    return stored
