"""Packed weights in the place of plain ones: a model that only predicts needs its matrices once in memory, not twice.

On CPUs a Linear computes on a packed copy of its weight (`vggt_mv_ext.packed_linear`). What is left to do here is to
make the plain weight cost no memory, while it stays what it was for everybody who reads it: it becomes, or is already,
a private view of a file, whose pages the system drops and reads again at need. The opposite way, to keep the packed
copy alone and to rebuild the weight from it, would lose bits where the copy is in bfloat16.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vggt_mv.layers.conv import StridedConv3x3
from vggt_mv.layers.linear import Linear
from vggt_mv.weights import pages
from vggt_mv.weights.errors import WeightsError
from vggt_mv_ext import cannot_pack_linear_weight, pack_linear_weight

__all__ = ["InferenceReport", "optimize_for_inference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class InferenceReport:
    """What `optimize_for_inference` did; `str()` of it is meant for people.

    Attributes:
        packed: number of weights that have a packed copy.
        packed_bytes: memory of the copies.
        released_bytes: memory that plain weights took, or would take once touched, and now give back.
        left: why other Linears stay as they are: reason -> number of weights.
    """

    packed: int = 0
    packed_bytes: int = 0
    released_bytes: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line, and one for each reason."""
        lines = [
            f"{self.packed} weights packed, {self.packed_bytes / 1e6:.0f} MB; "
            f"{self.released_bytes / 1e6:.0f} MB of plain weights released"
        ]
        return "\n".join(lines + [f"  {count} stay as they are: {reason}" for reason, count in self.left.items()])


def optimize_for_inference(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    release: bool = True,
    folder: str | Path | None = None,
    keep_freed: bool = True,
) -> InferenceReport:
    """Pack the weights of a model's Linears now, and let the packed copies take the plain weights' place in memory.

    Nothing else changes: parameters, `state_dict`, `.to()`, copying, pickling and training find the same values as
    before, read from disk when they are touched. A changed weight is packed again at the next prediction. A model
    from `from_pretrained` has its weights in the checkpoint's file already; others are written to a temporary file
    without a name, which takes disk space as long as they live. Writes that PyTorch does not count as changes, through
    ``p.data`` or numpy, are not noticed from then on.

    Args:
        model: its parameters on the CPU.
        dtype: what matrix products will run in: float32, or bfloat16 for predictions under autocast. By default that of
            each weight, which holds for a model's heads in any case: they run without autocast. Predictions in another
            dtype make copies of their own.
        release: False packs only, so that the first prediction has no packing to do. Weights are released on Linux.
        folder: where temporary files go; by default ``/var/tmp``, since ``/tmp`` may be memory itself.
        keep_freed: let the process keep the memory that a prediction frees for the next one, up to about 1 GiB, instead
            of fresh memory each time, which the system has to clear; tensors of more than 32 MiB may still be fresh.
            For the whole process, with glibc. False leaves the allocator as it is.

    Raises:
        WeightsError: no such dtype for matrix products, or a folder that cannot be written to.

    Example:
        >>> from vggt_mv.layers import Mlp
        >>> report = optimize_for_inference(Mlp(8, 32), release=False)
        >>> report.packed + sum(report.left.values())
        2
    """
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise WeightsError(f"optimize_for_inference: dtype must be one of {names}; got {dtype}")
    release = release and sys.platform.startswith("linux")
    weights = _linear_weights(model)
    heads = [head for name in getattr(model, "HEADS", ()) if (head := getattr(model, name)) is not None]
    without_autocast = {key for head in heads for key in _linear_weights(head)}
    clean = pages.clean_file_views() if release else []
    packed = packed_bytes = released = 0
    left: Counter[str] = Counter()
    for key, weight in weights.items():
        products = None if key in without_autocast else dtype
        reason = cannot_pack_linear_weight(weight, products)
        if reason is not None:
            left[reason] += 1
            continue
        if release and not _lies_in(weight, clean):
            weight.data = _on_disk(weight.detach(), folder)
        packed_bytes += pack_linear_weight(weight, products, sample=not release)
        packed += 1
        if release:
            pages.drop(weight)
            pages.trim()
            released += weight.nbytes
    if keep_freed:
        pages.keep_freed()
    return InferenceReport(packed, packed_bytes, released, dict(left))


def _linear_weights(model: nn.Module) -> dict[int, Tensor]:
    """The weight of every layer that runs on a packed copy once, by its identity."""
    packed = (module for module in model.modules() if isinstance(module, Linear | StridedConv3x3))
    return {id(module.weight): module.weight for module in packed}


def _lies_in(tensor: Tensor, ranges: Iterable[tuple[int, int]]) -> bool:
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return tensor.is_contiguous() and any(low <= begin and end <= high for low, high in ranges)


def _on_disk(tensor: Tensor, folder: str | Path | None) -> Tensor:
    """The same values as a private view of a temporary file that nobody else sees."""
    if folder is None:
        folder = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    values = tensor.contiguous()
    try:
        handle, name = tempfile.mkstemp(prefix="vggt_mv_weights_", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(values.view(-1).view(torch.uint8).numpy().data)
            return torch.from_file(name, shared=False, size=values.numel(), dtype=values.dtype).view(values.shape)
        finally:
            os.unlink(name)  # the view keeps the contents
    except OSError as error:
        raise WeightsError(
            f"optimize_for_inference: {values.nbytes} bytes of weights must go to a file in {str(folder)!r}: {error}; "
            "choose another folder, or release=False"
        ) from error
