"""Where the emulated library cannot be built, the tests say what to install; where it must be, they fail."""

from __future__ import annotations

import emulation_build
import pytest
from emulated_device import build_device
from emulation_build import HERE, build_library


def test_without_headers_tests_are_skipped_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGGT_MV_REQUIRE_EMULATION", raising=False)
    monkeypatch.setattr(emulation_build, "cuda_include_candidates", list)
    with pytest.raises(pytest.skip.Exception, match="pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"):
        build_device([HERE / "planted.cu"])


def test_where_emulation_is_required_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGT_MV_REQUIRE_EMULATION", "1")
    monkeypatch.setattr(
        emulation_build, "compiler", lambda: (_ for _ in ()).throw(emulation_build.CannotBuild("no g++"))
    )
    with pytest.raises(pytest.fail.Exception, match=r"VGGT_MV_REQUIRE_EMULATION=1, but no g\+\+"):
        build_device([HERE / "planted.cu"])


def test_a_second_build_compiles_nothing(planted_device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation_build, "_run", lambda command: pytest.fail(f"ran {command}"))
    assert build_library([HERE / "planted.cu"]).is_file()


def test_compiler_errors_are_shown(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cu").write_text("int f( { return missing; }\n")
    monkeypatch.setattr(emulation_build, "MACHINE", ())
    with pytest.raises(RuntimeError, match=r"broken\.cu:1"):
        build_library([tmp_path / "broken.cu"])
