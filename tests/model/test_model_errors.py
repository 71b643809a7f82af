"""Bad input: an error that names argument, rule and value."""

from __future__ import annotations

import pytest
import torch

from vggt_mv.errors import VggtMvError
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.options import AggregatorOptions, parameter_names
from vggt_mv.models.vggt import VGGT, VGGT_MV


def _with(value: float) -> torch.Tensor:
    images = torch.rand(1, 2, 3, 28, 42)
    images[0, 1, 2, 5, 7] = value
    return images


SHAPES = [
    (torch.rand(3, 28, 42), r"images must be \[S, 3, H, W\], .* got 3 dimensions: \[3, 28, 42\]"),
    (torch.rand(1, 1, 1, 1, 3, 28, 42), r"got 7 dimensions"),
    (torch.rand(1, 2, 4, 28, 42), r"images must have 3 channels \(RGB\), got 4 in \[1, 2, 4, 28, 42\]$"),
    (torch.rand(1, 2, 28, 42, 3), r"got 28 in \[1, 2, 28, 42, 3\]; move the channels before height and width"),
    (torch.rand(1, 2, 3, 28, 40), r"positive multiples of 14, got 28 x 40; the nearest valid size is 28 x 42"),
    (torch.rand(1, 2, 3, 500, 333), r"got 500 x 333; the nearest valid size is 504 x 336"),
    (torch.rand(1, 2, 3, 3, 5), r"got 3 x 5; the nearest valid size is 14 x 14"),
    (torch.rand(1, 2, 3, 0, 14), r"got 0 x 14; the nearest valid size is 14 x 14"),
    (torch.zeros(1, 2, 3, 28, 42, dtype=torch.uint8), r"got torch.uint8; pass images.float\(\) / 255"),
    (torch.zeros(1, 2, 3, 28, 42, dtype=torch.int64), r"must be floating point in \[0, 1\], got torch.int64"),
    (torch.rand(1, 0, 3, 28, 42), r"must hold at least one frame, got \[1, 0, 3, 28, 42\]"),
]
VALUES = [
    (_with(float("nan")), r"images must be finite, got NaN in images of shape \[1, 2, 3, 28, 42\]"),
    (_with(float("inf")), r"images must lie in \[0, 1\], got values from .* to inf"),
    (_with(float("-inf")), r"got values from -inf to"),
    (_with(255.0), r"got values from .* to 255; pass RGB in \[0, 1\], neither 0\.\.255 nor normalised"),
    (_with(-2.1), r"got values from -2\.1 to"),
]


@pytest.mark.parametrize("model_class", [VGGT, VGGT_MV])
@pytest.mark.parametrize(
    ("images", "message"), SHAPES + VALUES, ids=lambda v: "" if isinstance(v, torch.Tensor) else v[:30]
)
def test_bad_images(tiny_model, model_class, images, message):
    with pytest.raises(VggtMvError, match=rf"^{model_class.__name__}: .*{message}"):
        tiny_model(model_class)(images)


@pytest.mark.parametrize(("images", "message"), SHAPES, ids=lambda v: "" if isinstance(v, torch.Tensor) else v[:30])
def test_bad_images_for_the_aggregator(tiny_aggregator, images, message):
    with pytest.raises(VggtMvError, match=rf"^Aggregator: .*{message}"):
        tiny_aggregator()(images)


@torch.no_grad()
def test_a_little_overshoot_is_no_error(tiny_model):
    tiny_model(VGGT)(_with(1.05))
    tiny_model(VGGT)(_with(-0.05))


@torch.no_grad()
def test_values_are_not_looked_at_while_compiling(tiny_model):
    heads = {"enable_depth": False, "enable_point": False, "enable_track": False}
    model = tiny_model(VGGT, depth=1, patch_embed="conv", patch_embed_options={}, **heads)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(_with(float("nan")))["pose_enc"].isnan().any()


def test_errors_are_value_errors(tiny_model):
    assert issubclass(VggtMvError, ValueError)
    with pytest.raises(ValueError, match="got 2 dimensions"):
        tiny_model(VGGT)(torch.rand(28, 42))


def test_vggt_sends_times_by_views_to_vggt_mv(tiny_model):
    with pytest.raises(VggtMvError, match=r"got \[1, 2, 2, 3, 28, 42\]; VGGT_MV takes \[B, T, N, 3, H, W\]"):
        tiny_model(VGGT)(torch.rand(1, 2, 2, 3, 28, 42))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.zeros(1, 2, 2, 3),
            r"dynamic_mask must have the shape of images .* \[1, 2, 28, 42\], got \[1, 2, 2, 3\]",
        ),
        (
            torch.full((1, 2, 28, 42), 1.5),
            r"dynamic_mask must lie in \[0, 1\], got values from 1\.5 to 1\.5; 1 is where",
        ),
        (torch.full((1, 2, 28, 42), float("nan")), r"dynamic_mask must be finite, got NaN"),
    ],
    ids=["shape", "range", "nan"],
)
def test_bad_masks(tiny_model, mask, message):
    with pytest.raises(VggtMvError, match=message):
        tiny_model(VGGT_MV)(torch.rand(1, 2, 3, 28, 42), dynamic_mask=mask)


def test_bad_query_points(tiny_model):
    images = torch.rand(2, 2, 3, 28, 42)
    with pytest.raises(VggtMvError, match="query_points must be None for a model built with enable_track=False"):
        tiny_model(VGGT, enable_track=False)(images, torch.zeros(2, 1, 2))
    with pytest.raises(VggtMvError, match="query_points"):
        tiny_model(VGGT)(images, torch.zeros(1, 1, 2))
    with pytest.raises(VggtMvError, match="query_points"):
        tiny_model(VGGT)(images, torch.zeros(2, 1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dept": 3}, r"^VGGT_MV: unknown option 'dept'; the nearest known one is 'depth'"),
        ({"enable_tracks": True}, r"the nearest known one is 'enable_track'"),
        ({"xyz": 1}, r"unknown option 'xyz'; known are img_size, "),
        ({"camera_head_options": {"trunk": 1}}, r"camera_head_options: unknown option 'trunk'; .* 'trunk_depth'"),
        ({"dpt_head_options": {"feature": 1}}, r"dpt_head_options: unknown option 'feature'; .* 'features'"),
        ({"track_head_options": {"iter": 1}}, r"track_head_options: unknown option 'iter'; .* 'iters'"),
        ({"attention": "full"}, r"attention must be one of \['alternating', 'joint'\], got 'full'"),
        ({"dpt_head_options": None}, r"point_head.* must read outputs in 0\.\.depth-1 = 0\.\.3 .*got 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_model_options(tiny_model, options, message):
    with pytest.raises(VggtMvError, match=message):
        tiny_model(VGGT_MV, **options)


def test_bad_attention_of_a_call(tiny_model):
    with pytest.raises(VggtMvError, match=r"attention must be one of .* got 'view'"):
        tiny_model(VGGT_MV)(torch.rand(1, 2, 2, 3, 28, 42), attention="view")


def test_the_typed_options_are_those_of_the_aggregator():
    explicit = {"img_size", "patch_size", "embed_dim", "enable_dual_stream", "enable_sparse_global"}
    assert set(AggregatorOptions.__annotations__) == set(parameter_names(Aggregator.__init__)) - explicit
