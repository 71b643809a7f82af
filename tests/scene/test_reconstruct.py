"""reconstruct: the real small model on real files, against what the model itself says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vggt_mv_ext
from vggt_mv.errors import VggtMvError
from vggt_mv.models.configs import build_model
from vggt_mv.scene.reconstruct import ReconstructWarning, reconstruct, resolve_device, resolve_dtype
from vggt_mv.scene.sources import Scene
from vggt_mv.utils.pose_enc import pose_encoding_to_extri_intri
from vggt_mv.weights import WeightsProvenance, set_provenance

SIZE = 56


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Tiny tensors: threads that wait for each other cost more than they bring, fifty times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The demo model, made to show what it is given.

    Untrained it hardly does: its blocks start out near the identity, and its fields of view near 0.
    """
    torch.manual_seed(0)
    model = build_model("vggt_mv_demo")
    with torch.no_grad():
        for name, parameter in model.aggregator.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(1.0)
        model.camera_head.pose_branch.fc2.bias[7:] += 0.25
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """3 times x 2 views of 80x64 pixels."""
    rng = np.random.default_rng(0)
    for t in range(3):
        (tmp_path / f"time_{t}").mkdir()
        for n in range(2):
            pixels = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(tmp_path / f"time_{t}" / f"view{n}.png")
    return tmp_path


@pytest.fixture
def family(model: nn.Module, request: pytest.FixtureRequest) -> Any:
    set_provenance(model, WeightsProvenance(request.param, f"{request.param} for a test"))
    yield request.param
    set_provenance(model, WeightsProvenance("random", "random initial values"))


def images_of(result: Any) -> torch.Tensor:
    """What the network saw, up to 8-bit rounding: [1, T, N, 3, H, W]."""
    return torch.from_numpy(result.images).permute(0, 1, 4, 2, 3)[None].float() / 255


