"""Reconstruction of scenes from synchronized cameras over time, in one pass of a transformer.

The names below are imported on first use, so that `import vggt_mv` and the command line start quickly.

Example:
    >>> from vggt_mv import build_model
    >>> model = build_model("vggt_mv_demo", device="meta")
    >>> type(model).__name__
    'VGGT_MV'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_mv.errors import VggtMvError
    from vggt_mv.models.aggregator import Aggregator
    from vggt_mv.models.configs import build_model, load_config
    from vggt_mv.models.vggt import VGGT, VGGT_MV
    from vggt_mv.scene.load_model import load_model
    from vggt_mv.scene.preprocess import preprocess
    from vggt_mv.scene.reconstruct import reconstruct
    from vggt_mv.scene.reconstruction import Reconstruction
    from vggt_mv.scene.sources import Scene, open_scene
    from vggt_mv.scene.synthetic import synthetic_scene
    from vggt_mv.scene.windows import reconstruct_to_folder
    from vggt_mv_ext._version import __version__

__all__ = [
    "VGGT",
    "VGGT_MV",
    "Aggregator",
    "Reconstruction",
    "Scene",
    "VggtMvError",
    "__version__",
    "build_model",
    "load_config",
    "load_model",
    "open_scene",
    "preprocess",
    "reconstruct",
    "reconstruct_to_folder",
    "synthetic_scene",
]

_HOME = {
    "VGGT": "vggt_mv.models.vggt",
    "VGGT_MV": "vggt_mv.models.vggt",
    "Aggregator": "vggt_mv.models.aggregator",
    "Reconstruction": "vggt_mv.scene.reconstruction",
    "Scene": "vggt_mv.scene.sources",
    "VggtMvError": "vggt_mv.errors",
    "__version__": "vggt_mv_ext._version",
    "build_model": "vggt_mv.models.configs",
    "load_config": "vggt_mv.models.configs",
    "load_model": "vggt_mv.scene.load_model",
    "open_scene": "vggt_mv.scene.sources",
    "preprocess": "vggt_mv.scene.preprocess",
    "reconstruct": "vggt_mv.scene.reconstruct",
    "reconstruct_to_folder": "vggt_mv.scene.windows",
    "synthetic_scene": "vggt_mv.scene.synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
