from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops_support import usable_isas

import vggt_mv_ext
from vggt_mv_ext._extension import extension


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Every test starts from the same seed and the automatic choice of backend, and leaves the process as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with vggt_mv_ext.backend("auto"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every tensor that an operator allocates with NaN, so that an element it forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the CPU kernels of one instruction set; skips with the reason where the build or machine lacks it."""
    name = request.param
    if extension is None:
        pytest.skip("this build has no compiled kernels")
    if name not in usable_isas():
        pytest.skip(f"this machine cannot run the {name} kernels; it can run {', '.join(usable_isas())}")
    before = extension.build_info()["cpu_isa"]
    extension.set_cpu_isa(name)
    yield name
    extension.set_cpu_isa(before)
