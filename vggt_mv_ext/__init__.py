"""Operators of multi-view, multi-time geometry transformers on the token grid `[B, T, N, P, ...]`.

B scenes of T times seen by N views, P tokens a frame. Ten operators, each a `torch.library` operator of the namespace
`vggt_mv` with autograd, autocast rules and support for `torch.compile`:

* `residual_scale_norm`: `x + gamma * y` and its LayerNorm in one pass,
* `qk_norm_rope`: LayerNorm and 2-D rotary embedding of packed queries and keys,
* `alternating_attention`: attention along one axis of the grid, with a rank-1 bias,
* `dual_stream_attention`: the same for two streams of tokens, one muting and one amplifying what a mask marks,
* `memory_write`, `memory_read`: a few memory tokens read all tokens of the grid, and all tokens read the memory,
* `landmark_attention`: all tokens look at a few chosen ones,
* `block_dilated_attention`: the tokens of a frame look at those of a few neighbour frames,
* `packed_linear`: a linear layer, on a CPU with its weights laid out for the matrix kernel, and exact GELU,
* `conv3x3`: a 3 x 3 convolution with bias, residual and ReLU, on a CPU with a quarter of the multiplications.

An operator chooses the code that runs it (see `backends`): a compiled kernel where one fits, else `reference`.
`explain` says which and why, `backend` and `set_backend` force a choice, `build_info` says what this build holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import reference
from ._version import __version__
from .backends import BackendError, Explanation, backend, build_info, explain_choice, get_backend, set_backend
from .ops import (
    OPERATORS,
    alternating_attention,
    block_dilated_attention,
    cannot_pack_linear_weight,
    conv3x3,
    dual_stream_attention,
    landmark_attention,
    linear_product_dtype,
    memory_read,
    memory_write,
    pack_linear_weight,
    packed_linear,
    qk_norm_rope,
    residual_scale_norm,
)

__all__ = [
    "BackendError",
    "Explanation",
    "__version__",
    "alternating_attention",
    "backend",
    "block_dilated_attention",
    "build_info",
    "cannot_pack_linear_weight",
    "conv3x3",
    "dual_stream_attention",
    "explain",
    "get_backend",
    "landmark_attention",
    "linear_product_dtype",
    "memory_read",
    "memory_write",
    "pack_linear_weight",
    "packed_linear",
    "qk_norm_rope",
    "reference",
    "residual_scale_norm",
    "set_backend",
]


def explain(operator: str | Callable[..., Any], *tensors: Tensor) -> Explanation:
    """Tells which backend an operator takes for these tensors now, and why the others are passed over.

    Args:
        operator: one of this package's operators, or its name.
        *tensors: the tensors of a call, the first one at least: it decides.

    Returns:
        The choice and the reasons; `str()` of it is meant for people.

    Raises:
        ValueError: no such operator, or no tensor.

    Example:
        >>> import torch
        >>> from vggt_mv_ext import backend, explain
        >>> with backend("reference"):
        ...     print(explain("qk_norm_rope", torch.zeros(1, 1, 1, 1, 3, 1, 4)))
        qk_norm_rope: runs on reference (asked for: reference)
          not cuda: the tensors are on cpu
          not cpu: reference was asked for
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in OPERATORS:
        raise ValueError(f"explain: operator must be one of {', '.join(OPERATORS)}; got {name!r}")
    if not tensors or not isinstance(tensors[0], Tensor):
        raise ValueError(f"explain: the tensors of a call of {name} must follow, got {tensors!r}")
    return explain_choice(OPERATORS[name], *tensors)