def test_predictions_are_the_models_own_in_place(model: nn.Module, folder: Path) -> None:
    scene_images = torch.stack(
        [
            torch.stack(
                [
                    torch.from_numpy(np.array(Image.open(folder / f"time_{t}" / f"view{n}.png").resize((56, 42), 3)))
                    for n in range(2)
                ]
            )
            for t in range(3)
        ]
    )
    images = scene_images.permute(0, 1, 4, 2, 3)[None].float() / 255
    query = torch.tensor([[20.0, 12.0], [60.0, 50.0]])
    result = reconstruct(folder, model, image_size=SIZE, query_points=query)
    # x' = 0.7 (x + 1/2) - 1/2; y' with 42/64.
    network_query = torch.tensor([[20.5 * 0.7 - 0.5, 12.5 * 42 / 64 - 0.5], [60.5 * 0.7 - 0.5, 50.5 * 42 / 64 - 0.5]])
    with torch.inference_mode():
        expected = model(images, network_query)
    assert result.images.shape == (3, 2, 42, 56, 3)
    np.testing.assert_array_equal(result.images, scene_images.numpy())
    assert result.names[2] == ["time_2/view0.png", "time_2/view1.png"]
    assert result.depth is not None and result.depth.shape == (3, 2, 42, 56)
    for name, key in {
        "depth_conf": "depth_conf",
        "world_points": "world_points",
        "world_points_conf": "world_points_conf",
        "tracks": "track",
        "track_vis": "vis",
        "track_conf": "conf",
    }.items():
        np.testing.assert_allclose(getattr(result, name), expected[key][0], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(result.depth, expected["depth"][0, ..., 0], rtol=1e-5)
    extrinsics, intrinsics = pose_encoding_to_extri_intri(expected["pose_enc"][0], (42, 56))
    assert intrinsics is not None
    np.testing.assert_allclose(result.extrinsics, extrinsics, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.intrinsics, intrinsics, rtol=1e-4)
    np.testing.assert_allclose(result.query_points, network_query, rtol=1e-6)
    assert all(np.isfinite(getattr(result, name)).all() for name in ("extrinsics", "intrinsics", "depth", "tracks"))


def test_joint_is_the_sequence_of_all_frames(model: nn.Module, folder: Path) -> None:
    joint = reconstruct(folder, model, image_size=SIZE, attention="joint")
    alternating = reconstruct(folder, model, image_size=SIZE)
    with torch.inference_mode():
        sequence = model(images_of(joint).flatten(1, 2))
    np.testing.assert_allclose(joint.depth, sequence["depth"][0, ..., 0].reshape(3, 2, 42, 56), rtol=1e-5)
    np.testing.assert_allclose(joint.dynamic_mask, sequence["dynamic_mask"][0].reshape(3, 2, 3, 4), rtol=1e-4)
    assert alternating.dynamic_mask is None
    assert not np.allclose(joint.depth, alternating.depth, rtol=1e-3)  # type: ignore[arg-type]
    assert joint.report["attention"]["used"] == "joint"
    assert alternating.report["attention"] == {
        "requested": "auto",
        "used": "alternating",
        "reason": "random weights learnt nothing; alternating is VGGT_MV's own form",
    }


@pytest.mark.parametrize("layout", ["views", "times"])
def test_single_folder_is_one_sequence(model: nn.Module, folder: Path, layout: Any) -> None:
    for t in range(3):
        (folder / f"time_{t}" / "view0.png").rename(folder / f"{t}.png")
        (folder / f"time_{t}" / "view1.png").unlink()
        (folder / f"time_{t}").rmdir()
    result = reconstruct(folder, model, image_size=SIZE, layout=layout)
    grid = (1, 3) if layout == "views" else (3, 1)
    assert (result.num_times, result.num_views) == grid
    with torch.inference_mode():
        sequence = model(images_of(result).flatten(1, 2))
    np.testing.assert_allclose(result.depth, sequence["depth"][0, ..., 0].reshape(*grid, 42, 56), rtol=1e-5)
    assert result.report["attention"]["used"] == "joint"
    assert result.report["input"]["single_sequence"] is True
    with pytest.warns(ReconstructWarning, match="attention='alternating' is ignored: a single folder"):
        reconstruct(folder, model, image_size=SIZE, layout=layout, attention="alternating")


EXPECTED_ATTENTION = [
    ("vggt", "joint"),
    ("page4d", "joint"),
    ("pi3", "joint"),
    ("unknown", "joint"),
    ("vggt_mv", "alternating"),
    ("random", "alternating"),
]


@pytest.mark.parametrize(("family", "used"), EXPECTED_ATTENTION, indirect=["family"])
def test_attention_follows_the_weights(model: nn.Module, folder: Path, family: str, used: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = reconstruct(folder, model, image_size=SIZE, max_frames=2)
    messages = [str(w.message) for w in caught if issubclass(w.category, ReconstructWarning)]
    assert result.report["attention"]["used"] == used
    assert result.weights.family == family
    assert result.report["warnings"] == messages
    assert bool(messages) == (family == "unknown")
    assert all("\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("family", "forced", "warns"),
    [
        ("vggt", "alternating", True),
        ("vggt", "joint", False),
        ("vggt_mv", "joint", True),
        ("vggt_mv", "alternating", False),
        ("random", "joint", False),
        ("unknown", "alternating", False),
    ],
    indirect=["family"],
)
def test_forced_attention_warns_where_the_weights_learnt_another(
    model: nn.Module, folder: Path, family: str, forced: Any, warns: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructWarning)
        result = reconstruct(folder, model, image_size=SIZE, max_frames=2, attention=forced)
    assert result.report["attention"] == {"requested": forced, "used": forced, "reason": "asked for"}
    assert len(result.report["warnings"]) == warns
    if warns:
        assert f"attention='{forced}' was asked for, but {family} weights learnt" in result.report["warnings"][0]


def test_a_vggt_runs_grids_as_one_sequence(folder: Path) -> None:
    torch.manual_seed(0)
    options = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_embed": "conv"}
    heads = {"enable_point": False, "enable_depth": False, "enable_track": False}
    vggt = build_model({"class": "VGGT", **options, **heads, "camera_head_options": {"trunk_depth": 1, "num_heads": 2}})
    result = reconstruct(folder, vggt, image_size=28)
    assert result.report["attention"]["used"] == "joint"
    assert result.depth is None and result.world_points is None
    assert result.extrinsics is not None and result.extrinsics.shape == (3, 2, 3, 4)
    with pytest.raises(VggtMvError, match="attention='alternating' needs a VGGT_MV, got VGGT; use 'joint' or 'auto'"):
        reconstruct(folder, vggt, image_size=28, attention="alternating")
    with pytest.raises(VggtMvError, match="query_points were given, but the model has no track head"):
        reconstruct(folder, vggt, image_size=28, query_points=[[1, 1]])


def test_tensors_and_scenes_are_sources_too(model: nn.Module) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 2, 3, 42, 56)
    from_tensor = reconstruct(images, model, image_size=SIZE)
    from_scene = reconstruct(Scene.from_tensor(images), model, image_size=SIZE)
    np.testing.assert_array_equal(from_tensor.depth, from_scene.depth)
    with torch.inference_mode():
        expected = model((images[None] * 255).round() / 255)
    np.testing.assert_allclose(from_tensor.depth, expected["depth"][0, ..., 0], rtol=1e-5)


def test_everything_is_as_before_afterwards(model: nn.Module, folder: Path) -> None:
    model.train()
    model.aggregator.patch_embed.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen: dict[str, Any] = {}

    def look(stage: str, done: int, total: int) -> None:
        seen[stage] = (
            torch.is_inference_mode_enabled(),
            any(module.training for module in model.modules()),
            torch.is_autocast_enabled("cpu"),
        )

    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = reconstruct(folder, model, image_size=SIZE, progress=look)
            assert torch.is_autocast_enabled("cpu")
        assert all(seen[stage] == (True, False, False) for stage in ("patch_embed", "attention", "camera", "depth"))
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())
        model.eval()
        plain = reconstruct(folder, model, image_size=SIZE)
        # The caller's autocast did not get in, and neither did dropout.
        np.testing.assert_array_equal(result.depth, plain.depth)
    finally:
        model.eval()


