"""Counts, bounds, JSON and the printed table."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from weights_support import aggregator_of, manifest, small, with_aliases

from vggt_mv.weights import Entry, LoadReport, WeightsError, WeightsMismatchError, plan_load
from vggt_mv.weights.report import STATUSES

VGGT_1B, PAGE4D, PI3 = manifest("vggt_1b"), manifest("page4d_1b"), manifest("pi3")


@pytest.fixture(scope="module")
def vggt_report() -> LoadReport:
    return plan_load(PAGE4D, VGGT_1B).report()


def test_it_is_the_dict_that_scripts_read(vggt_report: LoadReport) -> None:
    assert isinstance(vggt_report, dict)
    assert vggt_report["checkpoint_loaded"] == 1797
    assert vggt_report["pi3_loaded"] == vggt_report["missing"] == vggt_report["unexpected"] == 0
    assert all(status in vggt_report for status in STATUSES)
    assert json.loads(json.dumps(vggt_report))["loaded"] == 1797
    assert repr(vggt_report).startswith("LoadReport(checkpoint_loaded=1797, cannot_have=8, loaded=1797, kept_init=8,")


def test_raise_unless(vggt_report: LoadReport) -> None:
    vggt_report.raise_unless()
    vggt_report.raise_unless(missing=0, unexpected=0, loaded=1797, cannot_have=8)
    with pytest.raises(WeightsMismatchError, match=r"kept_init is 8 \(wanted at most 7\)") as error:
        vggt_report.raise_unless(kept_init=7)
    assert str(error.value) == (
        "state_dict -> manifest: kept_init is 8 (wanted at most 7); most of it in aggregator.spatial_mask_head "
        "(8: VGGT has no aggregator.spatial_mask_head; it stays untrained (mask_layer=None leaves it out))"
    )
    assert error.value.table == str(vggt_report)
    with pytest.raises(WeightsMismatchError, match=r"loaded is 1797 \(wanted at least 1805\); missing is 0"):
        vggt_report.raise_unless(loaded=1805, missing=-1)
    with pytest.raises(WeightsError, match="raise_unless: no counter 'mising'; there are checkpoint_loaded, pi3"):
        vggt_report.raise_unless(mising=0)


def test_strict(vggt_report: LoadReport) -> None:
    with pytest.raises(WeightsMismatchError, match="strict: 8 of the model not in the file") as error:
        vggt_report.raise_unless_strict()
    assert error.value.table == TABLE
    plan_load(PAGE4D, VGGT_1B, only=["camera_head", "aggregator.frame_blocks"]).report().raise_unless_strict()
    plan_load(PAGE4D, PAGE4D, pi3=PI3).report().raise_unless_strict()  # Pi3's own parts are no offence
    damaged = {key: shape for key, shape in PAGE4D.items() if "point_head" not in key}
    damaged |= {"depth_head.norm.bias": (3,), "mystery": (1,)}
    with pytest.raises(WeightsMismatchError) as error:
        plan_load(PAGE4D, damaged).report().raise_unless_strict()
    assert str(error.value) == (
        "state_dict -> manifest, strict: 62 of the model not in the file, 1 of the file not in the model, "
        "1 of another shape; most of it in point_head (62: the file holds nothing of point_head)"
    )


def test_json(vggt_report: LoadReport, tmp_path: Path) -> None:
    text = vggt_report.to_json(tmp_path / "report.json")
    found = json.loads(text)
    assert (tmp_path / "report.json").read_text() == text + "\n"
    assert found["counts"] == dict(vggt_report)
    assert len(found["entries"]) == len(vggt_report.entries) == 1805
    assert found["entries"][0] == {
        "status": "loaded",
        "source": "checkpoint",
        "source_key": "aggregator.camera_token",
        "target_key": "aggregator.camera_token",
        "wins": True,
        "source_shape": [1, 2, 1, 1024],
        "target_shape": [1, 2, 1, 1024],
    }
    (kept, *_) = [entry for entry in found["entries"] if entry["status"] == "kept_init"]
    assert kept["cause"] == "cannot_have"
    assert found["sources"][0]["family"] == "vggt"
    assert found["applied"] is False
    assert json.loads(vggt_report.to_json(indent=None)) == found


TABLE = """\
checkpoint  state_dict: vggt, 1797 tensors
     model  manifest, 1805 tensors, 1797 planned

