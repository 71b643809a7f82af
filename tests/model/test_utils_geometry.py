"""Depth to points, points to pixels, inverses of rigid transforms; numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.utils.geometry import (
    closed_form_inverse_se3,
    depth_to_world_coords_points,
    project_world_points,
    unproject_depth_map_to_point_map,
)
from vggt_mv.utils.rotation import quat_to_mat

quick = settings(max_examples=30, deadline=None, derandomize=True)


def scene(seed: int, frames: int, height: int, width: int, skew: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random depth, camera-from-world and intrinsics, float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    depth = 0.5 + 4 * rand(frames, height, width)
    extrinsics = torch.cat((quat_to_mat(rand(frames, 4) - 0.5), 4 * rand(frames, 3, 1) - 2), dim=-1)
    intrinsics = torch.zeros(frames, 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = (1 + rand(2, frames)) * width
    intrinsics[:, 0, 1], intrinsics[:, 2, 2] = skew, 1
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width * rand(frames), height * rand(frames)
    return depth, extrinsics, intrinsics


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 3.0]))
@quick
def test_unprojected_pixels_project_back(seed: int, frames: int, height: int, width: int, skew: float) -> None:
    depth, extrinsics, intrinsics = scene(seed, frames, height, width, skew)
    world, camera, valid = depth_to_world_coords_points(depth, extrinsics, intrinsics)
    assert world.shape == camera.shape == (frames, height, width, 3)
    assert bool(valid.all())
    torch.testing.assert_close(camera[..., 2], depth)
    moved = torch.einsum("sij,shwj->shwi", extrinsics[:, :, :3], world) + extrinsics[:, None, None, :, 3]
    torch.testing.assert_close(moved, camera)
    pixels, z = project_world_points(world.flatten(1, 2), extrinsics, intrinsics)
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    expected = torch.stack((u, v), dim=-1).flatten(0, 1).expand(frames, -1, 2).double()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-11 * max(height, width) + 1e-11)
    torch.testing.assert_close(z, depth.flatten(1))


def test_one_pixel_by_hand() -> None:
    """Depth 2 at column 5, row 1; the camera looks along +x of the world from (-1, 0, 0)."""
    k = np.array([[10.0, 0, 3], [0, 20, 2], [0, 0, 1]])
    rotation = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # world x -> camera z, world -y -> x, world -z -> y
    extrinsic = np.concatenate((rotation, -rotation @ np.array([[-1.0], [0], [0]])), axis=1)
    depth = np.full((3, 7), 2.0)
    depth[0, 0] = 0.0
    world, camera, valid = depth_to_world_coords_points(depth, extrinsic, k)
    np.testing.assert_allclose(camera[1, 5], [2 * 0.2, 2 * -0.05, 2])
    np.testing.assert_allclose(world[1, 5], [2 - 1, -0.4, 0.1], atol=1e-15)
    assert not valid[0, 0]
    assert valid.sum() == 20
    assert depth_to_world_coords_points(depth, extrinsic, k, eps=2.0)[2].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_and_torch_agree(dtype: torch.dtype) -> None:
    arguments = [x.to(dtype) for x in scene(3, 2, 4, 5)]
    from_torch = depth_to_world_coords_points(*arguments)
    from_numpy = depth_to_world_coords_points(*(x.numpy() for x in arguments))
    for t, n in zip(from_torch, from_numpy, strict=True):
        assert isinstance(t, Tensor)
        assert isinstance(n, np.ndarray)
        assert torch.from_numpy(n).dtype == t.dtype
        torch.testing.assert_close(t, torch.from_numpy(n))
    poses = arguments[1]
    assert isinstance(closed_form_inverse_se3(poses.numpy()), np.ndarray)
    torch.testing.assert_close(
        closed_form_inverse_se3(poses), torch.from_numpy(closed_form_inverse_se3(poses.numpy())), rtol=0, atol=1e-6
    )


def test_one_camera_for_all_and_four_by_four() -> None:
    depth, extrinsics, intrinsics = scene(4, 3, 2, 2)
    square = torch.cat((extrinsics, torch.tensor([0.0, 0, 0, 1]).double().expand(3, 1, 4)), dim=1)
    torch.testing.assert_close(
        depth_to_world_coords_points(depth, square, intrinsics)[0],
        depth_to_world_coords_points(depth, extrinsics, intrinsics)[0],
    )
    shared = depth_to_world_coords_points(depth, extrinsics[1], intrinsics[1])[0]
    torch.testing.assert_close(shared[1], depth_to_world_coords_points(depth[1], extrinsics[1], intrinsics[1])[0])
    torch.testing.assert_close(shared[2], depth_to_world_coords_points(depth[2], extrinsics[1], intrinsics[1])[0])
    mixed = depth_to_world_coords_points(depth.float(), extrinsics, intrinsics.float())[0]
    assert mixed.dtype == torch.float64
    pixels, _ = project_world_points(shared[0], extrinsics[1], intrinsics[1])
    torch.testing.assert_close(pixels[1, 0], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-12)


def test_unproject_point_map_accepts_what_users_have() -> None:
    depth, extrinsics, intrinsics = scene(5, 2, 4, 5)
    expected = depth_to_world_coords_points(depth, extrinsics, intrinsics)[0].numpy()
    for d in (depth, depth[..., None], depth.numpy(), depth[..., None].numpy(), depth.clone().requires_grad_()):
        for e, k in ((extrinsics, intrinsics), (extrinsics.numpy(), intrinsics.numpy())):
            points = unproject_depth_map_to_point_map(d, e, k)
            assert isinstance(points, np.ndarray)
            assert points.shape == (2, 4, 5, 3)
            np.testing.assert_allclose(points, expected, rtol=1e-13)
    single = unproject_depth_map_to_point_map(depth.float(), extrinsics.float(), intrinsics.float())
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-4)
    for low in (torch.bfloat16, torch.float16):
        points = unproject_depth_map_to_point_map(depth.to(low), extrinsics.float(), intrinsics.float())
        assert points.dtype == np.float32
        np.testing.assert_allclose(points, expected, rtol=0, atol=0.1)
    half = unproject_depth_map_to_point_map(depth.numpy().astype(np.float16), extrinsics.float(), intrinsics.float())
    assert half.dtype == np.float32
    one = unproject_depth_map_to_point_map(depth[:1, :1, :1, None], extrinsics[:1], intrinsics[:1])  # all sizes 1
    np.testing.assert_allclose(one[0, 0, 0], expected[0, 0, 0], rtol=1e-13)


@given(st.integers(0, 10**6), st.integers(0, 4), st.booleans(), st.booleans())
@quick
def test_inverse_of_rigid_transforms(seed: int, count: int, square: bool, as_numpy: bool) -> None:
    poses: Any = scene(seed, count, 1, 1)[1]
    if square:
        poses = torch.cat((poses, torch.tensor([0.0, 0, 0, 1]).double().expand(count, 1, 4)), dim=1)
    inverse = closed_form_inverse_se3(poses.numpy() if as_numpy else poses)
    assert isinstance(inverse, np.ndarray) == as_numpy
    inverse = torch.as_tensor(inverse)
    assert inverse.shape == (count, 4, 4)
    full = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    full[:, :3] = poses[:, :3]
    torch.testing.assert_close(inverse @ full, torch.eye(4, dtype=torch.float64).expand(count, 4, 4))
    torch.testing.assert_close(closed_form_inverse_se3(inverse), full)


def test_inverse_with_given_parts() -> None:
    poses, other = scene(1, 2, 1, 1)[1], scene(2, 2, 1, 1)[1]
    expected = closed_form_inverse_se3(other)
    rotation, translation = other[:, :, :3], other[:, :, 3:]
    torch.testing.assert_close(closed_form_inverse_se3(poses, R=rotation, T=translation), expected)
    torch.testing.assert_close(closed_form_inverse_se3(poses, R=rotation, T=translation[..., 0]), expected)
    mixed = closed_form_inverse_se3(poses.numpy(), R=rotation.numpy())
    np.testing.assert_allclose(mixed[:, :3, :3], expected[:, :3, :3])
    np.testing.assert_allclose(mixed[:, :3, 3:], -expected[:, :3, :3].numpy() @ poses[:, :, 3:].numpy())


def test_gradients() -> None:
    arguments = tuple(x.requires_grad_() for x in scene(6, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda *a: depth_to_world_coords_points(*a)[:2], arguments)
    assert torch.autograd.gradcheck(closed_form_inverse_se3, (arguments[1],))
    points = torch.tensor([[[0.3, 0.2, 9.0]], [[0.1, 0.4, 8.0]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project_world_points, (points, *arguments[1:]))


def test_bad_input() -> None:
    depth, extrinsics, intrinsics = scene(0, 2, 4, 5)
    with pytest.raises(VggtMvError, match=r"depth_map must be \[S, H, W, 1\] or \[S, H, W\], got \[2, 4, 5, 3\]"):
        unproject_depth_map_to_point_map(depth[..., None].expand(2, 4, 5, 3), extrinsics, intrinsics)
    with pytest.raises(VggtMvError, match=r"extrinsics_cam must be \[2, 3, 4\] or \[2, 4, 4\].*got \[1, 3, 4\]"):
        unproject_depth_map_to_point_map(depth, extrinsics[:1], intrinsics)
    with pytest.raises(VggtMvError, match=r"intrinsics_cam must be \[2, 3, 3\] for 2 depth maps, got \[2, 3, 4\]"):
        unproject_depth_map_to_point_map(depth, extrinsics, extrinsics)
    with pytest.raises(VggtMvError, match=r"depth_map must be floating point, got int64"):
        unproject_depth_map_to_point_map(depth.long(), extrinsics, intrinsics)
    convert = depth_to_world_coords_points
    with pytest.raises(VggtMvError, match=r"depth_map must be \[..., H, W\], got \[5\]"):
        convert(depth[0, 0], extrinsics[0], intrinsics[0])
    with pytest.raises(VggtMvError, match=r"extrinsic must be \[..., 3, 4\] or \[..., 4, 4\], got \[2, 3, 3\]"):
        convert(depth, intrinsics, intrinsics)
    with pytest.raises(VggtMvError, match=r"intrinsic must be \[..., 3, 3\], got \[3\]"):
        convert(depth, extrinsics, intrinsics[0, 0])
    with pytest.raises(
        VggtMvError, match=r"intrinsic must have no leading dimensions or those of depth_map, \[2\]; got \[1\]"
    ):
        convert(depth, extrinsics, intrinsics[:1])
    with pytest.raises(
        VggtMvError, match=r"all numpy arrays or all torch tensors.*depth_map: ndarray, extrinsic: Tensor"
    ):
        convert(depth.numpy(), extrinsics, intrinsics)
    with pytest.raises(VggtMvError, match=r"points must be \[..., M, 3\], got \[2, 4, 5\]"):
        project_world_points(depth, extrinsics, intrinsics)
    with pytest.raises(VggtMvError, match=r"points must be floating point, got torch.int64"):
        project_world_points(torch.zeros(2, 1, 3, dtype=torch.long), extrinsics, intrinsics)
    with pytest.raises(
        VggtMvError, match=r"extrinsic must have no leading dimensions or those of points, \[3\]; got \[2\]"
    ):
        project_world_points(torch.zeros(3, 1, 3), extrinsics, intrinsics)
    with pytest.raises(VggtMvError, match=r"se3 must be \[N, 3, 4\] or \[N, 4, 4\], got \[3, 4\]"):
        closed_form_inverse_se3(extrinsics[0])
    with pytest.raises(VggtMvError, match=r"se3 must be floating point, got torch.int64"):
        closed_form_inverse_se3(extrinsics.long())
    with pytest.raises(VggtMvError, match=r"R must be \[2, 3, 3\], got \[1, 3, 3\]"):
        closed_form_inverse_se3(extrinsics, R=intrinsics[:1])
    with pytest.raises(VggtMvError, match=r"T must be \[2, 3, 1\] or \[2, 3\], got \[2, 1, 3\]"):
        closed_form_inverse_se3(extrinsics, T=torch.zeros(2, 1, 3))
    with pytest.raises(VggtMvError, match=r"all numpy arrays or all torch tensors, got se3: Tensor, R: ndarray"):
        closed_form_inverse_se3(extrinsics, R=intrinsics.numpy())
