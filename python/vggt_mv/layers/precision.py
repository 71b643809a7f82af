"""Autocast on any device, also on the meta device, which has none.

The meta device is named here because `torch.amp.is_autocast_available` breaks the graph of `torch.compile` in torch 2.6
to 2.11.
"""

from __future__ import annotations

import contextlib

import torch

__all__ = ["autocast_enabled", "without_autocast"]


def autocast_enabled(device: torch.device) -> bool:
    """Whether operators on this device run under autocast now."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which operators on this device keep the dtypes they are given."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