def test_modes_come_back_after_an_error(model: nn.Module, folder: Path) -> None:
    model.train()

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "attention":
            assert torch.is_inference_mode_enabled() and not model.training
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            reconstruct(folder, model, image_size=SIZE, progress=stop)
        assert model.training and not torch.is_inference_mode_enabled()
    finally:
        model.eval()


def test_bfloat16_is_near_float32(model: nn.Module, folder: Path) -> None:
    exact = reconstruct(folder, model, image_size=SIZE)
    coarse = reconstruct(folder, model, image_size=SIZE, dtype="bfloat16")
    assert coarse.report["dtype"] == "bfloat16"
    assert coarse.depth is not None and coarse.depth.dtype == np.float32
    # Seen: 3e-5. A step of bfloat16 is 8e-3, and the heads run in float32.
    difference = np.abs(coarse.depth / exact.depth - 1).max()
    assert 1e-6 < difference < 8e-3
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_progress_and_report_tell_every_stage(model: nn.Module, folder: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    result = reconstruct(
        folder, model, image_size=SIZE, query_points=[[1, 1]], progress=lambda *step: steps.append(step)
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in steps))
    assert stages == ["check", "images", "patch_embed", "attention", "camera", "depth", "points", "tracks", "collect"]
    for stage in stages:
        done = [step for step in steps if step[0] == stage]
        assert done[-1][1] == done[-1][2], stage
    seconds = result.report["seconds"]
    assert list(seconds) == [*stages, "total"]
    assert sum(seconds[stage] for stage in stages) == pytest.approx(seconds["total"], abs=1e-2)
    assert 50e6 < result.report["memory_bytes"]["process_peak_resident"] < 500e9
    operators = result.report["backend"]["operators"]
    assert operators["residual_scale_norm"]["backend"] in ("cpu", "reference")
    assert result.report["versions"]["torch"] == torch.__version__
    assert result.report["model"] == {
        "class": "VGGT_MV",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dual_stream": False,
        "sparse_global": None,
    }
    assert result.report["input"]["original_sizes"] == [[64, 80], [64, 80]]


