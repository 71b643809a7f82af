"""The one call: open, plan, check, write, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vggt_mv.weights.apply import LoadProgress, carry_out
from vggt_mv.weights.errors import WeightsError
from vggt_mv.weights.files import open_weights
from vggt_mv.weights.plan import Prefer, plan_load
from vggt_mv.weights.provenance import record_load
from vggt_mv.weights.report import LoadReport

__all__ = ["load_pretrained_weights"]


def load_pretrained_weights(
    model: nn.Module,
    checkpoint_path: str | Path | None = None,
    pi3_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    only: str | Sequence[str] | None = None,
    strict: bool = False,
    prefer: Prefer = "checkpoint",
    load_encoder: bool = False,
    unsafe_pickle: bool = False,
    progress: LoadProgress | None = None,
    *,
    assign: bool = False,
) -> LoadReport:
    """Load a VGGT, PAGE-4D, VGGT_MV or Pi3 checkpoint into a model, and account for every tensor.

    Pi3 goes into the aggregator first, then the checkpoint into the whole model, then blocks of a new dual stream are
    copied from the single stream. Nothing is written before everything is known to be valid.

    Args:
        model: a whole model or an aggregator by itself.
        checkpoint_path: file, folder, shard index or hub id; see `open_weights`.
        pi3_path: the same, of a Pi3 checkpoint.
        device: where tensors of a model on the meta device are put; other tensors stay where they are.
        only: restrict the load: ``["camera_head", "aggregator.frame_blocks.8-15"]``.
        strict: every tensor of the model (that `only` selects) must come from a file, every tensor of the checkpoint
            must be used, and all must be finite.
        prefer: ``"checkpoint"`` or ``"pi3"``: which wins where both have a tensor.
        load_encoder: take Pi3's image encoder too.
        unsafe_pickle: run the code that a pickle brings. Only for files that you trust as you trust a program.
        progress: called with (stage, bytes done, bytes in all); the stages are "check" and "write".
        assign: put the mapped tensors into the model instead of copying; see `apply_plan`.

    Returns:
        The report: counts as a dict (``report["checkpoint_loaded"]``, ``["pi3_loaded"]``, ``["missing"]``,
        ``["unexpected"]``, ...), ``print(report)`` for the table, ``report.entries`` for all.

    Raises:
        WeightsError: see its subclasses; one line, and the model is as it was.

    Warns:
        WeightsWarning: under half of the model found (with the likely cause), nothing of a source used, NaN or Inf.
    """
    if checkpoint_path is None and pi3_path is None:
        raise WeightsError("nothing to load: give checkpoint_path, pi3_path or both")
    checkpoint = None if checkpoint_path is None else open_weights(checkpoint_path, unsafe_pickle=unsafe_pickle)
    pi3 = None if pi3_path is None else open_weights(pi3_path, unsafe_pickle=unsafe_pickle)
    plan = plan_load(model, checkpoint, pi3=pi3, only=only, prefer=prefer, load_encoder=load_encoder)
    if strict:
        plan.report().raise_unless_strict()
    report = carry_out(
        model,
        plan,
        device=device,
        assign=assign,
        finite="raise" if strict else "warn",
        progress=progress,
        own_files=True,
    )
    record_load(model, report)
    return report
