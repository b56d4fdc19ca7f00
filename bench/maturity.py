"""What it costs to learn from the labels that came first, and what weighting them gives back.

    python bench/maturity.py                       the first table of docs/maturity.md
    python bench/maturity.py --cut 2010-12-01      another day
    python bench/maturity.py --live                what is seen of the constant while its labels come, on several
                                                  days, and which level one could have known

Real loans with their real dates (examples/credit_risk.py). A lake holds what was known on the day of the cut: who had
been charged off or had paid in full by then, and that nothing had happened within the horizon of those old enough. Its
last window of mature loans is what a cycle would learn from; a model is trained under each cohort of the contract, with
the trainer's own selection and calibration, and one from outcomes alone, as one would without a horizon, calibrated on
the latest of them. All are judged on the loans issued after the cut, by what became of them within the horizon. The
constant is generation 0: it says the contract's prior of every loan. z is of the paired difference of the Brier scores
to it.

The model is a logistic regression on the base model's vectors, which fine-tuning begins with too.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from machine import machine
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from accrual import scores
from accrual.calibrator import uncurved
from accrual.config import Config, load_config
from accrual.contract import Contract, load_contract
from accrual.encoder import Encoder, base_folder
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES
from examples.case import Case
from examples.credit_risk import ROWS, cases
from trainer.calibrate import calibrate
from trainer.pool import KEPT_BACK
from trainer.select import Selection, sealed_windows, select
from trainer.weigh import Row

Floats = NDArray[np.floating[Any]]
CONTRACT = Path(__file__).parents[1] / "schemas" / "contracts" / "credit-risk.yaml"
JUDGED = 3000
SEED = 7


def main() -> None:
    """Fill a lake, select under each cohort, compute the vectors of what was selected, learn, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", default="2009-12-01", metavar="DAY", help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=1000, help="loans in the mature window (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="score the constant on the loans that are open yet")
    given = parser.parse_args()
    cut, contract, started = datetime.fromisoformat(given.cut).replace(tzinfo=UTC), load_contract(CONTRACT), time.time()
    loans = cases(contract, ROWS, SEED)
    if given.live:
        print_live(contract, loans)
        print_level(contract, loans)
        return
    judged = [loan for loan in loans if loan.predicted_at >= cut][:JUDGED]
    with tempfile.TemporaryDirectory(prefix="accrual-bench-") as folder:
        config = load_config({}, state=folder)
        fill(config, contract, [loan for loan in loans if loan.predicted_at < cut], cut, given.window)
        learners = selections(config, contract)
    texts = {row.text for of in learners.values() for row in (*of.learn, *of.calibrate)}
    texts |= {contract.render(loan.inputs) for loan in judged}
    encoder = Encoder.load(base_folder("minilm"), contract.training.max_tokens)
    vectors = dict(zip(sorted(texts), encoder.embed(sorted(texts)), strict=True))

    horizon = timedelta(microseconds=contract.horizon_us)
    labels = [label_by(contract, loan, loan.predicted_at + horizon) or "" for loan in judged]
    truth = scores.indices_of(labels, contract.output.classes)
    asked = np.stack([vectors[contract.render(loan.inputs)] for loan in judged])
    constant = np.tile([(contract.output.prior or {})[name] for name in contract.output.classes], (len(judged), 1))
    print(
        f"Cut {cut:%Y-%m-%d}: judged on {len(judged):,} loans issued until {judged[-1].predicted_at:%Y-%m-%d}, of which"
        f" {(truth == 1).mean():.1%} were charged off within {contract.horizon}.\n\n"
        "| learned from | rows | effective | charged off | said | Brier | gain | z | ECE | AUROC |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    print_row("nothing: the constant", None, constant, constant, truth)
    for name, selection in learners.items():
        print_row(name, selection, learned(contract, selection, vectors, asked), constant, truth)
    print(f"\n{time.time() - started:.0f} s, {len(vectors):,} vectors; {machine()}")


def print_live(contract: Contract, loans: list[Case]) -> None:
    """The constant on the loans that were younger than the horizon on a day: by the outcomes that had come, and by what
    became of all of them.
    """
    horizon = timedelta(microseconds=contract.horizon_us)
    constant = [(contract.output.prior or {})[name] for name in contract.output.classes]
    print("| day | open loans | with an outcome | charged off | Brier | in truth | Brier |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for year in range(2008, 2012):
        day = datetime(year, 12, 1, tzinfo=UTC)
        young = [loan for loan in loans if day - horizon < loan.predicted_at <= day]
        cells = []
        for moment in (day, day + horizon):
            labels = [label for loan in young if (label := label_by(contract, loan, moment))]
            truth = scores.indices_of(labels, contract.output.classes)
            score = scores.brier(np.tile(constant, (len(truth), 1)), truth)
            cells += [f"{len(truth):,}", f"{(truth == 1).mean():.1%}", f"{score:.4f}"]
        print(f"| {day:%Y-%m-%d} | {cells[3]} | {cells[0]} | {cells[1]} | {cells[2]} | {cells[4]} | {cells[5]} |")


def print_level(contract: Contract, loans: list[Case]) -> None:
    """How far off the share of charged off loans is that one could have known, at each loan after the first 10,000."""
    horizon = timedelta(microseconds=contract.horizon_us)
    issued = np.array([loan.predicted_at.timestamp() for loan in loans])
    bad = np.array([label_by(contract, loan, loan.predicted_at + horizon) == "charged_off" for loan in loans])
    before, after = np.concatenate([[0], np.cumsum(bad)]), np.arange(10_000, len(loans))
    ripe = np.searchsorted(issued, issued[after] - horizon.total_seconds())  # loans that were past the horizon by then
    print("\n| said of each loan | in the mean | what came | off by |\n|---|---:|---:|---:|")
    said = {"the contract's 6%": np.full(len(after), (contract.output.prior or {})["charged_off"])}
    for last in (1_000, 3_000, 10_000, len(loans)):
        first = np.maximum(ripe - last, 0)
        name = f"the share in the last {last:,}" if last < len(loans) else "the share in all"
        said[f"{name} that were ripe"] = (before[ripe] - before[first]) / np.maximum(ripe - first, 1)
    for name, level in said.items():
        off = abs(level.mean() - bad[after].mean())
        print(f"| {name} | {level.mean():.4f} | {bad[after].mean():.4f} | {off:.4f} |")


def selections(config: Config, contract: Contract) -> dict[str, Selection]:
    """What each cohort would learn from, and what one would from outcomes alone, the latest of them kept back."""
    found: dict[str, Selection] = {}
    with open_lake(config) as lake:
        windows = sealed_windows(lake, contract.stream)
        come = {
            r["prediction_id"] for r in lake.rows("select prediction_id from ground_truth where status = 'labeled'")
        }
        for cohort in ("observed", "ipw", "mature"):
            training = msgspec.structs.replace(contract.training, cohort=cohort, replay=0.0)
            chosen = select(lake, msgspec.structs.replace(contract, training=training), windows, training.seed)
            if cohort == "observed":
                rows = [row for row in (*chosen.learn, *chosen.calibrate) if row.prediction_id in come]
                rows.sort(key=lambda row: row.prediction_id)  # which counts from the oldest on
                kept_back = int(len(rows) * KEPT_BACK)
                alone = msgspec.structs.replace(chosen, learn=rows[:-kept_back], calibrate=rows[-kept_back:])
                found["outcomes alone"] = alone
            found[f"`{cohort}`"] = chosen
    return found


def learned(contract: Contract, selection: Selection, vectors: dict[str, Floats], asked: Floats) -> Floats:
    """Fit the regression and the temperature; the probabilities [asked, classes]."""

    def truth_of(rows: list[Row]) -> NDArray[np.int64]:
        return scores.indices_of([row.label for row in rows], contract.output.classes)

    def logits_of(of: Floats) -> NDArray[np.float32]:
        positive = of @ head.coef_[0] + head.intercept_[0]
        return np.stack([np.zeros_like(positive), positive], axis=1).astype(np.float32)

    rows, late = selection.learn, selection.calibrate
    head = LogisticRegression(C=1.0, max_iter=1000)
    head.fit([vectors[row.text] for row in rows], truth_of(rows), sample_weight=[row.weight for row in rows])
    calibrator = calibrate(logits_of(np.stack([vectors[row.text] for row in late])), truth_of(late))
    return uncurved(logits_of(asked), calibrator.temperature, each=False)


def print_row(name: str, selection: Selection | None, said: Floats, constant: Floats, truth: NDArray[np.int64]) -> None:
    """One line of the table; `gain` is the constant's Brier score less this one's."""
    gains = scores.brier_per_row(constant, truth) - scores.brier_per_row(said, truth)
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    taught = "| |"
    if selection is not None:
        weights = np.array([row.weight for row in selection.learn])
        bad = np.array([row.label == "charged_off" for row in selection.learn])
        effective = weights.sum() ** 2 / (weights**2).sum()  # Kish 1965
        taught = f"{len(weights):,} | {effective:,.0f} | {weights[bad].sum() / weights.sum():.1%}"
    against = f"{gains.mean():+.4f} | {gains.mean() / error:+.1f}" if error else "|"
    auroc = scores.auroc(said[:, 1], truth == 1) or math.nan
    print(
        f"| {name} | {taught} | {said[:, 1].mean():.1%} | {scores.brier(said, truth):.4f} | {against}"
        f" | {scores.ece(said, truth):.3f} | {auroc:.3f} |",
        flush=True,
    )


def label_by(contract: Contract, loan: Case, moment: datetime) -> str | None:
    """The label that was known at `moment`: of an outcome within the horizon, or of none when that had passed."""
    deadline = loan.predicted_at + timedelta(microseconds=contract.horizon_us)
    known = [values for at, values in loan.outcomes if at <= min(moment, deadline)]
    if known:
        return contract.label_of(known[-1])
    return contract.on_expiry if deadline <= moment else None


def fill(config: Config, contract: Contract, loans: list[Case], cut: datetime, window_rows: int) -> None:
    """The lake on the day of the cut; its window is the last so many loans that were as old as the horizon."""
    horizon = timedelta(microseconds=contract.horizon_us)
    output = msgspec.json.encode({"label": "paid", "probabilities": contract.output.prior}).decode()
    predictions, labeled = [], []
    for number, loan in enumerate(loans):
        row = {
            "stream": contract.stream,
            "prediction_id": f"loan-{number:05d}",
            "model": f"{contract.stream}@0",
            "predicted_at": loan.predicted_at,
            "day": loan.predicted_at.date(),
            "inputs": msgspec.json.encode(loan.inputs).decode(),
            "output": output,
            "partition": 0,
            "offset": number,
        }
        predictions.append(row)
        label = label_by(contract, loan, cut)
        if label is not None:
            observed = loan.outcomes[-1][0]
            expired = observed > loan.predicted_at + horizon
            shown = {"label": label, "status": "expired" if expired else "labeled", "revision": 0 if expired else 1}
            labeled.append({**row, **shown, "observed_at": None if expired else observed})
    mature = [loan for loan in loans if loan.predicted_at < cut - horizon][-window_rows:]
    window = {
        "stream": contract.stream,
        "window": 1,
        "from_time": mature[0].predicted_at,
        "to_time": cut - horizon,
        "trainable": len(mature),
        "coverage": 1.0,
        "sealed_at": cut,
    }
    tick = {"stream": contract.stream, "moment": cut + timedelta(microseconds=contract.disorder_us)}
    rows = {"predictions": predictions, "ground_truth_history": labeled, "ticks": [tick]}
    with open_lake_for_writing(config) as lake:
        for table in ("predictions", "ground_truth_history"):
            lake.rows(f"alter table lake.{table} reset partitioned by")  # one file in place of one for each day
        lake.append({name: pa.Table.from_pylist(some, TABLES[name]) for name, some in rows.items()})
        window["snapshot_id"] = lake.snapshot_id()
        lake.append({"windows": pa.Table.from_pylist([window], TABLES["windows"])})


if __name__ == "__main__":
    main()
