"""load_model: which configuration is built for which weights, and what is called random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vggt_mv.errors import VggtMvError
from vggt_mv.models.configs import build_model
from vggt_mv.models.vggt import VGGT
from vggt_mv.scene.load_model import choose_config, load_model
from vggt_mv.weights import provenance_of
from vggt_mv.weights.files import WeightsFile

KEYS = Path(__file__).parents[1] / "keys"
TINY: dict[str, Any] = {
    "img_size": 28,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_embed": "conv",
    "camera_head_options": {"trunk_depth": 1, "num_heads": 2},
    "enable_point": False,
    "enable_depth": False,
    "enable_track": False,
}


@pytest.mark.parametrize("name", ["vggt_1b", "page4d_1b"])
def test_public_checkpoints_get_a_model_that_they_fill(name: str) -> None:
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    file = WeightsFile.of_mapping({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    state = build_model(choose_config(file), device="meta").state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == shapes


def test_names_win_over_weights() -> None:
    file = WeightsFile.of_mapping({"aggregator.camera_token": torch.zeros(1)})
    assert choose_config(file, "vggt_mv_demo") == "vggt_mv_demo"
    assert choose_config(None) == "vggt_mv_1b"
    with pytest.raises(VggtMvError, match="'vggt_mv_2b' is neither a file nor a known name"):
        choose_config(file, "vggt_mv_2b")


@pytest.fixture
def vggt_folder(tmp_path: Path) -> Path:
    """What a clone of a VGGT repository of the hub is: its config.json names no class."""
    torch.manual_seed(1)
    model = VGGT(**TINY)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_vggt_weights_become_a_model_for_grids_too(vggt_folder: Path) -> None:
    model = load_model(vggt_folder, device="cpu")
    assert type(model).__name__ == "VGGT_MV"
    assert not model.training
    assert provenance_of(model).family == "vggt"
    torch.manual_seed(1)
    original = VGGT(**TINY).eval()
    images = torch.rand(1, 3, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(images)["pose_enc"], original(images)["pose_enc"])
        assert model(images[:, None])["pose_enc"].shape == (1, 1, 3, 9)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "must hold a JSON object, got list")])
def test_bad_config_beside_the_weights(vggt_folder: Path, text: str, message: str) -> None:
    (vggt_folder / "config.json").write_text(text)
    with pytest.raises(VggtMvError, match=rf"config\.json.*{message}.*--config"):
        load_model(vggt_folder, device="cpu")
    assert load_model(vggt_folder, config={"class": "VGGT", **TINY}, device="cpu").img_size == 28


def test_half_precision_weights_become_float32(vggt_folder: Path) -> None:
    state = torch.load(vggt_folder / "model.pt")
    torch.save({key: value.to(torch.bfloat16) for key, value in state.items()}, vggt_folder / "model.pt")
    model = load_model(vggt_folder, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.aggregator.camera_token, state["aggregator.camera_token"].to(torch.bfloat16).float())


def test_random_weights_are_asked_for_and_seeded() -> None:
    with pytest.raises(VggtMvError, match=r"no weights: .*--weights .*--random-weights \(random_weights=True\)"):
        load_model(device="cpu")
    config = {"class": "VGGT", **TINY}
    before = torch.random.get_rng_state()
    models = [load_model(config=config, random_weights=True, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens = [model.aggregator.camera_token for model in models]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    assert provenance_of(models[2]).family == "random"
    assert provenance_of(models[2]).description == "random weights, config custom, seed 2"


def test_partly_random_is_random(vggt_folder: Path) -> None:
    state = torch.load(vggt_folder / "model.pt")
    kept = {key: value for key, value in state.items() if not key.startswith("camera_head.")}
    torch.save(kept, vggt_folder / "model.pt")
    with pytest.raises(VggtMvError, match="of the model not in the file"):
        load_model(vggt_folder, device="cpu")
    first, second = (load_model(vggt_folder, random_weights=True, seed=5, device="cpu") for _ in range(2))
    assert provenance_of(first).family == "random"
    left = len(state) - len(kept)
    assert provenance_of(first).description.startswith(
        f"{left} of {len(state)} tensors random (seed 5), the others from"
    )
    assert torch.equal(first.camera_head.empty_pose_tokens, second.camera_head.empty_pose_tokens)
    name = "camera_head.pose_branch.fc1.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert torch.equal(first.state_dict()["aggregator.camera_token"], state["aggregator.camera_token"])
