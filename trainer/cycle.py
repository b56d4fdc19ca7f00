"""The story of a cycle, told by `Trainer.next_step`:

    wait for a sealed window
    is a challenger waiting?   evaluate it on that window, beside the champion and generation 0
                               gate: promote, reject or wait; publish
    otherwise, if it is time   select rows, fine-tune, keep the base's abilities, calibrate on later rows, freeze

so that every challenger is frozen before it is judged, and is judged only on rows that neither it nor its champion has
learned from. Each step ends in the ledger; a trainer that is killed anywhere starts again with the step that is not
there yet, and finds the bundle of one that was frozen and not yet said.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from accrual.bundle import Manifest, read_manifest
from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import AccrualError, BundleError, ContractError, TrainingFailed
from accrual.lake import Lake, open_lake
from accrual.ledger import Generation, Run
from accrual.predictor import Predictor
from accrual.signing import load_or_make_signing_key
from accrual.training_policy import OBSERVED_WARNING
from trainer.challenger import Champion, make_challenger
from trainer.evaluate import (
    Scored,
    by_slice,
    calibration_error_of,
    check_contract,
    gains_of,
    learned_from,
    losses_of,
    score_window,
)
from trainer.freeze import find_frozen, freeze_generation_0, generation_0_id, made_with
from trainer.gate import judge
from trainer.plan import check_ledger, gather, plan_of, rises_of
from trainer.publish import Said
from trainer.ranks import Ranks
from trainer.retention import read_probe
from trainer.select import LAKE_MEMORY, Selection, Window, sealed_windows, select
from trainer.shard import check_shard
from trainer.tracking import Tracking
from trainer.triggers import Facts

log = logging.getLogger(__name__)

FRESH_S = 60.0
_STATE = {"promote": "promoted", "reject": "rejected", "wait": "waiting"}


class _Begun(msgspec.Struct, frozen=True):
    """A training that may have been broken off, and the new windows that it learns from."""

    training: str
    windows: list[int]


class Past(msgspec.Struct, frozen=True):
    """How things stood: the windows that were sealed, the lake's snapshot before the next was (None: now), the time."""

    windows: list[Window]
    snapshot_id: int | None
    now: datetime


