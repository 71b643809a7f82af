"""The tracker's parts against plain transcriptions, and what the tracker and the track head promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.track_head import TrackHead
from vggt_mv.heads.track_modules import utils as track_utils
from vggt_mv.heads.track_modules.base_track_predictor import BaseTrackerPredictor
from vggt_mv.heads.track_modules.blocks import UpdateTransformer
from vggt_mv.heads.track_modules.utils import (
    correlation_window,
    feature_pyramid,
    flow_embedding,
    sample_map,
    sampled_position_embedding,
)


@pytest.fixture(autouse=True)
def _seeded_and_on_one_thread() -> Iterator[None]:
    """Tensors are tiny here: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def grid_sample(maps: Tensor, coords: Tensor, padding: str) -> Tensor:
    """torch's sampler on channels-last maps ``[M, h, w, F]`` at pixels ``[M, N, 2]`` -> ``[M, N, F]``."""
    size = coords.new_tensor([maps.shape[2], maps.shape[1]])
    grid = 2 * coords / (size - 1) - 1
    samples = F.grid_sample(
        maps.permute(0, 3, 1, 2), grid[:, :, None], mode="bilinear", padding_mode=padding, align_corners=True
    )
    return samples[..., 0].transpose(1, 2)


def points(count: int, number: int, height: int, width: int) -> Tensor:
    """Points inside and outside of a map, near and far, on cells and between."""
    coords = torch.rand(count, number, 2, dtype=torch.float64) * torch.tensor([width + 8.0, height + 8.0]) - 4.0
    coords[:, ::3] = coords[:, ::3].round()
    coords[0, 0] = torch.tensor([-1e9, 1e30])
    coords[0, 1] = torch.tensor([width - 1.0, height - 1.0])
    return coords


@pytest.mark.parametrize(("height", "width"), [(2, 3), (5, 7), (16, 9)])
def test_sample_map_is_border_sampling(height: int, width: int) -> None:
    maps = torch.randn(2, height, width, 4, dtype=torch.float64)
    coords = points(2, 30, height, width)
    torch.testing.assert_close(sample_map(maps, coords), grid_sample(maps, coords, "border"))
    one = torch.randn(2, 1, 1, 4, dtype=torch.float64)  # a map of one cell, where torch's convention divides by zero
    torch.testing.assert_close(sample_map(one, coords), one[:, 0].expand(2, 30, 4))


