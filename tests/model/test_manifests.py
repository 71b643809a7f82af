"""The full-size models have exactly the keys and shapes of the public checkpoints.

On the meta device: nothing is allocated.
"""

from __future__ import annotations

import pytest
import torch

from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.configs import build_model

CASES = [("vggt_1b", "vggt_1b"), ("page4d_1b", "page4d_1b"), ("vggt_mv_1b", "page4d_1b")]


def _meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(("config", "keys"), CASES)
def test_the_whole_model_loads_strictly(manifest, config, keys):
    model, expected = build_model(config, device="meta"), manifest(keys)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    result = model.load_state_dict(_meta(expected), strict=True, assign=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_the_order_of_keys_is_that_of_the_checkpoint(manifest):
    assert list(build_model("vggt_1b", device="meta").aggregator.state_dict(prefix="aggregator.")) == [
        key for key in manifest("vggt_1b") if key.startswith("aggregator.")
    ]


def test_aliases_load_strictly_into_the_whole_model(manifest):
    shapes = manifest("page4d_1b")
    renamed = {
        key.replace("aggregator.global_blocks", "aggregator.view_blocks").replace(
            "aggregator.frame_blocks", "aggregator.time_blocks"
        ): shape
        for key, shape in shapes.items()
    }
    assert len(renamed) == len(shapes)
    assert not set(renamed) <= set(shapes)
    for state in (renamed, {**shapes, **renamed}):
        build_model("vggt_mv_1b", device="meta").load_state_dict(_meta(state), strict=True, assign=True)


def test_another_shape_or_key_does_not_load(manifest):
    model, shapes = build_model("vggt_1b", device="meta"), manifest("vggt_1b")
    wrong = {**shapes, "aggregator.camera_token": (1, 2, 1, 1025)}
    with pytest.raises(RuntimeError, match=r"size mismatch for aggregator\.camera_token"):
        model.load_state_dict(_meta(wrong), strict=True, assign=True)
    with pytest.raises(RuntimeError, match=r"Unexpected.*spatial_mask_head"):
        model.load_state_dict(_meta(manifest("page4d_1b")), strict=True, assign=True)
    with pytest.raises(RuntimeError, match=r"Missing.*spatial_mask_head"):
        build_model("page4d_1b", device="meta").load_state_dict(_meta(shapes), strict=True, assign=True)


def test_the_single_stream_part_of_the_dual_stream_manifest(manifest):
    """Its other keys belong to the dual stream and the memory tokens."""
    shapes = {
        key: shape
        for key, shape in manifest("vggt_mv_aggregator_dual_memory").items()
        if not key.startswith(("pose_", "geo_", "lambda_", "memory_"))
    }
    assert any(key.startswith("view_blocks") for key in shapes)
    with torch.device("meta"):
        aggregator = Aggregator(enable_spatial_mask=True)
    aggregator.load_state_dict(_meta(shapes), strict=True, assign=True)