class Trainer:
    """Runs the cycles of all streams that have a contract, one step at a time."""

    def __init__(self, config: Config, contracts: Mapping[str, Contract], ledger: Said) -> None:
        """Raises SigningKeyError when the signing key cannot be used, ContractError when a probe cannot be read,
        NotHere when MLflow is wanted and missing, and ConfigError when the base cannot be sharded.
        """
        if config.trainer.shard:
            check_shard(contracts)
        self._config = config
        self._contracts = contracts
        self._ledger = ledger
        self._key = load_or_make_signing_key(config.signing_key, config.public_key)
        self._tracking = Tracking(config.mlflow)
        self._store = config.model_store
        self._probes = {
            contract.stream: read_probe(contract.gate.retention.probe, contract.output.task)
            for contract in contracts.values()
            if contract.gate.retention is not None
        }
        self._asked_for: set[str] = set()
        self._waits: dict[str, str] = {}  # what was logged last, but for the figures in it
        self._gathered: dict[str, tuple[tuple[int, int, str], float, Facts]] = {}
        self._loaded: dict[str, Predictor] = {}
        self._empty: set[tuple[str, int]] = set()  # windows of which no row is left: quarantined, or erased
        # By bundle, window and classes of all that are compared, of the challengers that wait.
        self._scored: dict[tuple[str, int, tuple[str, ...]], Scored] = {}
        self._past: Past | None = None

    def ask_for(self, stream: str) -> None:
        """Train this stream once, whatever its triggers say, as soon as no challenger has a window to be judged on."""
        self._asked_for.add(stream)

    def next_step(self, stream: str, past: Past | None = None) -> bool:
        """Take the next step of a stream's story; False when it must wait, most often for a window to be sealed.

        With `past`, the step that would have been the next one then.

        Raises LakeUnavailable, BrokerUnavailable (try again), BundleError (a published bundle is gone or altered),
        LedgerLost.
        """
        contract, self._past = self._contracts[stream], past
        champion = self._ledger.champion(stream) or self._begin(contract)
        with open_lake(self._config, at_snapshot=past.snapshot_id if past else None, memory=LAKE_MEMORY) as lake:
            sealed = past.windows if past else sealed_windows(lake, stream)
            windows = [one for one in sealed if (stream, one.window) not in self._empty]
            facts_of = self._facts(lake, contract, windows)
            plan = plan_of(self._ledger, contract, windows, facts_of, self._now(), by_hand=stream in self._asked_for)
        if plan.step == "wait":
            kind = re.sub("[0-9.,]", "", plan.reason)
            if self._waits.get(stream) != kind:
                log.info("%s waits: %s", stream, plan.reason)
            self._waits[stream] = kind
            return False
        challenger = self._ledger.challenger(stream)
        if challenger is not None:
            self._judge(contract, champion, challenger, windows, plan.windows[0])
        else:
            self._train(contract, champion, plan.windows, plan.reason)
            self._asked_for.discard(stream)
        return True

    def _now(self) -> datetime:
        return self._past.now if self._past else datetime.now(UTC)

    def _facts(self, lake: Lake, contract: Contract, windows: Sequence[Window]) -> Callable[[Sequence[Window]], Facts]:
        """What triggers ask for, gathered when it is asked for, and again of the same windows after a minute."""
        said, stream = self._ledger, contract.stream

        def scored(champion: Generation, now: Window) -> Scored:
            [found] = self._score(contract, champion.bundle, [now])
            self._scored = {(champion.bundle, now.window, ()): found, **self._of_other_streams(stream)}
            return found

        def facts_of(new: Sequence[Window]) -> Facts:
            champion = said.champion(stream)
            asked = new[-1].window, said.last_tried(stream), champion.digest if champion else ""
            before, at, facts = self._gathered.get(stream, (None, 0.0, None))
            if facts is None or before != asked or time.monotonic() - at > FRESH_S:
                facts = gather(lake, said, contract, windows, new, partial(rises_of, said, stream, scored))
                self._gathered[stream] = asked, time.monotonic(), facts
            return facts

        return facts_of

    def _begin(self, contract: Contract) -> Generation:
        """Publish what the contract alone can give: the champion that every later generation is measured against."""
        if self._past is None:
            with open_lake(self._config) as lake:
                check_ledger(lake, contract.stream)
        digest = self._made_of(contract)
        generation = Generation(
            stream=contract.stream,
            version=0,
            model=f"{contract.stream}@0",
            digest=digest,
            bundle=digest,
            run_id=read_manifest(self._store / digest).run_id,
            parent=None,
            windows=[],
            rows=0,
            published_at=self._now(),
        )
        self._ledger.say([], generation)
        log.info("%s is published: it knows the contract only", generation.model)
        return generation

    def _train(self, contract: Contract, champion: Generation, new: Sequence[Window], trigger: str) -> None:
        """Make the next challenger from the windows that its champion has not seen, and freeze it."""
        started, cpu_started = time.monotonic(), time.process_time()
        check_contract(champion.model, self._predictor(champion.bundle).contract, contract)
        version = self._ledger.next_version(contract.stream)
        new = self._begun_with(contract.stream, f"{version} after {champion.digest}", new)
        windows = sorted({*champion.windows, *(window.window for window in new)})
        with open_lake(self._config, at_snapshot=new[-1].snapshot_id, memory=LAKE_MEMORY) as lake:
            selection = select(lake, contract, new, contract.training.seed)
        manifest = self._manifest_of(contract, champion, version, windows, new[-1].snapshot_id, selection)
        log.info(
            "%s: training on %d new and %d older rows, and calibrating on %d, set off by %s",
            manifest.model,
            selection.counts["new"],
            selection.replayed,
            selection.counts["calibrate"],
            trigger,
        )
        if contract.training.cohort == "observed":
            log.warning("%s: learns from whatever labels came first: %s", manifest.model, OBSERVED_WARNING)
        digest, failure = self._frozen(contract, champion, selection, manifest)
        frozen = read_manifest(self._store / digest) if digest is not None else manifest
        run = Run(
            run_id=manifest.run_id,
            stream=contract.stream,
            version=version,
            parent=champion.model,
            windows=windows,
            snapshot_id=new[-1].snapshot_id,
            rows_new=selection.new,
            rows_replayed=selection.replayed,
            seed=contract.training.seed,
            trigger=trigger,
            selection=selection.counts,
            learned_until=selection.until,
            digest=digest,
            state="trained" if digest else "failed",
            reason=failure or f"{'; '.join(filter(None, ['frozen', frozen.kept]))}; the next sealed window judges it",
            seconds=round(time.monotonic() - started, 3),
            cpu_seconds=round(time.process_time() - cpu_started, 3),
            retention=frozen.retention,
            at=self._now(),
        )
        self._ledger.say([run])
        shutil.rmtree(self._checkpoints(contract.stream), ignore_errors=True)
        self._tracking.log(run)
        log.info("%s: %s after %.1f s: %s", manifest.model, run.state, run.seconds, run.reason)

    def _manifest_of(
        self,
        contract: Contract,
        champion: Generation,
        version: int,
        windows: list[int],
        snapshot_id: int,
        selection: Selection,
    ) -> Manifest:
        """What is known of a model before it is trained."""
        return Manifest(
            stream=contract.stream,
            version=version,
            parent=champion.model,
            parent_digest=champion.digest,
            run_id=_run_id(contract, version, champion.digest, windows),
            windows=windows,
            snapshot_id=snapshot_id,
            rows_new=selection.new,
            rows_replayed=selection.replayed,
            rows_digest=selection.digest,
            selection=selection.counts,
            seed=contract.training.seed,
            base=contract.training.base_model or self._config.models.base,
            base_digest=None,
            made_with=made_with(),
        )

    def _frozen(
        self, contract: Contract, champion: Generation, selection: Selection, manifest: Manifest
    ) -> tuple[str | None, str]:
        """The digest of the bundle, which may have been made before a crash; or None, and why there is none."""
        if found := find_frozen(self._store, manifest.run_id, manifest.rows_digest):
            return found, ""
        try:
            return self._make(contract, champion, selection, manifest), ""
        except TrainingFailed as exc:
            return None, str(exc)
        except Exception as exc:  # of torch, peft: as many as there are bases
            if Ranks().world > 1:  # the others may be in the middle of it: whoever started them starts all again
                log.exception("%s cannot be trained by this process alone", manifest.model)
                raise SystemExit(1) from exc
            if isinstance(exc, AccrualError):
                raise
            log.exception("%s cannot be trained", manifest.model)
            return None, f"{type(exc).__name__}: {exc}"

    def _make(self, contract: Contract, champion: Generation, selection: Selection, manifest: Manifest) -> str:
        """Train, calibrate, freeze; returns the bundle's digest."""
        return make_challenger(
            self._store,
            self._key,
            contract,
            manifest,
            Champion(self._predictor(champion.bundle), self._store / champion.bundle),
            selection,
            self._probes.get(contract.stream),
            self._checkpoints(contract.stream) / f"{manifest.run_id}.safetensors",
            self._config.trainer.shard,
        )

    def _begun_with(self, stream: str, training: str, new: Sequence[Window]) -> Sequence[Window]:
        """The windows that a training which was broken off had begun with, since its checkpoint is of these; else
        `new`. More may have been sealed since.
        """
        file = self._checkpoints(stream) / "begun.json"
        try:
            begun = msgspec.json.decode(file.read_bytes(), type=_Begun)
        except (OSError, msgspec.MsgspecError):
            begun = None
        if begun is not None and begun.training == training:
            return [window for window in new if window.window in begun.windows] or new
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(msgspec.json.encode(_Begun(training, [window.window for window in new])))
        except OSError as exc:  # costs what a checkpoint that cannot be written costs
            log.warning("%s cannot be written: %s", file, exc.strerror)
        return new

    def _checkpoints(self, stream: str) -> Path:
        return self._config.state_dir / "checkpoints" / stream

    def _judge(
        self, contract: Contract, champion: Generation, challenger: Run, windows: Sequence[Window], now: Window
    ) -> None:
        """Score challenger, champion and generation 0 on the next window, and say what the gate makes of it."""
        judged = [w for w in windows if w.window in self._ledger.judged(challenger.run_id) or w == now]
        at, run_id = self._now(), challenger.run_id
        zero_bundle = self._generation_0_of(contract, champion.bundle)
        models = [self._predictor(bundle) for bundle in (champion.bundle, zero_bundle)]
        for model in models:
            check_contract(model.model, model.contract, contract)
        try:
            models.append(self._predictor(challenger.digest or ""))
            check_contract(models[-1].model, models[-1].contract, contract)
        except (BundleError, ContractError) as exc:  # those that it is compared with are whole: it is this one
            self._fail(challenger, now, str(exc))
            return
        beside = tuple(sorted({name for model in models for name in model.classes}))
        ours = self._score(contract, challenger.digest or "", judged, beside)
        if not len(ours[-1].ids):
            log.warning("window %d of %s has no row left to judge on: the next one judges", now.window, contract.stream)
            self._empty.add((contract.stream, now.window))
            return
        theirs = self._score(contract, champion.bundle, judged, beside)
        if leak := self._leak([challenger.digest or "", champion.bundle], ours):
            self._fail(challenger, now, leak)
            return
        [zero] = self._score(contract, zero_bundle, [now], beside)
        gains = gains_of(ours, theirs)
        verdict = judge(
            gains,
            self._ledger.trial(challenger),
            calibration_error_of(ours) - calibration_error_of(theirs),
            contract.gate,
            by_slice(ours, gains),
            losses_of(ours, theirs),
            [part.counts for part in ours],
        )
        entries = [
            ours[-1].entry(run_id, "challenger", at, verdict),
            theirs[-1].entry(run_id, "champion", at),
            zero.entry(run_id, "generation-0", at),
        ]
        concluded = msgspec.structs.replace(challenger, state=_STATE[verdict.verdict], reason=verdict.reason, at=at)
        promoted = challenger.as_generation(at) if verdict.verdict == "promote" else None
        self._ledger.say([*entries, concluded], promoted)
        self._tracking.log(concluded, entries)
        if verdict.verdict != "wait":
            self._scored = self._of_other_streams(contract.stream)
        log.info("%s is %s, judged on window %d: %s", ours[-1].model, concluded.state, now.window, verdict.reason)

    def _fail(self, challenger: Run, window: Window, reason: str) -> None:
        """Say that a challenger cannot be judged, and why."""
        self._ledger.say([msgspec.structs.replace(challenger, state="failed", reason=reason, at=self._now())])
        log.error("%s cannot be judged on window %d: %s", challenger.model, window.window, reason)

    def _leak(self, bundles: Sequence[str], judged: Sequence[Scored]) -> str:
        """What is wrong if one of two models learned from a row that is to judge it; empty if neither did."""
        for bundle in bundles:
            if seen := learned_from(self._store, bundle, judged):
                model, first = read_manifest(self._store / bundle).model, ", ".join(seen[:3])
                return f"{len(seen)} of the judged rows are among those that {model} learned from, first {first}"
        return ""

    def _score(
        self, contract: Contract, bundle: str, windows: Sequence[Window], beside: tuple[str, ...] = ()
    ) -> list[Scored]:
        """A frozen model on each window, the rows as they were when the window was sealed.

        Neither changes any more, so what was scored once is kept while the same challenger waits for further windows.
        """
        for window in windows:
            if (bundle, window.window, beside) not in self._scored:
                scored = score_window(self._config, contract, self._predictor(bundle), window, beside)
                self._scored[bundle, window.window, beside] = scored
        return [self._scored[bundle, window.window, beside] for window in windows]

    def _of_other_streams(self, stream: str) -> dict[tuple[str, int, tuple[str, ...]], Scored]:
        return {key: kept for key, kept in self._scored.items() if kept.window.stream != stream}

    def _generation_0_of(self, contract: Contract, bundle: str) -> str:
        """The bundle of the generation 0 that a champion goes back to, parent by parent; where one of these is gone,
        what the contract gives today.
        """
        manifest = read_manifest(self._store / bundle)
        while manifest.version > 0:
            bundle = manifest.parent_digest or ""
            try:
                manifest = read_manifest(self._store / bundle)
            except BundleError:
                return self._made_of(contract)
        return bundle

    def _made_of(self, contract: Contract) -> str:
        """The bundle of a generation 0, made if the store does not have it: the contract decides every byte of it."""
        base = contract.training.base_model or self._config.models.base
        found = find_frozen(self._store, generation_0_id(contract, base), "")
        return found or freeze_generation_0(self._store, self._key, contract, base)

    def _predictor(self, bundle: str) -> Predictor:
        """A bundle, verified and loaded; the last few are kept."""
        if bundle not in self._loaded:
            while len(self._loaded) >= 4:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[bundle] = Predictor.load(self._store / bundle, self._config)
        return self._loaded[bundle]


def _run_id(contract: Contract, version: int, parent: str, windows: Sequence[int]) -> str:
    """The same for the same contract, version, champion and windows: what was begun under it is found again after a
    crash.
    """
    stream, said = contract.stream, msgspec.json.encode(msgspec.to_builtins(contract)).decode()
    content = f"{stream}@{version}|{parent}|{','.join(map(str, windows))}|{said}"
    return f"{stream}@{version}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
