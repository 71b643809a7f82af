"""What a model's weights are and where they came from, remembered on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from torch import nn

from vggt_mv.weights.errors import WeightsError
from vggt_mv.weights.report import LoadReport

__all__ = ["ProvenanceFamily", "WeightsProvenance", "provenance_of", "record_load", "set_provenance"]

ProvenanceFamily = Literal["vggt", "page4d", "vggt_mv", "pi3", "random", "unknown"]
_ATTRIBUTE: Final = "_weights_provenance"


@dataclass(frozen=True)
class WeightsProvenance:
    """Family of a model's weights, one line that describes them, and the files they came from.

    `family` says what the weights were trained for: ``vggt``, ``page4d`` and ``pi3`` learnt frame/global attention,
    ``vggt_mv`` view/time attention; ``random`` weights learnt nothing, of ``unknown`` ones nothing can be said.
    """

    family: ProvenanceFamily
    description: str
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in get_args(ProvenanceFamily):
            known = ", ".join(get_args(ProvenanceFamily))
            raise WeightsError(f"WeightsProvenance: family must be one of {known}, got {self.family!r}")


_RANDOM: Final = WeightsProvenance("random", "random initial values")
BY_HAND: Final = WeightsProvenance("unknown", "load_state_dict called by hand")


def provenance_of(model: nn.Module) -> WeightsProvenance:
    """Where the weights of `model` came from; ``random`` for a model that nothing was loaded into.

    A ``load_state_dict`` of the whole model makes it ``unknown``; one of a submodule goes unnoticed.

    Example:
        >>> provenance_of(nn.Linear(2, 2)).family
        'random'
    """
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, WeightsProvenance) else _RANDOM


def set_provenance(model: nn.Module, provenance: WeightsProvenance) -> None:
    """Record where weights came from, as the loaders do; for trainers whose result is of another family.

    ``save_pretrained`` writes the family into the file.
    """
    object.__setattr__(model, _ATTRIBUTE, provenance)


def record_load(model: nn.Module, report: LoadReport) -> WeightsProvenance:
    """Record a load that was applied, and return what was recorded.

    The family is that of the source with the most tensors in the model. A load of less than half of the model is a
    part: the model stays of the family that it was, and the description names the part.
    """
    filled, total = report.filled(), report["model_tensors"]
    sources = sorted(report.sources, key=lambda source: -report[f"{source.role}_loaded"])
    used = [source for source in sources if report[f"{source.role}_loaded"]]
    before = provenance_of(model)
    if not used:
        return before
    text = " + ".join(f"{report[f'{s.role}_loaded']} from {s.path} ({s.family})" for s in used)
    paths = tuple(source.path for source in used)
    if 2 * filled >= total:
        family = _family(used[0].family)
        rest = f", the other {total - filled}: {before.description}" if filled < total else ""
        found = WeightsProvenance(family, f"{filled} of {total} tensors: {text}{rest}", paths)
    else:
        description = f"{before.description}; then {filled} of {total} tensors: {text}"
        found = WeightsProvenance(before.family, description, (*before.sources, *paths))
    set_provenance(model, found)
    return found


def _family(label: str) -> ProvenanceFamily:
    name = label.partition(" ")[0]
    for family in ("vggt", "page4d", "vggt_mv", "pi3"):
        if name == family:
            return family
    return "unknown"
