"""Output folders: complete or not there, and never somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.export.folder import output_folder


def write_output(folder: Path, content: str = "new", *files: str) -> None:
    (folder / "depth").mkdir()
    (folder / "depth" / "a.png").write_text(content)
    listed = ["depth/a.png", "report.json", *files]
    (folder / "report.json").write_text(json.dumps({"format": "vggt_mv.reconstruction", "files": listed}))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("target", ["out", "a/b/out", "empty"])
def test_folder_appears_when_the_block_ends(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "empty").stat().st_mode
    with output_folder(tmp_path / target) as staging:
        write_output(staging)
        assert not (tmp_path / target / "report.json").exists()
    assert (tmp_path / target / "depth" / "a.png").read_text() == "new"
    assert (tmp_path / target).stat().st_mode == before
    assert not [name for name in tree(tmp_path) if "partial" in name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "a" / "b" / "out") as staging:
        write_output(staging)
        raise error
    assert tree(tmp_path) == []


def test_earlier_output_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as staging:
        write_output(staging, "old")
    with pytest.raises(KeyboardInterrupt), output_folder(out, overwrite=True) as staging:
        write_output(staging, "new")
        raise KeyboardInterrupt
    assert (out / "depth" / "a.png").read_text() == "old"
    (out / ".DS_Store").write_text("a file manager was here")
    with output_folder(out, overwrite=True) as staging:
        write_output(staging, "new")
        assert (out / "depth" / "a.png").read_text() == "old"
    assert (out / "depth" / "a.png").read_text() == "new"
    assert tree(tmp_path) == ["out", "out/depth", "out/depth/a.png", "out/report.json"]


def test_earlier_output_returns_when_the_move_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with output_folder(out) as staging:
        write_output(staging, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(VggtMvError, match="No space left on device"), output_folder(out, overwrite=True) as staging:
        write_output(staging, "new")
    assert (out / "depth" / "a.png").read_text() == "old"
    assert tree(tmp_path) == ["out", "out/depth", "out/depth/a.png", "out/report.json"]


def test_not_empty_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(VggtMvError, match=r"output folder '.*out' is not empty; .*--overwrite"),
        output_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == ["out", "out/thesis.tex"]


@pytest.mark.parametrize("report", [None, "{", "[]", '{"format": "other"}', '{"format": "vggt_mv.reconstruction"}'])
def test_overwrite_refuses_what_is_no_output(tmp_path: Path, report: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    with pytest.raises(VggtMvError, match="is not an earlier output"), output_folder(tmp_path, overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_refuses_an_output_that_holds_foreign_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as staging:
        write_output(staging)
    (out / "depth" / "notes.txt").write_text("mine")
    with (
        pytest.raises(VggtMvError, match=r"holds 'depth/notes.txt', which vggt-mv did not write"),
        output_folder(out, overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (out / "depth" / "notes.txt").read_text() == "mine"


def test_files_that_arrive_meanwhile_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(VggtMvError, match="is not empty"), output_folder(out) as staging:
        write_output(staging)
        out.mkdir()
        (out / "theirs").write_text("x")
    assert tree(tmp_path) == ["out", "out/theirs"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(VggtMvError, match=r"output '.*out' is a file; name a folder"), output_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    with (
        pytest.raises(VggtMvError, match=r"output folder '.*deeper' cannot be written \(Not a directory\)"),
        output_folder(tmp_path / "out" / "deeper"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that nobody may write to")
@pytest.mark.parametrize("target", ["/proc/out", "/proc/a/b/out"])
def test_unwritable_parent(target: str) -> None:
    with pytest.raises(VggtMvError, match=f"output folder '{target}' cannot be written"), output_folder(target):
        pytest.fail("the block must not run")


def test_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with (
        pytest.raises(VggtMvError, match=r"is a mount point.*name a folder inside it, such as '.*reconstruction'"),
        output_folder(tmp_path),
    ):
        pytest.fail("the block must not run")


def test_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with output_folder(tmp_path / "out") as staging:
        write_output(staging)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "report.json").exists()
