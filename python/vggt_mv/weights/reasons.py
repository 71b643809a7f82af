"""Why a tensor was not used or not found: the sentences of the report, and the likely cause of a failed load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vggt_mv.weights import rules
from vggt_mv.weights.report import FILLED, Cause, Entry
from vggt_mv.weights.spec import ModelSpec

__all__ = ["PI3_NO_PART", "SourceView", "absence", "likely_cause", "unexpected"]

PI3_NO_PART: Final = "Pi3 has no such part in VGGT_MV"
_TITLES: Final = {"vggt": "VGGT", "page4d": "PAGE-4D", "vggt_mv": "VGGT_MV", "pi3": "Pi3"}
_HEADS: Final = ("camera_head", "point_head", "depth_head", "track_head")
_SWITCHES: Final = {
    "camera_head": " (enable_camera=False)",
    "point_head": " (enable_point=False)",
    "depth_head": " (enable_depth=False)",
    "track_head": " (enable_track=False)",
    "aggregator.spatial_mask_head": " (VGGT has none, VGGT_MV has one)",
    "aggregator.memory_tokens": " (no memory bank)",
}
_UNTRAINED: Final = {
    "aggregator.spatial_mask_head": "; it stays untrained (mask_layer=None leaves it out)",
}
# What a VGGT_MV file may lack because it was saved without it.
_OPTIONAL: Final = frozenset(
    [f"aggregator.{s}{kind}_blocks" for s in rules.STREAMS for kind in ("frame", "global")]
    + [f"aggregator.lambda_{s}logit" for s in rules.STREAMS]
    + ["aggregator.memory_tokens", "aggregator.spatial_mask_head"]
)


@dataclass
class SourceView:
    """What the reasons need to know of one source: what it is, and how many blocks of which modules it holds."""

    detection: rules.Detection
    depths: dict[str, int] = field(default_factory=dict)  # module -> highest block index + 1; 0 for other modules

    def add(self, canonical: str) -> None:
        """Note that the source holds something under this canonical name."""
        part, index = rules.module_of(canonical), rules.index_of(canonical)
        self.depths[part] = max(self.depths.get(part, 0), 0 if index is None else index + 1)


def unexpected(canonical: str, spec: ModelSpec, parts: dict[str, int]) -> str:
    """Why a tensor of the file has no place in the model; `parts` is module -> number of blocks of the model."""
    if canonical in spec.self_made:
        return "a buffer that the model makes itself"
    part = rules.module_of(canonical)
    if not rules.known_families(canonical):
        return f"no such tensor in {part}" if part in parts else "no such name in any known scheme"
    if part not in parts:
        if not part.startswith("aggregator") and not any(name in parts for name in _HEADS):
            return "the model is the aggregator alone"
        if rules.single_stream_name(canonical) or part.startswith("aggregator.lambda_"):
            return f"the model has no {part} (enable_dual_stream=False)"
        return f"the model has no {part}{_SWITCHES.get(part, '')}"
    index = rules.index_of(canonical)
    if index is not None and index >= parts[part] > 0:
        return f"the model has only {parts[part]} blocks in {part}"
    return f"the model has no such tensor in {part}"


def absence(canonical: str, source: SourceView, *, load_encoder: bool) -> tuple[str, Cause]:
    """Why a source did not fill a tensor of the model, and whether it could have."""
    family, part = source.detection.family, rules.module_of(canonical)
    index = rules.index_of(canonical)
    if family == "pi3":
        return _absence_pi3(canonical, part, index, source, load_encoder)
    families = rules.part_families(part)
    if family is not None and families and family not in families:
        return f"{_TITLES[family]} has no {part}{_UNTRAINED.get(part, '')}", "cannot_have"
    if part not in source.depths:
        if part in _OPTIONAL:
            return f"the file was saved without {part}{_UNTRAINED.get(part, '')}", "cannot_have"
        if source.detection.scope == "aggregator" and not part.startswith("aggregator"):
            return "the file holds the aggregator alone", "missing"
        return f"the file holds nothing of {part}", "missing"
    if index is not None and index >= source.depths[part] > 0:
        return f"the file has only {source.depths[part]} blocks in {part}", "missing"
    return "the file has no such tensor", "missing"


def _absence_pi3(
    canonical: str, part: str, index: int | None, source: SourceView, load_encoder: bool
) -> tuple[str, Cause]:
    if part == "aggregator.patch_embed":
        if canonical.endswith(".mask_token"):
            return "Pi3's encoder has no mask token", "cannot_have"
        if not load_encoder:
            return "load_encoder=False", "requested"
        return "the file has no such tensor", "missing"
    if part in ("aggregator.frame_blocks", "aggregator.global_blocks") and index is not None:
        blocks = sum(source.depths.get(f"aggregator.{kind}_blocks", 0) for kind in ("frame", "global"))
        if index >= source.depths.get(part, 0):
            rounds = source.depths.get(part, 0)
            return f"Pi3 has {blocks} decoder blocks: rounds {rounds} and later keep what they had", "cannot_have"
        return "the file has no such tensor", "missing"
    if part == "aggregator.register_token":
        return "the file has no such tensor", "missing"
    return f"Pi3 has nothing for {part}", "cannot_have"


def likely_cause(entries: Sequence[Entry], views: Sequence[SourceView], spec: ModelSpec) -> str:
    """Why under half of the model's tensors were found, in half a sentence."""
    mismatched = [entry for entry in entries if entry.status == "shape_mismatch"]
    matched = sum(entry.status in FILLED and entry.source is not None for entry in entries)
    from_files = [entry for entry in entries if entry.source_key is not None]
    if mismatched and len(mismatched) >= matched:
        worst = mismatched[0]
        return (
            f"a model of another size: {worst.target_key} is {list(worst.source_shape or ())} in the file and "
            f"{list(worst.target_shape or ())} in the model"
        )
    strange = [entry for entry in from_files if entry.status == "unexpected" and not entry.known]
    if from_files and 2 * len(strange) >= len(from_files):
        example, reason = strange[0].source_key, strange[0].reason
        return f"{len(strange)} of {len(from_files)} names of the file are not of this model ({example!r}: {reason})"
    if views and all(view.detection.family == "pi3" for view in views):
        return "Pi3 holds only the attention blocks; a whole-model checkpoint (checkpoint_path) has the rest"
    if any(view.detection.scope == "aggregator" for view in views) and "camera_head" in spec.parts():
        return "the file holds the aggregator alone"
    missing = Counter(rules.module_of(rules.canonical_name(e.target_key or "")) for e in entries if e.cause)
    parts = ", ".join(part for part, _ in missing.most_common(3))
    return f"the file holds only part of a model; nothing or little was found for {parts}"
