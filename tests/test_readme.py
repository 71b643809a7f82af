"""The Python of the README runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vggt_mv import build_model, synthetic_scene

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model("vggt_mv_demo").save_pretrained(tmp_path / "path" / "or" / "hub-id")
    synthetic_scene(2, 2, 42, 56).save(tmp_path / "recording")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out" / "report.json").is_file()
