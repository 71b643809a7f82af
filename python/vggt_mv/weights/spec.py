"""What a plan needs to know of a model or of a file: names, shapes, dtypes. No tensor is touched here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from vggt_mv.weights import rules
from vggt_mv.weights.errors import WeightsError

__all__ = ["ModelSpec", "Selection", "TensorInfo", "dual_stream_spec", "tensor_info"]


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor; the dtype is None where only a shape is known."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes; unknown dtypes count as float32."""
        return self.numel * (torch.float32 if self.dtype is None else self.dtype).itemsize


def tensor_info(name: str, value: Any) -> TensorInfo:
    """Shape and dtype of a tensor, of anything with a ``shape``, or of a plain sequence of sizes.

    Raises:
        WeightsError: `value` is neither.
    """
    shape = getattr(value, "shape", None)
    if shape is not None:
        dtype = getattr(value, "dtype", None)
        return TensorInfo(tuple(shape), dtype if isinstance(dtype, torch.dtype) else None)
    sizes: Sequence[Any] = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [None]
    if all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        return TensorInfo(tuple(sizes))
    raise WeightsError(f"the value of {name!r} must be a tensor or a shape, got {type(value).__name__}")


@dataclass
class ModelSpec:
    """The tensors of a model by canonical name.

    Attributes:
        tensors: canonical name -> shape and dtype.
        names: canonical name -> the model's own name for it.
        aliases: further names that the model lists for a tensor (``view_blocks``) -> canonical name.
        self_made: canonical names of buffers that the model makes itself and that no file needs.
        label: class name, or "manifest".
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    self_made: frozenset[str] = frozenset()
    label: str = "manifest"

    @classmethod
    def of(cls, model: nn.Module | Mapping[str, Any] | ModelSpec) -> ModelSpec:
        """From a module (also on the meta device), a mapping name -> tensor or shape, or a spec.

        Example:
            >>> spec = ModelSpec.of({"camera_head.embed_pose.bias": [2048]})
            >>> spec.tensors
            {'camera_head.embed_pose.bias': TensorInfo(shape=(2048,), dtype=None)}
        """
        if isinstance(model, ModelSpec):
            return model
        if isinstance(model, nn.Module):
            values: Mapping[str, Any] = {
                name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
            }
            self_made = {rules.canonical_name(name) for name, _ in model.named_buffers()}
            label = type(model).__name__
        elif isinstance(model, Mapping):
            values, self_made, label = model, set(), "manifest"
        else:
            raise WeightsError(f"model must be a module or a mapping name -> shape, got {type(model).__name__}")
        spec = cls(label=label)
        for name, value in values.items():
            spec._add(name, tensor_info(name, value))
        spec.self_made = frozenset(self_made - spec.tensors.keys())
        return spec

    def _add(self, name: str, info: TensorInfo) -> None:
        canonical = rules.canonical_name(name)
        if canonical not in self.tensors:
            self.tensors[canonical] = info
            self.names[canonical] = name
            return
        if self.tensors[canonical].shape != info.shape:
            raise WeightsError(
                f"model names {self.names[canonical]!r} and {name!r} are one tensor and must have one shape, "
                f"got {list(self.tensors[canonical].shape)} and {list(info.shape)}"
            )
        if rules.has_alias(self.names[canonical]) and not rules.has_alias(name):
            name, self.names[canonical] = self.names[canonical], name
        self.aliases[name] = canonical

    def parts(self) -> set[str]:
        """The modules of this model, as `rules.module_of` names them."""
        return {rules.module_of(name) for name in self.tensors}

    def depth_of(self, part: str) -> int:
        """How many blocks the module `part` has; 0 where it has none."""
        indices = (rules.index_of(name) for name in self.tensors if rules.module_of(name) == part)
        return 1 + max((index for index in indices if index is not None), default=-1)


def dual_stream_spec(spec: ModelSpec, *, memory_tokens: int | None = None) -> ModelSpec:
    """The spec of the same model with ``enable_dual_stream=True``: what its blocks and scalars will be.

    Adds ``pose_*``/``geo_*`` twins of every frame and global block and the two ``lambda_*_logit`` scalars; with
    `memory_tokens`, also ``memory_tokens [1, memory_tokens, C]``. Lets a load be planned before such a model is built.
    """
    if any(rules.single_stream_name(name) for name in spec.tensors):
        raise WeightsError("model has dual-stream blocks already")
    prefix = "aggregator." if any(name.startswith("aggregator.") for name in spec.names.values()) else ""
    tensors, names = dict(spec.tensors), dict(spec.names)

    def add(tail: str, info: TensorInfo) -> None:
        tensors[f"aggregator.{tail}"] = info
        names[f"aggregator.{tail}"] = prefix + tail

    token = spec.tensors.get("aggregator.camera_token", TensorInfo((0,)))
    for stream in rules.STREAMS:
        add(f"lambda_{stream}logit", TensorInfo((), token.dtype))
        for name, info in spec.tensors.items():
            if rules.module_of(name) in ("aggregator.frame_blocks", "aggregator.global_blocks"):
                add(stream + name[len("aggregator.") :], info)
    if memory_tokens is not None:
        add("memory_tokens", TensorInfo((1, memory_tokens, token.shape[-1]), token.dtype))
    return ModelSpec(tensors, names, dict(spec.aliases), spec.self_made, spec.label + " with dual stream")


class Selection:
    """``only=``: modules (``camera_head``), blocks and ranges of blocks (``aggregator.frame_blocks.8-15``), or tensors.

    Aliases and names without ``aggregator.`` are understood; both ends of a range belong to it.

    Raises:
        WeightsError: an empty list, a range that runs backwards, or an item that no tensor of the model is in.
    """

    _RANGE = re.compile(r"(\d+)-(\d+)")

    def __init__(self, only: str | Sequence[str] | None, spec: ModelSpec) -> None:
        self.items: tuple[str, ...] | None = None
        if only is None:
            return
        self.items = (only,) if isinstance(only, str) else tuple(only)
        if not self.items:
            raise WeightsError("only must name at least one module, got an empty list")
        patterns = [self._pattern(item) for item in self.items]
        for item, pattern in zip(self.items, patterns, strict=True):
            if not any(_within(pattern, name) for name in spec.tensors):
                raise WeightsError(f"only: the model has no {item!r}{_suggest(item, spec)}")
        self._patterns = patterns

    def __contains__(self, canonical: object) -> bool:
        if self.items is None:
            return True
        return isinstance(canonical, str) and any(_within(pattern, canonical) for pattern in self._patterns)

    def _pattern(self, item: str) -> list[str | range]:
        if not isinstance(item, str) or not item.strip("."):
            raise WeightsError(f"only must hold names such as 'camera_head', got {item!r}")
        pattern: list[str | range] = []
        for part in rules.canonical_name(item.strip(".")).split("."):
            ends = self._RANGE.fullmatch(part)
            if ends is None:
                pattern.append(part)
                continue
            first, last = int(ends.group(1)), int(ends.group(2))
            if first > last:
                raise WeightsError(f"only: a range must run upwards, got {part!r} in {item!r}")
            pattern.append(range(first, last + 1))
        return pattern


def _within(pattern: list[str | range], name: str) -> bool:
    parts = name.split(".")
    if len(parts) < len(pattern):
        return False
    for want, part in zip(pattern, parts, strict=False):
        if isinstance(want, range):
            if not part.isdigit() or int(part) not in want:
                return False
        elif want != part:
            return False
    return True


def _modules(spec: ModelSpec) -> Iterator[str]:
    for name in spec.tensors:
        parts = name.split(".")
        for end in range(1, len(parts)):
            yield ".".join(parts[:end])


def _suggest(item: str, spec: ModelSpec) -> str:
    close = difflib.get_close_matches(rules.canonical_name(item), sorted(set(_modules(spec))), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; it has " + ", ".join(sorted(spec.parts())[:12])
