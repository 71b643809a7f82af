"""Values into models: right, complete, and all or nothing."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from weights_support import Tree, aggregator_of, manifest, small, snapshot, tensors, unchanged, with_aliases

from vggt_mv.weights import (
    AliasConflictError,
    TensorValueError,
    WeightsError,
    WeightsMismatchError,
    WeightsWarning,
    apply_plan,
    load_pretrained_weights,
    open_weights,
    pages,
    plan_load,
    provenance_of,
)
from vggt_mv.weights import apply as apply_module
from vggt_mv.weights.safetensors_io import write_safetensors

# The aggregator and one head: enough for everything here, and many tests write and read a file.
PAGE4D, VGGT_1B = (
    {key: shape for key, shape in small(name).items() if key.startswith(("aggregator.", "camera_head."))}
    for name in ("page4d_1b", "vggt_1b")
)
PI3 = small("pi3")
TOKEN = "aggregator.camera_token"
Save = Callable[[dict[str, Any], str], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(state: dict[str, Any], name: str = "w.safetensors") -> Path:
        if name.endswith(".pt"):
            torch.save(state, tmp_path / name)
        else:
            write_safetensors(tmp_path / name, state)  # quicker, and there are many tests
        return tmp_path / name

    return save


def load(model: nn.Module, *args: Any, **options: Any) -> Any:
    """`load_pretrained_weights` where warnings are not the matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsWarning)
        return load_pretrained_weights(model, *args, **options)


# ---- values


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_values_arrive(save: Save, assign: bool, meta: bool) -> None:
    state = tensors(VGGT_1B)
    with torch.device("meta" if meta else "cpu"):
        model = Tree(PAGE4D)
    if meta:
        model._scale = torch.ones(1)
    report = load(model, save(state), assign=assign)
    assert report.applied
    assert report["checkpoint_loaded"] == len(state)
    for key, value in model.state_dict().items():
        if key in state:
            assert torch.equal(value, state[key])
        elif meta:
            assert value.is_meta
        else:
            assert torch.equal(value, torch.full_like(value, 0.5))
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def test_copying_keeps_the_models_memory(save: Save) -> None:
    model = Tree(PAGE4D)
    parameter = model.get_parameter(TOKEN)
    address = parameter.data_ptr()
    load(model, save(tensors(PAGE4D)))
    assert model.get_parameter(TOKEN) is parameter
    assert parameter.data_ptr() == address


def test_assigning_keeps_parameters_and_flags(save: Save) -> None:
    model = Tree(PAGE4D)
    parameter = model.get_parameter(TOKEN)
    parameter.requires_grad_(False)
    load(model, save(tensors(PAGE4D)), assign=True)
    assert model.get_parameter(TOKEN) is parameter  # an optimizer that holds it stays right
    with torch.device("meta"):
        meta = Tree(PAGE4D)
    meta.get_parameter(TOKEN).requires_grad_(False)
    load(meta, save(tensors(PAGE4D)))
    assert not meta.get_parameter(TOKEN).requires_grad
    assert meta.get_parameter("camera_head.token_norm.bias").requires_grad


