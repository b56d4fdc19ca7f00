"""How many events the join handles a second of one core, exactly once, beside what else could do it.

    python bench/join.py                                 backlog: 2M predictions and 2M outcomes, 5 rounds
    python bench/join.py --half-load                     and then event to ground truth at half the rate reached
    python bench/join.py --delay-outcomes                each outcome a million predictions after its own
    python bench/join.py --pending 10000000 --peers none     memory with ten million predictions without outcome
    python bench/join.py --predictions 50000 --rounds 1 --peers kafka-streams        a quick look

It starts a development broker of its own, on a core of its own, in a temporary folder; the worker gets another core. In
each round every contender reads the same topics, one after the other, from its start with empty state to the last
commit; what it wrote is then compared with what must be there. The table is in Markdown, medians over the rounds.
docs/performance.md says what each contender is and does.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from arena import Arena, Cost
from check import Verdict, delays_ms, verdict
from contenders import CONTENDERS, PEERS, Contender
from load import STEP, Load, Produced, produce
from machine import machine
from measure import percentile
from report import Delay, Result, table

from accrual.config import Config

# The half load: seconds of events, of which the first are not counted, after this part of the backlog to warm up.
PACED_S, SETTLE_S, WARMING = 30, 5, 4


def main() -> None:
    """Run what was asked for and print the table."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the broker and the worker end with the bench
    contenders = [CONTENDERS[name] for name in ("accrual", "read-only", *given.peers)]
    results: list[Result] = []
    delays: list[Delay] = []
    with tempfile.TemporaryDirectory(prefix="accrual-bench-", dir=given.folder) as folder, Arena(Path(folder)) as arena:
        conditions = _conditions(given, arena.layout)
        if given.pending:
            scenario = _pending(arena, contenders, given)
        elif given.delay_outcomes:
            scenario = _delayed(arena, contenders, given)
        else:
            scenario = _backlog(arena, contenders, given)
        for result in scenario:
            results.append(result)
            _say(result)
        if given.half_load:
            for contender in contenders:
                if contender.name != "read-only":
                    rate = median(r.cost.rate for r in results if r.contender == contender.name) / 2
                    warming = _whole_steps(given.predictions / (given.slower if contender.slow else 1) / WARMING)
                    delays.append(_half_load(arena, contender, rate, warming))
    print(f"\n{table(results, delays)}\n\n{conditions}")
    if given.json:
        written = {
            "conditions": conditions,
            "runs": [result.as_dict() for result in results],
            "half_load": [vars(delay) for delay in delays],
        }
        given.json.write_text(json.dumps(written, indent=1) + "\n")


def _backlog(arena: Arena, contenders: Sequence[Contender], given: argparse.Namespace) -> Iterator[Result]:
    """All events are there when the worker starts. Slow contenders get fewer."""
    inputs: dict[bool, tuple[Config, Load]] = {}
    for slow in sorted({contender.slow for contender in contenders}):
        predictions = _whole_steps(given.predictions / (given.slower if slow else 1))
        load = Load(predictions, predictions)
        config = arena.inputs("few" if slow else "all")
        _announce(produce(config, load, range(load.steps)))
        inputs[slow] = config, load
    for number in range(given.rounds):
        for contender in contenders:
            config, load = inputs[contender.slow]
            with arena.run(contender, config) as run:
                run.start()
                cost = run.drain()
                run.stop()
                yield Result(contender.name, number, cost, _verdict(config, run.output, load))


