"""Memory: work on a batch is done in pieces once memory has run out, and smaller pieces from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from accrual.encoder import BATCH_TOKENS
from accrual.errors import TrainingFailed

log = logging.getLogger(__name__)

_SAID_BY_ALLOCATORS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class Budget:
    """How many tokens, rows times the longest of them, are computed at once. It only ever falls.

    `in_step` with other ranks (`shard.py`) a batch is done at once, whatever it is.
    """

    def __init__(self, tokens: int = BATCH_TOKENS, in_step: bool = False) -> None:
        self.tokens = tokens
        self._in_step = in_step

    def spend(self, rows: Sequence[int], lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        """Call `work` with the rows of a batch, all at once or in pieces, in their order.

        `lengths` are by row. When memory runs out in `work`, which must then have done nothing, the budget becomes
        half of what that piece needed and the piece is tried again in two. Raises TrainingFailed when one row alone
        does not fit; in step with other ranks, the allocator's own error.
        """
        if self._in_step:
            work(list(rows))
            return
        waiting = [list(rows)]
        while waiting:
            piece = waiting.pop()
            need = len(piece) * max(lengths[row] for row in piece)
            if len(piece) > 1 and need > self.tokens:
                half = len(piece) // 2
                waiting += [piece[half:], piece[:half]]
                continue
            if self._fits(piece, work):
                continue
            if len(piece) == 1:
                raise TrainingFailed(f"out of memory with one row of {need} tokens: lower training.max_tokens")
            self.tokens = max(1, need // 2)
            log.warning("out of memory with %d tokens at once: %d from now on", need, self.tokens)
            waiting.append(piece)

    @staticmethod
    def _fits(piece: list[int], work: Callable[[list[int]], None]) -> bool:
        """False when memory ran out; by then the failed attempt's tensors are free again."""
        try:
            work(piece)
        except (MemoryError, RuntimeError) as exc:
            if not isinstance(exc, MemoryError) and not _ran_out(exc):
                raise
            return False
        return True


def _ran_out(error: RuntimeError) -> bool:
    """Whether an error is an allocator's: torch's for CUDA has a class of its own, that for the CPU only words."""
    return any(words in str(error).lower() for words in _SAID_BY_ALLOCATORS)