def test_training_an_assigned_model_leaves_the_file_alone(save: Save) -> None:
    path = save(tensors(PAGE4D))
    before = path.read_bytes()
    model = Tree(PAGE4D)
    load(model, path, assign=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_pi3_values_go_where_the_table_says(save: Save) -> None:
    state = tensors(PI3)
    model = Tree(PAGE4D)
    report = load(model, None, save(state), load_encoder=True)
    now = model.state_dict()
    assert report["pi3_loaded"] == sum(entry.source == "pi3" and entry.wins for entry in report.entries)
    for index, kind in ((0, "frame"), (1, "global"), (2, "frame"), (3, "global")):
        key = f"aggregator.{kind}_blocks.{index // 2}.attn.qkv.weight"
        assert torch.equal(now[key], state[f"decoder.{index}.attn.qkv.weight"])
    token = now["aggregator.register_token"]
    for variant in range(2):
        assert torch.equal(token[0, variant], state["register_token"][0, 0, :4])
    assert torch.equal(now["aggregator.patch_embed.register_tokens"], state["encoder.register_tokens"])
    assert torch.equal(now["camera_head.token_norm.bias"], torch.full((16,), 0.5))


def test_position_grids_are_resampled_as_the_model_resamples_them(save: Save) -> None:
    state = tensors(PI3)
    model = Tree({**PAGE4D, "aggregator.patch_embed.pos_embed": (1, 37, 8)})
    load(model, None, save(state), load_encoder=True)
    old = state["encoder.pos_embed"]
    grid = old[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    wanted = torch.cat((old[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 36, 8)), dim=1)
    assert torch.equal(model.state_dict()["aggregator.patch_embed.pos_embed"], wanted)


@pytest.mark.parametrize("prefer", ["checkpoint", "pi3"])
def test_the_preferred_file_wins(save: Save, prefer: str) -> None:
    state, pi3 = tensors(PAGE4D, 1), tensors(PI3, 2)
    model = Tree(PAGE4D)
    load(model, save(state, "a.pt"), save(pi3, "b.pt"), prefer=prefer)
    wanted = pi3["decoder.1.norm1.weight"] if prefer == "pi3" else state["aggregator.global_blocks.0.norm1.weight"]
    assert torch.equal(model.state_dict()["aggregator.global_blocks.0.norm1.weight"], wanted)
    assert torch.equal(model.state_dict()[TOKEN], state[TOKEN])


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_dual_streams_start_as_copies_of_their_own(save: Save, assign: bool, meta: bool) -> None:
    dual = {f"aggregator.{key}": shape for key, shape in small("vggt_mv_aggregator_dual_memory").items()
            if "view_blocks" not in key and "time_blocks" not in key}  # fmt: skip
    with torch.device("meta" if meta else "cpu"):
        model = Tree({**PAGE4D, **dual})
    state = tensors(PAGE4D)
    report = load(model, save(state), assign=assign)
    assert report["copied"] == 4 * 2 * 18
    now = dict(model.named_parameters())
    for key, value in state.items():
        for stream in ("pose", "geo"):
            copy = now.get(key.replace(".frame_blocks", f".{stream}_frame_blocks"))
            if copy is not None and "frame_blocks" in key:
                assert torch.equal(copy, value)
                assert copy.data_ptr() != now[key].data_ptr()
    with torch.no_grad():
        now["aggregator.frame_blocks.0.norm1.weight"].zero_()
    assert now["aggregator.pose_frame_blocks.0.norm1.weight"].abs().sum() > 0


def test_tied_tensors_of_a_file_are_untied(save: Save) -> None:
    """Saved while tied, they share one storage of the file: in a model they must not."""
    state = tensors(PAGE4D)
    one, other = "aggregator.frame_blocks.0.norm1.weight", "aggregator.frame_blocks.0.norm2.weight"
    state[other] = state[one]
    with torch.device("meta"):
        model = Tree(PAGE4D)
    load(model, save(state, "tied.pt"))
    assert torch.equal(model.get_parameter(one), model.get_parameter(other))
    with torch.no_grad():
        model.get_parameter(one).zero_()
    assert model.get_parameter(other).abs().sum() > 0


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_tied_parameters_of_a_model_stay_tied(save: Save, assign: bool) -> None:
    shapes = {"aggregator.camera_token": (2, 3), "camera_head.empty_pose_tokens": (2, 3)}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tree(shapes)
        tied = model.get_parameter("aggregator.camera_token")
        model.get_submodule("camera_head").empty_pose_tokens = tied
        value = torch.ones(2, 3) * 7
        load(model, save({key: value.clone() for key in shapes}), assign=assign)
        assert model.get_parameter("aggregator.camera_token") is model.get_parameter("camera_head.empty_pose_tokens")
        assert torch.equal(model.get_parameter("aggregator.camera_token"), value)


def test_wrapped_models_are_loaded(save: Save) -> None:
    model = nn.Sequential()
    model.add_module("module", Tree(PAGE4D))
    state = tensors(PAGE4D)
    load(model, save({f"_orig_mod.{key}": value for key, value in state.items()}))
    assert torch.equal(model.state_dict()[f"module.{TOKEN}"], state[TOKEN])


def test_persistent_buffers_are_loaded(save: Save) -> None:
    for device, assign in itertools.product(("cpu", "meta"), (False, True)):
        with torch.device(device):
            model = Tree(PAGE4D)
            model.register_buffer("mean", torch.zeros(3))
        load(model, save({**tensors(PAGE4D), "mean": torch.arange(3.0)}), assign=assign)
        assert model.get_buffer("mean").tolist() == [0.0, 1.0, 2.0]
        assert not isinstance(model.get_buffer("mean"), nn.Parameter)


def test_a_meta_model_makes_the_buffers_that_no_file_holds(save: Save) -> None:
    class Resets(Tree):
        def reset_buffers(self, device: Any = None) -> None:
            self._scale = torch.tensor([2.0], device=device)

    with torch.device("meta"):
        model, helpless = Resets(PAGE4D), Tree(PAGE4D)
    path = save(tensors(PAGE4D))
    load(model, path)
    assert model.get_buffer("_scale").tolist() == [2.0]
    with pytest.warns(WeightsWarning, match="1 tensors are still without values on the meta device, such as '_scale'"):
        load_pretrained_weights(helpless, path)


# ---- all or nothing


class Boom(Exception):
    pass


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize(("error", "after"), [(Boom, 0.0), (KeyboardInterrupt, 0.5), (MemoryError, 1.0)])
def test_a_failure_while_writing_undoes_all(
    save: Save, assign: bool, meta: bool, error: type[BaseException], after: float
) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Tree(PAGE4D)
    before, objects = snapshot(model), dict(model.named_parameters())
    stop = int(after * (len(PAGE4D) - 1))
    steps = itertools.count()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write" and next(steps) == stop:
            raise error

    with pytest.raises(error):
        load(model, save(tensors(PAGE4D)), assign=assign, progress=progress)
    assert all(value is objects[name] for name, value in model.named_parameters())
    if meta:
        assert all(value.is_meta for value in model.parameters())
    else:
        assert unchanged(model, before)
    assert provenance_of(model).family == "random"
    load(model, save(tensors(PAGE4D)), assign=assign)  # and the model is still good for a load
    assert provenance_of(model).family == "page4d"


@pytest.mark.parametrize("number", [0, 1, 40, 120])
def test_a_failing_copy_undoes_all(save: Save, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The copy itself fails, after the tensor was half written."""
    model = Tree(PAGE4D)
    before = snapshot(model)
    copy, calls = Tensor.copy_, itertools.count()

    def failing(self: Tensor, other: Tensor, *args: Any) -> Tensor:
        if next(calls) == number:
            self.view(-1)[: max(self.numel() // 2, 1)] = -1.0
            raise RuntimeError("device lost")
        return copy(self, other, *args)

    monkeypatch.setattr(Tensor, "copy_", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        load(model, save(tensors(PAGE4D)))
    assert unchanged(model, before)


BAD_STATES: list[tuple[str, Callable[[dict[str, Tensor]], Any], type[Exception], str]] = [
    (
        "integers",
        lambda s: s.update({TOKEN: s[TOKEN].long()}),
        TensorValueError,
        "must have a float dtype .* got int64",
    ),
    (
        "alias",
        lambda s: s.update({"aggregator.view_blocks.1.ls1.gamma": s["aggregator.global_blocks.1.ls1.gamma"] + 1}),
        AliasConflictError,
        "'aggregator.global_blocks.1.ls1.gamma' and 'aggregator.view_blocks.1.ls1.gamma' are one tensor and must be "
        "equal, got other values; remove one of them from the file",
    ),
    ("missing", lambda s: s.pop(TOKEN), WeightsMismatchError, "strict: 1 of the model not in the file"),
    (
        "extra",
        lambda s: s.update({"more": torch.ones(1)}),
        WeightsMismatchError,
        "strict: 1 of the file not in the model",
    ),
    ("shape", lambda s: s.update({TOKEN: torch.ones(3)}), WeightsMismatchError, "strict: 1 of another shape"),
    ("nan", lambda s: s[TOKEN].view(-1)[0].fill_(torch.nan), TensorValueError, f"'{TOKEN}' must be finite, got 1 NaN"),
    ("inf", lambda s: s[TOKEN].view(-1)[:2].fill_(-torch.inf), TensorValueError, "must be finite, got 2 Inf"),
]


@pytest.mark.parametrize(("change", "kind", "text"), [c[1:] for c in BAD_STATES], ids=[c[0] for c in BAD_STATES])
def test_bad_files_leave_the_model_untouched(
    save: Save, change: Callable[[dict[str, Tensor]], Any], kind: type[Exception], text: str
) -> None:
    state = tensors(PAGE4D)
    change(state)
    model = Tree(PAGE4D)
    before = snapshot(model)
    path = save(state)
    with pytest.raises(kind, match=text) as error:
        load_pretrained_weights(model, path, strict=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert unchanged(model, before)


# ---- aliases that agree


def test_agreeing_aliases_are_loaded_once(save: Save) -> None:
    state = with_aliases(tensors(PAGE4D), both=True)
    state["aggregator.view_blocks.0.ls1.gamma"] = state["aggregator.global_blocks.0.ls1.gamma"].clone()
    model = Tree(PAGE4D)
    report = load(model, save(state), strict=True)
    assert (report["loaded"], report["aliased"]) == (len(PAGE4D), 4 * 18)


def test_agreement_is_of_bits(save: Save) -> None:
    """NaN equals itself here, and a dtype that loses nothing agrees."""
    shapes = PAGE4D
    state = with_aliases(tensors(shapes), both=True)
    one, other = "aggregator.global_blocks.0.ls1.gamma", "aggregator.view_blocks.0.ls1.gamma"
    state[one] = state[one].clone()
    state[one][0] = torch.nan
    state[other] = state[one].clone()
    with pytest.warns(WeightsWarning, match="hold NaN or Inf"):
        load_pretrained_weights(Tree(shapes), save(state))
    state[one] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    state[other] = state[one].double()
    assert load(Tree(shapes), save(state))["missing"] == 0
    state[other] = state[other] + 1e-12
    with pytest.raises(AliasConflictError):
        load(Tree(shapes), save(state))


# ---- NaN, dtypes, warnings


def test_nan_is_a_warning_entry(save: Save) -> None:
    state = tensors(VGGT_1B)
    state[TOKEN].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    state["camera_head.token_norm.bias"][0] = torch.nan
    model = Tree(PAGE4D)
    path = save(state)
    line = f"2 tensors of {path} hold NaN or Inf, such as '{TOKEN}' (1 NaN, 2 Inf)"
    with pytest.warns(WeightsWarning) as caught:
        report = load_pretrained_weights(model, path)
    assert [str(w.message) for w in caught] == [line]
    assert report.warnings == (line,)
    assert report["non_finite"] == 2
    assert report.winners[TOKEN].warning == "1 NaN, 2 Inf"
    assert torch.isnan(model.get_parameter(TOKEN)).sum() == 1  # what the file says is what is loaded


def test_nan_in_what_is_not_loaded_is_no_matter(save: Save) -> None:
    state = tensors(VGGT_1B)
    state[TOKEN][0] = torch.nan
    report = load(Tree(PAGE4D), save(state), only="camera_head")
    assert report["non_finite"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_search_for_nan_sees_every_dtype(dtype: torch.dtype) -> None:
    values = torch.full((1000,), 60000.0).to(dtype)  # a sum in float16 would overflow
    assert apply_module.non_finite_values(values) == ""
    values[500] = torch.nan
    assert apply_module.non_finite_values(values) == "1 NaN"
    assert apply_module.non_finite_values(torch.full((9,), 3e38)) == ""  # the sum overflows, the values do not
    assert apply_module.non_finite_values(torch.tensor([torch.inf, -torch.inf])) == "2 Inf"
    assert apply_module.non_finite_values(torch.empty(0)) == ""
    assert apply_module.non_finite_values(torch.tensor([1])) == ""


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_converted_and_said(save: Save, assign: bool, given: torch.dtype) -> None:
    state = tensors(VGGT_1B, dtype=given)
    model = Tree(PAGE4D)
    report = load(model, save(state), assign=assign)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.get_parameter(TOKEN), state[TOKEN].float())
    name = str(given).removeprefix("torch.")
    assert f"{len(state)} tensors were converted from {name} to float32" in report.notes
    entry = report.winners[TOKEN]
    assert (entry.source_dtype, entry.target_dtype) == (name, "float32")
    assert entry.warning == f"converted from {name} to float32"


def test_a_dtype_can_be_asked_for(save: Save) -> None:
    state = tensors(VGGT_1B, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = Tree(VGGT_1B)
    model._scale = torch.ones(1)
    plan = plan_load(model, open_weights(save(state)))
    report = apply_plan(model, plan, dtype=torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert not any("converted" in note for note in report.notes)
    real = Tree(VGGT_1B)
    apply_plan(real, plan_load(real, open_weights(save(tensors(VGGT_1B)))), assign=True, dtype=torch.float16)
    assert {value.dtype for value in real.state_dict().values()} == {torch.float16}


def test_under_half_warns_in_one_line(save: Save) -> None:
    model = Tree(PAGE4D)
    file = {key: value for key, value in tensors(VGGT_1B).items() if key.startswith("camera_head.")}
    with pytest.warns(WeightsWarning) as caught:
        load_pretrained_weights(model, save(file))
    (line,) = (str(w.message) for w in caught)
    assert line.startswith(f"only 69 of {len(PAGE4D)} tensors of Tree are in ")
    assert "\n" not in line
    assert provenance_of(model).family == "random"


def test_the_whole_model_file_in_an_aggregator(save: Save) -> None:
    """The failure that this package exists to end: 2082 tensors silently missing."""
    model = Tree(aggregator_of(PAGE4D))
    state = tensors(PAGE4D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_pretrained_weights(model, save(state))
    assert (report["missing"], report["kept_init"]) == (0, 0)
    assert torch.equal(model.state_dict()["camera_token"], state[TOKEN])


# ---- misuse


def test_apply_checks_the_model() -> None:
    plan = plan_load(Tree(PAGE4D), tensors(PAGE4D))
    other = {**PAGE4D, TOKEN: (1, 2, 1, 9)}
    with pytest.raises(WeightsError, match=r"the plan is for another model: '.*camera_token' is \[1, 2, 1, 8\] there"):
        apply_plan(Tree(other), plan)
    with pytest.raises(WeightsError, match=r"the plan is for another model: '.*' is .* there and absent here"):
        apply_plan(Tree(aggregator_of(PAGE4D)), plan)
    with pytest.raises(WeightsError, match="the plan is for another model: it does not know 'more'"):
        apply_plan(Tree({**PAGE4D, "more": (1,)}), plan)


def test_apply_needs_values() -> None:
    model = Tree(PAGE4D)
    with pytest.raises(
        WeightsError, match="the plan of state_dict was made from shapes: checkpoint '.*' has no values"
    ):
        apply_plan(model, plan_load(model, PAGE4D))
    with torch.device("meta"):
        meta = Tree(PAGE4D)
    with pytest.raises(WeightsError, match="is on the meta device and has no values"):
        apply_plan(model, plan_load(model, meta.state_dict()))


def test_a_plan_of_a_manifest_fits_the_module() -> None:
    model, state = Tree(PAGE4D), tensors(VGGT_1B)
    apply_plan(model, plan_load(PAGE4D, state))
    assert torch.equal(model.get_parameter(TOKEN), state[TOKEN])


def test_apply_arguments() -> None:
    model = Tree(PAGE4D)
    plan = plan_load(model, tensors(PAGE4D))
    with pytest.raises(WeightsError, match="finite must be 'warn', 'raise' or 'skip', got 'no'"):
        apply_plan(model, plan, finite="no")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="dtype must be one of float64, float32, float16, bfloat16, got int8"):
        apply_plan(model, plan, dtype=torch.int8)
    with pytest.raises(WeightsError, match="nothing to load: give checkpoint_path, pi3_path or both"):
        load_pretrained_weights(model)


def test_skipping_the_search_for_nan() -> None:
    model, state = Tree(PAGE4D), tensors(PAGE4D)
    state[TOKEN].fill_(torch.nan)
    assert apply_plan(model, plan_load(model, state), finite="skip")["non_finite"] == 0


def test_a_module_whose_names_are_not_attributes() -> None:
    class Renames(Tree):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"camera_head.x{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

    model = Renames({"a": (2,)})
    with pytest.raises(WeightsError, match="lists 'camera_head.xa' in its state dict and has no such attribute"):
        apply_plan(model, plan_load(model, {"camera_head.xa": torch.ones(2)}))


def test_modified_tensors_survive_a_second_use(save: Save) -> None:
    """An opened file is the caller's: what was written to its tensors is never dropped."""
    file = open_weights(save(tensors(manifest_rows())))
    key = "aggregator.frame_blocks.0.mlp.fc1.weight"
    file.tensors[key].fill_(3.0)
    for _ in range(2):
        model = Tree(manifest_rows())
        apply_plan(model, plan_load(model, file))
        assert bool((model.get_parameter(key) == 3.0).all())


def manifest_rows() -> dict[str, tuple[int, ...]]:
    """One block at full width: tensors of many pages."""
    return {key: shape for key, shape in manifest("vggt_1b").items() if key.startswith("aggregator.frame_blocks.0.")}


def test_pages_are_given_back_only_while_nobody_else_reads_them(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tensors(manifest_rows()))
    released: list[int] = []
    monkeypatch.setattr(pages, "drop", lambda tensor: released.append(tensor.data_ptr()))
    model = Tree(manifest_rows())
    apply_plan(model, plan_load(model, open_weights(path)))
    assert released == []
    load(model, path)  # read to check it, and again to copy it
    assert len(released) == 2 * len(manifest_rows())
    released.clear()
    load(model, path, assign=True)  # read to check it; then it is the model's
    assert len(released) == len(manifest_rows())
    assert all(bool((value != 0.5).any()) for value in model.parameters())
    released.clear()
    with torch.device("meta"):
        meta = Tree(manifest_rows())
    meta._scale = torch.ones(1)
    load(meta, path)
    assert released == []


def test_progress_counts_bytes(save: Save) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    state = tensors(PAGE4D)
    load(
        Tree(PAGE4D), save(state), progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total))
    )
    size = sum(value.nbytes for value in state.values())
    assert list(seen) == ["check", "write"]
    for steps in seen.values():
        assert steps[-1] == (size, size)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
