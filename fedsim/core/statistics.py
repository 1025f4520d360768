"""What the gradient of a step says of itself, measured while it is in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.support import Taps, pack, unpack


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """Figures of one step's gradient, all parameters, without weight decay.

    Parameters
    ----------
    norm : float
        Euclidean norm.
    per_layer_norms : dict of str to float
        The same of each parameter.
    cosine_to_previous : float or None
        Cosine to the gradient of the step before; None for the first step and for a zero.
    cosine_to_mean : float or None
        Cosine to the mean of the gradients of all steps before.
    zero_fraction : float
        Share of entries that are exactly +0.
    """

    norm: float
    per_layer_norms: dict[str, float]
    cosine_to_previous: float | None
    cosine_to_mean: float | None
    zero_fraction: float


class GradientStatistics:
    """Follows the gradients of a client's local steps.

    Works on packed gradients: what is left out is zero and adds nothing to a norm or a product.
    Keeps the gradient of the step before and the sum of all.
    """

    def __init__(self) -> None:
        self._previous: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._taps: dict[str, Taps | None] = {}
        self._previous_norm = 0.0
        self._sum_square = 0.0

    def add(
        self,
        packed: Mapping[str, Tensor],
        taps: Mapping[str, Taps | None],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        nonzero: int,
    ) -> StepStatistics:
        """Measure the next step.

        Parameters
        ----------
        packed : mapping of str to Tensor
            The step's gradient; kept until the next step.
        taps : mapping of str to tuple of int or None
            Support of each.
        shapes : mapping of str to tuple of int
            Shapes of the parameters.
        nonzero : int
            Entries that are not +0.
        """
        self._repack(taps, shapes)
        measured = []
        first = not self._sum
        for name, tensor in packed.items():
            flat = tensor.detach().reshape(-1)
            figures = [torch.linalg.vector_norm(flat)]
            if first:
                self._sum[name] = flat.clone()
            else:
                total = self._sum[name]
                figures += [torch.dot(flat, self._previous[name]), torch.dot(flat, total)]
                total.add_(flat)
            self._previous[name] = flat
            measured.append(torch.stack(figures))
        # One transfer for all figures where they lie on a GPU.
        table = torch.stack(measured).double().cpu().numpy()
        norm = math.sqrt(float((table[:, 0] ** 2).sum()))
        to_previous = to_mean = None
        if first:
            self._sum_square = norm**2
        else:
            with_previous, with_sum = (float(column.sum()) for column in table[:, 1:].T)
            to_previous = _cosine(with_previous, norm, self._previous_norm)
            to_mean = _cosine(with_sum, norm, self.sum_norm)
            # Exact arithmetic over what was measured: the sum need not be read once more.
            self._sum_square += 2 * with_sum + norm**2
        self._previous_norm = norm
        entries = sum(math.prod(shape) for shape in shapes.values())
        return StepStatistics(
            norm=norm,
            per_layer_norms={n: float(r[0]) for n, r in zip(packed, table, strict=True)},
            cosine_to_previous=to_previous,
            cosine_to_mean=to_mean,
            zero_fraction=1 - nonzero / entries if entries else 0.0,
        )

    @property
    def sum_norm(self) -> float:
        """Euclidean norm of the sum of all gradients so far."""
        return math.sqrt(max(0.0, self._sum_square))

    def hold(self) -> None:
        """Copy what was kept of the last step, whose memory is about to be used again."""
        self._previous = {name: tensor.clone() for name, tensor in self._previous.items()}

    def _repack(
        self, taps: Mapping[str, Taps | None], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Lay out what is kept as the next step is packed."""
        for name, live in taps.items():
            if self._sum and self._taps[name] != live:
                for kept in (self._sum, self._previous):
                    before = self._taps[name]
                    shape = shapes[name]
                    packed = kept[name] if before is None else kept[name].view(-1, *shape[:2])
                    dense = unpack(packed.view(shape) if before is None else packed, shape, before)
                    kept[name] = pack(dense, live).reshape(-1)
            self._taps[name] = live


def _cosine(product: float, first: float, second: float) -> float | None:
    if not first * second:
        return None
    cosine = product / (first * second)
    # Rounding may pass the ends; what is not finite stays so.
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine
