"""Models built around files: meta parameters, real buffers, `from_pretrained`, provenance, and the memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from weights_support import Tree, small, snapshot, tensors

from vggt_mv.weights import (
    PretrainedWeightsMixin,
    WeightsError,
    WeightsMismatchError,
    WeightsProvenance,
    WeightsWarning,
    build_from_weights,
    inspect_weights,
    load_pretrained_weights,
    open_weights,
    parameters_on_meta,
    provenance_of,
    set_provenance,
)
from vggt_mv.weights.rules import FAMILY_KEY
from vggt_mv.weights.safetensors_io import write_safetensors

VGGT_1B, PAGE4D = (
    {key: shape for key, shape in small(name).items() if key.startswith(("aggregator.", "camera_head."))}
    for name in ("vggt_1b", "page4d_1b")
)
TOKEN = "aggregator.camera_token"


class Initialised(Tree):
    """Every parameter gets another initial value, so that nothing can be right by chance."""

    def __init__(self, shapes: Any) -> None:
        super().__init__(shapes)
        for number, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, float(number))


class Small(PretrainedWeightsMixin, PyTorchModelHubMixin, repo_url="", license="apache-2.0"):
    """A model with a config and the names of a manifest."""

    def __init__(self, masked: bool = True, *, scale: float = 1.0) -> None:
        super().__init__()
        inner = Initialised(PAGE4D if masked else VGGT_1B)
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.masked = masked
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


# ---- building


def test_parameters_on_meta() -> None:
    with parameters_on_meta() as registered:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2), nn.Linear(2, 2, bias=False))
        nn.init.normal_(model[2].weight)
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in model.parameters())
    assert model[0].running_var.tolist() == [1.0, 1.0, 1.0]
    assert {name for _, name in registered} >= {"weight", "in_proj_weight"}
    assert not nn.Linear(1, 1).weight.is_meta


def test_parameters_on_meta_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert not nn.Linear(1, 1).weight.is_meta


def test_other_threads_build_as_ever() -> None:
    built: list[nn.Linear] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(1, 1)))
        thread.start()
        thread.join()
    assert not built[0].weight.is_meta


def test_frozen_parameters_stay_frozen() -> None:
    with parameters_on_meta():
        module = nn.Module()
        module.register_parameter("a", nn.Parameter(torch.ones(1), requires_grad=False))
        module.register_parameter("b", None)
    assert not module.a.requires_grad
    assert module.b is None


def test_build_from_weights(tmp_path: Path) -> None:
    state = tensors(PAGE4D)
    write_safetensors(tmp_path / "w.safetensors", state)
    model, report = build_from_weights(lambda: Initialised(PAGE4D), tmp_path / "w.safetensors")
    assert report.applied
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model._scale.tolist() == [2.0]
    assert provenance_of(model).family == "page4d"


def test_strict_building_says_what_is_wrong(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", tensors(VGGT_1B))
    with pytest.raises(
        WeightsMismatchError, match="strict: 8 of the model not in the file; most of it in aggregator.spa"
    ):
        build_from_weights(lambda: Initialised(PAGE4D), tmp_path / "w.safetensors")


def test_what_the_file_lacks_has_its_initial_values(tmp_path: Path) -> None:
    """Of the second build only those tensors are real, and they are initialised as in any build."""
    state = tensors(VGGT_1B)
    write_safetensors(tmp_path / "w.safetensors", state)
    real = snapshot(Initialised(PAGE4D))
    model, report = build_from_weights(lambda: Initialised(PAGE4D), tmp_path / "w.safetensors", strict=False)
    assert (report["loaded"], report["cannot_have"]) == (len(state), 8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state.get(key, real[key]))


def test_a_constructor_that_needs_values_is_built_whole(tmp_path: Path) -> None:
    class Computes(Initialised):
        def __init__(self) -> None:
            super().__init__(PAGE4D)
            token, head = self.get_parameter(TOKEN), self.get_submodule("aggregator.spatial_mask_head")
            if not token.is_meta and not head.alpha_logit.is_meta:
                pass  # a whole build
            elif not head.alpha_logit.is_meta:
                head.alpha_logit.data.copy_(token.data.sum())  # NotImplementedError: there is no meta sum to copy

    write_safetensors(tmp_path / "w.safetensors", tensors(VGGT_1B))
    model, _ = build_from_weights(Computes, tmp_path / "w.safetensors", strict=False)
    real = snapshot(Initialised(PAGE4D))
    key = "aggregator.spatial_mask_head.alpha_logit"
    assert torch.equal(model.state_dict()[key], real[key])


def test_dtype_of_a_build(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", tensors(VGGT_1B), dtype=torch.bfloat16)
    model, report = build_from_weights(
        lambda: Initialised(PAGE4D), tmp_path / "w.safetensors", dtype=torch.bfloat16, strict=False
    )
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert report.notes == ()
    model, report = build_from_weights(lambda: Initialised(VGGT_1B), tmp_path / "w.safetensors")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert report.notes == (f"{len(VGGT_1B)} tensors were converted from bfloat16 to float32",)


def test_building_from_an_opened_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", tensors(VGGT_1B))
    file = open_weights(tmp_path / "w.safetensors")
    models = [build_from_weights(lambda: Initialised(VGGT_1B), file)[0] for _ in range(2)]
    assert torch.equal(models[0].get_parameter(TOKEN), models[1].get_parameter(TOKEN))


# ---- from_pretrained, save_pretrained


def test_save_and_load(tmp_path: Path) -> None:
    model = Small(scale=3.0)
    model.save_pretrained(tmp_path)
    again = Small.from_pretrained(tmp_path)
    assert (again.masked, again.scale.item(), again.training) == (True, 3.0, False)
    before = snapshot(model)
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["scale"] == 3.0


def test_from_pretrained_is_strict(tmp_path: Path) -> None:
    Small(masked=False).save_pretrained(tmp_path)
    with pytest.raises(WeightsMismatchError, match="-> Small, strict: 8 of the model not in the file"):
        Small.from_pretrained(tmp_path, masked=True)
    model = Small.from_pretrained(tmp_path, masked=True, strict=False)
    key = "aggregator.spatial_mask_head.alpha_logit"
    assert torch.equal(model.state_dict()[key], Small().state_dict()[key])


def test_saving_over_the_file_that_the_model_is_mapped_from(tmp_path: Path) -> None:
    Small().save_pretrained(tmp_path)
    model = Small.from_pretrained(tmp_path)
    before = snapshot(model)
    with torch.no_grad():
        model.get_parameter(TOKEN).fill_(42.0)
    model.save_pretrained(tmp_path)
    again = Small.from_pretrained(tmp_path)
    assert bool((again.get_parameter(TOKEN) == 42).all())
    key = "camera_head.token_norm.bias"
    assert torch.equal(again.state_dict()[key], before[key])
    assert torch.equal(model.state_dict()[key], before[key])


def test_saving_writes_canonical_names_once(tmp_path: Path) -> None:
    class Aliased(Small):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            state = super().state_dict(*args, **kwargs)
            aliases = {
                key.replace("global_blocks", "view_blocks"): value for key, value in state.items() if "global_" in key
            }
            return {**aliases, **state}

    Aliased().save_pretrained(tmp_path)
    assert set(open_weights(tmp_path).tensors) == set(PAGE4D)


# ---- provenance


def test_provenance_of_a_life(tmp_path: Path) -> None:
    vggt, page4d = tmp_path / "vggt.safetensors", tmp_path / "page4d.pt"
    write_safetensors(vggt, tensors(VGGT_1B))
    torch.save(tensors(PAGE4D), page4d)
    model = Small()
    assert provenance_of(model) == WeightsProvenance("random", "random initial values")
    report = model.load_pretrained_weights(vggt)
    assert isinstance(report["checkpoint_loaded"], int)
    found = provenance_of(model)
    assert (found.family, found.sources) == ("vggt", (str(vggt),))
    total = len(PAGE4D)
    text = f"{total - 8} of {total} tensors: {total - 8} from {vggt} (vggt), the other 8: random initial values"
    assert found.description == text
    model.load_pretrained_weights(page4d)
    assert provenance_of(model).family == "page4d"
    assert provenance_of(model).description == f"{total} of {total} tensors: {total} from {page4d} (page4d)"
    model.load_pretrained_weights(vggt, only="camera_head")
    assert (provenance_of(model).family, provenance_of(model).sources) == ("page4d", (str(page4d), str(vggt)))
    assert provenance_of(model).description.endswith(f"; then 69 of {total} tensors: 69 from {vggt} (vggt)")
    model.load_state_dict(model.state_dict())
    assert provenance_of(model) == WeightsProvenance("unknown", "load_state_dict called by hand")


def test_a_part_does_not_make_a_random_model_trained(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", tensors(VGGT_1B))
    model = Tree(PAGE4D)
    load_pretrained_weights(model, tmp_path / "w.safetensors", only="camera_head")
    assert provenance_of(model).family == "random"


def test_a_combined_load_is_of_the_larger_family(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", tensors(PAGE4D))
    write_safetensors(tmp_path / "b.safetensors", tensors(small("pi3")))
    model = Tree(PAGE4D)
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for encoder, family in ((True, "pi3"), (False, "page4d")):
        report = load_pretrained_weights(model, *files, prefer="pi3", load_encoder=encoder)
        assert (report["pi3_loaded"] > report["checkpoint_loaded"]) == encoder
        assert provenance_of(model).family == family
        assert len(provenance_of(model).sources) == 2
    with pytest.warns(WeightsWarning, match=r"nothing of .*b.safetensors \(pi3\) survives"):
        load_pretrained_weights(model, *files)
    assert provenance_of(model).sources == (str(tmp_path / "a.safetensors"),)


def test_a_trained_model_can_say_what_it_is(tmp_path: Path) -> None:
    model = Small()
    set_provenance(model, WeightsProvenance("vggt_mv", "trained here"))
    model.save_pretrained(tmp_path)
    assert open_weights(tmp_path).metadata[FAMILY_KEY] == "vggt_mv"
    summary = inspect_weights(tmp_path)
    assert (summary.family, summary.recorded_family) == ("vggt_mv", True)
    again = Small.from_pretrained(tmp_path)
    assert provenance_of(again).family == "vggt_mv"
    assert provenance_of(Small()).family == "random"


def test_provenance_families() -> None:
    with pytest.raises(WeightsError, match="family must be one of vggt, page4d, vggt_mv, pi3, random, unknown, got"):
        WeightsProvenance("mv", "")  # type: ignore[arg-type]


# ---- memory, in a process of its own

_MEASURE = """
import gc, resource, sys, torch
from pathlib import Path
sys.path[:0] = {path!r}
from weights_support import Tree
from vggt_mv.weights import build_from_weights, convert_weights, load_pretrained_weights
torch.set_num_threads(1)

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