@pytest.mark.parametrize(("height", "width"), [(2, 3), (5, 7), (16, 9)])
@pytest.mark.parametrize("radius", [0, 1, 4])
@pytest.mark.parametrize("small_steps", [False, True])
def test_correlation_window_samples_the_map_of_dot_products(
    height: int, width: int, radius: int, small_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_steps:
        monkeypatch.setattr(track_utils, "_WINDOW_NUMBERS", 7 * 6 * (2 * radius + 2) ** 2)
    maps = torch.randn(2, height, width, 6, dtype=torch.float64)
    features = torch.randn(2, 30, 6, dtype=torch.float64)
    coords = points(2, 30, height, width)
    products = torch.einsum("mnf,mhwf->mnhw", features, maps) / math.sqrt(6)
    expected = torch.zeros(2, 30, (2 * radius + 1) ** 2, dtype=torch.float64)
    for i in range(2 * radius + 1):  # slow: x
        for j in range(2 * radius + 1):  # fast: y
            at = coords + torch.tensor([i - radius, j - radius])
            for n in range(30):
                sample = grid_sample(products[:, n, :, :, None], at[:, n : n + 1], "zeros")
                expected[:, n, i * (2 * radius + 1) + j] = sample[:, 0, 0]
    torch.testing.assert_close(correlation_window(features, maps, coords, radius), expected)


def test_correlation_window_survives_nan() -> None:
    maps, coords = torch.randn(1, 4, 4, 4), torch.tensor([[[1.0, 1.0], [math.nan, 1.0], [math.inf, -math.inf]]])
    window = correlation_window(torch.randn(1, 3, 4), maps, coords, 1)
    assert bool(window[0, 0].isfinite().all())
    assert bool(window[0, 1].isnan().all())
    assert not window[0, 2].any()


def test_sample_map_survives_nan() -> None:
    samples = sample_map(torch.randn(1, 4, 4, 4), torch.tensor([[[math.nan, 1.0], [1.0, math.nan], [2.0, 1.0]]]))
    assert bool(samples[0, :2].isnan().all())
    assert bool(samples[0, 2].isfinite().all())


def test_gradients_of_sampling() -> None:
    maps = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    coords = points(2, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda f, m: correlation_window(f, m, coords, 1), (features, maps))
    assert torch.autograd.gradcheck(lambda m: sample_map(m, coords), (maps,))


def test_feature_pyramid_averages() -> None:
    maps = torch.randn(2, 7, 10, 3, dtype=torch.float64)
    pyramid = feature_pyramid(maps, 3)
    assert [tuple(level.shape) for level in pyramid] == [(2, 7, 10, 3), (2, 3, 5, 3), (2, 1, 2, 3)]
    torch.testing.assert_close(pyramid[1][:, 2, 4], maps[:, 4:6, 8:10].mean((1, 2)))
    assert all(level.is_contiguous() for level in pyramid)
    with pytest.raises(VggtMvError, match="at least 8 cells a side for corr_levels = 4, got 7 x 10"):
        feature_pyramid(maps, 4)


def test_flow_embedding() -> None:
    flow = torch.tensor([0.013, -0.4], dtype=torch.float64)
    expected = []
    for value in flow.tolist():
        for j in range(3):
            d = 2 * j * 1000 / 6
            expected += [math.sin(value * d), math.cos(value * d)]
    torch.testing.assert_close(flow_embedding(flow, 12), torch.tensor(expected, dtype=torch.float64))
    assert flow_embedding(torch.zeros(2, 3, 2), 8).shape == (2, 3, 8)


def test_position_embedding_samples_the_embedding_of_the_grid() -> None:
    height, width, dim = 5, 7, 16
    whole = torch.zeros(1, height, width, dim, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for half, p in ((0, x), (8, y)):
                for j in range(4):
                    whole[0, y, x, half + j] = math.sin(p * 10000 ** (-j / 4))
                    whole[0, y, x, half + 4 + j] = math.cos(p * 10000 ** (-j / 4))
    coords = points(1, 30, height, width)
    actual = sampled_position_embedding(coords, height, width, dim)
    # The table is kept in float32.
    torch.testing.assert_close(actual, grid_sample(whole, coords, "border"), rtol=0, atol=1e-7)


def tracker(**options: Any) -> BaseTrackerPredictor:
    arguments = {"stride": 2, "corr_levels": 2, "corr_radius": 1, "latent_dim": 8, "hidden_size": 16, "depth": 2}
    module = BaseTrackerPredictor(**(arguments | options)).double().eval()
    with torch.no_grad():
        module.updateformer.flow_head.weight.normal_(std=0.3)  # so that points move
    return module


def queries(batch: int = 1, number: int = 4) -> Tensor:
    return torch.rand(batch, number, 2, dtype=torch.float64) * torch.tensor([18.0, 12.0])


def feature_maps(batch: int = 1, frames: int = 3) -> Tensor:
    return torch.randn(batch, frames, 8, 7, 10, dtype=torch.float64)


@torch.no_grad()
def test_tracker_shapes_and_frame_zero() -> None:
    query, maps = queries(2, 4), feature_maps(2, 3)
    tracks, visibility, confidence = tracker()(query, maps, iters=3)
    assert len(tracks) == 3
    assert all(track.shape == (2, 3, 4, 2) for track in tracks)
    assert visibility.shape == confidence.shape == (2, 3, 4)
    assert bool(((visibility > 0) & (visibility < 1)).all())
    for track in tracks:
        torch.testing.assert_close(track[:, 0], query)
    assert float((tracks[-1][:, 1:] - query[:, None]).abs().min()) > 1e-3  # the others have moved
    assert len(tracker()(query, maps)[0]) == 6  # the default


@torch.no_grad()
def test_tracker_options() -> None:
    module, query, maps = tracker(), queries(), feature_maps()
    _, visibility, confidence = module(query, maps, iters=1)
    *_, features = module(query, maps, iters=1, return_feat=True)
    assert features.shape == (1, 3, 4, 8)
    _, logits, confidence_logits = module(query, maps, iters=1, apply_sigmoid=False)
    torch.testing.assert_close(module.vis_predictor(features)[..., 0], logits)
    torch.testing.assert_close(logits.sigmoid(), visibility)
    torch.testing.assert_close(confidence_logits.sigmoid(), confidence)
    coarse = module(query * 3, maps, iters=1, down_ratio=3)[0][-1]
    torch.testing.assert_close(coarse, 3 * module(query, maps, iters=1)[0][-1])
    without = tracker(predict_conf=False)
    assert not [key for key in without.state_dict() if key.startswith("conf_predictor")]
    assert without(query, maps, iters=1)[2] is None


@torch.no_grad()
def test_tracks_are_exchangeable_and_see_each_other() -> None:
    module, query, maps = tracker(), queries(), feature_maps()
    track, visibility, _ = module(query, maps, iters=2)
    order = torch.tensor([2, 0, 3, 1])
    permuted, permuted_visibility, _ = module(query[:, order], maps, iters=2)
    # The embedding's frequencies up to 1000 turn 1e-16 into 1e-12 between the iterations.
    torch.testing.assert_close(permuted[-1], track[-1][:, :, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(permuted_visibility, visibility[:, :, order], rtol=1e-9, atol=1e-9)
    alone = module(query[:, :1], maps, iters=2)[0][-1]
    assert float((alone - track[-1][:, :, :1]).abs().max()) > 1e-6


@torch.no_grad()
def test_without_space_attention_tracks_are_independent() -> None:
    module, query, maps = tracker(use_spaceatt=False), queries(), feature_maps()
    assert not [key for key in module.state_dict() if "space" in key or "virual" in key]
    whole = module(query, maps, iters=2)[0][-1]
    alone = module(query[:, 1:2], maps, iters=2)[0][-1]
    torch.testing.assert_close(alone, whole[:, :, 1:2], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_frame_is_the_query() -> None:
    query = queries()
    tracks, visibility, _ = tracker()(query, feature_maps(frames=1), iters=2)
    torch.testing.assert_close(tracks[-1], query[:, None])
    assert visibility.shape == (1, 1, 4)


def test_the_residual_adds_to_the_normalised_input() -> None:
    """With attention and MLP at zero a block is its first norm, not the identity."""
    module = UpdateTransformer(input_dim=12, hidden_size=16, output_dim=4, depth=1).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64) * 3 + 1
    for block, arguments in (
        (module.time_blocks[0], (x,)),
        (module.space_point2virtual_blocks[0], (x, torch.randn_like(x))),
    ):
        attention = block.attn if len(arguments) == 1 else block.cross_attn
        for parameter in (*attention.out_proj.parameters(), *block.mlp.fc2.parameters()):
            torch.nn.init.zeros_(parameter)
        torch.testing.assert_close(block(*arguments), block.norm1(x))


def test_tracker_gradients_reach_everything() -> None:
    """Also through the checkpointed correlation: its gradient equals the one without checkpoint."""
    module, query, maps = tracker(), queries(), feature_maps().requires_grad_()

    def gradients() -> dict[str, Tensor]:
        tracks, visibility, confidence = module(query, maps, iters=2)
        loss = sum(track.square().sum() for track in tracks) + visibility.sum() + confidence.sum()
        names = [name for name, _ in module.named_parameters()] + ["maps"]
        return dict(zip(names, torch.autograd.grad(loss, [*module.parameters(), maps]), strict=True))

    first = gradients()
    assert all(bool(gradient.isfinite().all()) for gradient in first.values())
    assert not [name for name, gradient in first.items() if not gradient.any()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vggt_mv.heads.track_modules.base_track_predictor.checkpoint",
            lambda function, *arguments, **_: function(*arguments),
        )
        second = gradients()
    for name, gradient in second.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()), msg=name)


def test_no_gradient_passes_through_coordinates() -> None:
    """Each iteration takes the coordinates so far as given: of the query, only frame 0 of the tracks knows."""
    query = queries().requires_grad_()
    track = tracker()(query, feature_maps(), iters=2)[0][-1]
    (gradient,) = torch.autograd.grad(track[:, 0].sum(), query, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(query))
    (gradient,) = torch.autograd.grad(track[:, 1:].sum(), query, allow_unused=True)
    assert gradient is None or not gradient.any()


@torch.no_grad()
def test_inputs_are_not_changed_and_any_dtype_works() -> None:
    module, query, maps = tracker().float(), queries().float(), feature_maps().half()
    tracks, visibility, _ = module(query, maps, iters=1)
    assert query._version == 0
    assert maps._version == 0
    expected, *_ = module(query.double(), maps.float(), iters=1)
    torch.testing.assert_close(tracks[-1], expected[-1])
    assert tracks[-1].dtype == visibility.dtype == torch.float32
    whole = module(query.round().long(), maps, iters=1)[0][-1]
    torch.testing.assert_close(whole[:, 0], query.round())
    low = module.bfloat16()(query, maps, iters=1)
    assert low[0][-1].dtype == torch.float32  # pixel coordinates have no room in bfloat16
    assert low[1].dtype == torch.bfloat16
    assert bool(low[0][-1].isfinite().all())


@torch.no_grad()
def test_autocast_does_not_reach_the_tracker() -> None:
    module, query, maps = tracker().float(), queries().float(), feature_maps().float()
    expected, *_ = module(query, maps, iters=2)
    with torch.autocast("cpu", torch.bfloat16):
        actual, *_ = module(query, maps, iters=2)
    assert torch.equal(actual[-1], expected[-1])


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    module, query, maps = tracker(depth=1), queries(), feature_maps()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, maps, iters=1)[0][-1], module(query, maps, iters=1)[0][-1])
    torch._dynamo.reset()


