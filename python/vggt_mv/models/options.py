"""Names and types of a model's options, and the error for a name that is none of them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import nn

from vggt_mv.errors import VggtMvError

__all__ = [
    "AggregatorOptions",
    "StageCallback",
    "check_option_names",
    "check_option_types",
    "nearest_name",
    "parameter_names",
]

#: Called with (stage, steps done, steps in all); stages are "patch_embed", "attention", "camera", "depth", "points",
#: "tracks".
StageCallback = Callable[[str, int, int], None]


class AggregatorOptions(TypedDict, total=False):
    """Options of `Aggregator` that `VGGT` and `VGGT_MV` hand on; see there for what they mean."""

    depth: int
    num_heads: int
    mlp_ratio: float
    num_register_tokens: int
    block_fn: Callable[..., nn.Module]
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    patch_embed: str | nn.Module
    aa_order: Sequence[str]
    aa_block_size: int
    qk_norm: bool
    rope_freq: float | None
    init_values: float | None
    patch_embed_options: dict[str, Any] | None
    enable_spatial_mask: bool
    mask_layer: int | None
    mask_strength: float
    special_token_position: str
    gradient_checkpointing: bool
    sparse_global_layers: Collection[int] | None
    sparse_strategy: str
    landmark_k: int
    num_memory_tokens: int


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of the named parameters of a function or class, without `self`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds and p.name != "self"]


def check_option_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Checks that every given name is known.

    Raises:
        VggtMvError: naming the unknown one and the nearest known one.

    Example:
        >>> check_option_names("VGGT", ["dept"], ["depth", "num_heads"])
        Traceback (most recent call last):
        vggt_mv.errors.VggtMvError: VGGT: unknown option 'dept'; the nearest known one is 'depth'
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise VggtMvError(f"{owner}: unknown option {name!r}; {nearest_name(name, known)}")


def check_option_types(owner: str, given: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Checks values against the annotations of the functions that they are arguments of, as far as JSON can be wrong.

    An int passes for a float and a tuple for a list. Of modules and functions only being no JSON is checked.

    Raises:
        VggtMvError: naming the option, its type, and the value.

    Example:
        >>> def build(depth: int = 24, rope_freq: float | None = 100.0): ...
        >>> check_option_types("VGGT", {"rope_freq": 3}, build)
        >>> check_option_types("VGGT", {"depth": "3"}, build)
        Traceback (most recent call last):
        vggt_mv.errors.VggtMvError: VGGT: depth must be int, got '3'
    """
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            kind = inspect.formatannotation(parameter.annotation).strip("'")
            if name in given and not _is_of(kind, given[name]):
                raise VggtMvError(f"{owner}: {name} must be {kind.replace(' | ', ' or ')}, got {given[name]!r}")


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value fits an annotation; for one that JSON has no type for, whether it is something else than JSON."""
    if sequence := re.fullmatch(r"(?:Sequence|Collection|list|tuple)\[(\w+)(?:, \.\.\.)?\]", kind):
        return isinstance(value, list | tuple) and all(_is_of(sequence[1], item) for item in value)
    if " | " in kind:
        return any(_is_of(part, value) for part in kind.split(" | "))
    if kind.startswith(("Mapping[", "dict[")):
        return isinstance(value, Mapping)
    if kind in ("int", "float"):  # True is an int in Python, and never meant as one
        return isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    plain = {"bool": bool, "str": str, "None": type(None)}
    if kind in plain:
        return isinstance(value, plain[kind])
    return not isinstance(value, str | int | float | list | tuple | Mapping | None)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The half of an error message that says which of the known names was probably meant."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"the nearest known one is {nearest[0]!r}" if nearest else f"known are {', '.join(known)}"
