"""From files to scenes, and back to files: sources, preprocessing, reconstruction, synthetic worlds.

``preprocess`` is the function here, not its module. The import system binds a submodule's name in its package when it
is first imported, so a function of the same name is imported here, eagerly and after its module: whatever is imported
later finds the name taken. Everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vggt_mv.errors import SceneError
from vggt_mv.scene.preprocess import PreprocessedScene, ViewTransform, preprocess
from vggt_mv.scene.sources import Scene, open_scene

if TYPE_CHECKING:
    from vggt_mv.scene.synthetic import SyntheticScene, synthetic_scene

__all__ = [
    "PreprocessedScene",
    "Scene",
    "SceneError",
    "SyntheticScene",
    "ViewTransform",
    "open_scene",
    "preprocess",
    "synthetic_scene",
]

_LAZY = {
    "SyntheticScene": "vggt_mv.scene.synthetic",
    "synthetic_scene": "vggt_mv.scene.synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
