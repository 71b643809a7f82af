"""The real model classes, small: files go into them and come out of them, and predictions follow."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights_support import aggregator_of, with_aliases

from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.vggt import VGGT, VGGT_MV
from vggt_mv.weights import (
    AliasConflictError,
    WeightsMismatchError,
    WeightsWarning,
    build_from_weights,
    load_pretrained_weights,
    open_weights,
    provenance_of,
)

OPTIONS: dict[str, Any] = {
    "img_size": 56,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "patch_embed": "dinov2_vits14_reg",
    "patch_embed_options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "enable_point": False,
    "enable_track": False,
    "camera_head_options": {"trunk_depth": 1, "num_heads": 2},
    "dpt_head_options": {"features": 16, "out_channels": [8, 8, 16, 16], "intermediate_layer_idx": [0, 1, 2, 3]},
}
MASKED: dict[str, Any] = {**OPTIONS, "mask_layer": 1}


def vggt(seed: int = 0) -> VGGT:
    torch.manual_seed(seed)
    return VGGT(**OPTIONS).eval()


def vggt_mv(seed: int = 1, **more: Any) -> VGGT_MV:
    torch.manual_seed(seed)
    return VGGT_MV(**{**MASKED, **more}).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def predict(model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    found = model(images)
    return {name: found[name] for name in ("pose_enc", "depth", "depth_conf")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_vggt_file_makes_a_vggt_mv_predict_the_same(tmp_path: Path, images: Tensor) -> None:
    source = vggt()
    torch.save({"model": source.state_dict()}, tmp_path / "w.pt")
    model = vggt_mv(enable_spatial_mask=False)
    assert not same(predict(model, images), predict(source, images))
    report = model.load_pretrained_weights(checkpoint_path=tmp_path / "w.pt", strict=True)
    assert report["checkpoint_loaded"] == report["model_tensors"]
    assert same(predict(model, images), predict(source, images))
    assert provenance_of(model).family == "vggt"


def test_a_vggt_file_into_a_vggt_mv_with_a_mask_head(tmp_path: Path) -> None:
    source, model = vggt(), vggt_mv()
    head = {key: value.clone() for key, value in model.state_dict().items() if "spatial_mask_head" in key}
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        WeightsMismatchError, match="8 of the model not in the file; most of it in aggregator.spatial_m"
    ):
        model.load_pretrained_weights(tmp_path / "w.pt", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = model.load_pretrained_weights(tmp_path / "w.pt")
    assert (report["missing"], report["unexpected"], report["cannot_have"]) == (0, 0, 8)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in source.state_dict().items())
    assert all(torch.equal(now[key], value) for key, value in head.items())


@pytest.mark.parametrize("how", ["aliases", "both names", "module._orig_mod.", "aggregator alone"])
def test_other_names_of_the_same_weights(tmp_path: Path, images: Tensor, how: str) -> None:
    source = vggt_mv(0)
    state: dict[str, Tensor] = source.state_dict()
    if how == "aliases":
        state = with_aliases(state)
    elif how == "both names":
        state = with_aliases(state, both=True)
    elif how == "aggregator alone":
        state = aggregator_of(state)
    else:
        state = {how + key: value for key, value in state.items()}
    torch.save(state, tmp_path / "w.pt")
    model = vggt_mv(1)
    report = model.load_pretrained_weights(tmp_path / "w.pt")
    if how == "aggregator alone":
        assert report["missing"] == sum("aggregator" not in key for key in source.state_dict())
        source.camera_head, source.depth_head = model.camera_head, model.depth_head
    else:
        assert report["missing"] == 0
    assert same(predict(model, images), predict(source, images))


def test_aliases_that_disagree(tmp_path: Path) -> None:
    state = with_aliases(vggt_mv(0).state_dict(), both=True)
    key = "aggregator.time_blocks.2.mlp.fc1.weight"
    state[key] = state[key] + 1
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(AliasConflictError, match=f"'aggregator.frame_blocks.2.mlp.fc1.weight' and '{key}'"):
        vggt_mv(1).load_pretrained_weights(tmp_path / "w.pt")


def test_the_alias_attributes_show_what_was_loaded(tmp_path: Path) -> None:
    torch.save(vggt_mv(0).state_dict(), tmp_path / "w.pt")
    for model in (vggt_mv(1), build_from_weights(lambda: vggt_mv(2), tmp_path / "w.pt")[0]):
        model.load_pretrained_weights(tmp_path / "w.pt", assign=True)
        for alias, name in (("view_blocks", "global_blocks"), ("time_blocks", "frame_blocks")):
            one, other = getattr(model.aggregator, alias), getattr(model.aggregator, name)
            assert one[0].attn.qkv.weight is other[0].attn.qkv.weight


def test_a_whole_file_into_an_aggregator(tmp_path: Path, images: Tensor) -> None:
    source = vggt()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    options = {key: value for key, value in OPTIONS.items() if "enable" not in key and "head" not in key.split("_")}
    model = Aggregator(**options)
    report = load_pretrained_weights(model, tmp_path / "w.pt")
    assert (report["missing"], report["kept_init"]) == (0, 0)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images)[0][-1], source.aggregator(images)[0][-1])


def test_a_meta_model_is_ready_after_a_load(tmp_path: Path, images: Tensor) -> None:
    source = vggt_mv(0)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        model = vggt_mv(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_pretrained_weights(tmp_path / "w.pt")
    assert same(predict(model, images), predict(source, images))


def test_a_round_trip_keeps_every_bit(tmp_path: Path, images: Tensor) -> None:
    source = vggt_mv(0)
    source.save_pretrained(tmp_path)
    assert set(open_weights(tmp_path).tensors) == set(source.state_dict())
    model = VGGT_MV.from_pretrained(tmp_path)
    assert same(predict(model, images), predict(source, images))
    assert model.aggregator._resnet_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_file_of_another_size_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = VGGT(**{**OPTIONS, "embed_dim": 64, "patch_embed_options": {"embed_dim": 64, "depth": 2, "num_heads": 2}})
    torch.save(wide.state_dict(), tmp_path / "w.pt")
    model = vggt()
    with pytest.warns(WeightsWarning, match=r"a model of another size: .* in the file and .* in the model"):
        report = model.load_pretrained_weights(tmp_path / "w.pt")
    assert report["shape_mismatch"] > report.filled()
    with pytest.raises(WeightsMismatchError, match="of another shape"):
        VGGT.from_pretrained(_folder(tmp_path), **OPTIONS)


def _folder(path: Path) -> Path:
    (path / "w.pt").rename(path / "model.pt")
    return path
