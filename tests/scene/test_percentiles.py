"""streamed_percentiles against numpy on all values at once."""

from __future__ import annotations

import numpy as np
import pytest

from vggt_mv.scene.export.percentiles import streamed_percentiles

VALUES = {
    "one": [3.0],
    "two": [1.0, 2.0],
    "equal": [1.0] * 7,
    "signs": [-1.5, 0.0, -0.0, 2.0, 1e-40, -1e-40, 3e38, -3e38],
}


@pytest.mark.parametrize("name", [*VALUES, "many", "near"])
def test_as_numpy_says(name: str) -> None:
    rng = np.random.default_rng(0)
    values = {**VALUES, "many": rng.normal(size=10_007), "near": 1 + rng.uniform(0, 1e-5, 3001)}[name]
    array = np.array(values, dtype=np.float32)
    parts = np.array_split(array, min(4, len(array)))
    percents = [0, 2, 37.5, 50, 98, 100]
    found = streamed_percentiles(lambda: parts, percents)
    # The place between two neighbours is worked out in two ways that round differently.
    np.testing.assert_allclose(found, np.percentile(array, percents), rtol=1e-6, atol=1e-30)
    assert found is not None and found[0] == array.min() and found[-1] == array.max()


def test_without_values_there_is_none() -> None:
    assert streamed_percentiles(lambda: [np.zeros(0, dtype=np.float32)], [50]) is None