module                         tensors   loaded   kept init
───────────────────────────────────────────────────────────
aggregator.camera_token              1        1
aggregator.register_token            1        1
aggregator.patch_embed             344      344
aggregator.frame_blocks            432      432
aggregator.global_blocks           432      432
aggregator.spatial_mask_head         8                    8
camera_head                         69       69
point_head                          62       62
depth_head                          62       62
track_head                         394      394

all                               1805     1797           8

Kept at initial values
module                         tensors   why
────────────────────────────────────────────────────────────────────────────────────────────────────
aggregator.spatial_mask_head         8   VGGT has no aggregator.spatial_mask_head; it stays
                                         untrained (mask_layer=None leaves it out)"""


def test_table(vggt_report: LoadReport) -> None:
    assert str(vggt_report) == TABLE
    console = Console(file=io.StringIO(), width=100)
    console.print(vggt_report)
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "\n".join(line.rstrip() for line in file.getvalue().splitlines()) == TABLE


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [100, 80])
def test_every_table_keeps_its_width(verbose: bool, width: int) -> None:
    vggt, page4d, dual, pi3 = map(small, ("vggt_1b", "page4d_1b", "vggt_mv_aggregator_dual_memory", "pi3"))
    for model, file, second in (
        (page4d, vggt, None),
        (page4d, vggt, pi3),
        (dual, page4d, pi3),
        (dual, with_aliases(dual), None),
        (aggregator_of(page4d), {f"module.model.{key}": (9, *shape) for key, shape in page4d.items()}, None),
    ):
        report = plan_load(model, file, pi3=second, prefer="pi3", load_encoder=True).report()
        text = report.to_text(verbose=verbose, width=width)
        assert max(map(len, text.splitlines())) <= width


def test_blocks_are_given_as_ranges() -> None:
    text = str(plan_load(PAGE4D, PI3).report())
    rounds = "Pi3 has 36 decoder blocks: rounds 18 and later keep what"
    assert f"aggregator.frame_blocks.18-23        108   {rounds}" in text
    text = str(plan_load(PAGE4D, VGGT_1B, only=["frame_blocks.3", "frame_blocks.7-9"]).report())
    assert "aggregator.frame_blocks.0-2,4-6,10-23" in text


def test_everything_that_was_not_used_is_in_the_table() -> None:
    file = {**with_aliases(small("page4d_1b"), both=True), "stray": (1,), "point_head.norm.bias": (7,)}
    text = str(plan_load(small("page4d_1b"), file).report())
    assert "Second names of tensors that were loaded" in text
    assert "stray                      1   no such name in any known scheme" in text
    assert "point_head.norm.bias: [7] in the file, [16] in the model" in text


def test_the_verbose_table_names_every_tensor() -> None:
    report = plan_load(small("page4d_1b"), small("vggt_1b"), pi3=small("pi3"), prefer="pi3").report()
    text = report.to_text(verbose=True, width=200)
    for entry in report.entries:
        assert entry.target_key is None or entry.target_key in text
        assert entry.source_key is None or entry.source_key in text
    assert "(overridden)" in text
    assert "  <- decoder.0.norm1.weight" in text


def test_without_rich_the_counts_are_left(vggt_report: LoadReport, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "vggt_mv.weights.table" or name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert str(vggt_report).startswith("state_dict -> manifest: checkpoint_loaded 1797, cannot_have 8, loaded 1797")


def test_the_head_names_what_was_peeled() -> None:
    file = {"state_dict": {f"module.{key}": shape for key, shape in VGGT_1B.items()}, "epoch": 3}
    report = plan_load(PAGE4D, file).report()
    first = str(report).splitlines()[0]
    assert first == "checkpoint  state_dict: vggt, 1797 tensors, unwrapped 'state_dict', prefix removed: 'module.'"
    assert report.sources[0].container == ("state_dict",)
    assert report.sources[0].prefixes == ("module.",)
    assert report.notes == ("besides 'state_dict' the file holds 'epoch': not used",)


def test_an_empty_report() -> None:
    report = LoadReport([])
    assert set(report.values()) == {0}
    report.raise_unless_strict()
    assert "all" in str(report)


def test_entries_know_their_winner() -> None:
    entry = Entry("loaded", "checkpoint", "a", "b", wins=True)
    loser = Entry("overridden", "pi3", "c", "b", reason="taken from the checkpoint file")
    report = LoadReport([entry, loser])
    assert report.winners == {"b": entry}
    assert (report.filled(), report["overridden"], report["source_tensors"]) == (1, 1, 2)
