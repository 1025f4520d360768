"""Deltas, their sample-weighted mean and the hash of a state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
State = Mapping[str, Array]


def check_like(local: State, reference: State) -> None:
    """Check that a state has the names, shapes and dtypes of another.

    Raises
    ------
    ValueError
        Naming the first that differs.
    """
    if list(local) != list(reference):
        odd = sorted(set(local).symmetric_difference(reference)) or ["their order"]
        raise ValueError(f"the local state and the global one differ in {odd[0]}")
    for name, array in reference.items():
        found = local[name]
        if found.shape != array.shape or found.dtype != array.dtype:
            raise ValueError(
                f"{name} has shape {found.shape} and dtype {found.dtype}; "
                f"the global state has {array.shape} and {array.dtype}"
            )


def first_not_finite(state: State) -> str | None:
    """Give the name of the first array that holds a NaN or an infinity; None where none does."""
    return next((name for name, array in state.items() if not np.isfinite(array).all()), None)


# A state that is not finite is one that diverged, not a mistake of the arithmetic.
@np.errstate(all="ignore")
def delta_of(local: State, reference: State) -> dict[str, Array]:
    """Subtract the global state from a local one, each array in its own dtype.

    This sign, local minus global, is the only one used anywhere.

    Raises
    ------
    ValueError
        When names, shapes or dtypes differ.
    """
    check_like(local, reference)
    # asarray: numpy turns the result of arithmetic on 0-d arrays into scalars.
    return {n: np.asarray(np.subtract(local[n], array)) for n, array in reference.items()}


# Values that are not finite have no range: callers check for them first.
@np.errstate(all="ignore")
def local_range(delta: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Find the local arrays that have a delta, which is their difference after rounding.

    Subtraction is monotone, so they are the float32 numbers from one to another in each entry.
    Usually there is one: a delta holds less than the array only where it is the larger of the two.

    Parameters
    ----------
    delta, reference : ndarray of float32
        Finite; the global array and what `delta_of` gave.

    Returns
    -------
    tuple of (ndarray of float32, ndarray of float32)
        The least and the greatest. Where there is none, the least is the greater one.
    """
    near = np.asarray(np.add(reference, delta))
    low, high = near.copy(), near.copy()
    alone = (near - reference == delta) & ~(
        (_next(near, -1) - reference == delta) | (_next(near, 1) - reference == delta)
    )
    if not alone.all():
        left = ~alone
        low[left], high[left] = _ends(delta[left], reference[left])
    return low, high


def _ends(delta: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    ends = []
    for sign in (-1, 1):
        # Half-way to the next delta, in float64 and a little beyond, then back by whole steps.
        half = (_next(delta, sign).astype(np.float64) + delta.astype(np.float64)) / 2
        far = np.nextafter(reference.astype(np.float64) + half, sign * np.inf)
        end = far.astype(np.float32)
        for _ in range(3):
            beyond = (end - reference - delta) * sign > 0
            end = np.where(beyond, _next(end, -sign), end)
        ends.append(np.where(end - reference == delta, end, np.float32(-sign * np.inf)))
    return ends[0], ends[1]


def _next(array: NDArray[Any], sign: int) -> NDArray[Any]:
    return np.asarray(np.nextafter(array, np.float32(sign * np.inf)))


class Sums:
    """Sums of weighted arrays in float64; the order of `add` decides their last bits."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}

    @np.errstate(all="ignore")
    def add(self, arrays: State, weight: float) -> None:
        """Add arrays of the same names and shapes each time, times a weight."""
        for name, array in arrays.items():
            weighted = np.multiply(array, weight, dtype=np.float64)
            if name in self._sums:
                self._sums[name] += weighted
            else:
                self._sums[name] = weighted
                self._dtypes[name] = array.dtype

    @np.errstate(all="ignore")
    def divided(self, divisor: float) -> dict[str, Array]:
        """Divide and round once to each array's own dtype, integers half to even."""
        result: dict[str, Array] = {}
        for name, total in self._sums.items():
            mean = total / divisor
            dtype = self._dtypes[name]
            if np.issubdtype(dtype, np.integer):
                mean = np.rint(mean)
            result[name] = np.asarray(mean, dtype=dtype)
        return result


class DeltaMean:
    """The weighted mean of deltas, one at a time, in float64.

    The order of `add` decides the last bits of the sum: add in `fold_order`.
    """

    def __init__(self) -> None:
        self._sums = Sums()
        self.weight = 0

    def add(self, delta: State, weight: int) -> None:
        """Fold one client's delta in.

        Parameters
        ----------
        delta : mapping of str to ndarray
            The same names and shapes each time.
        weight : int
            Distinct training samples of the client, 1 or more.
        """
        if weight < 1:
            raise ValueError(f"a delta needs a weight of 1 or more, not {weight}")
        self._sums.add(delta, weight)
        self.weight += weight

    def mean(self) -> dict[str, Array]:
        """Divide by the total weight and round once to each array's own dtype.

        Integer buffers are rounded half to even.
        """
        return self._sums.divided(self.weight)


def local_work(
    steps: int, *, learning_rate: float, momentum: float = 0.0, nesterov: bool = False
) -> float:
    """Give how far SGD moves in some steps whose gradient is always 1.

    That is the learning rate times the norm ``|a|_1`` of Wang et al. 2020, sec. 4: the steps
    themselves without momentum, and about ``1 / (1 - momentum)`` times as many with it.

    Parameters
    ----------
    steps : int
        Local steps of a round that were updates.
    learning_rate, momentum, nesterov : float, float, bool
        Of torch's SGD, without dampening.
    """
    velocity = moved = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1
        moved += 1 + momentum * velocity if nesterov else velocity
    return learning_rate * moved


@np.errstate(all="ignore")
def apply_delta(reference: State, delta: State) -> dict[str, Array]:
    """Add a delta to the global state, each array in its own dtype."""
    return {n: np.asarray(np.add(array, delta[n])) for n, array in reference.items()}


def state_sha256(state: State) -> str:
    """Hash a state: names, dtypes, shapes and bytes, in ascending order of names.

    Returns
    -------
    str
        Hexadecimal SHA-256. For each array: its name, its numpy dtype string and its shape as
        comma-separated decimals, each followed by a zero byte, then its little-endian bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        # np.ascontiguousarray would turn a scalar into a vector of one.
        array = np.asarray(state[name], order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        shape = ",".join(str(size) for size in array.shape)
        digest.update(f"{name}\0{array.dtype.name}\0{shape}\0".encode())
        digest.update(array.tobytes() if array.ndim == 0 else array.data)
    return digest.hexdigest()
