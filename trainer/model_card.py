"""The model card: the bundle's README.md, in the form that the Hugging Face hub reads.

A bundle is frozen before the windows that judge it, so its own card can hold no figure of theirs; `evaluated` adds
them, as the hub's `model-index` and as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from accrual.bundle import Manifest
from accrual.calibrator import Calibrator
from accrual.contract import Contract
from trainer.generations import Trial
from trainer.retention import levered

_METRICS = ("brier", "log_loss", "ece", "accuracy", "auroc", "rank_correlation")
_ON_THE_HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_EVALUATION, _USE = "## Evaluation\n", "## Use\n"


def model_card(contract: Contract, manifest: Manifest, classes: Sequence[str], calibrator: Calibrator) -> str:
    """What the model is, what made it, and where its record is. How it did is known only later: that is the ledger."""
    constant, output = manifest.base_digest is None, contract.output
    read = "text-ranking" if output.task == "ranking" else "text-classification"
    front = {
        "pipeline_tag": "text-generation" if output.writes else read,
        "tags": ["accrual", contract.stream],
        **({} if constant else {"base_model": _ON_THE_HUB.get(manifest.base, manifest.base)}),
        **({"library_name": "peft"} if manifest.version else {}),
    }
    if manifest.version:
        lora = levered(contract.training, manifest.levers).lora
        kind = f"Low-rank adapters (rank {lora.rank}) on the top {lora.layers} layers of `{manifest.base}`" + (
            "." if output.writes else ", and a linear head."
        )
        data = (
            f"{manifest.rows_new} new rows of ground truth, of which the latest"
            f" {manifest.selection.get('calibrate', 0)} calibrate it, and {manifest.rows_replayed} older ones, from"
            f" windows {', '.join(map(str, manifest.windows))}, read at lake snapshot {manifest.snapshot_id}."
            f" SHA-256 over their ids and labels: `{manifest.rows_digest}`. Trained to replace `{manifest.parent}`"
            f" (`{manifest.parent_digest}`)."
        )
    else:
        kind = (
            "Says the same of every row: what the contract's `output.prior` says, or that all is as likely."
            if constant
            else f"Writes what `{manifest.base}` writes."
            if output.writes
            else f"The label whose name is most like the text, by `{manifest.base}`."
        )
        data = "None: this is generation 0, made from the contract alone."
    given = contract.training
    behind = given.completions if given.second_template is None else [given.second_template]
    templates = " and ".join(f"`{template}`" for template in (given.template, *behind))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {manifest.model}

{contract.description}

{kind}

- Input: {templates}
- Task: {output.task}
- Classes: {", ".join(classes) or "none: it writes"}
- Calibration: {calibrator.description}
- Retention: {manifest.kept or "not measured"}

## Training data

{data}

Run `{manifest.run_id}`, seed {manifest.seed}, made with {", ".join(f"{k} {v}" for k, v in manifest.made_with.items())}.

{_EVALUATION}
On windows of ground truth of which no row had a part in it, beside its champion and generation 0: in the table
`evaluations` of the lake (`accrual sql "select * from evaluations where model = '{manifest.model}'"`).

{_USE}
```python
from pathlib import Path

from accrual.config import load_config
from accrual.predictor import Predictor

predictor = Predictor.load(Path("this folder"), load_config())
```
"""


def evaluated(card: str, model: str, trials: Sequence[Trial]) -> str:
    """A bundle's card with what each window that judged the model measured, beside its champion and generation 0."""
    _, front, text = card.split("---\n", 2)
    head = yaml.safe_load(front)
    if trials:
        head["model-index"] = [{"name": model, "results": [_result(head["pipeline_tag"], trial) for trial in trials]}]
    before, after = text.split(_EVALUATION)
    use = after[after.index(_USE) :]
    lines = [
        "| window | rows | Brier score (95%) | its champion's | generation 0's | log-loss | ECE | accuracy |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for trial in trials:
        ours = trial.challenger
        low, high = ours.intervals["brier"]
        lines.append(
            f"| {ours.window} | {ours.rows:,} | {ours.brier:.4f} ({low:.4f} to {high:.4f}) | {trial.champion.brier:.4f}"
            f" | {trial.generation_0.brier:.4f} | {ours.log_loss:.4f} | {ours.ece:.4f} | {ours.accuracy:.4f} |"
        )
    table = "\n".join(lines) if trials else "No window has judged it."
    said = "On windows of ground truth of which no row had a part in it, nor in its champion."
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{before}{_EVALUATION}\n{said}\n\n{table}\n\n{use}"


def _result(task: str, trial: Trial) -> dict[str, Any]:
    """One window's figures as the hub reads them (huggingface.co/docs/hub/model-cards, "Evaluation Results")."""
    ours = trial.challenger
    measured = {name: getattr(ours, name) for name in _METRICS}
    return {
        "task": {"type": task},
        "dataset": {"type": ours.stream, "name": f"{ours.stream}, window {ours.window}, {ours.rows} rows"},
        "metrics": [{"type": name, "value": round(value, 6)} for name, value in measured.items() if value is not None],
    }
