"""What the model tests share: small models with random weights that matter, and the recorded fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden.fixtures import NAMES, Fixture, relative_error
from vggt_mv.models.aggregator import Aggregator
from vggt_mv_ext.ops import _packed_weights

TESTS = Path(__file__).resolve().parent.parent

TINY: dict[str, Any] = {
    "img_size": 42,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "patch_embed": "dinov2_vits14_reg",
    "patch_embed_options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
TINY_HEADS: dict[str, Any] = {
    "camera_head_options": {"trunk_depth": 1, "num_heads": 2},
    "dpt_head_options": {"features": 8, "out_channels": [8, 8, 8, 8], "intermediate_layer_idx": [0, 1, 2, 3]},
    "track_head_options": {
        "features": 8,
        "corr_levels": 2,
        "corr_radius": 1,
        "hidden_size": 16,
        "depth": 1,
        "iters": 2,
        "out_channels": [8, 8, 8, 8],
        "intermediate_layer_idx": [0, 1, 2, 3],
    },
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["few rows, plain linears", "packed linears"])
def linear_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have too few tokens for packed weights to pay: here they are packed all the same."""
    if request.param == "packed linears":
        if _packed_weights.unsupported(torch.float32) is not None:
            pytest.skip(str(_packed_weights.unsupported(torch.float32)))
        monkeypatch.setattr(_packed_weights, "MIN_ROWS", 0)


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, tuple[int, ...]]]:
    """Key -> shape of a public checkpoint."""

    def read(name: str) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v) for k, v in json.loads((TESTS / "keys" / f"{name}.json").read_text()).items()}

    return read


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """Gives a model weights with which every part of it shows in the result (LayerScale starts at 0.01)."""

    def apply(model: nn.Module, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if name.endswith("gamma"):
                    p.copy_(0.3 + 0.05 * noise)
                elif "norm" in name and name.endswith("weight"):
                    p.copy_(1 + 0.1 * noise)
                elif name.endswith("bias"):
                    p.copy_(0.05 * noise)
                elif name.endswith("logit"):
                    p.copy_(0.3 * noise)
                elif name.endswith(("token", "tokens", "pos_embed")):
                    p.copy_(0.5 * noise)
                elif p.ndim > 1:
                    p.copy_(noise / p[0].numel() ** 0.5)
        return model

    return apply


@pytest.fixture
def tiny_aggregator(randomize: Callable[..., Any]) -> Callable[..., Aggregator]:
    """Makes a small aggregator in evaluation mode; keyword arguments override `TINY`."""

    def make(seed: int = 0, **options: Any) -> Aggregator:
        return randomize(Aggregator(**{**TINY, **options}), seed).eval()

    return make


@pytest.fixture
def tiny_model(randomize: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a small VGGT or VGGT_MV in evaluation mode; keyword arguments override `TINY` and `TINY_HEADS`."""

    def make(model_class: type[nn.Module], seed: int = 0, **options: Any) -> Any:
        mask = {"mask_layer": 1} if model_class.__name__ == "VGGT_MV" else {}
        return randomize(model_class(**{**TINY, **TINY_HEADS, **mask, **options}), seed).eval()

    return make


@pytest.fixture(scope="session")
def tiny_options() -> dict[str, Any]:
    """The options of `tiny_model`, for tests that build by configuration."""
    return {**TINY, **TINY_HEADS}


@pytest.fixture(scope="module", params=NAMES)
def golden_aggregator(request: pytest.FixtureRequest) -> Fixture:
    """Every recording in turn."""
    return Fixture(request.param)


@pytest.fixture(scope="session")
def rel() -> Callable[[Tensor, Tensor], float]:
    """`relative_error`, for tests that cannot import this file."""
    return relative_error
