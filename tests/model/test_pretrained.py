"""Saving to a folder and building from one; configurations by name, file and dict."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vggt_mv.errors import VggtMvError
from vggt_mv.models.configs import CONFIGS, build_model, load_config
from vggt_mv.models.vggt import VGGT, VGGT_MV

pytest.importorskip("huggingface_hub")


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A small VGGT_MV with options that are no defaults, and the folder it was saved to."""
    model = tiny_model(VGGT_MV, mask_layer=2, aa_order=["time", "view"], attention="joint")
    model.save_pretrained(tmp_path)
    return model, tmp_path


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def test_a_round_trip_gives_the_same_model(saved, rel):
    model, folder = saved
    images = torch.rand(1, 2, 2, 3, 28, 42)
    loaded = VGGT_MV.from_pretrained(folder)
    assert not loaded.training
    assert (loaded.attention, loaded.aggregator.mask_layer) == ("joint", 2)
    assert loaded.aggregator.aa_order == ["time", "view"]
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value), key
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    expected, actual = model(images), loaded(images)
    # Not bit by bit: mapped tensors lie at other addresses, and vectorised sums depend on alignment.
    for name in ("depth", "pose_enc"):
        assert rel(actual[name], expected[name]) < 1e-6


def test_saving_writes_each_tensor_once_under_its_canonical_name(saved):
    model, folder = saved
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


def test_a_loaded_model_can_be_trained_and_saved_again(saved, tmp_path_factory):
    _, folder = saved
    model = VGGT_MV.from_pretrained(folder).train()
    model(torch.rand(1, 2, 3, 28, 42))["depth"].mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * (p.grad if p.grad is not None else 0)
    again = tmp_path_factory.mktemp("again")
    model.save_pretrained(again)
    reloaded = VGGT_MV.from_pretrained(again).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(reloaded[key], value)


def test_alias_names_in_the_file_load(saved):
    model, folder = saved

    def rename(tensors):
        for key in list(tensors):
            alias = key.replace("aggregator.global_blocks", "aggregator.view_blocks")
            tensors[alias] = tensors.pop(key)

    _edit_weights(folder, rename)
    loaded = VGGT_MV.from_pretrained(folder)
    key = "aggregator.global_blocks.1.attn.qkv.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])


def test_a_missing_tensor_is_an_error(saved):
    _, folder = saved
    _edit_weights(folder, lambda tensors: tensors.pop("camera_head.token_norm.weight"))
    with pytest.raises(VggtMvError, match=r"1 of the model not in the file; .* camera_head"):
        VGGT_MV.from_pretrained(folder)


