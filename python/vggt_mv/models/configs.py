"""Named configurations, and configurations in JSON files.

A configuration is a dict of the arguments of `VGGT` or `VGGT_MV`; the key ``"class"`` says of which. A JSON file holds
such an object; the config.json that `save_pretrained` writes is one, of `VGGT_MV` unless it says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from vggt_mv.errors import VggtMvError
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.base import VGGTBase
from vggt_mv.models.options import check_option_names, check_option_types, nearest_name, parameter_names
from vggt_mv.models.vggt import VGGT, VGGT_MV

__all__ = ["CONFIGS", "Config", "build_model", "load_config"]

_CLASSES: dict[str, type[VGGTBase]] = {"VGGT": VGGT, "VGGT_MV": VGGT_MV}

_DEMO_LAYERS = [1, 2, 3, 4]

#: Name -> configuration.
CONFIGS: dict[str, dict[str, Any]] = {
    # The public VGGT checkpoint: 1.2 billion parameters, all of them defaults.
    "vggt_1b": {"class": "VGGT"},
    # The public PAGE-4D checkpoint: the same with the spatial mask head.
    "page4d_1b": {"class": "VGGT_MV"},
    # PAGE-4D's parameters, times x views by view and time attention in turn. Spelled out although it is the default.
    "vggt_mv_1b": {"class": "VGGT_MV", "attention": "alternating", "aa_order": ["view", "time"]},
    # About 5 million parameters: every part of the large model, in seconds on two cores.
    "vggt_mv_demo": {
        "class": "VGGT_MV",
        "img_size": 168,
        "embed_dim": 128,
        "depth": 5,
        "num_heads": 4,
        "mask_layer": 2,
        "patch_embed": "dinov2_vits14_reg",
        "patch_embed_options": {"embed_dim": 128, "depth": 4, "num_heads": 4},
        "camera_head_options": {"trunk_depth": 1, "num_heads": 8},
        "dpt_head_options": {
            "features": 32,
            "out_channels": [16, 32, 64, 64],
            "intermediate_layer_idx": _DEMO_LAYERS,
        },
        "track_head_options": {
            "features": 32,
            "corr_levels": 4,
            "corr_radius": 3,
            "hidden_size": 64,
            "depth": 2,
            "out_channels": [16, 32, 64, 64],
            "intermediate_layer_idx": _DEMO_LAYERS,
        },
    },
}

Config = str | Path | Mapping[str, Any]


def load_config(config: Config) -> tuple[type[VGGTBase], dict[str, Any]]:
    """The class and its arguments that a configuration means.

    Args:
        config: a name of `CONFIGS`, the path of a JSON file, or such an object as a dict.

    Returns:
        The class (`VGGT` or `VGGT_MV`) and its keyword arguments.

    Raises:
        VggtMvError: an unknown name, a file that is missing or no JSON object, an unknown class, or an unknown argument
            (naming the nearest known one), or one of another type.

    Example:
        >>> load_config("vggt_mv_1b")
        (<class 'vggt_mv.models.vggt.VGGT_MV'>, {'attention': 'alternating', 'aa_order': ['view', 'time']})
    """
    if isinstance(config, Mapping):
        source, values = "config", dict(config)
    elif str(config) in CONFIGS:
        source, values = f"config {str(config)!r}", CONFIGS[str(config)]
    else:
        source, values = f"config {config}", _read_json(Path(config))
    values = deepcopy(dict(values))
    name = values.pop("class", "VGGT_MV")
    if name not in _CLASSES:
        raise VggtMvError(f"{source}: class must be one of {list(_CLASSES)}, got {name!r}")
    model_class = _CLASSES[name]
    known = [n for n in parameter_names(Aggregator.__init__) if n != "block_fn"] + parameter_names(model_class.__init__)
    check_option_names(source, values, known)
    check_option_types(source, values, Aggregator.__init__, model_class.__init__)
    return model_class, values


def build_model(config: Config, *, device: torch.device | str = "cpu") -> VGGTBase:
    """Builds a model with new weights, in evaluation mode.

    Args:
        config: as for `load_config`.
        device: where its tensors are made; ``"meta"`` makes none.

    Raises:
        VggtMvError: as `load_config`, or an argument out of its range.
    """
    model_class, arguments = load_config(config)
    try:
        with torch.device(device):
            return model_class(**arguments).eval()
    except (VggtMvError, NotImplementedError):
        raise
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # Sizes that nobody checked before PyTorch met them: negative, zero, or more than there is memory for.
        source = "config" if isinstance(config, Mapping) else f"config {config}"
        raise VggtMvError(
            f"{source}: no model has these sizes ({' '.join(str(error).split())}); correct them"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.suffix == ".json" or len(path.parts) > 1:
            raise VggtMvError(f"config {path}: no such file; name one that exists, or one of {', '.join(CONFIGS)}")
        raise VggtMvError(
            f"config {str(path)!r} is neither a file nor a known name; {nearest_name(str(path), CONFIGS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VggtMvError(f"config {path}: must be a JSON file, but cannot be read: {error}; mend it") from error
    if not isinstance(values, dict):
        raise VggtMvError(f"config {path}: must hold a JSON object, got {type(values).__name__}")
    return values