def bad_shape(shape: str) -> str:
    return rf"query_points must be \[1, N, 2\] with N >= 1.*got \[{shape}\]"


@pytest.mark.parametrize(
    ("query", "maps", "options", "message"),
    [
        (queries(), None, {}, r"fmaps must be feature maps \[B, S, F, h, w\], got None"),
        (queries(), feature_maps()[0], {}, r"fmaps must be \[B, S, 8, h, w\], got \[3, 8, 7, 10\]"),
        (queries(), feature_maps()[:, :, 1:], {}, r"fmaps must be \[B, S, 8, h, w\], got \[1, 3, 7, 7, 10\]"),
        (queries()[0], feature_maps(), {}, bad_shape("4, 2")),
        (queries(2), feature_maps(), {}, bad_shape("2, 4, 2")),
        (queries()[..., :1], feature_maps(), {}, bad_shape("1, 4, 1")),
        (queries()[:, :0], feature_maps(), {}, bad_shape("1, 0, 2")),
        (None, feature_maps(), {}, r"query_points must be \[B, N, 2\] pixel coordinates.*got None"),
        (queries(), feature_maps(), {"iters": 0}, "iters must be at least 1, got 0"),
        (queries(), feature_maps(), {"down_ratio": 0}, "down_ratio must be at least 1, got 0"),
        (queries(), feature_maps()[..., :1], {}, "at least 2 cells a side for corr_levels = 2, got 7 x 1; use larger"),
    ],
    ids=range(11),
)
def test_bad_tracker_input(query: Tensor | None, maps: Tensor | None, options: dict[str, int], message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        tracker()(query, maps, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"corr_levels": 0}, "corr_levels must be at least 1, got 0"),
        ({"corr_radius": -1}, "corr_radius must be at least 0, got -1"),
        ({"latent_dim": 6}, "latent_dim must be a positive multiple of 4, got 6"),
        ({"hidden_size": 20}, "hidden_size must be a multiple of 8 heads, got 20"),
    ],
    ids=str,
)
def test_bad_tracker_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        tracker(**options)


