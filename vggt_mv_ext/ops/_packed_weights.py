"""Weights of linear layers in the layout of oneDNN's matrix kernels: packed once, kept beside the parameter.

A packed tensor is opaque: as an attribute of a module it could be neither copied nor pickled nor traced. So packed
copies stand in a table of this file, under the identity of their parameter, and die with it. A copy holds as long as
its parameter is what was packed: the same memory, with the same layout, at the same version. In-place operations count
up the version; `.to()`, `load_state_dict(assign=True)` and `p.data = ...` bring other memory. Writes that PyTorch does
not count (`p.data.mul_()`, numpy, a file that is mapped) show in a sample of the values, unless they spare the sample.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..reference import matrix_of

# Below so many rows the work is to read the weights once, and packing reads and writes them: only a copy that is there
# already is used.
MIN_ROWS = 64

# Relative errors that the probe allows: a few roundings of the dtype. float32 products in bfloat16 would be 1e-3 off.
_PROBE_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# Rows of a 16-bit x that are widened to float32 at a time.
_WIDENED_ROWS = 1024


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight`, as the matrix that it is, in oneDNN's own layout."""
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix_of(weight.detach()).contiguous())
    return packed


def run(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`activation(x @ packed.T + bias)` in x's dtype; bias in that of the packed weight, which may be a wider one."""
    if packed.dtype == x.dtype:
        return _multiply(x, packed, bias, activation)
    rows = x.reshape(-1, x.shape[-1])
    result = x.new_empty(rows.shape[0], packed.shape[0])
    for part, to in zip(rows.split(_WIDENED_ROWS), result.split(_WIDENED_ROWS), strict=True):
        to.copy_(_multiply(part.to(packed.dtype), packed, bias, activation))
    return result.view(*x.shape[:-1], packed.shape[0])


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`run` for one dtype."""
    name, algorithm = ("gelu", "none") if activation == "gelu" else ("none", "")  # "none": erf, not tanh
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)
    return result


@lru_cache(maxsize=16)
def _probe(dtype: torch.dtype, precision: str) -> str | None:
    """Packs and runs a small layer: the reason why this PyTorch or this machine cannot, or None.

    Names and arguments of these operators have changed between versions, so what counts is what they do. `precision`,
    what `torch.set_float32_matmul_precision` was given, only keeps results apart.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        x, weight = (torch.randn(size, 48, generator=generator).to(dtype) for size in (20, 33))
        bias = torch.randn(33, generator=generator).to(dtype)
        exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
        try:
            packed = pack(weight)
            got = run(x, packed, bias, "gelu")
            same = torch.equal(packed.to_dense(), weight)
        except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
            return f"packed linear layers do not work in torch {torch.__version__} here: {str(error).splitlines()[0]}"
        name = str(dtype).removeprefix("torch.")
        if got.dtype != dtype or got.shape != exact.shape or not same:
            return f"packed linear layers of torch {torch.__version__} give something else than {name}"
        off = ((got.double() - exact).norm() / exact.norm()).item()
        if not off <= _PROBE_TOLERANCE[dtype]:
            return f"packed linear layers of torch {torch.__version__} are off by {off:.0e} in {name} here"
    return None


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of `dtype` are computed in.

    float32 for 16-bit values that oneDNN cannot multiply on this processor, those without AVX-512 among them: PyTorch
    has no fast kernel for them either there.
    """
    wide = dtype in (torch.bfloat16, torch.float16) and _cannot_multiply(dtype) and not _cannot_multiply(torch.float32)
    return torch.float32 if wide else dtype


def unsupported(dtype: torch.dtype) -> str | None:
    """Why no weight can be packed for products of `dtype` here, or None."""
    return _cannot_multiply(product_dtype(dtype))


def _cannot_multiply(dtype: torch.dtype) -> str | None:
    """Why oneDNN does not run layers that are of `dtype` throughout, or None."""
    if dtype not in _PROBE_TOLERANCE:
        return f"{str(dtype).removeprefix('torch.')} runs on the reference alone"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn)"
    return _probe(dtype, torch.get_float32_matmul_precision())


def unpackable(weight: Tensor) -> str | None:
    """Why this weight cannot have a packed copy, whatever the dtype, or None."""
    if not isinstance(weight, torch.nn.Parameter):
        return "the weight is not a torch.nn.Parameter, so nothing says that it will come again"
    if weight.is_inference():
        return "the weight was made in inference mode, where PyTorch does not count changes"
    return None


@dataclass(frozen=True)
class _Stamp:
    """What a parameter was when it was packed."""

    storage: StorageWeakRef  # a weak reference: while it lives no other storage can have the address
    rest: tuple[Any, ...]
    sample: tuple[Any, ...] | None  # None: the values are not looked at

    @classmethod
    def of(cls, weight: Tensor, sample: bool) -> _Stamp:
        storage = StorageWeakRef(weight.untyped_storage())
        return cls(storage, _layout(weight), _sample(weight) if sample else None)

    def holds(self, weight: Tensor) -> bool:
        return (
            self.storage.cdata == weight.untyped_storage()._cdata
            and self.rest == _layout(weight)
            and (self.sample is None or self.sample == _sample(weight))
        )


def _layout(weight: Tensor) -> tuple[Any, ...]:
    return weight._version, weight.dtype, weight.shape, weight.stride(), weight.storage_offset()


def _sample(weight: Tensor) -> tuple[Any, ...]:
    """A few values from two places."""
    values = weight.detach()
    return tuple(values[row, :8].tolist() for row in (0, weight.shape[0] // 2))


@dataclass
class _Entry:
    stamp: _Stamp
    copies: dict[torch.dtype, Tensor] = field(default_factory=dict)


class PackedWeights:
    """The table of packed copies: parameter -> dtype -> copy. Safe to use from several threads."""

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def find(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy of `weight` for products of `dtype`, if there is one that still holds."""
        with self._lock:
            entry = self._valid(weight)
            return None if entry is None else entry.copies.get(product_dtype(dtype))

    def get(self, weight: Tensor, dtype: torch.dtype, sample: bool = True) -> Tensor:
        """The copy of `weight` for products of `dtype`; made now where none holds, with or without a sample."""
        dtype = product_dtype(dtype)
        with self._lock:
            entry = self._valid(weight)
            if entry is None:
                entry = _Entry(_Stamp.of(weight, sample))
                self._entries[weight] = entry
            elif not sample and entry.stamp.sample is not None:
                entry.stamp = _Stamp.of(weight, sample=False)
            if dtype not in entry.copies:
                entry.copies[dtype] = pack(weight.detach().to(dtype))
            return entry.copies[dtype]

    def drop(self, weight: Tensor) -> None:
        """Forgets the copies of `weight`."""
        with self._lock:
            self._entries.pop(weight, None)

    def _valid(self, weight: Tensor) -> _Entry | None:
        entry: _Entry | None = self._entries.get(weight)
        if entry is not None and not entry.stamp.holds(weight):
            del self._entries[weight]
            return None
        return entry


PACKED = PackedWeights()


def packed_bytes(packed: Tensor) -> int:
    """Memory of a packed copy."""
    try:
        return int(torch.ops.mkldnn._nbytes(packed))
    except (RuntimeError, AttributeError):
        return packed.numel() * packed.element_size()
