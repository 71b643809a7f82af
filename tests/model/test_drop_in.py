"""A program written for the public VGGT interface runs when only its import root is changed.

Everything below the imports is what such programs do: the aggregator and the heads called separately with
``(tokens, images, patch_start_idx)``, cameras decoded, depth unprojected, points tracked, images loaded from files. The
models are small; nothing else is particular to this package.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from vggt_mv.heads.camera_head import CameraHead
from vggt_mv.heads.dpt_head import DPTHead
from vggt_mv.heads.head_act import activate_head, activate_pose
from vggt_mv.heads.track_head import TrackHead
from vggt_mv.heads.track_modules.base_track_predictor import BaseTrackerPredictor
from vggt_mv.heads.utils import create_uv_grid, position_grid_to_embed
from vggt_mv.layers.attention import Attention
from vggt_mv.layers.block import Block
from vggt_mv.layers.layer_scale import LayerScale
from vggt_mv.layers.mlp import Mlp
from vggt_mv.layers.patch_embed import PatchEmbed
from vggt_mv.layers.rope import PositionGetter, RotaryPositionEmbedding2D
from vggt_mv.layers.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.vggt import VGGT
from vggt_mv.utils.geometry import (
    closed_form_inverse_se3,
    depth_to_world_coords_points,
    unproject_depth_map_to_point_map,
)
from vggt_mv.utils.load_fn import load_and_preprocess_images, load_and_preprocess_images_square
from vggt_mv.utils.pose_enc import extri_intri_to_pose_encoding, pose_encoding_to_extri_intri
from vggt_mv.utils.rotation import mat_to_quat, quat_to_mat

# What existing programs rely on: arguments, their order and their defaults.
SIGNATURES = [
    (
        VGGT.__init__,
        "img_size=518 patch_size=14 embed_dim=1024 enable_camera=True enable_point=True enable_depth=True "
        "enable_track=True",
    ),
    (VGGT.forward, "images query_points=None"),
    (
        Aggregator.__init__,
        "img_size=518 patch_size=14 embed_dim=1024 depth=24 num_heads=16 mlp_ratio=4.0 num_register_tokens=4 "
        "block_fn=Block "
        "qkv_bias=True proj_bias=True ffn_bias=True patch_embed='dinov2_vitl14_reg' aa_order=['frame','global'] "
        "aa_block_size=1 qk_norm=True rope_freq=100 init_values=0.01",
    ),
    (Aggregator.forward, "images"),
    (
        Attention.__init__,
        "dim num_heads=8 qkv_bias=True proj_bias=True attn_drop=0.0 proj_drop=0.0 norm_layer=LayerNorm qk_norm=False "
        "fused_attn=True rope=None",
    ),
    (Attention.forward, "x pos=None"),
    (
        Block.__init__,
        "dim num_heads mlp_ratio=4.0 qkv_bias=True proj_bias=True ffn_bias=True drop=0.0 attn_drop=0.0 "
        "init_values=None "
        "drop_path=0.0 act_layer=GELU norm_layer=LayerNorm attn_class=Attention ffn_layer=Mlp qk_norm=False "
        "fused_attn=True rope=None",
    ),
    (Block.forward, "x pos=None"),
    (Mlp.__init__, "in_features hidden_features=None out_features=None act_layer=GELU drop=0.0 bias=True"),
    (LayerScale.__init__, "dim init_values=1e-05 inplace=False"),
    (
        PatchEmbed.__init__,
        "img_size=224 patch_size=16 in_chans=3 embed_dim=768 norm_layer=None flatten_embedding=True",
    ),
    (RotaryPositionEmbedding2D.__init__, "frequency=100.0 scaling_factor=1.0"),
    (RotaryPositionEmbedding2D.forward, "tokens positions"),
    (PositionGetter.__call__, "batch_size height width device"),
    (
        DinoVisionTransformer.__init__,
        "img_size=224 patch_size=16 in_chans=3 embed_dim=768 depth=12 num_heads=12 mlp_ratio=4.0 qkv_bias=True "
        "ffn_bias=True "
        "proj_bias=True drop_path_rate=0.0 drop_path_uniform=False init_values=None embed_layer=PatchEmbed "
        "act_layer=GELU "
        "block_fn=Block ffn_layer='mlp' block_chunks=1 num_register_tokens=0 interpolate_antialias=False "
        "interpolate_offset=0.1 qk_norm=False",
    ),
    *((vit, "patch_size=16 num_register_tokens=0 **kwargs") for vit in (vit_small, vit_base, vit_large, vit_giant2)),
    (
        CameraHead.__init__,
        "dim_in=2048 trunk_depth=4 pose_encoding_type='absT_quaR_FoV' num_heads=16 mlp_ratio=4 init_values=0.01 "
        "trans_act='linear' quat_act='linear' fl_act='relu'",
    ),
    (CameraHead.forward, "aggregated_tokens_list num_iterations=4"),
    (
        DPTHead.__init__,
        "dim_in patch_size=14 output_dim=4 activation='inv_log' conf_activation='expp1' features=256 "
        "out_channels=[256,512,1024,1024] intermediate_layer_idx=[4,11,17,23] pos_embed=True feature_only=False "
        "down_ratio=1",
    ),
    (DPTHead.forward, "aggregated_tokens_list images patch_start_idx frames_chunk_size=8"),
    (
        TrackHead.__init__,
        "dim_in patch_size=14 features=128 iters=4 predict_conf=True stride=2 corr_levels=7 corr_radius=4 "
        "hidden_size=384",
    ),
    (TrackHead.forward, "aggregated_tokens_list images patch_start_idx query_points=None iters=None"),
    (
        BaseTrackerPredictor.__init__,
        "stride=1 corr_levels=5 corr_radius=4 latent_dim=128 hidden_size=384 use_spaceatt=True depth=6 max_scale=518 "
        "predict_conf=True",
    ),
    (
        BaseTrackerPredictor.forward,
        "query_points fmaps=None iters=6 return_feat=False down_ratio=1 apply_sigmoid=True",
    ),
    (activate_pose, "pred_pose_enc trans_act='linear' quat_act='linear' fl_act='linear'"),
    (activate_head, "out activation='norm_exp' conf_activation='expp1'"),
    (create_uv_grid, "width height aspect_ratio=None dtype=None device=None"),
    (position_grid_to_embed, "pos_grid embed_dim omega_0=100"),
    (load_and_preprocess_images, "image_path_list mode='crop'"),
    (load_and_preprocess_images_square, "image_path_list target_size=1024"),
    (
        extri_intri_to_pose_encoding,
        "extrinsics intrinsics image_size_hw=None pose_encoding_type='absT_quaR_FoV'",
    ),
    (
        pose_encoding_to_extri_intri,
        "pose_encoding image_size_hw=None pose_encoding_type='absT_quaR_FoV' build_intrinsics=True",
    ),
    (quat_to_mat, "quaternions"),
    (mat_to_quat, "matrix"),
    (unproject_depth_map_to_point_map, "depth_map extrinsics_cam intrinsics_cam"),
    (depth_to_world_coords_points, "depth_map extrinsic intrinsic eps=1e-08"),
    (closed_form_inverse_se3, "se3 R=None T=None"),
]


def _written(parameter: inspect.Parameter) -> str:
    """``name=default`` as above."""
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    default = parameter.default
    if isinstance(default, (list, tuple)):
        text = "[" + ",".join(repr(item) for item in default) + "]"
    elif isinstance(default, type):
        text = default.__name__
    else:
        text = repr(default)
    return f"{parameter.name}={text}"


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=lambda v: getattr(v, "__qualname__", ""))
def test_arguments_have_their_names_order_and_defaults(function, expected):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    ours = {"aggregator_options"}
    assert " ".join(_written(p) for p in positional if p.name not in ours) == expected


@pytest.fixture
def image_files(tmp_path):
    """Three landscape photographs of 300 x 200 pixels."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(3):
        small = rng.integers(0, 255, (10, 15, 3), dtype=np.uint8)
        Image.fromarray(small).resize((300, 200), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    return names


def _small_vggt(tiny_model):
    model = tiny_model(VGGT)
    with torch.no_grad():  # random weights may give a field of view of zero
        model.camera_head.pose_branch.fc2.bias[7:] += 2.0
    return model


def test_the_quick_start(tiny_model, image_files):
    device = "cpu"
    model = _small_vggt(tiny_model).to(device)
    images = load_and_preprocess_images(image_files).to(device)
    assert images.shape == (3, 3, 350, 518)
    images = torch.nn.functional.interpolate(images, (42, 56), mode="area")  # the model is small, and so is the machine
    with torch.no_grad():
        predictions = model(images)
    assert predictions["depth"].shape == (1, 3, 42, 56, 1)
    assert predictions["world_points"].shape == (1, 3, 42, 56, 3)


def test_each_part_called_by_itself(tiny_model):
    model = _small_vggt(tiny_model)
    images = torch.rand(3, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    query_points = torch.FloatTensor([[20.0, 10.0], [30.5, 40.0]])
    with torch.no_grad():
        with torch.autocast("cpu", enabled=False):
            images = images[None]  # add batch dimension
            aggregated_tokens_list, ps_idx = model.aggregator(images)

        # Predict Cameras
        pose_enc = model.camera_head(aggregated_tokens_list)[-1]
        # Extrinsic and intrinsic matrices, following OpenCV convention (camera from world)
        extrinsic, intrinsic = pose_encoding_to_extri_intri(pose_enc, images.shape[-2:])
        # Predict Depth Maps
        depth_map, depth_conf = model.depth_head(aggregated_tokens_list, images, ps_idx)
        # Predict Point Maps
        point_map, point_conf = model.point_head(aggregated_tokens_list, images, ps_idx)
        # Construct 3D Points from Depth Maps and Cameras
        point_map_by_unprojection = unproject_depth_map_to_point_map(
            depth_map.squeeze(0), extrinsic.squeeze(0), intrinsic.squeeze(0)
        )
        # Predict Tracks
        track_list, vis_score, conf_score = model.track_head(
            aggregated_tokens_list, images, ps_idx, query_points=query_points[None]
        )
        predictions = model(images, query_points=query_points)

    assert len(aggregated_tokens_list) == 4
    assert ps_idx == 5
    assert (extrinsic.shape, intrinsic.shape) == ((1, 3, 3, 4), (1, 3, 3, 3))
    # The parts together are the whole.
    for name, value in {
        "pose_enc": pose_enc,
        "depth": depth_map,
        "depth_conf": depth_conf,
        "world_points": point_map,
        "world_points_conf": point_conf,
        "track": track_list[-1],
        "vis": vis_score,
        "conf": conf_score,
    }.items():
        assert torch.equal(predictions[name], value), name

    # A pixel's point, by the camera model: x_cam = R x_world + t, u = fx x/z + cx.
    assert point_map_by_unprojection.shape == (3, 42, 56, 3)
    s, v, u = 1, 30, 11
    world = torch.from_numpy(point_map_by_unprojection[s, v, u]).float()
    camera = extrinsic[0, s, :, :3] @ world + extrinsic[0, s, :, 3]
    pixel = intrinsic[0, s] @ (camera / camera[2])
    assert camera[2].item() == pytest.approx(depth_map[0, s, v, u, 0].item(), rel=1e-4)
    assert pixel[:2].tolist() == pytest.approx([u, v], abs=2e-2)


def test_cameras_there_and_back():
    extrinsics = torch.eye(3, 4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, :, :3] = quat_to_mat(torch.tensor([0.1, 0.2, 0.3, 0.9]))
    extrinsics[0, 1, :, 3] = torch.tensor([1.0, -2.0, 0.5])
    intrinsics = torch.tensor([[60.0, 0, 28], [0, 50, 21], [0, 0, 1]]).repeat(1, 2, 1, 1)
    encoding = extri_intri_to_pose_encoding(extrinsics, intrinsics, (42, 56))
    again_extrinsics, again_intrinsics = pose_encoding_to_extri_intri(encoding, (42, 56))
    torch.testing.assert_close(again_extrinsics, extrinsics, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again_intrinsics, intrinsics, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(quat_to_mat(mat_to_quat(extrinsics[..., :3])), extrinsics[..., :3], atol=1e-5, rtol=1e-5)
    inverse = closed_form_inverse_se3(extrinsics[0])
    assert inverse.shape == (2, 4, 4)
    torch.testing.assert_close(extrinsics[0] @ inverse, torch.eye(3, 4).repeat(2, 1, 1), atol=1e-5, rtol=1e-5)


def test_blocks_as_existing_programs_build_them():
    rope, position_getter = RotaryPositionEmbedding2D(frequency=100), PositionGetter()
    block = Block(dim=32, num_heads=2, mlp_ratio=4.0, init_values=0.01, qk_norm=True, rope=rope)
    tokens, pos = torch.randn(2, 6, 32), position_getter(2, 2, 3, device=torch.device("cpu"))
    assert block(tokens, pos=pos).shape == (2, 6, 32)
    trunk = torch.nn.Sequential(*[Block(dim=32, num_heads=2) for _ in range(2)])
    assert trunk(tokens).shape == (2, 6, 32)
