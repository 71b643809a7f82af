from __future__ import annotations

from collections.abc import Callable

import pytest
from peers import Comparison

_comparisons: list[Comparison] = []


@pytest.fixture
def report() -> Callable[[Comparison], None]:
    """Keeps a comparison for the end of the run, where all of them are printed."""
    return _comparisons.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _comparisons:
        terminalreporter.section("beside peers: median (quartiles), bytes, rate, times as long as the first")
        for comparison in _comparisons:
            terminalreporter.write_line(str(comparison))
