"""Manifests of the real checkpoints, small copies of them, and the check that every tensor is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_mv.weights.plan import LoadPlan
from vggt_mv.weights.report import FILLED, STATUSES
from vggt_mv.weights.rules import canonical_name

Shapes = dict[str, tuple[int, ...]]

_KEYS = Path(__file__).parents[1] / "keys"
MANIFESTS = ("vggt_1b", "page4d_1b", "vggt_mv_aggregator_dual_memory", "pi3")


@cache
def _manifest(name: str) -> Shapes:
    return {key: tuple(shape) for key, shape in json.loads((_KEYS / f"{name}.json").read_text()).items()}


def manifest(name: str) -> Shapes:
    """Names and shapes of a real checkpoint."""
    return dict(_manifest(name))


def small(name: str, blocks: int = 2) -> Shapes:
    """A manifest with widths divided by 128 and the first `blocks` blocks of every list: the same names, few bytes."""

    def narrow(size: int) -> int:
        if size == 1370:
            return 17  # class token and a 4x4 grid
        return size // 128 if size >= 128 else max(size // 16, 1) if size > 32 else size

    return {key: tuple(map(narrow, shape)) for key, shape in shallow(name, blocks).items()}


def shallow(name: str, blocks: int = 4) -> Shapes:
    """A manifest at full width, with the first `blocks` rounds: quick to plan many times."""
    shapes = {}
    for key, shape in _manifest(name).items():
        parts = key.split(".")
        limit = 2 * blocks if key.startswith("decoder.") else blocks
        lists = ("blocks", "decoder")
        if all(int(part) < limit for i, part in enumerate(parts) if part.isdigit() and parts[i - 1].endswith(lists)):
            shapes[key] = shape
    return shapes


def tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random values in these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def with_aliases(state: Mapping[str, Any], *, both: bool = False) -> dict[str, Any]:
    """The same with ``view_blocks``/``time_blocks`` as names, instead of or besides the canonical ones."""
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        alias = f".{key}".replace(".global_blocks.", ".view_blocks.").replace(".frame_blocks.", ".time_blocks.")[1:]
        if alias == key or both:
            renamed[key] = value
        renamed[alias] = value
    return renamed


def aggregator_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The aggregator's part by itself, as its own ``state_dict()`` names it."""
    head = "aggregator."
    return {key[len(head) :]: value for key, value in state.items() if key.startswith(head)}


class Tree(nn.Module):
    """A module that has exactly the parameters of a manifest, under their names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for key, shape in shapes.items():
            *path, leaf = key.split(".")
            module: nn.Module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                child = module._modules[name]
                assert child is not None
                module = child
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=dtype)))
            nn.init.constant_(module.get_parameter(leaf), 0.5)  # as layers do: allocate, register, initialise
        self.register_buffer("_scale", torch.tensor([2.0]), persistent=False)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all values."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether a model still holds what `snapshot` saw, bit by bit and in the same dtypes."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[key].dtype == value.dtype and torch.equal(now[key], value) for key, value in before.items()
    )


def check_accounting(plan: LoadPlan, sources: Mapping[str, Iterable[str]]) -> None:
    """Every source tensor in exactly one entry, every model tensor in exactly one that wins, counts that add up."""
    entries, report = plan.entries, plan.report()
    seen = Counter((entry.source, entry.source_key) for entry in entries if entry.source_key is not None)
    given = {(role, key) for role, keys in sources.items() for key in keys}
    assert set(seen) == given
    assert set(seen.values()) <= {1}
    winners = Counter(entry.target_key for entry in entries if entry.wins)
    assert set(winners) == set(plan.spec.names.values())
    assert set(winners.values()) == {1}
    for entry in entries:
        assert entry.status in STATUSES
        assert (entry.cause is not None) == (entry.status == "kept_init")
        assert entry.source_key is not None or entry.status in ("kept_init", "copied")
        assert entry.reason or entry.status == "loaded"
        if entry.wins and entry.status in ("loaded", "aliased", "remapped"):
            assert entry.source_shape == entry.target_shape
    steps = Counter(step.target for step in plan.steps)
    filled = {canonical_name(entry.target_key or "") for entry in entries if entry.wins and entry.status in FILLED}
    assert set(steps) == filled
    assert set(steps.values()) <= {1}
    requested = sum(entry.cause == "requested" for entry in entries)
    assert report["kept_init"] == report["missing"] + report["cannot_have"] + requested
    mismatched = sum(entry.wins and entry.status == "shape_mismatch" for entry in entries)
    assert report["model_tensors"] == report.filled() + report["kept_init"] + mismatched
    assert report["source_tensors"] == len(given)
    filled_by_files = report["checkpoint_loaded"] + report["pi3_loaded"]
    assert report.filled() == filled_by_files + report["copied"]
