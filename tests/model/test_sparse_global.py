"""Sparse global attention: the neighbours of a frame."""

from __future__ import annotations

import pytest

from vggt_mv.models.sparse_global import dilated_neighbours


@pytest.mark.parametrize(("times", "views"), [(1, 1), (1, 9), (9, 1), (2, 3), (6, 2), (11, 10)])
def test_dilated_neighbours_against_the_definition(times: int, views: int) -> None:
    found = dilated_neighbours(times, views)
    assert found.shape[0] == times * views
    assert found.shape[1] <= 25
    for frame, row in enumerate(found.tolist()):
        t, v = divmod(frame, views)
        expected = set()
        for length in (1, 2, 4):
            for dt in (-length, 0, length):
                for dv in (-length, 0, length):
                    if 0 <= t + dt < times and 0 <= v + dv < views:
                        expected.add((t + dt) * views + v + dv)
        assert row == sorted(expected) + [-1] * (found.shape[1] - len(expected))
        assert frame in row


def test_a_frame_in_the_middle_has_all_neighbours() -> None:
    assert (dilated_neighbours(9, 9)[40] >= 0).sum() == 25
