"""The heads against recorded outputs of the public models, and their keys against the public checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.golden.fixtures import NAMES, Fixture, relative_error
from vggt_mv.heads.camera_head import CameraHead
from vggt_mv.heads.dpt_head import DPTHead
from vggt_mv.heads.track_head import TrackHead

TESTS = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("linear_layers")


class Golden:
    """One fixture, with what several tests need of it made once."""

    def __init__(self, name: str) -> None:
        fixture = Fixture(name)
        self.info, self.arrays, self.heads = fixture.info, fixture.arrays, fixture.heads()
        self.images, self.outputs = fixture.images(), fixture.outputs()
        self.patch_start = int(self.arrays["patch_start_idx"])


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def test_keys_and_shapes_are_those_of_the_fixture(golden: Golden) -> None:
    keys = {key: list(value.shape) for key, value in golden.heads.state_dict().items()}
    assert keys == golden.info["head_keys"]


@torch.no_grad()
def test_camera(golden: Golden) -> None:
    encodings = golden.heads["camera_head"](golden.outputs)
    assert len(encodings) == 4
    for i, encoding in enumerate(encodings):
        assert_relative(encoding, golden.arrays[f"pose_enc_{i}"], 1e-5)


# Measured: points 1.4e-6 (expm1 of sums over 256 terms), all else under 1e-6.
@torch.no_grad()
def test_depth_and_points(golden: Golden) -> None:
    inputs = (golden.outputs, golden.images, golden.patch_start)
    depth, depth_conf = golden.heads["depth_head"](*inputs)
    points, points_conf = golden.heads["point_head"](*inputs)
    assert_relative(depth, golden.arrays["depth"], 1e-5)
    assert_relative(depth_conf, golden.arrays["depth_conf"], 1e-5)
    assert_relative(points, golden.arrays["world_points"], 1e-5)
    assert_relative(points_conf, golden.arrays["world_points_conf"], 1e-5)


@torch.no_grad()
def test_track_features(golden: Golden) -> None:
    features = golden.heads["track_features"](golden.outputs, golden.images, golden.patch_start)
    assert_relative(features, golden.arrays["track_features"], 1e-5)


# The second iteration embeds displacements with frequencies near 1000, which amplify rounding a hundredfold.
@pytest.mark.parametrize(("iterations", "tolerance"), [(1, 1e-5), (2, 2e-4)])
@torch.no_grad()
def test_tracker(golden: Golden, iterations: int, tolerance: float) -> None:
    arrays = golden.arrays
    tracks, visibility, confidence = golden.heads["tracker"](
        arrays["query_points"], arrays["track_features"], iters=iterations
    )
    assert len(tracks) == iterations
    assert_relative(tracks[-1], arrays[f"track_{iterations}"], tolerance)
    assert_relative(visibility, arrays[f"vis_{iterations}"], tolerance)
    assert_relative(confidence, arrays[f"conf_{iterations}"], tolerance)


@torch.no_grad()
def test_first_of_two_iterations_is_the_only_one_of_one() -> None:
    golden = Golden("vggt_tiny")
    tracks, *_ = golden.heads["tracker"](golden.arrays["query_points"], golden.arrays["track_features"], iters=2)
    assert_relative(tracks[0], golden.arrays["track_1"], 1e-5)


@pytest.mark.parametrize("manifest", ["vggt_1b", "page4d_1b"])
def test_full_size_heads_have_the_keys_of_the_checkpoint(manifest: str) -> None:
    with torch.device("meta"):
        heads = nn.ModuleDict(
            {
                "camera_head": CameraHead(dim_in=2048),
                "point_head": DPTHead(dim_in=2048, output_dim=4, activation="inv_log"),
                "depth_head": DPTHead(dim_in=2048, output_dim=2, activation="exp"),
                "track_head": TrackHead(dim_in=2048),
            }
        )
    shapes = json.loads((TESTS / "keys" / f"{manifest}.json").read_text())
    expected = {key: shape for key, shape in shapes.items() if not key.startswith("aggregator.")}
    assert {key: list(value.shape) for key, value in heads.state_dict().items()} == expected
