"""The matrix R: what its figures mean, on numbers that can be checked by hand."""

import pytest

from trainer.matrix import Matrix


def made(brier: list[list[float]], learned: list[list[bool]]) -> Matrix:
    size = range(len(brier[0]))
    return Matrix(
        models=[f"s@{i}" for i in range(len(brier))],
        windows=[j + 1 for j in size],
        rows=[50 for _ in size],
        brier=brier,
        accuracy=brier,
        learned=learned,
    )


def test_transfer_and_forgetting_by_hand() -> None:
    r = made(
        [[0.8, 0.8, 0.8], [0.4, 0.5, 0.6], [0.5, 0.3, 0.4]],
        [[False, False, False], [True, False, False], [True, True, False]],
    )
    assert r.backward_transfer == pytest.approx(0.4 - 0.5), "window 1 was learned by 1, and 2 is worse on it"
    assert r.forward_transfer == pytest.approx(((0.8 - 0.5) + (0.8 - 0.4)) / 2), "window 2 by model 1, window 3 by 2"
    assert r.forgetting == pytest.approx(0.5 - 0.4)
    assert r.gain == pytest.approx(((0.8 - 0.5) + (0.8 - 0.3) + (0.8 - 0.4)) / 3)


def test_what_is_not_defined_is_none() -> None:
    alone = made([[0.8]], [[False]])
    assert (alone.backward_transfer, alone.forward_transfer, alone.forgetting) == (None, None, None)
    assert alone.gain == 0
