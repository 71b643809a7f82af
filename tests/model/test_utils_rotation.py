"""Quaternions and rotation matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.utils.rotation import mat_to_quat, quat_to_mat

quick = settings(max_examples=50, deadline=None, derandomize=True)
components = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


def rotation_about(axis: list[float], angle: float) -> Tensor:
    """Rodrigues' formula, by the matrix exponential."""
    x, y, z = (torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis) * angle).tolist()
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


@given(components, st.sampled_from([torch.float32, torch.float64]))
@quick
def test_any_quaternion_makes_a_rotation_and_comes_back(values: list[float], dtype: torch.dtype) -> None:
    q = torch.tensor(values, dtype=dtype)
    assume(float(q.norm()) > 1e-3)
    r = quat_to_mat(q)
    exact = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=dtype), **exact)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones((), dtype=dtype), **exact)
    torch.testing.assert_close(quat_to_mat(-2.5 * q), r, **exact)
    back = mat_to_quat(r)
    assert back.dtype == dtype
    assert float(back[3]) >= 0
    torch.testing.assert_close(back.norm(), torch.ones((), dtype=dtype), **exact)
    unit = q / q.norm()
    assert min(float((back - unit).abs().max()), float((back + unit).abs().max())) <= exact["atol"]


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(-math.pi, math.pi))
@quick
def test_scalar_last_and_right_handed(axis: list[float], angle: float) -> None:
    assume(math.hypot(*axis) > 1e-3)
    unit = torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis)
    q = torch.cat((unit * math.sin(angle / 2), torch.tensor([math.cos(angle / 2)], dtype=torch.float64)))
    torch.testing.assert_close(quat_to_mat(q), rotation_about(axis, angle), rtol=0, atol=1e-12)


# One rotation in each branch (largest component x, y, z, w), the half-turns where three components vanish, and ties.
BRANCHES = {
    "x": ([1.0, 0.1, 0.2], 3.0),
    "y": ([0.1, 1.0, 0.2], 3.0),
    "z": ([0.1, 0.2, 1.0], 3.0),
    "w": ([0.3, 0.2, 0.1], 0.5),
    "half-turn x": ([1.0, 0, 0], math.pi),
    "half-turn y": ([0, 1.0, 0], math.pi),
    "half-turn z": ([0, 0, 1.0], math.pi),
    "half-turn xyz": ([1.0, 1.0, 1.0], math.pi),
    "almost half-turn": ([1.0, -1.0, 0.5], math.pi - 1e-7),
    "identity": ([1.0, 0, 0], 0.0),
    "tiny": ([1.0, 2.0, 3.0], 1e-9),
    "third of a turn": ([1.0, 1.0, 1.0], 2 * math.pi / 3),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch(name: str) -> None:
    r = rotation_about(*BRANCHES[name]).requires_grad_()
    q = mat_to_quat(r)
    torch.testing.assert_close(quat_to_mat(q), r, rtol=0, atol=1e-14)
    assert float(q[3].detach()) >= 0
    q.square().sum().sqrt().backward(retain_graph=True)
    q[:3].sum().backward()
    assert r.grad is not None
    assert bool(r.grad.isfinite().all())


@pytest.mark.parametrize("name", ["x", "y", "z", "w", "half-turn xyz"])
def test_gradients(name: str) -> None:
    r = rotation_about(*BRANCHES[name])
    if name != "half-turn xyz":  # there the sign is free, and finite differences see it jump
        assert torch.autograd.gradcheck(mat_to_quat, r.clone().requires_grad_())
    assert torch.autograd.gradcheck(quat_to_mat, (3 * mat_to_quat(r)).requires_grad_())


def test_small_rotations_keep_their_digits() -> None:
    """The vector part of a tiny rotation is known to the last bits, not only to the root of the machine precision."""
    q = mat_to_quat(rotation_about([1.0, 2.0, 3.0], 1e-9))
    half = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / math.sqrt(14) * 0.5e-9
    torch.testing.assert_close(q[:3], half, rtol=1e-9, atol=0)


def test_leading_dimensions_are_free() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 4)
    r = quat_to_mat(q)
    assert r.shape == (2, 3, 5, 3, 3)
    assert mat_to_quat(r).shape == q.shape
    torch.testing.assert_close(mat_to_quat(r)[1, 2, 3], mat_to_quat(r[1, 2, 3]))
    assert quat_to_mat(torch.zeros(0, 4)).shape == (0, 3, 3)
    assert mat_to_quat(torch.zeros(0, 3, 3)).shape == (0, 4)


def test_bad_input() -> None:
    with pytest.raises(VggtMvError, match=r"quaternions must be \[..., 4\] \(x, y, z, w\), got \[2, 3\]"):
        quat_to_mat(torch.zeros(2, 3))
    with pytest.raises(VggtMvError, match=r"matrix must be \[..., 3, 3\], got \[3, 4\]"):
        mat_to_quat(torch.zeros(3, 4))
    with pytest.raises(VggtMvError, match=r"quaternions must be floating point, got torch.int64"):
        quat_to_mat(torch.zeros(4, dtype=torch.long))
    with pytest.raises(VggtMvError, match=r"matrix must be floating point, got torch.int64"):
        mat_to_quat(torch.zeros(3, 3, dtype=torch.long))
