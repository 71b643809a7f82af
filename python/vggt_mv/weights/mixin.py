"""What a model class inherits to load weights: `load_pretrained_weights`, and a lean, strict `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vggt_mv.weights.apply import LoadProgress
from vggt_mv.weights.convert import canonical_state_dict
from vggt_mv.weights.lean import build_from_weights
from vggt_mv.weights.load import load_pretrained_weights
from vggt_mv.weights.plan import Prefer
from vggt_mv.weights.provenance import BY_HAND, provenance_of, set_provenance
from vggt_mv.weights.report import LoadReport
from vggt_mv.weights.rules import FAMILIES, FAMILY_KEY
from vggt_mv.weights.safetensors_io import write_safetensors

__all__ = ["PretrainedWeightsMixin"]


class PretrainedWeightsMixin(nn.Module):
    """Goes before huggingface_hub's mixin among the bases: ``class Model(PretrainedWeightsMixin, HubMixin)``."""

    def load_pretrained_weights(
        self,
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
        """Load a checkpoint into this model; see `vggt_mv.weights.load_pretrained_weights`."""
        return load_pretrained_weights(
            self,
            checkpoint_path,
            pi3_path,
            device,
            only,
            strict,
            prefer,
            load_encoder,
            unsafe_pickle,
            progress,
            assign=assign,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; `provenance_of` says ``unknown`` from then on."""
        result = super().load_state_dict(state_dict, strict, assign)
        set_provenance(self, BY_HAND)
        return result

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        dtype: torch.dtype | None = None,
        unsafe_pickle: bool = False,
        progress: LoadProgress | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What huggingface_hub's ``from_pretrained`` calls once it has read config.json; see `build_from_weights`."""
        model, _ = build_from_weights(
            lambda: cls(**model_kwargs),
            model_id,
            strict=strict,
            device=map_location,
            dtype=dtype,
            unsafe_pickle=unsafe_pickle,
            progress=progress,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """What ``save_pretrained`` calls: canonical names, the family of the weights in the header.

        Safe where the parameters are mapped from the very file that is replaced.
        """
        family = provenance_of(self).family
        metadata = {FAMILY_KEY: family} if family in FAMILIES else {}
        write_safetensors(Path(save_directory) / "model.safetensors", canonical_state_dict(self), metadata)