def test_an_unexpected_tensor_is_an_error(saved):
    _, folder = saved
    _edit_weights(folder, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    with pytest.raises(VggtMvError, match="stranger"):
        VGGT_MV.from_pretrained(folder)


def test_the_weights_of_another_model_are_an_error(saved):
    _, folder = saved
    _edit_config(folder, embed_dim=48, patch_embed_options={"embed_dim": 48, "depth": 2, "num_heads": 2})
    with pytest.raises(VggtMvError, match=r"aggregator\.camera_token|shape"):
        VGGT_MV.from_pretrained(folder)


def test_the_weights_of_page4d_do_not_load_into_vggt_unnoticed(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    for name in ("attention", "mask_layer", "enable_dual_stream", "enable_sparse_global", "enable_spatial_mask"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VggtMvError, match="spatial_mask_head"):
        VGGT.from_pretrained(folder)


def test_an_unknown_key_in_the_configuration_is_an_error(saved):
    _, folder = saved
    _edit_config(folder, dept=12)
    with pytest.raises(VggtMvError, match=r"unknown option 'dept'; the nearest known one is 'depth'"):
        VGGT_MV.from_pretrained(folder)


def test_a_model_with_a_module_as_option_is_not_saved(tiny_model, tmp_path):
    model = tiny_model(VGGT, patch_embed=nn.Conv2d(3, 32, 14, 14), patch_embed_options={})
    with pytest.raises(VggtMvError, match=r"patch_embed must be a value that config.json can hold, got Conv2d"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Configurations


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_named_configuration_builds(name):
    model_class, arguments = load_config(name)
    model = build_model(name, device="meta")
    assert type(model) is model_class
    assert not model.training
    assert all(p.is_meta for p in model.parameters())
    assert json.loads(json.dumps(arguments)) == arguments


def test_sizes_of_the_named_configurations():
    def millions(name):
        return sum(p.numel() for p in build_model(name, device="meta").parameters()) / 1e6

    assert 1200 < millions("vggt_1b") < 1300
    assert millions("page4d_1b") == millions("vggt_mv_1b") == pytest.approx(millions("vggt_1b"), rel=1e-3)
    assert 4.5 < millions("vggt_mv_demo") < 5.5


def test_changing_a_loaded_configuration_changes_no_named_one():
    load_config("vggt_mv_demo")[1]["patch_embed_options"]["depth"] = 99
    assert load_config("vggt_mv_demo")[1]["patch_embed_options"]["depth"] != 99


def test_a_configuration_from_a_file_or_a_dict(tiny_options, tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"class": "VGGT", **tiny_options}))
    assert load_config(path) == load_config(str(path)) == (VGGT, tiny_options)
    assert type(build_model(path)) is VGGT
    assert type(build_model({**tiny_options, "mask_layer": None})) is VGGT_MV


def test_the_config_json_of_a_saved_model_is_a_configuration(saved):
    _, folder = saved
    assert type(build_model(folder / "config.json", device="meta")) is VGGT_MV


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("vggt_mv_dem", r"config 'vggt_mv_dem' is neither a file nor a known name; .* 'vggt_mv_demo'"),
        ("nowhere/x.json", r"config nowhere/x\.json: no such file"),
        ({"class": "Pi3"}, r"class must be one of \['VGGT', 'VGGT_MV'\], got 'Pi3'"),
        ({"class": "VGGT", "attention": "joint"}, r"config: unknown option 'attention'"),
        ({"embed_dims": 1}, r"unknown option 'embed_dims'; the nearest known one is 'embed_dim'"),
        ({"block_fn": "Block"}, r"unknown option 'block_fn'"),
        ({"depth": "24"}, r"^config: depth must be int, got '24'$"),
        ({"qk_norm": 1}, r"^config: qk_norm must be bool, got 1$"),
        ({"embed_dim": True}, r"^config: embed_dim must be int, got True$"),
        ({"rope_freq": []}, r"^config: rope_freq must be float or None, got \[\]$"),
        ({"aa_order": ["view", 1]}, r"^config: aa_order must be Sequence\[str\], got \['view', 1\]$"),
        ({"patch_embed": 14}, r"^config: patch_embed must be str or nn\.Module, got 14$"),
        ({"camera_head_options": 3}, r"camera_head_options must be Mapping\[str, Any\] or None, got 3$"),
    ],
    ids=str,
)
def test_bad_configurations(config, message):
    with pytest.raises(VggtMvError, match=message):
        load_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_head_options": {"trunk_depth": "x"}}, r"camera_head_options: trunk_depth must be int, got 'x'"),
        ({"dpt_head_options": {"out_channels": [16, 2.5]}}, r"out_channels must be Sequence\[int\], got \[16, 2\.5\]"),
        ({"patch_embed_options": {"act_layer": "gelu"}}, r"act_layer must be Callable.*, got 'gelu'"),
        ({"num_register_tokens": -1}, r"^config: no model has these sizes \(.*-1.*\); correct them$"),
        ({"patch_size": 0}, r"^config: no model has these sizes \(.* by zero\); correct them$"),
    ],
    ids=str,
)
def test_values_that_make_no_model(tiny_options, changes, message):
    with pytest.raises(VggtMvError, match=message):
        build_model({**tiny_options, "mask_layer": None, **changes}, device="meta")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be a JSON file, but cannot be read"), ("[1]", "must hold a JSON object, got list")],
    ids=["broken", "list"],
)
def test_files_that_are_no_configurations(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(VggtMvError, match=message):
        load_config(path)


# The top-level package


def test_every_top_level_name_is_there():
    import vggt_mv

    assert set(vggt_mv._HOME) == set(vggt_mv.__all__)
    assert vggt_mv.VGGT_MV is VGGT_MV
    for name in vggt_mv.__all__:
        assert getattr(vggt_mv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vggt_mv.nothing


def test_importing_the_package_imports_no_torch():
    code = "import sys, vggt_mv; dir(vggt_mv); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_run_without_the_hub():
    """huggingface_hub is for loading and saving alone."""
    code = """
import sys
sys.modules["huggingface_hub"] = None
import torch
from vggt_mv.models.configs import build_model
torch.set_num_threads(1)
model = build_model("vggt_mv_demo")
with torch.inference_mode():
    assert model(torch.rand(1, 1, 2, 3, 28, 42))["depth"].shape == (1, 1, 2, 28, 42, 1)
for call in (lambda: model.save_pretrained("x"), lambda: type(model).from_pretrained("x")):
    try:
        call()
    except ImportError as error:
        assert "pip install huggingface_hub" in str(error)
    else:
        raise SystemExit("no error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
