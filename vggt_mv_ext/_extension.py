"""Finds the compiled module `vggt_mv_ext._C`, or says exactly why it is not there.

Every build writes `_build_info.json` beside this file: what was compiled, and what was left out and why. So there are
three cases and no fourth: the compiled module is there; the build was asked to leave it out (`VGGT_MV_NO_EXT=1`) and
recorded that; or something is wrong, most often a source checkout in the current directory that shadows the installed
package. The last is an ImportError that names the folder, never a silent fall-back to slow code.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  before _C, so that both share the one OpenMP runtime that PyTorch brings along

_PACKAGE_FOLDER = Path(__file__).resolve().parent


def read_switch(name: str) -> bool:
    """Reads an environment variable that is a switch: `1` is on; `0`, empty or unset is off; the rest is an error."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable {name}: must be 0 or 1, got {value!r}")
    return value == "1"


def read_build_record(folder: Path) -> dict[str, Any] | None:
    """Returns what the build wrote into `folder`, or None where no build has been."""
    try:
        record = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(record, dict):
        raise ImportError(f"{folder / '_build_info.json'}: must hold a JSON object, got {type(record).__name__}")
    return record


def load_extension(folder: Path = _PACKAGE_FOLDER) -> tuple[ModuleType | None, dict[str, Any]]:
    """Loads `_C` as the record in `folder` promises.

    Returns:
        The compiled module, or None for a recorded build without it; and the record.

    Raises:
        ImportError: `_C` is missing or does not load although the build was not recorded as one without it, or it is
            missing although `VGGT_MV_REQUIRE_EXT=1`.
    """
    record = read_build_record(folder)
    if record is not None and record.get("kind") == "no_ext":
        if read_switch("VGGT_MV_REQUIRE_EXT"):
            raise ImportError(
                f"VGGT_MV_REQUIRE_EXT=1, but {folder} holds a build without compiled kernels "
                f"({record.get('reason', 'no reason recorded')}). Build it with: pip install -e ."
            )
        return None, record
    shadowed = ImportError(
        f"vggt_mv_ext was imported from {folder}, which holds no compiled module _C. If that is a source checkout "
        "that shadows the installed package, start Python from another directory; to use the checkout itself, "
        "build it there with: pip install -e . (or VGGT_MV_NO_EXT=1 pip install -e . for pure Python)"
    )
    try:
        module = importlib.import_module("vggt_mv_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "vggt_mv_ext._C":
            raise
        raise shadowed from error
    except ImportError as error:
        raise ImportError(f"the compiled module of {folder} does not load: {error}") from error
    if module.__file__ is None or Path(module.__file__).resolve().parent != folder:
        raise shadowed  # an editable install lends its module to any package of this name
    return module, record if record is not None else {"kind": "full", "reason": "no build record was found"}


extension, build_record = load_extension()
