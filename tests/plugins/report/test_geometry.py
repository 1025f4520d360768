from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.plugins.report import geometry
from fedsim.plugins.report.geometry import (
    Layers,
    conflict_share,
    cosines,
    gram,
    noise_scale,
    pairs_of,
)
from fedsim.recording.reader import load_run

X = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0])}
Y = {"a": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "b": torch.tensor([2.0])}


class Pieces:
    def __init__(self, pieces: dict[int, Tensor]) -> None:
        self._pieces = pieces

    def pieces(self, name: str) -> Mapping[int, Tensor]:
        return self._pieces


def test_inner_products_are_over_all_layers() -> None:
    assert gram([Layers(X), Layers(Y)], ["a", "b"]).tolist() == [[55, 8], [8, 6]]
    assert gram([Layers(X), Layers(Y)], ["a"]).tolist() == [[30, -2], [-2, 2]]
    assert gram([], ["a"]).shape == (0, 0)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "BLOCK_BYTES", 2 * 4 * 3)
    assert gram([Layers(X), Layers(Y)], ["a", "b"]).tolist() == [[55, 8], [8, 6]]


def test_no_more_than_a_block_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "BLOCK_BYTES", 4000)
    made: list[int] = []
    zeros = torch.zeros

    def counted(*shape: int) -> Tensor:
        made.append(4 * shape[0] * shape[1])
        return zeros(*shape)

    monkeypatch.setattr(geometry.torch, "zeros", counted)
    vectors = [Layers({"a": torch.ones(1001)}) for _ in range(10)]
    assert gram(vectors, ["a"]).tolist() == [[1001.0] * 10] * 10
    assert max(made) == 4000
    assert len(made) == 11


def test_a_piece_that_is_not_there_is_zero() -> None:
    one = Pieces({0: torch.tensor([1.0, 2.0]), 3: torch.tensor([1.0, 1.0])})
    two = Pieces({3: torch.tensor([4.0, 5.0]), 4: torch.tensor([9.0, 9.0])})
    assert gram([one, two], ["a"]).tolist() == [[7, 9], [9, 41 + 162]]


@pytest.mark.parametrize("encoding", ["support", "dense"])
def test_captured_gradients_have_the_products_of_whole_ones(
    make_run: object, encoding: str
) -> None:
    path: Path = make_run(capture_encoding=encoding, rounds=1)  # type: ignore[operator]
    run = load_run(path)
    clients = list(run.round(1).clients.values())
    steps = [(client, step) for client in clients for step in (0, 2)]
    whole = np.stack(
        [
            np.concatenate([t.double().numpy().ravel() for t in client.gradient(step).values()])
            for client, step in steps
        ]
    )
    found = gram([run.config.policy.vector(*step) for step in steps], list(run.shapes))
    np.testing.assert_allclose(found, whole @ whole.T, rtol=1e-5, atol=1e-5 * (whole**2).sum())


def test_cosines_are_those_of_the_angles() -> None:
    products = gram(
        [Layers({"a": torch.tensor(v)}) for v in ([3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0])],
        ["a"],
    )
    half = 0.5**0.5
    expected = [[1, 0, -1, half], [0, 1, 0, half], [-1, 0, 1, -half], [half, half, -half, 1]]
    np.testing.assert_allclose(cosines(products), expected, atol=1e-7)


def test_what_has_no_direction_has_no_cosine() -> None:
    vectors = [torch.tensor(v) for v in ([1.0], [0.0], [float("nan")], [float("inf")])]
    angles = cosines(gram([Layers({"a": v}) for v in vectors], ["a"]))
    assert np.isnan(angles).tolist() == [
        [False, True, True, True],
        *[[True] * 4] * 3,
    ]
    assert pairs_of(angles).tolist() == []
    assert conflict_share(angles) is None


def test_conflict_is_the_share_of_negative_pairs() -> None:
    angles = np.array([[1, -0.5, 0.0], [-0.5, 1, 0.2], [0.0, 0.2, 1]])
    assert pairs_of(angles).tolist() == [-0.5, 0.0, 0.2]
    assert conflict_share(angles) == pytest.approx(1 / 3)


def test_the_noise_scale_of_two_gradients() -> None:
    # 3 and 1: the mean is 2, the variance 2, so |G|^2 is 4 - 2/2.
    products = np.outer([3.0, 1.0], [3.0, 1.0])
    assert noise_scale(products, 16) == pytest.approx(16 * 2 / 3)


def test_equal_gradients_have_no_noise() -> None:
    assert noise_scale(np.full((3, 3), 4.0), 16) == 0


def test_gradients_that_cancel_hide_the_signal() -> None:
    assert noise_scale(np.outer([1.0, -1.0], [1.0, -1.0]), 16) is None
    assert noise_scale(np.full((2, 2), np.nan), 16) is None


def test_the_estimate_of_the_noise_scale_is_near_the_truth() -> None:
    # Samples have the gradient 1 +- 3 in each of 50 places: tr(S) / |G|^2 = 50 * 9 / 50.
    draw = np.random.default_rng(1)
    batches = 1 + draw.normal(0, 3 / 8**0.5, size=(4000, 50))
    assert noise_scale(batches @ batches.T, 8) == pytest.approx(9, rel=0.05)
