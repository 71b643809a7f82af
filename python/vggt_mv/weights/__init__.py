"""Weights: from any checkpoint to a loaded model, with an account of every tensor.

>>> from vggt_mv.weights import plan_load
>>> plan = plan_load({"aggregator.camera_token": [1, 2, 1, 8]}, {"camera_token": [1, 2, 1, 8]})
>>> plan.report()["missing"]
0
"""

from vggt_mv.weights.apply import LoadProgress, apply_plan
from vggt_mv.weights.convert import WeightsSummary, convert_weights, inspect_weights
from vggt_mv.weights.errors import (
    AliasConflictError,
    TensorValueError,
    UnknownSchemeError,
    UnsafePickleError,
    WeightsError,
    WeightsFileError,
    WeightsMismatchError,
    WeightsWarning,
)
from vggt_mv.weights.files import WeightsFile, open_weights
from vggt_mv.weights.inference import InferenceReport, optimize_for_inference
from vggt_mv.weights.lean import build_from_weights, parameters_on_meta
from vggt_mv.weights.load import load_pretrained_weights
from vggt_mv.weights.mixin import PretrainedWeightsMixin
from vggt_mv.weights.plan import LoadPlan, plan_load
from vggt_mv.weights.provenance import WeightsProvenance, provenance_of, set_provenance
from vggt_mv.weights.report import Entry, LoadReport
from vggt_mv.weights.spec import ModelSpec, dual_stream_spec

__all__ = [
    "AliasConflictError",
    "Entry",
    "InferenceReport",
    "LoadPlan",
    "LoadProgress",
    "LoadReport",
    "ModelSpec",
    "PretrainedWeightsMixin",
    "TensorValueError",
    "UnknownSchemeError",
    "UnsafePickleError",
    "WeightsError",
    "WeightsFile",
    "WeightsFileError",
    "WeightsMismatchError",
    "WeightsProvenance",
    "WeightsSummary",
    "WeightsWarning",
    "apply_plan",
    "build_from_weights",
    "convert_weights",
    "dual_stream_spec",
    "inspect_weights",
    "load_pretrained_weights",
    "open_weights",
    "optimize_for_inference",
    "parameters_on_meta",
    "plan_load",
    "provenance_of",
    "set_provenance",
]
