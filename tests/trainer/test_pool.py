"""The pool keeps what a choice among all rows would choose, whatever order they come in."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.contract import Contract, load_contract
from trainer.pool import KEPT_BACK, Found, Pool
from trainer.weigh import Row

SHIPPED = load_contract(Path(__file__).parents[2] / "schemas" / "contracts" / "support-intents.yaml")
START = datetime(2026, 1, 1, tzinfo=UTC)
UNTIL = START + timedelta(minutes=30)
SEED = 5


def contract(**training: Any) -> Contract:
    return msgspec.structs.replace(SHIPPED, training=msgspec.structs.replace(SHIPPED.training, **training))


@st.composite
def rows(draw: st.DrawFn) -> list[Found]:
    drawn = draw(
        st.lists(
            st.tuples(
                st.integers(0, 40), st.sampled_from([0.1, 0.2, 0.9]), st.sampled_from([None, None, None, "erased"])
            ),
            max_size=60,
        )
    )
    return [
        Found(Row(f"p-{n:02}", "text", "label"), START + timedelta(minutes=minute), 0, margin, excluded, 0.0, n % 3)
        for n, (minute, margin, excluded) in enumerate(drawn)
    ]


def among_all(found: list[Found], most: int, how: str) -> tuple[list[Found], list[Found]]:
    """The same choice with all rows at hand."""
    there = sorted((one for one in found if not one.excluded), key=lambda one: one.order)
    mature = [one for one in there if one.at < UNTIL]
    size = min(len(there), most)
    kept_back = int(min(size, len(mature)) * KEPT_BACK)
    calibrate = mature[len(mature) - kept_back :]
    rest = [one for one in there if one not in calibrate]
    if how == "uncertain":
        places = sorted(range(len(rest)), key=lambda place: (rest[place].margin, -place))
    elif how == "rare":
        places = sorted(range(len(rest)), key=lambda place: (rest[place].of_slice, -place))
    elif how == "ipw":
        drawn = [hashlib.md5(f"{one.row.prediction_id}:{SEED}".encode()).digest() for one in rest]
        places = sorted(range(len(rest)), key=drawn.__getitem__)
    else:
        places = sorted(range(len(rest)), reverse=True)
    return [rest[place] for place in sorted(places[: size - kept_back])], calibrate


@pytest.mark.parametrize("how", ["newest", "uncertain", "rare", "ipw"])
@given(found=rows(), most=st.integers(10, 40), mixed=st.randoms())
def test_it_chooses_as_if_all_rows_were_at_hand(how: str, found: list[Found], most: int, mixed: Any) -> None:
    options = {"cohort": "ipw"} if how == "ipw" else {"prefer": how}
    pool = Pool(contract(max_rows=most, **options), UNTIL, SEED)
    wanted = among_all(found, most, how)
    coming = list(found)
    mixed.shuffle(coming)
    for one in coming:
        pool.add(one)
    assert pool.chosen() == wanted
    assert sum(pool.excluded.values()) == sum(one.excluded is not None for one in found)


def test_it_keeps_no_more_than_may_be_chosen() -> None:
    pool = Pool(contract(max_rows=100), UNTIL, SEED)
    for n in range(10_000):
        pool.add(Found(Row(f"p-{n:05}", "t", "l"), START + timedelta(seconds=n), 0, 0.5, None, 0.0, 0))
    assert len(pool._best) == 100 and len(pool._latest) == 12
    fresh, calibrate = pool.chosen()
    assert (len(fresh), len(calibrate)) == (88, 12)
