"""Look at a checkpoint without a model, and write it as one plain ``.safetensors`` file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_mv.weights import pages, rules
from vggt_mv.weights.apply import equal_values, non_finite_values
from vggt_mv.weights.errors import AliasConflictError, TensorValueError, WeightsError
from vggt_mv.weights.files import WeightsFile, dtype_name, open_weights
from vggt_mv.weights.plan import FLOATS
from vggt_mv.weights.safetensors_io import write_safetensors
from vggt_mv.weights.spec import TensorInfo, tensor_info

__all__ = ["ModuleSummary", "WeightsSummary", "convert_weights", "inspect_weights"]


@dataclass(frozen=True)
class ModuleSummary:
    """The tensors of a file under one module."""

    module: str
    tensors: int
    parameters: int
    nbytes: int
    blocks: int
    dtypes: tuple[str, ...]
    known: int  # how many of the names the rules know


@dataclass(frozen=True)
class WeightsSummary:
    """What a file is, told from its names, shapes and header."""

    path: str
    format: str
    files: tuple[str, ...]
    nbytes: int
    family: str
    recorded_family: bool
    known: int
    tensors: int
    parameters: int
    container: tuple[str, ...]
    prefixes: tuple[str, ...]
    aliases: int
    metadata: dict[str, str]
    modules: tuple[ModuleSummary, ...]
    nearest: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]
    non_finite: dict[str, str]


def inspect_weights(
    source: str | Path | WeightsFile, *, check_values: bool = False, unsafe_pickle: bool = False
) -> WeightsSummary:
    """Tell what a checkpoint is; values are read only with `check_values`, which looks for NaN and Inf.

    Example:
        >>> file = WeightsFile.of_mapping({"module.camera_token": torch.zeros(1, 2, 1, 8)})
        >>> inspect_weights(file).family
        'vggt (aggregator alone)'
    """
    file = source if isinstance(source, WeightsFile) else open_weights(source, unsafe_pickle=unsafe_pickle)
    infos = {key: tensor_info(key, value) for key, value in file.tensors.items()}
    found = rules.detect(infos, file.metadata)
    pi3 = found.family == "pi3"
    modules: dict[str, list[str]] = {}
    for key in infos:
        modules.setdefault(_module(key, pi3), []).append(key)
    prefixes = dict.fromkeys(prefix for key in infos for prefix in rules.peel(key)[1])
    flaws = {}
    if check_values:
        tensors = {key: value for key, value in file.tensors.items() if isinstance(value, Tensor)}
        flaws = {key: flaw for key, value in tensors.items() if (flaw := non_finite_values(value))}
    return WeightsSummary(
        path=file.path,
        format=file.format,
        files=tuple(path.name for path in file.files),
        nbytes=file.nbytes,
        family=found.label,
        recorded_family=found.recorded,
        known=found.known,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos.values()),
        container=file.container,
        prefixes=tuple(prefixes),
        aliases=0 if pi3 else sum(map(rules.has_alias, infos)),
        metadata=file.metadata,
        modules=tuple(_summary(name, {key: infos[key] for key in keys}, pi3) for name, keys in modules.items()),
        nearest=() if found.family is not None else tuple(rules.nearest_schemes(infos)),
        notes=tuple(file.notes),
        non_finite=flaws,
    )


def _module(key: str, pi3: bool) -> str:
    return rules.peel(key)[0].partition(".")[0] if pi3 else rules.module_of(rules.canonical_name(key))


def _summary(name: str, infos: dict[str, TensorInfo], pi3: bool) -> ModuleSummary:
    indices = {_index(key, pi3) for key in infos} - {None}
    known = sum(
        rules.is_pi3_name(key) if pi3 else bool(rules.known_families(rules.canonical_name(key))) for key in infos
    )
    return ModuleSummary(
        module=name,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos.values()),
        nbytes=sum(info.nbytes for info in infos.values()),
        blocks=len(indices),
        dtypes=tuple(dict.fromkeys(dtype_name(info.dtype) for info in infos.values() if info.dtype is not None)),
        known=known,
    )


def _index(key: str, pi3: bool) -> int | None:
    if not pi3:
        return rules.index_of(rules.canonical_name(key))
    parts = rules.peel(key)[0].split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None


def convert_weights(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    unsafe_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WeightsSummary:
    """Write a checkpoint as one ``.safetensors`` file: wrappers, prefixes and aliases gone, the family in its header.

    Needs memory for one tensor at a time. Names of Pi3 stay Pi3's.

    Args:
        source: anything that `open_weights` opens.
        target: ``*.safetensors``.
        dtype: convert floating-point tensors; None keeps theirs.
        overwrite: replace an existing `target`.
        unsafe_pickle: run the code that a pickle brings. Only for files that you trust as you trust a program.
        progress: called with (bytes written, bytes in all).

    Returns:
        What was written.

    Raises:
        WeightsError: `target` exists or has another suffix, its folder does not exist, or `dtype` is not a float one.
        AliasConflictError: the file names a tensor twice, with different values.
        TensorValueError: `dtype` cannot hold a finite value of the file.
    """
    path = Path(target).expanduser()
    if path.suffix != ".safetensors":
        raise WeightsError(f"the output must end in .safetensors, got {path.name!r}")
    if dtype is not None and dtype not in FLOATS:
        raise WeightsError(f"dtype must be one of {', '.join(map(dtype_name, FLOATS))}, got {dtype_name(dtype)}")
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists; pass overwrite=True (--overwrite) to replace it")
    if not path.parent.is_dir():
        raise WeightsError(f"{path.parent} is not a folder")
    file = open_weights(source, unsafe_pickle=unsafe_pickle)
    found = rules.detect(file.tensors, file.metadata)
    tensors = _plain(file, pi3=found.family == "pi3")
    if dtype is not None:
        _check_range(file, tensors, dtype)
    metadata = {key: value for key, value in file.metadata.items() if key != "total_size"}
    if found.family is not None:
        metadata[rules.FAMILY_KEY] = found.family
    try:
        # The file was opened here, so nobody else has its pages: giving them back keeps one tensor in memory.
        release = pages.drop if file.mapped else None
        write_safetensors(path, tensors, metadata, dtype=dtype, progress=progress, release=release)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror or error}") from error
    return inspect_weights(path)


def canonical_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without aliases: every tensor once, under the model's own canonical spelling."""
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()
    for key, value in sorted(model.state_dict().items(), key=lambda item: rules.has_alias(item[0])):
        name = rules.canonical_name(key)
        if name not in seen and isinstance(value, Tensor):
            seen.add(name)
            tensors[key] = value
    return tensors