LAYERS = [0, 2, 3, 5]


def track_head(**options: Any) -> TrackHead:
    arguments: dict[str, Any] = {
        "features": 8,
        "iters": 2,
        "corr_levels": 2,
        "corr_radius": 1,
        "hidden_size": 16,
        "out_channels": [4, 4, 8, 8],
        "intermediate_layer_idx": LAYERS,
        "depth": 1,
    }
    return TrackHead(24, **(arguments | options)).eval()


def head_inputs(frames: int = 3) -> tuple[list[Tensor | None], Tensor, int]:
    outputs: list[Tensor | None] = [None] * 6
    for layer in LAYERS:
        outputs[layer] = torch.randn(1, frames, 5 + 2 * 3, 24)
    return outputs, torch.zeros(1, frames, 3, 28, 42), 5


def test_track_head_is_features_and_tracker() -> None:
    head, arguments, query = track_head(), head_inputs(), queries().float()
    with torch.no_grad():
        track_list, visibility, confidence = head(*arguments, query_points=query, iters=3)
        maps = head.feature_extractor(*arguments)
        assert maps.shape == (1, 3, 8, 14, 21)
        expected = head.tracker(query, maps, iters=3)
        assert len(track_list) == 3
        assert len(head(*arguments, query)[0]) == 2
        torch.testing.assert_close(torch.stack(track_list), torch.stack(expected[0]))
        torch.testing.assert_close(visibility, expected[1])
        torch.testing.assert_close(confidence, expected[2])
        half = [None if t is None else t.bfloat16() for t in arguments[0]]
        assert head(half, *arguments[1:], query)[0][-1].dtype == torch.float32


