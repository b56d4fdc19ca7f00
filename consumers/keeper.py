"""Maintenance of the lake by the sink itself, while it keeps up with what comes."""

from __future__ import annotations

import logging
import time

from accrual.config import Config
from accrual.errors import LakeConflict, LakeError
from accrual.lake import WritableLake
from accrual.lake_maintenance import maintain
from accrual.lake_verify import record

# After a round of maintenance: at least so long, and fifty times as long as it took, until the next.
_PAUSE_S = 60.0
_PAUSE_FACTOR = 50.0
log = logging.getLogger("accrual.sink")


class Keeper:
    """Does a round of maintenance now and then. A round is limited; records that come meanwhile wait for it.

    It also records the digests of new files, for `accrual lake verify`.
    """

    def __init__(self, lake: WritableLake, config: Config) -> None:
        self._lake = lake
        self._config = config
        self._not_before = time.monotonic() + _PAUSE_S

    def maintain_if_due(self) -> None:
        """Do a round if the pause after the last one is over. One that fails is left for later: capture goes on."""
        if time.monotonic() < self._not_before:
            return
        started = time.monotonic()
        try:
            work = maintain(self._lake)
            record(self._lake, self._config)
        except (LakeConflict, LakeError) as exc:
            log.warning("maintenance of the lake is left for later: %s", exc)
        else:
            if work.merged or work.snapshots or work.files or work.orphans:
                log.info("maintenance of the lake: %s", work)
        self._not_before = time.monotonic() + max(_PAUSE_S, _PAUSE_FACTOR * (time.monotonic() - started))
