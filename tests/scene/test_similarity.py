"""similarity_transform: known transforms found again, whatever outliers say; transforms of points and cameras."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.similarity import Similarity, similarity_transform


def random_similarity(seed: int, scale: float = 1.7) -> Similarity:
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return Similarity(scale, q * np.sign(np.linalg.det(q)), rng.normal(size=3))


def close(found: Similarity, true: Similarity, tolerance: float) -> None:
    np.testing.assert_allclose(found.scale, true.scale, rtol=tolerance)
    np.testing.assert_allclose(found.rotation, true.rotation, atol=tolerance)
    np.testing.assert_allclose(found.translation, true.translation, atol=tolerance * true.scale * 10)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
@pytest.mark.parametrize("points", [3, 4, 50, 5000])
def test_exact_points(points: int, scale: float) -> None:
    true = random_similarity(points, scale)
    x = np.random.default_rng(1).normal(size=(points, 3)) + np.array([0, 0, 5])
    fit = similarity_transform(x, true.apply(x))
    close(fit.similarity, true, 1e-9)
    assert fit.inlier_share == 1
    assert fit.points == points
    assert fit.median_residual < 1e-9 * scale


OUTLIERS = ["far targets", "far sources", "shuffled", "one wrong motion"]


@pytest.mark.parametrize("kind", OUTLIERS)
@pytest.mark.parametrize("seed", range(4))
def test_gross_outliers_do_not_matter(kind: str, seed: int) -> None:
    """30 % of the pairs are wrong, without noise in the others: the answer is exact, not merely near."""
    rng = np.random.default_rng(seed)
    true = random_similarity(seed)
    x = rng.normal(size=(2000, 3)) * [2.0, 1.0, 3.0] + [0, 0, 4]
    y = true.apply(x)
    wrong = rng.choice(2000, 600, replace=False)
    if kind == "far targets":
        y[wrong] = 1000 * rng.normal(size=(600, 3))
    elif kind == "far sources":
        x[wrong] = 1000 * rng.normal(size=(600, 3))
    elif kind == "shuffled":
        y[wrong] = y[np.roll(wrong, 1)]
    else:  # consistent among themselves
        y[wrong] = random_similarity(seed + 100).apply(x[wrong])
    fit = similarity_transform(x, y)
    close(fit.similarity, true, 1e-9)
    assert fit.inlier_share == pytest.approx(0.7, abs=2e-3)
    # Least squares on all is far off: the test can fail.
    plain = np.linalg.lstsq(np.c_[x, np.ones(2000)], y, rcond=None)[0][:3].T
    assert np.abs(plain - true.scale * true.rotation).max() > 0.05


def test_noise_and_outliers() -> None:
    rng = np.random.default_rng(3)
    true = random_similarity(3)
    x = rng.normal(size=(4000, 3))
    clean = true.apply(x)
    y = clean + 0.01 * rng.normal(size=clean.shape)
    best = similarity_transform(x, y).similarity
    y[:1200] += 50 * rng.normal(size=(1200, 3))
    fit = similarity_transform(x, y)
    # Deviation of the mean of 2800 x 3 errors of 0.01: 2e-4; thrice that.
    assert np.abs(fit.similarity.rotation - best.rotation).max() < 6e-4
    assert abs(fit.similarity.scale - true.scale) < 1e-3
    assert 0.6 < fit.inlier_share <= 0.71
    assert fit.rms_residual == pytest.approx(0.01 * np.sqrt(3), rel=0.1)
    assert fit.extent == pytest.approx(true.scale * np.sqrt(3), rel=0.05)


def test_errors_on_both_sides_do_not_shrink() -> None:
    """Errors of 10 % of the extent in source and target: plain least squares is 1 % too small, each time."""
    found, plain = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(2000, 3))
        x, y = (points + 0.1 * rng.normal(size=points.shape) for _ in range(2))
        found.append(similarity_transform(x, y).similarity.scale)
        plain.append(np.linalg.lstsq(x, y, rcond=None)[0].trace() / 3)
    # The scale of one fit deviates by 0.1 / sqrt(3 * 2000) = 1.3e-3, their mean by 3e-4.
    assert abs(np.mean(found) - 1) < 1e-3
    assert np.mean(plain) < 0.993


def test_weights_decide() -> None:
    """Points without weight do not exist; heavy ones carry more than many light ones."""
    rng = np.random.default_rng(4)
    one, other = random_similarity(5), random_similarity(6)
    x = rng.normal(size=(300, 3))
    y = np.concatenate([one.apply(x[:100]), other.apply(x[100:])])
    weights = np.r_[np.full(100, 10.0), np.ones(200)]
    close(similarity_transform(x, y, weights).similarity, one, 1e-9)
    close(similarity_transform(x, y).similarity, other, 1e-9)
    close(similarity_transform(x, y, np.r_[np.ones(100), np.zeros(200)]).similarity, one, 1e-9)


def test_a_plane_is_enough_and_gives_no_reflection() -> None:
    x = np.random.default_rng(7).normal(size=(100, 3)) * [1, 1, 0]
    true = random_similarity(7)
    fit = similarity_transform(x, true.apply(x))
    close(fit.similarity, true, 1e-9)
    assert np.linalg.det(fit.similarity.rotation) == pytest.approx(1)
    solid = np.random.default_rng(8).normal(size=(100, 3))
    mirrored = similarity_transform(solid, solid * [1, 1, -1])
    assert np.linalg.det(mirrored.similarity.rotation) == pytest.approx(1)


def test_the_same_every_time() -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2, 5000, 3))
    first, second = similarity_transform(x, y).similarity, similarity_transform(x, y).similarity
    assert first.to_dict() == second.to_dict()


BAD: list[tuple[Any, Any, Any, str]] = [
    (np.zeros((5, 2)), np.zeros((5, 2)), None, r"must be \[K, 3\], got \[5, 2\] and \[5, 2\]"),
    (np.zeros((5, 3)), np.zeros((4, 3)), None, r"must be \[K, 3\], got \[5, 3\] and \[4, 3\]"),
    (np.eye(3), np.eye(3), np.ones(2), r"weights must be \[K\] = \[3\], got \[2\]"),
    (np.eye(3), np.eye(3), [1, 1, -2], "weights must not be negative, got -2"),
    (np.full((3, 3), np.nan), np.eye(3), None, "source_points must be finite"),
    (np.eye(3), np.full((3, 3), np.inf), None, "target_points must be finite"),
    (np.eye(3), np.eye(3), [1, 1, 0], "at least 3 pairs .* are needed, got 2"),
    (np.ones((9, 3)), np.eye(3).repeat(3, 0), None, "source_points .* lie in one place"),
    (np.outer(np.arange(9), [1, 2, 3]), np.eye(3).repeat(3, 0), None, "source_points .* lie on one line"),
    (np.eye(3).repeat(3, 0), np.outer(np.arange(9), [1, 2, 3]), None, "target_points .* lie on one line"),
]


@pytest.mark.parametrize(("source", "target", "weights", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_input(source: Any, target: Any, weights: Any, message: str) -> None:
    with pytest.raises(VggtMvError, match=message):
        similarity_transform(source, target, weights)


def test_chain_inverse_and_cameras() -> None:
    a, b = random_similarity(10), random_similarity(11, 0.3)
    x = np.random.default_rng(12).normal(size=(20, 3))
    np.testing.assert_allclose(a.after(b).apply(x), a.apply(b.apply(x)), rtol=1e-12, atol=1e-12)
    close(a.after(a.inverse()), Similarity.identity(), 1e-12)
    assert Similarity.from_dict(a.to_dict()).to_dict() == a.to_dict()
    camera = np.c_[random_similarity(13).rotation, [0.1, 0.2, 0.3]]
    before = x @ camera[:, :3].T + camera[:, 3]
    moved = a.apply_to_cameras(camera)
    after = a.apply(x) @ moved[:, :3].T + moved[:, 3]
    # The camera sees the same pixels, at a.scale times the depth.
    np.testing.assert_allclose(after, a.scale * before, rtol=1e-12, atol=1e-12)
