"""Angles and lengths of many large vectors, reading a part of each at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.capture import Vector

BLOCK_BYTES = 64 * 2**20
"""Of the parts of all vectors that are in memory together."""


class Layers:
    """A vector whose layers are one piece each, like a delta."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def pieces(self, name: str) -> Mapping[int, Tensor]:
        """Give the layer."""
        return {0: self._tensors[name]}


def gram(vectors: Sequence[Vector], names: Sequence[str]) -> NDArray[np.float64]:
    """Compute the inner products of all pairs of vectors.

    Products are made in float32, in blocks that are summed in float64. However large and many
    the vectors, `BLOCK_BYTES` of them are in memory at a time.

    Parameters
    ----------
    vectors : sequence of Vector
        They have the same layers.
    names : sequence of str
        The layers to take.

    Returns
    -------
    ndarray of float64, shape (vectors, vectors)
    """
    count = len(vectors)
    total = np.zeros((count, count))
    if not count:
        return total
    width = max(1, BLOCK_BYTES // (4 * count))
    for name in names:
        layers = [vector.pieces(name) for vector in vectors]
        for number in sorted({number for layer in layers for number in layer}):
            rows = [layer.get(number) for layer in layers]
            size = max(math.prod(row.shape) for row in rows if row is not None)
            for start in range(0, size, width):
                block = torch.zeros(count, min(width, size - start))
                for position, row in enumerate(rows):
                    if row is not None:
                        block[position] = row.reshape(-1)[start : start + width]
                total += (block @ block.T).double().numpy()
    return total


def cosines(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn inner products into cosines; NaN where a vector is zero or not finite.

    Parameters
    ----------
    products : ndarray of float64, shape (n, n)
        From `gram`.

    Returns
    -------
    ndarray of float64, shape (n, n)
        From -1 to 1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.sqrt(np.diag(products))
        angles: NDArray[np.float64] = np.clip(products / np.outer(lengths, lengths), -1, 1)
    return angles


def pairs_of(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the finite entries above the diagonal: each pair once."""
    above = matrix[np.triu_indices(len(matrix), k=1)]
    return above[np.isfinite(above)]


def conflict_share(angles: NDArray[np.float64]) -> float | None:
    """Give the share of pairs with a negative cosine: gradients in conflict.

    Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, call two gradients
    conflicting when their cosine is negative.

    Parameters
    ----------
    angles : ndarray of float64, shape (n, n)
        Cosines of all pairs.

    Returns
    -------
    float or None
        From 0 to 1; None where there is no pair.
    """
    pairs = pairs_of(angles)
    return float((pairs < 0).mean()) if len(pairs) else None


def noise_scale(products: NDArray[np.float64], batch_size: int) -> float | None:
    """Estimate the simple noise scale tr(S) / |G|^2 from the gradients of batches.

    McCandlish et al., "An Empirical Model of Large-Batch Training", 2018. S is the covariance of
    the gradient of one sample, G the true gradient: at a batch of as many samples as the scale,
    noise and signal are alike. Both are estimated without bias from n gradients of batches: the
    variance between them is tr(S) / batch, and the square of their mean exceeds |G|^2 by
    a share of 1 / n of it.

    Parameters
    ----------
    products : ndarray of float64, shape (n, n)
        Inner products of the n gradients, two or more.
    batch_size : int
        Samples of each batch.

    Returns
    -------
    float or None
        In samples; None where the estimate of |G|^2 is not positive: noise hides the signal.
    """
    count = len(products)
    mean_square = products.sum() / count**2
    variance = (np.trace(products) - count * mean_square) / (count - 1)
    signal = mean_square - variance / count
    if not (math.isfinite(signal) and signal > 0):
        return None
    return float(batch_size * max(variance, 0.0) / signal)
