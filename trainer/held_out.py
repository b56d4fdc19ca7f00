"""Held-out rows: a share of every window that no generation ever learns from.

A digest of the prediction's id chooses them, so the choice is the same in every run, whatever the lake holds. They are
what generations can be compared on over all windows, those they learned from too (`matrix.py`). The gate does not need
them: it judges on windows that are later than all that was learned.
"""

from __future__ import annotations

HELD_OUT = "left(md5(prediction_id || ':held out'), 8) < $held_out"


def held_out_below(share: float) -> str:
    """The parameter of `HELD_OUT`: the first eight digits of the digest are below it for `share` of ids."""
    return f"{round(share * 0x1_0000_0000):08x}"
