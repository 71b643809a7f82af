"""Errors and the warning category of the weight loader. Every message is one line."""

from __future__ import annotations

from vggt_mv.errors import VggtMvError

__all__ = [
    "AliasConflictError",
    "TensorValueError",
    "UnknownSchemeError",
    "UnsafePickleError",
    "WeightsError",
    "WeightsFileError",
    "WeightsMismatchError",
    "WeightsWarning",
]


class WeightsWarning(UserWarning):
    """A load that went through, with something that its caller should know. One line each."""


class WeightsError(VggtMvError):
    """Base of every error of `vggt_mv.weights`."""


class WeightsFileError(WeightsError):
    """A file that is missing, empty, truncated, corrupt, or not a weights file."""


class UnsafePickleError(WeightsFileError):
    """A pickle that runs code when read; refused unless ``unsafe_pickle=True``."""


class UnknownSchemeError(WeightsError):
    """Tensor names that belong to no known scheme: a weights file of another model."""


class AliasConflictError(WeightsError):
    """Two names of one tensor in one file that do not hold the same values."""


class TensorValueError(WeightsError):
    """A tensor that cannot be used: wrong dtype, not dense, or NaN/Inf where finite values were demanded."""


class WeightsMismatchError(WeightsError):
    """File and model do not fit as was demanded (``strict=True`` or `LoadReport.raise_unless`).

    ``str(error)`` is one line; ``error.table`` is the whole account as text.
    """

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message)
        self.table = table
