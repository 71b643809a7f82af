"""The emulated device, built once a session; skipped with a reason where the machine cannot build it."""

from __future__ import annotations

import pytest
from emulated_device import EmulatedDevice, build_device
from emulation_build import HERE, ROOT


@pytest.fixture(scope="session", params=["native", "ucontext"])
def planted_device(request: pytest.FixtureRequest) -> EmulatedDevice:
    """The kernels of planted.cu, on both kinds of fibers."""
    return build_device([HERE / "planted.cu"], *(["-DVGGT_MV_FIBER_UCONTEXT"] if request.param == "ucontext" else []))


@pytest.fixture(scope="session")
def emulated() -> EmulatedDevice:
    """Every CUDA kernel and launcher of the package."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted(HERE.glob("bind_*.cpp"))
    return build_device(sources)