def _plain(file: WeightsFile, *, pi3: bool) -> dict[str, Tensor]:
    """Names without prefixes and aliases; a tensor that is there twice must be there twice alike."""
    tensors: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in file.tensors.items():
        name = rules.peel(key)[0]
        if not pi3:
            first, dot, rest = name.partition(".")
            if first in rules.ALIASES:
                name = rules.ALIASES[first] + dot + rest
            elif first == "aggregator":
                name = rules.canonical_name(name)
        if name in tensors and not equal_values(tensors[name], value):
            raise AliasConflictError(
                f"{file.path}: {origin[name]!r} and {key!r} are one tensor and must be equal, got other values; "
                f"remove one of them from the file"
            )
        if name not in tensors:
            tensors[name], origin[name] = value, key
    return tensors


def _check_range(file: WeightsFile, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """No finite value may become infinite."""
    limit = torch.finfo(dtype).max
    for key, value in tensors.items():
        if not value.is_floating_point() or value.numel() == 0 or torch.finfo(value.dtype).max <= limit:
            continue
        low, high = value.aminmax()  # abs() would make a copy
        largest = torch.maximum(-low, high)
        if not torch.isfinite(largest):
            finite = value[torch.isfinite(value)]
            largest = finite.abs().max() if finite.numel() else torch.zeros(())
        if float(largest) > limit:
            raise TensorValueError(
                f"{file.path}: {key!r} must fit into {dtype_name(dtype)} (at most {limit:.4g}), "
                f"got {float(largest):.4g}"
            )
        if file.mapped:
            pages.drop(value)