def test_track_head_strides() -> None:
    """Feature maps follow the stride, so that coordinates mean the same on both."""
    head = track_head(stride=4, predict_conf=False)
    assert head.feature_extractor.down_ratio == head.tracker.stride == 4
    track_list, _, confidence = head(*head_inputs(), query_points=queries().float())
    assert track_list[-1].shape == (1, 3, 4, 2)
    assert confidence is None


def test_track_head_trains() -> None:
    head, arguments = track_head().train(), head_inputs()
    track_list, visibility, confidence = head(*arguments, query_points=queries().float())
    (track_list[-1].sum() + visibility.sum() + confidence.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())


def test_track_head_knows_no_device() -> None:
    with torch.device("meta"):
        head, (outputs, images, start) = track_head(), head_inputs()
        track_list, *_ = head(outputs, images, start, query_points=torch.zeros(1, 4, 2))
    assert track_list[-1].device.type == "meta"


HEAD_ERRORS: list[tuple[Callable[..., tuple[Any, ...]], Tensor | None, str]] = [
    (lambda o, i, s: (o, i, s), None, r"TrackHead: query_points must be \[B, N, 2\] pixel coordinates.*got None"),
    (lambda o, i, s: (o, i, s), torch.zeros(4, 2), r"TrackHead: query_points must be \[1, N, 2\].*got \[4, 2\]"),
    (lambda o, i, s: (o, i[0], s), torch.zeros(1, 4, 2), r"TrackHead: images must be \[B, S, 3, H, W\]"),
    (lambda o, i, s: (o[:3], i, s), torch.zeros(1, 4, 2), r"must have an entry 3.*it has 3"),
    (lambda o, i, s: (o, i, 6), torch.zeros(1, 4, 2), r"must be \[1, 3, 6 \+ 2 x 3, C\]"),
]


@pytest.mark.parametrize(("change", "query", "message"), HEAD_ERRORS, ids=range(len(HEAD_ERRORS)))
def test_bad_track_head_input(change: Callable[..., tuple[Any, ...]], query: Tensor | None, message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        track_head()(*change(*head_inputs()), query_points=query)
