"""Checks that every head makes on what it is handed: `(aggregated_tokens_list, images, patch_start_idx)`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vggt_mv.errors import VggtMvError

__all__ = ["image_size", "patch_grid", "select_output"]


def image_size(head: str, images: Tensor) -> tuple[int, int, int, int]:
    """(batch, frames, height, width) of images ``[B, S, 3, H, W]``.

    Raises:
        VggtMvError: any other rank.
    """
    if images.ndim != 5:
        raise VggtMvError(
            f"{head}: images must be [B, S, 3, H, W] (flatten times x views to S), got {list(images.shape)}"
        )
    batch, frames, _, height, width = images.shape
    return batch, frames, height, width


def patch_grid(head: str, height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches.

    Raises:
        VggtMvError: a side that is no positive multiple of the patch size.
    """
    for name, side in (("height", height), ("width", width)):
        if side < patch_size or side % patch_size:
            raise VggtMvError(
                f"{head}: images must have a {name} that is a positive multiple of patch_size = {patch_size}, "
                f"got {side}"
            )
    return height // patch_size, width // patch_size


def select_output(head: str, outputs: Sequence[Tensor | None], layer: int, width: int) -> Tensor:
    """Output `layer` (negative: from the end) of the aggregator's list, ``[B, S, P, width]``.

    Raises:
        VggtMvError: no such entry, an entry that was not kept, a wrong rank or a wrong width.
    """
    count = len(outputs)
    if not -count <= layer < count:
        raise VggtMvError(
            f"{head}: aggregated_tokens_list must have an entry {layer}, which this head reads; it has {count}"
        )
    tokens = outputs[layer]
    if tokens is None:
        raise VggtMvError(
            f"{head}: aggregated_tokens_list[{layer}] must be a tensor, got None: this head reads that output, "
            f"so the aggregator has to keep it (keep_outputs)"
        )
    if tokens.ndim != 4:
        raise VggtMvError(
            f"{head}: aggregated_tokens_list[{layer}] must be [B, S, P, C] (flatten times x views to S), "
            f"got {list(tokens.shape)}"
        )
    if tokens.shape[-1] != width:
        raise VggtMvError(
            f"{head}: aggregated_tokens_list[{layer}] must have {width} features (dim_in), got {tokens.shape[-1]}"
        )
    return tokens
