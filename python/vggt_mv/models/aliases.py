"""Second names of the aggregator's lists of blocks: view is global, time is frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BLOCK_ALIASES", "canonicalize_block_names"]

#: Alias -> the name under which the blocks are registered and saved.
BLOCK_ALIASES = {"view_blocks": "global_blocks", "time_blocks": "frame_blocks"}


def canonicalize_block_names(state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Gives the entries under an alias their canonical names, in place.

    Returns:
        An error message for every tensor that is there under both names with different values.
    """
    errors = []
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name, _, rest = key.removeprefix(prefix).partition(".")
        if name not in BLOCK_ALIASES:
            continue
        canonical = f"{prefix}{BLOCK_ALIASES[name]}.{rest}"
        value = state_dict.pop(key)
        if canonical in state_dict and not _same(state_dict[canonical], value):
            errors.append(f"{key} and {canonical} are two names of one tensor, but their values differ")
        state_dict.setdefault(canonical, value)
    return errors


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta  # nothing but shapes to compare
    return torch.equal(a, b.to(a.device))
