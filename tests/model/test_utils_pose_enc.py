"""Pose encodings: both directions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.utils.pose_enc import extri_intri_to_pose_encoding, pose_encoding_to_extri_intri
from vggt_mv.utils.rotation import quat_to_mat

quick = settings(max_examples=50, deadline=None, derandomize=True)


def cameras(seed: int, leading: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random cameras with the principal point in the centre and fields of view between 15 and 130 degrees."""
    generator = torch.Generator().manual_seed(seed)
    rotation = quat_to_mat(torch.randn(*leading, 4, generator=generator, dtype=torch.float64))
    translation = 5 * torch.randn(*leading, 3, 1, generator=generator, dtype=torch.float64)
    fov = torch.empty(*leading, 2, dtype=torch.float64).uniform_(0.26, 2.27, generator=generator)
    height, width = size
    intrinsics = torch.zeros(*leading, 3, 3, dtype=torch.float64)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(fov[..., 1] / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(fov[..., 0] / 2)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1
    return torch.cat((rotation, translation), dim=-1).to(dtype), intrinsics.to(dtype)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
    st.tuples(st.integers(14, 1000), st.integers(14, 1000)),
    st.sampled_from([torch.float32, torch.float64]),
)
@quick
def test_round_trip(seed: int, leading: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> None:
    extrinsics, intrinsics = cameras(seed, leading, size, dtype)
    encoding = extri_intri_to_pose_encoding(extrinsics, intrinsics, size)
    assert encoding.shape == (*leading, 9)
    assert encoding.dtype == dtype
    assert bool((encoding[..., 6] >= 0).all())
    back_extrinsics, back_intrinsics = pose_encoding_to_extri_intri(encoding, size)
    assert back_intrinsics is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(back_extrinsics, extrinsics, rtol=0, atol=32 * eps)
    torch.testing.assert_close(back_intrinsics, intrinsics, rtol=32 * eps, atol=0)
    again = extri_intri_to_pose_encoding(back_extrinsics, back_intrinsics, size)
    torch.testing.assert_close(again, encoding, rtol=0, atol=32 * eps)


def test_meaning_of_the_numbers() -> None:
    turn = [0.0, 0.0, math.sin(math.pi / 4), math.cos(math.pi / 4)]  # 90 degrees about z, not normalised below
    encoding = torch.tensor([1.0, 2, 3, *(2 * q for q in turn), math.pi / 2, 2 * math.atan(0.5)], dtype=torch.float64)
    extrinsics, intrinsics = pose_encoding_to_extri_intri(encoding, (200, 100))
    expected = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]], dtype=torch.float64)
    torch.testing.assert_close(extrinsics, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        intrinsics, torch.tensor([[100.0, 0, 50], [0, 100, 100], [0, 0, 1]], dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_without_intrinsics() -> None:
    encoding = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1])
    extrinsics, intrinsics = pose_encoding_to_extri_intri(encoding, build_intrinsics=False)
    assert intrinsics is None
    assert torch.equal(extrinsics, torch.eye(4)[:3])


def test_four_by_four_extrinsics_and_mixed_dtypes() -> None:
    extrinsics, intrinsics = cameras(0, (2,), (28, 42), torch.float32)
    square = torch.cat((extrinsics, torch.tensor([0.0, 0, 0, 1]).expand(2, 1, 4)), dim=1)
    expected = extri_intri_to_pose_encoding(extrinsics, intrinsics, (28, 42))
    assert torch.equal(extri_intri_to_pose_encoding(square, intrinsics, (28, 42)), expected)
    assert extri_intri_to_pose_encoding(square, intrinsics.double(), (28, 42)).dtype == torch.float64


def test_gradients() -> None:
    extrinsics, intrinsics = (c.requires_grad_() for c in cameras(1, (2,), (28, 42), torch.float64))
    assert torch.autograd.gradcheck(lambda e, k: extri_intri_to_pose_encoding(e, k, (28, 42)), (extrinsics, intrinsics))
    encoding = extri_intri_to_pose_encoding(extrinsics, intrinsics, (28, 42)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: pose_encoding_to_extri_intri(e, (28, 42)), (encoding,))


def test_bad_input() -> None:
    extrinsics, intrinsics = cameras(0, (2,), (28, 42), torch.float32)
    encode, decode = extri_intri_to_pose_encoding, pose_encoding_to_extri_intri
    with pytest.raises(VggtMvError, match=r"extrinsics must be \[..., 3, 4\] or \[..., 4, 4\], got \[2, 3, 3\]"):
        encode(intrinsics, intrinsics, (28, 42))
    with pytest.raises(VggtMvError, match=r"intrinsics must be \[..., 3, 3\], got \[2, 3, 4\]"):
        encode(extrinsics, extrinsics, (28, 42))
    with pytest.raises(VggtMvError, match=r"same leading dimensions, got \[2\] and \[1\]"):
        encode(extrinsics, intrinsics[:1], (28, 42))
    with pytest.raises(VggtMvError, match=r"pose_encoding must be \[..., 9\], got \[2, 8\]"):
        decode(torch.zeros(2, 8), (28, 42))
    for function, arguments in ((encode, (extrinsics, intrinsics)), (decode, (torch.zeros(9),))):
        name = function.__name__
        with pytest.raises(VggtMvError, match=rf"{name}: image_size_hw must be \(height, width\) in pixels, got None"):
            function(*arguments)
        with pytest.raises(VggtMvError, match=r"two positive sizes \(height, width\), got \(28, 0\)"):
            function(*arguments, (28, 0))
        with pytest.raises(VggtMvError, match=r"two positive sizes \(height, width\), got \(3, 28, 42\)"):
            function(*arguments, (3, 28, 42))
        with pytest.raises(VggtMvError, match=r"pose_encoding_type must be one of \['absT_quaR_FoV'\], got 'euler'"):
            function(*arguments, (28, 42), pose_encoding_type="euler")
