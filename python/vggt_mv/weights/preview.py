"""A load planned against a model that is described and never built with values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vggt_mv.weights.files import open_weights
from vggt_mv.weights.lean import parameters_on_meta
from vggt_mv.weights.plan import LoadPlan, Prefer, plan_load
from vggt_mv.weights.spec import ModelSpec

__all__ = ["config_spec", "preview_load"]


def config_spec(config: str | Path = "vggt_mv_1b", *, dual_stream: bool = False) -> ModelSpec:
    """Names and shapes of a named or described model, without memory for it.

    Args:
        config: a name of `vggt_mv.models.configs`, or the path of a JSON file.
        dual_stream: with ``enable_dual_stream=True``.
    """
    from vggt_mv.models.configs import load_config  # the model classes know this package: import them late

    model_class, options = load_config(config)

    def spec(**more: Any) -> ModelSpec:
        with parameters_on_meta():
            return ModelSpec.of(model_class(**{**options, **more}))

    return spec(enable_dual_stream=True) if dual_stream else spec()


def preview_load(
    checkpoint_path: str | Path | None = None,
    pi3_path: str | Path | None = None,
    *,
    config: str | Path = "vggt_mv_1b",
    dual_stream: bool = False,
    only: str | Sequence[str] | None = None,
    prefer: Prefer = "checkpoint",
    load_encoder: bool = False,
    unsafe_pickle: bool = False,
) -> LoadPlan:
    """What `load_pretrained_weights` would do with these files, without reading a value of them.

    Tensors that a file names twice are not compared, and NaN is not searched for: that takes their values.

    Returns:
        The plan; ``plan.report()`` is the table.
    """
    checkpoint = None if checkpoint_path is None else open_weights(checkpoint_path, unsafe_pickle=unsafe_pickle)
    pi3 = None if pi3_path is None else open_weights(pi3_path, unsafe_pickle=unsafe_pickle)
    spec = config_spec(config, dual_stream=dual_stream)
    return plan_load(spec, checkpoint, pi3=pi3, only=only, prefer=prefer, load_encoder=load_encoder)
