"""Similarity transforms between two reconstructions of the same points: ``y = s R x + t``, found in spite of outliers.

Images tell neither where the world begins nor how large it is, so two runs over overlapping parts of a recording agree
up to a scale s, a rotation R and a translation t. ``similarity_transform`` finds them from points that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vggt_mv.errors import VggtMvError

__all__ = ["Similarity", "SimilarityFit", "similarity_transform"]

# Triples of points that a first guess is made of. With half of the points wrong, one in eight triples is right: none of
# 256 being so has a chance of 1e-15.
_GUESSES = 256
_GUESS_POINTS = 2048  # that a guess is judged by
# Tukey's biweight: 95 % as efficient as least squares where errors are normal. The median of the length of a
# three-dimensional error of unit deviation is 1.538.
_TUKEY, _MEDIAN_LENGTH = 4.685, 1.538
_STEPS = 30
# Of the thinner over the longer side of a cloud: below, the rotation about the long side is rounding.
_THINNEST = 1e-5


@dataclass(frozen=True)
class Similarity:
    """``y = scale * rotation x + translation``.

    Attributes:
        scale: above 0.
        rotation: [3, 3] float64.
        translation: [3] float64.

    Example:
        >>> half_turn = Similarity(2.0, np.diag([-1.0, -1.0, 1.0]), np.array([0.0, 0.0, 1.0]))
        >>> half_turn.apply(np.array([1.0, 2.0, 3.0])).tolist()
        [-2.0, -4.0, 7.0]
    """

    scale: float
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]

    @classmethod
    def identity(cls) -> Similarity:
        """The transform that changes nothing."""
        return cls(1.0, np.eye(3), np.zeros(3))

    def apply(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points [..., 3], transformed."""
        return np.asarray(points) @ (self.scale * self.rotation).T + self.translation

    def apply_to_cameras(self, extrinsics: ArrayLike) -> NDArray[np.float64]:
        """Cameras [..., 3, 4] (camera from world) in the transformed world; their depths are to be scaled by ``scale``.

        With ``X_c = R_c X + t_c``: ``R_c' = R_c R^T``, ``t_c' = s t_c - R_c' t``, and then ``X_c' = s X_c``.
        """
        cameras = np.asarray(extrinsics, dtype=np.float64)
        rotation = cameras[..., :3] @ self.rotation.T
        translation = self.scale * cameras[..., 3] - rotation @ self.translation
        return np.concatenate([rotation, translation[..., None]], axis=-1)

    def after(self, first: Similarity) -> Similarity:
        """The transform that applies ``first``, then this one."""
        return Similarity(
            self.scale * first.scale,
            self.rotation @ first.rotation,
            self.scale * (self.rotation @ first.translation) + self.translation,
        )

    def inverse(self) -> Similarity:
        """The transform back: ``x = R^T (y - t) / s``."""
        return Similarity(1.0 / self.scale, self.rotation.T.copy(), -(self.rotation.T @ self.translation) / self.scale)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` gives the same numbers back, to the last bit."""
        return {
            "scale": self.scale,
            "rotation": self.rotation.tolist(),
            "translation": self.translation.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Similarity:
        """What ``to_dict`` made."""
        return cls(
            float(values["scale"]),
            np.array(values["rotation"], dtype=np.float64),
            np.array(values["translation"], dtype=np.float64),
        )


@dataclass(frozen=True)
class SimilarityFit:
    """A transform, and how well it fits.

    Attributes:
        similarity: takes source points to target points.
        points: how many pairs were used.
        median_residual: weighted median of ``|y - (s R x + t)|``, in the unit of the target.
        rms_residual: root of the weighted mean square, over the pairs that are not outliers.
        inlier_share: weight of the pairs that are not outliers, over all weight.
        extent: root of the weighted mean square distance of the targets (outliers left out) from their mean: what
            residuals are small or large against.
    """

    similarity: Similarity
    points: int
    median_residual: float
    rms_residual: float
    inlier_share: float
    extent: float


def similarity_transform(
    source_points: ArrayLike, target_points: ArrayLike, weights: ArrayLike | None = None
) -> SimilarityFit:
    """The similarity that takes source points to target points, whatever up to about 40 % of the pairs say.

    Weighted least squares in its symmetric form (Horn 1987), which treats errors of either side alike: with d the
    distances from the weighted means, ``min over s, R of sum_i w_i |dy_i / sqrt(s) - sqrt(s) R dx_i|^2``, which gives
    ``s^2 = sum_i w_i |dy_i|^2 / sum_i w_i |dx_i|^2`` and the R of Umeyama (1991). The scale of plain least squares is
    too small wherever x has errors, and a chain of transforms would shrink.

    It starts from the best of many guesses from three pairs each, by the weighted median of the residuals, and is
    repeated with the weights times Tukey's biweight of the residuals, so that outliers end up with no weight at all.
    All in float64, and the same for the same input.

    Args:
        source_points: [K, 3].
        target_points: [K, 3].
        weights: [K], 0 and up; by default all 1.

    Raises:
        VggtMvError: shapes that do not fit, values that are not finite, negative weights, or points that determine no
            transform: fewer than three with weight, all in one place, or on one line.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(100, 3))
        >>> y = 2.0 * x + [1.0, 0.0, 0.0]
        >>> y[:30] = 1000.0 * rng.normal(size=(30, 3))
        >>> fit = similarity_transform(x, y)
        >>> round(fit.similarity.scale, 9), bool(np.allclose(fit.similarity.apply(x[30:]), y[30:]))
        (2.0, True)
    """
    x, y, w = _checked(source_points, target_points, weights)
    similarity = _first_guess(x, y, w)
    floor = 1e-12 * (float(np.abs(y).max()) + np.finfo(np.float64).tiny)
    robust = w
    for _ in range(_STEPS):
        residuals = _residuals(similarity, x, y)
        deviation = max(_weighted_median(residuals, w) / _MEDIAN_LENGTH, floor)
        robust = w * np.clip(1.0 - (residuals / (_TUKEY * deviation)) ** 2, 0.0, None) ** 2
        previous, similarity = similarity, _least_squares(x, y, robust)
        if _moved(previous, similarity, x[robust > 0]) < 1e-10 * deviation:
            break
    residuals = _residuals(similarity, x, y)
    share = robust / robust.sum()
    inliers = robust > 0
    inlier_weights = np.where(inliers, w, 0.0) / w[inliers].sum()
    spread = y - inlier_weights @ y
    return SimilarityFit(
        similarity=similarity,
        points=len(x),
        median_residual=_weighted_median(residuals, w),
        rms_residual=float(np.sqrt(share @ residuals**2)),
        inlier_share=float(w[inliers].sum() / w.sum()),
        extent=float(np.sqrt(inlier_weights @ (spread**2).sum(axis=1))),
    )


def _checked(
    source: ArrayLike, target: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Pairs with a weight above 0, in float64."""
    x, y = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 3 or y.shape != x.shape:
        raise VggtMvError(
            f"similarity_transform: source_points and target_points must be [K, 3], got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(x),):
        raise VggtMvError(f"similarity_transform: weights must be [K] = [{len(x)}], got {list(w.shape)}")
    for name, values in {"source_points": x, "target_points": y, "weights": w}.items():
        if not np.isfinite(values).all():
            raise VggtMvError(f"similarity_transform: {name} must be finite, got NaN or infinity")
    if (w < 0).any():
        raise VggtMvError(f"similarity_transform: weights must not be negative, got {w.min():g}")
    counted = w > 0
    if counted.sum() < 3:
        raise VggtMvError(
            f"similarity_transform: at least 3 pairs of points with a weight above 0 are needed, got {counted.sum()}"
        )
    return x[counted], y[counted], w[counted]


def _first_guess(x: NDArray[np.float64], y: NDArray[np.float64], w: NDArray[np.float64]) -> Similarity:
    """The best of many transforms from three pairs each, and of the one from all pairs."""
    rng = np.random.default_rng(0)
    chance = w / w.sum()
    triples = rng.choice(len(x), size=(_GUESSES, 3), p=chance)
    judges = slice(None) if len(x) <= _GUESS_POINTS else rng.choice(len(x), _GUESS_POINTS, p=chance)
    xj, yj = x[judges], y[judges]
    # Drawn by weight they count alike.
    wj = w if isinstance(judges, slice) else np.ones(len(xj))
    best, best_residual = _least_squares(x, y, w), np.inf
    for indices in [None, *triples]:
        try:
            guess = best if indices is None else _least_squares(x[indices], y[indices], np.ones(3))
        except VggtMvError:  # twice the same point, or three on a line
            continue
        residual = _weighted_median(_residuals(guess, xj, yj), wj)
        if residual < best_residual:
            best, best_residual = guess, residual
    return best


def _least_squares(x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]) -> Similarity:
    """The closed form, with weights."""
    w = weights / weights.sum()
    x_mean, y_mean = w @ x, w @ y
    dx, dy = x - x_mean, y - y_mean
    for name, d in (("source_points", dx), ("target_points", dy)):
        sides = np.sqrt(np.clip(np.linalg.eigvalsh((w[:, None] * d).T @ d), 0.0, None))[::-1]
        if not sides[1] > _THINNEST * sides[0]:
            what = "lie in one place" if not sides[0] > 0 else "lie on one line"
            raise VggtMvError(f"similarity_transform: {name} must determine a rotation, and they {what}")
    u, _, vt = np.linalg.svd((w[:, None] * dy).T @ dx)
    # A reflection is none of the rotations: the axis that matters least is turned back.
    rotation = (u * [1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))]) @ vt
    scale = float(np.sqrt((w @ (dy**2).sum(axis=1)) / (w @ (dx**2).sum(axis=1))))
    return Similarity(scale, rotation, y_mean - scale * (rotation @ x_mean))


def _residuals(similarity: Similarity, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(y - similarity.apply(x), axis=1))


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The smallest value that half of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(cumulative, 0.5 * cumulative[-1])]])


def _moved(before: Similarity, after: Similarity, x: NDArray[np.float64]) -> float:
    """How far a step moved the points, on the average (root mean square)."""
    return float(np.sqrt(((before.apply(x) - after.apply(x)) ** 2).sum(axis=1).mean()))