def _delayed(arena: Arena, contenders: Sequence[Contender], given: argparse.Namespace) -> Iterator[Result]:
    """The worker has taken in `--delay-outcomes` predictions, and is stopped. From then on outcomes come too.

    What is measured begins when it is started again. Inputs are produced anew for every run, for the second part must
    not be there while the worker takes in the first.
    """
    for number in range(given.rounds):
        for contender in contenders:
            share = given.slower if contender.slow else 1
            answered, ahead = _whole_steps(given.predictions / share), _whole_steps(given.delay_outcomes / share)
            load = Load(answered + ahead, answered, ahead)
            config = arena.inputs(f"delayed-{contender.name}-{number}")
            with arena.run(contender, config) as run:
                produce(config, load, range(ahead // STEP), title=f"{contender.name}: ahead")
                run.start()
                run.drain()
                run.stop()
                produce(config, load, range(ahead // STEP, load.steps), title=f"{contender.name}: the rest")
                run.start()
                cost = run.drain()
                run.stop()
                yield Result(contender.name, number, cost, _verdict(config, run.output, load))
            arena.drop_inputs(config)


def _pending(arena: Arena, contenders: Sequence[Contender], given: argparse.Namespace) -> Iterator[Result]:
    """Predictions without outcomes: what they cost, above all in memory."""
    for contender in contenders:
        load = Load(_whole_steps(given.pending / (given.slower if contender.slow else 1)), 0)
        config = arena.inputs(f"pending-{contender.name}")
        _announce(produce(config, load, range(load.steps)))
        for number in range(given.rounds):
            with arena.run(contender, config) as run:
                run.start()
                cost = run.drain()
                run.stop()
                yield Result(contender.name, number, cost, _verdict(config, run.output, load))
        arena.drop_inputs(config)


def _half_load(arena: Arena, contender: Contender, rate: float, warming: int) -> Delay:
    """Events come at `rate` a second for half a minute, after a backlog of `warming` predictions and their outcomes."""
    paced = _whole_steps(max(rate * PACED_S / 2, 10 * STEP))
    load = Load(warming + paced, warming + paced)
    warm, settled = warming // STEP, warming // STEP + max(1, paced // STEP * SETTLE_S // PACED_S)
    config = arena.inputs(f"paced-{contender.name}")
    with arena.run(contender, config) as run:
        assert run.output is not None
        run.start()
        produce(config, load, range(warm), title=f"{contender.name}: warming")
        run.drain()
        produce(config, load, range(warm, settled), rate, f"{contender.name}: settling")
        begin_ms = int(time.time() * 1000)  # the broker's clock is this machine's
        produce(config, load, range(settled, load.steps), rate, f"{contender.name}: half load")
        run.drain()
        run.stop()
        delays = delays_ms(config, run.output, load, begin_ms)
    arena.drop_inputs(config)
    return Delay(contender.name, rate, percentile(delays, 50), percentile(delays, 99), len(delays))


def _verdict(config: Config, output: str | None, load: Load) -> Verdict | None:
    return verdict(config, output, load) if output else None


def _whole_steps(ids: float) -> int:
    return math.ceil(ids / STEP) * STEP


def _announce(produced: Produced) -> None:
    print(
        f"{produced.events:,} events: predictions of {produced.prediction_bytes:.0f} bytes,"
        f" outcomes of {produced.outcome_bytes:.0f}",
        flush=True,
    )


def _say(result: Result) -> None:
    cost: Cost = result.cost
    warm = "" if math.isnan(cost.warm_per_cpu_s) else f", {cost.warm_per_cpu_s:,.0f} once warm"
    print(
        f"round {result.round + 1} {result.contender:14}"
        f" {cost.per_cpu_s:9,.0f} events/CPU-s{warm};"
        f" {cost.cpu_s:7.1f} CPU s {cost.wall_s:7.1f} s {cost.peak_mib:6,.0f} MiB"
        f" broker {cost.broker_cpu_s:6.1f} CPU s  {result.verdict or ''}",
        flush=True,
    )


def _conditions(given: argparse.Namespace, layout: str) -> str:
    fewer = [name for name in given.peers if CONTENDERS[name].slow]
    share = [f"{' and '.join(fewer)}: 1/{given.slower} of the events"] if fewer else []
    rounds = "one round" if given.rounds == 1 else f"medians of {given.rounds} rounds"
    return "; ".join([rounds, *share, layout, machine()])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--predictions", type=int, default=2_000_000, metavar="N", help="and as many outcomes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--peers",
        type=_peers,
        default=PEERS,
        metavar="A,B",
        help=f"which of {', '.join(PEERS)}; or none (default: all)",
    )
    parser.add_argument(
        "--slower", type=int, default=20, metavar="K", help="quix and faust get one Kth of the events (default: 20)"
    )
    parser.add_argument(
        "--half-load", action="store_true", help="then measure event to ground truth at half the rate reached"
    )
    scenario = parser.add_mutually_exclusive_group()
    scenario.add_argument(
        "--delay-outcomes",
        type=int,
        nargs="?",
        const=1_000_000,
        metavar="N",
        help="every outcome comes N predictions after its own (1000000 unless given): state on disk",
    )
    scenario.add_argument("--pending", type=int, metavar="N", help="N predictions and no outcomes")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the temporary files, gigabytes at full size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures there")
    given = parser.parse_args()
    if given.half_load and (given.pending or given.delay_outcomes):
        parser.error("--half-load goes with the backlog: leave out --delay-outcomes and --pending")
    return given


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text != "none" else ()
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(PEERS)}, none")
    return names


if __name__ == "__main__":
    main()