shapes = {{f"aggregator.frame_blocks.{{i}}.mlp.fc1.weight": (4096, 1024) for i in range({blocks})}}
torch.ones(1000).sum()
if sys.argv[2] == "copy":
    model = Tree(shapes)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
if sys.argv[2] == "convert":
    convert_weights(sys.argv[1], sys.argv[1] + ".safetensors", dtype=torch.bfloat16)
    print(memory("VmHWM") - before)
    sys.exit()
if sys.argv[2] == "build":
    model, _ = build_from_weights(lambda: Tree(shapes), sys.argv[1])
else:
    load_pretrained_weights(model, sys.argv[1])
float(sum(value.sum() for value in model.parameters()))  # every page is touched
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "kind", "limit"),
    [("build", "safetensors", 1.15), ("build", "pt", 1.15), ("copy", "safetensors", 1.25), ("convert", "pt", 0.25)],
)
def test_memory(tmp_path: Path, how: str, kind: str, limit: float) -> None:
    """Resident memory over that before the load, as a multiple of the file, with every tensor touched after it.

    A build takes the mapped file alone. A copy into a model that holds tensors takes the old values once more (to put
    back after a failure), beside pages of the file only for the tensor at hand. So does a conversion: a tensor and its
    copy in the new dtype, of the file's twelve.
    """
    blocks = 12  # 201 MB
    shapes = {f"aggregator.frame_blocks.{i}.mlp.fc1.weight": (4096, 1024) for i in range(blocks)}
    path = tmp_path / f"w.{kind}"
    state = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(shapes.items())}
    write_safetensors(path, state) if kind == "safetensors" else torch.save(state, path)
    script = _MEASURE.format(path=[str(Path(__file__).parent), *sys.path], blocks=blocks)
    done = subprocess.run([sys.executable, "-c", script, str(path), how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= limit * path.stat().st_size
