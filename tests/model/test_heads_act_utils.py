"""Activations and position embeddings of the heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vggt_mv.errors import VggtMvError
from vggt_mv.heads import utils
from vggt_mv.heads.head_act import activate_head, activate_pose, inverse_log_transform
from vggt_mv.heads.utils import (
    add_position_embedding,
    axis_embedding,
    create_uv_grid,
    position_grid_to_embed,
    sincos_embedding,
)

V = [0.5, -1.5, 0.25]  # one pixel's values
NORM = math.sqrt(0.25 + 2.25 + 0.0625)
Z = math.expm1(0.25)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("linear", V),
        ("exp", [math.exp(v) for v in V]),
        ("relu", [0.5, 0.0, 0.25]),
        ("sigmoid", [1 / (1 + math.exp(-v)) for v in V]),
        ("inv_log", [math.expm1(0.5), -math.expm1(1.5), Z]),
        ("xy_inv_log", [0.5 * Z, -1.5 * Z, Z]),
        ("norm", [v / NORM for v in V]),
        ("norm_exp", [v / NORM * math.expm1(NORM) for v in V]),
    ],
)
def test_head_activations(activation: str, expected: list[float]) -> None:
    out = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    out[1, :3, 2, 4] = torch.tensor(V, dtype=torch.float64)
    values, confidence = activate_head(out, activation)
    assert values.shape == (2, 3, 5, 3)
    assert confidence.shape == (2, 3, 5)
    torch.testing.assert_close(values[1, 2, 4], torch.tensor(expected, dtype=torch.float64))
    assert bool(values.isfinite().all())  # zero vectors included


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("expp1", 1 + math.exp(-2)), ("expp0", math.exp(-2)), ("sigmoid", 1 / (1 + math.exp(2)))],
)
def test_confidence_activations(activation: str, expected: float) -> None:
    _, confidence = activate_head(torch.full((1, 2, 1, 1), -2.0, dtype=torch.float64), "linear", activation)
    assert confidence.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activation", ["norm", "norm_exp", "inv_log", "xy_inv_log"])
def test_gradients_of_head_activations(activation: str) -> None:
    out = torch.randn(1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activate_head(x, activation), out)


def test_inverse_log_transform_inverts() -> None:
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)
    torch.testing.assert_close(inverse_log_transform(x.sign() * (1 + x.abs()).log()), x)


def test_pose_activations() -> None:
    encoding = torch.tensor([-1.0, 0, 1, -1, 0, 1, 2, -3, 3])
    assert torch.equal(activate_pose(encoding), encoding)
    actual = activate_pose(encoding, trans_act="inv_log", quat_act="exp", fl_act="relu")
    e = math.e
    torch.testing.assert_close(actual, torch.tensor([1 - e, 0, e - 1, 1 / e, 1, e, e * e, 0, 3]))
    assert activate_pose(encoding.expand(2, 3, 9)).shape == (2, 3, 9)


@pytest.mark.parametrize("argument", ["trans_act", "quat_act", "fl_act"])
def test_unknown_pose_activation(argument: str) -> None:
    with pytest.raises(
        VggtMvError, match=rf"{argument} must be one of \['exp', 'inv_log', 'linear', 'relu'\], got 'log'"
    ):
        activate_pose(torch.zeros(9), **{argument: "log"})


def test_bad_activation_input() -> None:
    with pytest.raises(VggtMvError, match=r"^activation must be one of \[.*'xy_inv_log'\], got 'tanh'"):
        activate_head(torch.zeros(1, 2, 1, 1), "tanh")
    with pytest.raises(VggtMvError, match=r"conf_activation must be one of \['expp0', 'expp1', 'sigmoid'\], got 'exp'"):
        activate_head(torch.zeros(1, 2, 1, 1), "exp", "exp")
    with pytest.raises(VggtMvError, match=r"out must be \[N, C, H, W\] with C >= 2.*got \[1, 1, 4, 4\]"):
        activate_head(torch.zeros(1, 1, 4, 4))
    with pytest.raises(VggtMvError, match=r"pred_pose_enc must be \[..., 9\], got \[2, 4\]"):
        activate_pose(torch.zeros(2, 4))


@pytest.mark.parametrize(("width", "height", "aspect"), [(7, 5, None), (1, 1, None), (6, 4, 2.0), (1, 3, 0.5)])
def test_uv_grid(width: int, height: int, aspect: float | None) -> None:
    a = aspect or width / height
    g = math.sqrt(a * a + 1)
    grid = create_uv_grid(width, height, aspect, dtype=torch.float64)
    assert grid.shape == (height, width, 2)
    for i in range(height):
        for j in range(width):
            u = (a / g) * (2 * j - (width - 1)) / width  # cell centres over +-(a / g)
            v = (1 / g) * (2 * i - (height - 1)) / height
            torch.testing.assert_close(grid[i, j], torch.tensor([u, v], dtype=torch.float64), rtol=0, atol=1e-15)
    assert create_uv_grid(2, 2).dtype == torch.float32
    assert create_uv_grid(2, 2, device="meta").device.type == "meta"


def test_grid_embedding() -> None:
    grid = create_uv_grid(3, 2, dtype=torch.float64)
    embedding = position_grid_to_embed(grid, 8)
    assert embedding.shape == (2, 3, 8)
    assert embedding.dtype == torch.float32
    u, v = grid[1, 2].tolist()
    expected = [f(p * w) for p in (u, v) for f in (math.sin, math.cos) for w in (1.0, 0.1)]  # 100 ** -(0, 1/2)
    torch.testing.assert_close(embedding[1, 2], torch.tensor(expected))
    fast = position_grid_to_embed(grid, 8, omega_0=10000)[1, 2, 1]
    assert float(fast) == pytest.approx(math.sin(u * 0.01), rel=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad", [False, True])
def test_adding_the_embedding_equals_adding_the_map(memory_format: torch.memory_format, grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5, 7).to(memory_format=memory_format)
    grid = create_uv_grid(7, 5, 1.5, dtype=torch.float64)
    expected = x + 0.1 * position_grid_to_embed(grid, 12).permute(2, 0, 1)
    actual = add_position_embedding(x.clone().requires_grad_(grad), 1.5)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous(memory_format=memory_format)
    assert actual.requires_grad == grad


def test_the_input_is_overwritten_only_without_gradients() -> None:
    x = torch.zeros(1, 4, 2, 3)
    assert add_position_embedding(x, 1.5) is x
    y = torch.zeros(1, 4, 2, 3, requires_grad=True)
    add_position_embedding(y, 1.5).sum().backward()
    assert not y.any()
    assert torch.equal(y.grad, torch.ones_like(y))


def test_tables_are_made_once_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    utils._cached_axis_table.cache_clear()
    made = []
    original = sincos_embedding

    def counting(positions: Tensor, embed_dim: int, omega_0: float = 100.0) -> Tensor:
        made.append(len(positions))
        return original(positions, embed_dim, omega_0)

    monkeypatch.setattr(utils, "sincos_embedding", counting)
    for frames in (1, 8, 3):
        add_position_embedding(torch.zeros(frames, 8, 5, 7), 1.5)
    assert made == [5, 7]
    add_position_embedding(torch.zeros(1, 8, 5, 7, dtype=torch.float64), 1.5)  # another dtype: other tables
    assert made == [5, 7, 5, 7]
    for length in range(1, 200):
        axis_embedding((0.0, 1.0), length, 4, torch.zeros(1))
    assert utils._cached_axis_table.cache_info().currsize <= 128


def test_a_table_of_inference_mode_is_not_met_outside() -> None:
    like = torch.zeros(1)
    with torch.inference_mode():
        assert axis_embedding((0.0, 3.0), 11, 4, like).is_inference()
    outside = axis_embedding((0.0, 3.0), 11, 4, like)
    assert not outside.is_inference()
    weight = torch.ones(11, 4, requires_grad=True)
    (weight * outside).sum().backward()  # saves the table for the backward pass
    torch.testing.assert_close(weight.grad, outside)


def test_fake_tensors_do_not_enter_the_cache() -> None:
    utils._cached_axis_table.cache_clear()
    like = torch.zeros(1)
    with FakeTensorMode() as mode:
        assert isinstance(axis_embedding((0.0, 3.0), 12, 4, mode.from_tensor(like)), FakeTensor)
    assert type(axis_embedding((0.0, 3.0), 12, 4, like)) is Tensor
    with FakeTensorMode() as mode:  # nor does the cached table meet them
        assert isinstance(axis_embedding((0.0, 3.0), 12, 4, mode.from_tensor(like)), FakeTensor)


def test_bad_sizes() -> None:
    with pytest.raises(VggtMvError, match="width and height must be at least 1, got 0 and 2"):
        create_uv_grid(0, 2)
    with pytest.raises(VggtMvError, match="width and height must be at least 1, got 2 and 0"):
        create_uv_grid(2, 0)
    with pytest.raises(VggtMvError, match="aspect_ratio must be positive and finite, got -1"):
        create_uv_grid(2, 2, aspect_ratio=-1.0)
    with pytest.raises(VggtMvError, match="aspect_ratio must be positive and finite, got 0"):
        create_uv_grid(2, 2, aspect_ratio=0.0)
    with pytest.raises(VggtMvError, match="embed_dim must be a positive multiple of 4, got 6"):
        position_grid_to_embed(create_uv_grid(2, 2), 6)
    with pytest.raises(VggtMvError, match=r"pos_grid must be \[H, W, 2\], got \[2, 2\]"):
        position_grid_to_embed(torch.zeros(2, 2), 8)
    with pytest.raises(VggtMvError, match="embed_dim must be a positive even number, got 3"):
        sincos_embedding(torch.zeros(2), 3)
    with pytest.raises(VggtMvError, match=r"C a multiple of 4, got \[1, 6, 2, 2\]"):
        add_position_embedding(torch.zeros(1, 6, 2, 2), 1.0)
