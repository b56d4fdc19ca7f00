"""Calibrate what a generator writes: one temperature for the next token, fitted on later rows than were learned from.

It is the likeliest on a grid, by the log-loss of all tokens, under the same prior around the champion's as a
classifier's (`calibrate.py`). Rows count once, whatever their length: tokens of one text know of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from accrual.calibrator import Calibrator, Method
from accrual.generator import Generator, Written
from trainer.calibrate import STRAYS
from trainer.learner import counts_of

GRID = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)


def calibrate_text(
    generator: Generator,
    rows: Sequence[Written],
    method: Literal["auto"] | Method,
    champion: Calibrator,
    weights: Sequence[float],
) -> Calibrator:
    """The calibrator of a generator; `none` leaves its probabilities as they are. `weights`: what each row counts.

    Without rows it is the champion's.
    """
    if method == "none":
        return Calibrator(method="none")
    if not rows:
        return champion
    strayed = (np.log(GRID) - np.log(champion.temperature)) / STRAYS
    unlikely = generator.log_losses(rows, GRID) @ counts_of(weights, len(rows)).numpy() + strayed**2 / 2
    return Calibrator(temperature=GRID[int(unlikely.argmin())], rows=len(rows))
