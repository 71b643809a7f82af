"""The recorded outputs of the public models on a CUDA device: float32 to 1e-5, low precision as far off as eager is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from tests.golden.fixtures import NAMES, Fixture, frames, relative_error
from vggt_mv.models.configs import build_model


def run(fixture: Fixture, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Aggregator and heads on the GPU, the aggregator under autocast where a dtype is given."""
    aggregator, heads = fixture.aggregator().cuda(), fixture.heads().cuda()
    images = fixture.arrays["images"].cuda()
    with torch.inference_mode():
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            outputs, start, *_ = aggregator(images)
        results = {f"tokens_{layer}": outputs[layer] for layer in fixture.layers}
        sequence = [frames(output, 4).float() for output in outputs]
        images = frames(images, 5)
        for i, encoding in enumerate(heads["camera_head"](sequence)):
            results[f"pose_enc_{i}"] = encoding
        for name, head in (("depth", "depth_head"), ("world_points", "point_head")):
            results[name], results[f"{name}_conf"] = heads[head](sequence, images, start)
        results["track_features"] = heads["track_features"](sequence, images, start)
    return results


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str, backend: str) -> None:
    fixture = Fixture(name)
    with vggt_mv_ext.backend(backend):
        errors = {key: relative_error(value, fixture.arrays[key]) for key, value in run(fixture).items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_no_worse_than_eager(name: str, dtype: torch.dtype) -> None:
    fixture = Fixture(name)
    errors = {}
    for backend in ("auto", "reference"):
        with vggt_mv_ext.backend(backend):
            errors[backend] = {
                key: relative_error(value, fixture.arrays[key]) for key, value in run(fixture, dtype).items()
            }
    for key, error in errors["auto"].items():
        assert error < 1.5 * errors["reference"][key] + 2 * torch.finfo(dtype).eps, (key, errors)


@pytest.mark.parametrize("name", NAMES)
def test_tracker(name: str) -> None:
    fixture = Fixture(name)
    tracker = fixture.heads()["tracker"].cuda()
    for iterations, tolerance in ((1, 1e-5), (2, 2e-4)):
        with torch.inference_mode():
            tracks, visibility, confidence = tracker(
                fixture.arrays["query_points"].cuda(), fixture.arrays["track_features"].cuda(), iters=iterations
            )
        for key, value in (("track", tracks[-1]), ("vis", visibility), ("conf", confidence)):
            assert relative_error(value, fixture.arrays[f"{key}_{iterations}"]) < tolerance, key


def test_the_aggregator_in_a_cuda_graph() -> None:
    """Nothing in it waits for the host: captured once, replayed on other images."""
    torch.manual_seed(0)
    aggregator = build_model("vggt_mv_demo", device="cuda").aggregator
    images = torch.rand(1, 2, 2, 3, 112, 168, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                aggregator(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = aggregator(images)[0]
        images.copy_(torch.rand_like(images))
        graph.replay()
        expected = aggregator(images)[0]
    for found, wanted in zip(captured, expected, strict=True):
        assert relative_error(found, wanted) < 1e-2


def test_a_whole_model_makes_finite_predictions() -> None:
    torch.manual_seed(0)
    model = build_model("vggt_mv_demo", device="cuda")
    images = torch.rand(1, 2, 3, 3, 112, 168, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        predictions = model(images, query_points=torch.tensor([[[20.0, 30.0], [100.0, 60.0]]], device="cuda"))
    for key, value in predictions.items():
        for tensor in value if isinstance(value, list) else [value]:
            assert tensor.device.type == "cuda" and tensor.isfinite().all(), key