def test_saving_and_reading_back(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    result = reconstruct(folder, model, image_size=SIZE)
    out = result.save(tmp_path / "out", conf_percentile=90)
    with np.load(out / "predictions.npz") as file:
        np.testing.assert_array_equal(file["depth"], result.depth)
    assert (out / "depth" / "time_2_view1.png").exists()
    with pytest.raises(VggtMvError, match="is not empty"):
        result.save(out)
    result.save(out, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "all"}, "attention must be 'auto', 'joint' or 'alternating', got 'all'"),
        ({"dtype": "int8"}, "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ({"dtype": "float16"}, "dtype 'float16' is not supported on device 'cpu'; use float32 or bfloat16"),
        ({"device": "gpu"}, "device 'gpu' is not a device; use 'cpu', 'cuda'"),
        ({"device": "meta"}, "device 'meta': this torch cannot compute on it"),
        ({"image_size": 50}, "image_size must be a multiple of 14, got 50"),
        ({"preprocess": "stretch"}, "mode must be 'crop' or 'pad', got 'stretch'"),
        ({"layout": "views"}, "layout='views'.*time_"),
        ({"query_points": [1.0, 2.0]}, r"query_points must be \[M, 2\] with at least one point, got shape \[2\]"),
        (
            {"query_points": np.zeros((0, 2))},
            r"query_points must be \[M, 2\] with at least one point, got shape \[0, 2\]",
        ),
        ({"query_points": [[1.0, float("nan")]]}, "query_points must be finite"),
        ({"query_points": [[1, 1], [80, 3]]}, r"query_points must lie in the first image, 80x64 pixels, got \(80, 3\)"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else None,
)
def test_bad_options(model: nn.Module, folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        reconstruct(folder, model, **{"image_size": SIZE, **options})


def test_bad_sources(model: nn.Module, folder: Path) -> None:
    with pytest.raises(VggtMvError, match="one image only"):
        reconstruct(folder / "time_0" / "view0.png", model, image_size=SIZE)
    single = reconstruct(folder / "time_0" / "view0.png", model, image_size=SIZE, allow_single=True)
    assert single.depth is not None and single.depth.shape == (1, 1, 42, 56)
    with pytest.raises(VggtMvError, match="images must be finite, got nan"):
        reconstruct(torch.full((2, 3, 28, 28), torch.nan), model)
    with pytest.raises(VggtMvError, match="images must have shape .* got 3 dimensions"):
        reconstruct(torch.rand(3, 28, 28), model)
    with pytest.raises(VggtMvError, match="max_frames is for files"):
        reconstruct(torch.rand(2, 3, 28, 28), model, max_frames=1)
    with pytest.raises(VggtMvError, match="a Scene has its layout already"):
        reconstruct(Scene.from_tensor(torch.rand(2, 3, 28, 28)), model, layout="times")


def test_cropped_query_points_are_refused(model: nn.Module) -> None:
    with pytest.raises(VggtMvError, match=r"query_points: \(3, 0\) is cropped away .* use preprocess='pad'"):
        reconstruct(torch.rand(2, 3, 112, 28), model, image_size=28, query_points=[[3, 0]])


def test_parameters_must_be_float32(folder: Path) -> None:
    half = build_model("vggt_mv_demo").to(torch.bfloat16)
    with pytest.raises(VggtMvError, match="model must have float32 parameters, got bfloat16; call model.float()"):
        reconstruct(folder, half)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_size_and_the_remedy(
    model: nn.Module, folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model.aggregator, "forward", fail)
    message = (
        r"^out of memory on cpu: 6 frames \(3 times x 2 views\) of 56x42 pixels with alternating attention in float32 "
        r"are too much; use fewer frames \(max_frames, --max-frames\)"
    )
    with pytest.raises(VggtMvError, match=message):
        reconstruct(folder, model, image_size=SIZE)


def test_a_backend_that_cannot_run_is_bad_input(model: nn.Module, folder: Path) -> None:
    message = r"backend 'cuda' was asked for and cannot run this call: .*; choose another backend, or 'auto'"
    with vggt_mv_ext.backend("cuda"), pytest.raises(VggtMvError, match=message):
        reconstruct(folder, model, image_size=SIZE)


def test_real_allocation_failure_is_recognised(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.aggregator, "forward", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(VggtMvError, match="out of memory on cpu"):
        reconstruct(folder, model, image_size=SIZE)


def test_other_errors_keep_their_type(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(model.aggregator, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        reconstruct(folder, model, image_size=SIZE)


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(VggtMvError, match="device 'cuda': this torch was built without CUDA|torch sees no CUDA GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(VggtMvError, match="device 'cuda:2': this machine has 2 GPUs, numbered from 0"):
        resolve_device("cuda:2")
    for capability, chosen in (((7, 5), torch.float16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_dtype("auto", torch.device("cuda")) is chosen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(VggtMvError, match="dtype 'bfloat16' is not supported on Tesla T4; use float16 or float32"):
        resolve_dtype("bfloat16", torch.device("cuda"))
