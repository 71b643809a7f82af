"""Names to names: what a tensor name of a checkpoint means, and which family of models a file belongs to.

Everything here is about strings. All comparisons happen between *canonical names*: those of the whole model
(``aggregator.frame_blocks.0.norm1.weight``, ``camera_head.token_norm.bias``), whatever prefixes, aliases or missing
``aggregator.`` the file or the model were written with. `canonical_name` is stateless, so a file and a model are
brought to the same names by the same function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple

__all__ = [
    "ALIASES",
    "FAMILIES",
    "PREFIXES",
    "Detection",
    "Family",
    "Pi3Target",
    "canonical_name",
    "detect",
    "has_alias",
    "index_of",
    "known_families",
    "module_of",
    "nearest_schemes",
    "peel",
    "pi3_target",
    "single_stream_name",
]

Family = Literal["vggt", "page4d", "vggt_mv", "pi3"]
FAMILIES: Final[tuple[Family, ...]] = ("vggt", "page4d", "vggt_mv", "pi3")

FAMILY_KEY: Final = "vggt_mv.family"  # key of a safetensors file's metadata that records the family

ALIASES: Final[dict[str, str]] = {"view_blocks": "global_blocks", "time_blocks": "frame_blocks"}
PREFIXES: Final[tuple[str, ...]] = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, trainers
_CACHED: Final = 16384  # names of two of the largest files; these functions are called many times for each

STREAMS: Final[tuple[str, ...]] = ("pose_", "geo_")

_WB = r"\.(?:weight|bias)"
_BLOCK = rf"\d+\.(?:(?:norm[12]|attn\.(?:qkv|proj|q_norm|k_norm)|mlp\.(?:fc[12]|w12|w3)){_WB}|ls[12]\.gamma)"
_VIT = (
    rf"(?:cls_token|pos_embed|register_tokens|mask_token|patch_embed\.(?:proj|norm){_WB}|norm{_WB}"
    rf"|blocks\.(?:\d+\.)?{_BLOCK}|proj{_WB})"
)
_DPT = (
    rf"(?:(?:norm|projects\.\d+|resize_layers\.\d+|scratch\.output_conv1|scratch\.output_conv2(?:\.\d+)?){_WB}"
    rf"|scratch\.layer\d_rn\.weight|scratch\.refinenet\d\.(?:out_conv|resConfUnit[12]\.conv[12]){_WB})"
)
_CAMERA = (
    rf"(?:empty_pose_tokens|trunk\.{_BLOCK}"
    rf"|(?:token_norm|trunk_norm|adaln_norm|embed_pose|poseLN_modulation\.\d+|pose_branch\.fc[12]){_WB})"
)
_TRACK = (
    rf"(?:feature_extractor\.{_DPT}|tracker\.(?:query_ref_token|updateformer\..+"
    rf"|(?:corr_mlp\.fc[12]|fmap_norm|ffeat_norm|ffeat_updater\.\d+|vis_predictor\.\d+|conf_predictor\.\d+){_WB}))"
)

_ALL: Final[frozenset[Family]] = frozenset(("vggt", "page4d", "vggt_mv"))
_MASKED: Final[frozenset[Family]] = frozenset(("page4d", "vggt_mv"))
_MV: Final[frozenset[Family]] = frozenset(("vggt_mv",))

# module of the whole model -> (names inside it, families whose files hold it)
_PARTS: Final[dict[str, tuple[re.Pattern[str], frozenset[Family]]]] = {
    name: (re.compile(pattern), families)
    for name, pattern, families in (
        ("aggregator.camera_token", r"", _ALL),
        ("aggregator.register_token", r"", _ALL),
        ("aggregator.patch_embed", _VIT, _ALL),
        ("aggregator.frame_blocks", _BLOCK, _ALL),
        ("aggregator.global_blocks", _BLOCK, _ALL),
        ("aggregator.spatial_mask_head", rf"(?:alpha_logit|tau_logit|head0\.\d+{_WB})", _MASKED),
        ("aggregator.pose_frame_blocks", _BLOCK, _MV),
        ("aggregator.pose_global_blocks", _BLOCK, _MV),
        ("aggregator.geo_frame_blocks", _BLOCK, _MV),
        ("aggregator.geo_global_blocks", _BLOCK, _MV),
        ("aggregator.lambda_pose_logit", r"", _MV),
        ("aggregator.lambda_geo_logit", r"", _MV),
        ("aggregator.memory_tokens", r"", _MV),
        ("camera_head", _CAMERA, _ALL),
        ("point_head", _DPT, _ALL),
        ("depth_head", _DPT, _ALL),
        ("track_head", _TRACK, _ALL),
    )
}
_AGGREGATOR_TOP: Final[frozenset[str]] = frozenset(
    [name.partition(".")[2] for name in _PARTS if name.startswith("aggregator.")] + list(ALIASES)
)
_PI3: Final = re.compile(
    rf"(?:(?:encoder\.)?register_token|image_mean|image_std|encoder\.{_VIT}|decoder\.{_BLOCK}"
    rf"|(?:point|conf|camera)_decoder\.(?:(?:projects|linear_out){_WB}|blocks\.{_BLOCK})"
    rf"|(?:point|conf)_head\.proj{_WB}|camera_head\.(?:res_conv|more_mlps|fc_t|fc_rot)\..+)"
)
_PI3_BLOCK: Final = re.compile(r"decoder\.(\d+)\.(.+)")


@lru_cache(maxsize=_CACHED)
def peel(name: str) -> tuple[str, tuple[str, ...]]:
    """Take wrapper prefixes off a name: ``module._orig_mod.x`` -> ``("x", ("module.", "_orig_mod."))``.

    ``_orig_mod.`` is also taken out of the middle, where a single submodule was compiled.
    """
    taken: list[str] = []
    while name.startswith(PREFIXES):
        prefix = next(p for p in PREFIXES if name.startswith(p))
        if prefix == name:
            break
        taken.append(prefix)
        name = name[len(prefix) :]
    if "._orig_mod." in name:
        taken.append("_orig_mod.")
        name = name.replace("._orig_mod.", ".")
    return name, tuple(taken)


@lru_cache(maxsize=_CACHED)
def canonical_name(name: str) -> str:
    """The whole-model name of a tensor: prefixes peeled, ``aggregator.`` added, aliases resolved.

    Example:
        >>> canonical_name("module.view_blocks.3.norm1.weight")
        'aggregator.global_blocks.3.norm1.weight'
    """
    name = peel(name)[0]
    first, dot, rest = name.partition(".")
    if first in _AGGREGATOR_TOP:
        first, dot, rest = "aggregator", ".", name
    if first != "aggregator":
        return name
    second, dot2, tail = rest.partition(".")
    return f"{first}{dot}{ALIASES.get(second, second)}{dot2}{tail}"


def has_alias(name: str) -> bool:
    """Whether a name is spelled with an alias: ``view_blocks``, ``time_blocks``."""
    return any(part in ALIASES for part in peel(name)[0].split(".", 2)[:2])


@lru_cache(maxsize=_CACHED)
def module_of(canonical: str) -> str:
    """The module that a report files a tensor under: ``aggregator.frame_blocks``, ``camera_head``, ..."""
    parts = canonical.split(".", 2)
    return ".".join(parts[:2]) if parts[0] == "aggregator" else parts[0]


@lru_cache(maxsize=_CACHED)
def index_of(canonical: str) -> int | None:
    """The block index of a name, ``aggregator.frame_blocks.7.norm1.bias`` -> 7, or None where it has none."""
    rest = canonical[len(module_of(canonical)) + 1 :]
    first = rest.partition(".")[0]
    return int(first) if first.isdigit() else None


@lru_cache(maxsize=_CACHED)
def known_families(canonical: str) -> frozenset[Family]:
    """The families whose whole-model files hold this name; empty where it is in no known scheme (Pi3 apart)."""
    part = module_of(canonical)
    found = _PARTS.get(part)
    if found is None or found[0].fullmatch(canonical[len(part) + 1 :]) is None:
        return frozenset()
    return found[1]


def part_families(part: str) -> frozenset[Family]:
    """The families whose files hold the module `part` (as named by `module_of`)."""
    found = _PARTS.get(part)
    return frozenset() if found is None else found[1]


def single_stream_name(canonical: str) -> str | None:
    """The single-stream tensor that a dual-stream tensor starts as a copy of, or None for any other name."""
    part = module_of(canonical)
    for stream in STREAMS:
        head = f"aggregator.{stream}"
        if part in (f"{head}frame_blocks", f"{head}global_blocks"):
            return "aggregator." + canonical[len(head) :]
    return None


class Pi3Target(NamedTuple):
    """Where a Pi3 tensor goes: `name` is canonical, or None where VGGT_MV has no such part."""

    name: str | None
    encoder: bool  # part of the image encoder, loaded on request only


def pi3_target(name: str) -> Pi3Target:
    """The table of Pi3 names: even decoder blocks attend inside a frame, odd ones over all frames.

    Example:
        >>> pi3_target("decoder.5.attn.qkv.weight").name
        'aggregator.global_blocks.2.attn.qkv.weight'
    """
    name = peel(name)[0]
    if name in ("register_token", "encoder.register_token"):
        return Pi3Target("aggregator.register_token", False)
    block = _PI3_BLOCK.fullmatch(name)
    if block is not None:
        index, rest = int(block.group(1)), block.group(2)
        kind = "global_blocks" if index % 2 else "frame_blocks"
        return Pi3Target(f"aggregator.{kind}.{index // 2}.{rest}", False)
    if name.startswith("encoder."):
        return Pi3Target("aggregator.patch_embed." + name[len("encoder.") :], True)
    return Pi3Target(None, False)


def is_pi3_name(name: str) -> bool:
    """Whether a name is one that Pi3 checkpoints hold."""
    return _PI3.fullmatch(peel(name)[0]) is not None


@dataclass(frozen=True)
class Detection:
    """What a set of tensor names is.

    Attributes:
        family: the family, or None where too few names are in any known scheme.
        scope: ``"whole"``, or ``"aggregator"`` where the file holds that module by itself.
        known: how many of the names are in the scheme.
        total: how many names there are.
        recorded: the family was recorded by whoever wrote the file, not inferred from names.
    """

    family: Family | None
    scope: Literal["whole", "aggregator"]
    known: int
    total: int
    recorded: bool = False

    @property
    def label(self) -> str:
        """``"page4d"``, ``"vggt (aggregator alone)"``, ``"unknown"``."""
        if self.family is None:
            return "unknown"
        return self.family + (" (aggregator alone)" if self.scope == "aggregator" else "")


# A file with a smaller share of known names than this is of another model, and not a damaged one of ours.
KNOWN_SHARE: Final = 0.1


def detect(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> Detection:
    """Tell the family of a file from its tensor names, or from the family that its writer recorded."""
    peeled = [peel(name)[0] for name in names]
    families = [(name, known_families(canonical_name(name))) for name in peeled]
    known = [(name, found) for name, found in families if found]
    pi3 = sum(is_pi3_name(name) for name in peeled)
    scope: Literal["whole", "aggregator"] = "whole"
    family: Family | None
    if pi3 > len(known):
        family, count = "pi3", pi3
    else:
        count = len(known)
        if known and all(name.partition(".")[0] in _AGGREGATOR_TOP for name, _ in known):
            scope = "aggregator"
        aliased = any(set(name.split(".", 2)[:2]) & ALIASES.keys() for name, _ in known)
        if aliased or any(found == _MV for _, found in known):
            family = "vggt_mv"
        else:
            family = "page4d" if any(found == _MASKED for _, found in known) else "vggt"
    if not peeled or count == 0 or count < KNOWN_SHARE * len(peeled):
        return Detection(None, scope, count, len(peeled))
    recorded = next((name for name in FAMILIES if name == (metadata or {}).get(FAMILY_KEY)), None)
    if recorded is not None and (recorded == "pi3") == (family == "pi3"):
        return Detection(recorded, scope, count, len(peeled), recorded=True)
    return Detection(family, scope, count, len(peeled))


def nearest_schemes(names: Iterable[str], count: int = 3) -> list[tuple[str, int]]:
    """The known schemes with the most names in common: ``[("vggt", 12), ...]``, the simplest first among equals."""
    peeled = [peel(name)[0] for name in names]
    scores: dict[str, int] = {}
    for family in FAMILIES[:3]:
        for scope in ("", " (aggregator alone)"):
            scores[family + scope] = 0
    for name in peeled:
        bare = name.partition(".")[0] in _AGGREGATOR_TOP
        for family in known_families(canonical_name(name)):
            scores[family + (" (aggregator alone)" if bare else "")] += 1
    scores["pi3"] = sum(is_pi3_name(name) for name in peeled)
    return sorted(scores.items(), key=lambda item: -item[1])[:count]


def foreign_prefix(names: Iterable[str]) -> str | None:
    """A dotted prefix that all names share and whose removal makes most of them known, else None."""
    peeled = [peel(name)[0] for name in names]
    prefix = ""
    while peeled and all("." in name for name in peeled):
        head = peeled[0].partition(".")[0] + "."
        if not all(name.startswith(head) for name in peeled):
            return None
        prefix += head
        peeled = [name[len(head) :] for name in peeled]
        found = detect(peeled)
        if found.family is not None and 2 * found.known >= found.total:
            return prefix
    return None
