"""The recorded outputs of the public models, with the models that they were recorded from.

`<name>.npz` holds inputs and outputs, `<name>.json` the configuration and the keys; weights are drawn anew from the
keys (`keyed_weights`). In the 6-D fixtures the heads saw the frames in time-major order, as one sequence.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vggt_mv.heads.camera_head import CameraHead
from vggt_mv.heads.dpt_head import DPTHead
from vggt_mv.heads.track_modules.base_track_predictor import BaseTrackerPredictor
from vggt_mv.models.aggregator import Aggregator

FOLDER = Path(__file__).resolve().parent
NAMES = ("vggt_tiny", "page4d_tiny", "vggt_mv_tiny", "vggt_mv_tiny_time_first", "vggt_mv_tiny_first_patch")


def keyed_state_dict(model: nn.Module, salt: int) -> dict[str, Tensor]:
    """`keyed_weights.keyed_state_dict`, whose file is kept as it came."""
    spec = importlib.util.spec_from_file_location("keyed_weights", FOLDER / "keyed_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.keyed_state_dict(model, salt)


def frames(array: Tensor, sequence_rank: int) -> Tensor:
    """`[B,T,N,...]` as the sequence `[B,T*N,...]`; a sequence, which has `sequence_rank` dimensions, as it is."""
    return array.flatten(1, 2) if array.ndim > sequence_rank else array


class Fixture:
    """One recording: `info` (the json), `arrays` (the npz as tensors), and makers of the modules."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.layers = sorted(int(key.removeprefix("tokens_")) for key in self.arrays if key.startswith("tokens_"))

    def aggregator(self, **options: Any) -> Aggregator:
        """The aggregator it was recorded from, in evaluation mode; keyword arguments change it."""
        config = self.info["config"]
        vit = {"embed_dim": config["embed_dim"], "num_heads": config["num_heads"], "depth": config["vit_depth"]}
        model = Aggregator(
            **{
                **{key: config[key] for key in ("img_size", "embed_dim", "depth", "num_heads")},
                "patch_embed_options": vit,
                "enable_spatial_mask": any(key.startswith("spatial_mask") for key in self.info["aggregator_keys"]),
                "special_token_position": self.info["special_token_position"],
                **self.info["package_kw"],
                **options,
            }
        )
        model.load_state_dict(keyed_state_dict(model, self.info["salt"]))
        return model.eval()

    def heads(self) -> nn.ModuleDict:
        """Camera, point and depth head, the features of the tracks, and the tracker, in evaluation mode."""
        config = self.info["config"]
        dim = 2 * config["embed_dim"]
        dpt = {
            "features": config["features"],
            "out_channels": config["out_channels"],
            "intermediate_layer_idx": config["layers"],
        }
        tracker = {"latent_dim": config["features"], "hidden_size": config["hidden"], "depth": 2}
        heads = nn.ModuleDict(
            {
                "camera_head": CameraHead(dim, trunk_depth=config["trunk_depth"], num_heads=config["camera_heads"]),
                "point_head": DPTHead(dim, output_dim=4, activation="inv_log", **dpt),
                "depth_head": DPTHead(dim, output_dim=2, activation="exp", **dpt),
                "track_features": DPTHead(dim, feature_only=True, down_ratio=2, pos_embed=False, **dpt),
                "tracker": BaseTrackerPredictor(stride=2, corr_levels=3, corr_radius=2, **tracker),
            }
        )
        heads.load_state_dict(keyed_state_dict(heads, self.info["salt"]))
        return heads.eval()

    def images(self) -> Tensor:
        """The images as one sequence, `[B,S,3,H,W]`: what the heads saw."""
        return frames(self.arrays["images"], 5)

    def outputs(self) -> list[Tensor | None]:
        """The recorded outputs of the aggregator as one sequence; None where none was recorded."""
        outputs: list[Tensor | None] = [None] * int(self.arrays["num_outputs"])
        for layer in self.layers:
            outputs[layer] = frames(self.arrays[f"tokens_{layer}"], 4)
        return outputs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error in fp64; infinite where anything is not finite or shapes differ, so NaN never passes."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if actual.shape != expected.shape or not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm())
