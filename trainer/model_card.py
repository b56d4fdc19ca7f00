"""The model card: the bundle's README.md, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from accrual.bundle import Manifest
from accrual.calibrator import Calibrator
from accrual.contract import Contract
from trainer.retention import levered


def model_card(contract: Contract, manifest: Manifest, classes: Sequence[str], calibrator: Calibrator) -> str:
    """What the model is, what made it, and where its record is. How it did is known only later: that is the ledger."""
    constant, output = manifest.base_digest is None, contract.output
    read = "text-ranking" if output.task == "ranking" else "text-classification"
    front = {
        "pipeline_tag": "text-generation" if output.writes else read,
        "tags": ["accrual", contract.stream],
        **({} if constant else {"base_model": manifest.base}),
        **({"library_name": "peft"} if manifest.version else {}),
    }
    if manifest.version:
        lora = levered(contract.training, manifest.levers).lora
        kind = f"Low-rank adapters (rank {lora.rank}) on the top {lora.layers} layers of `{manifest.base}`" + (
            "." if output.writes else ", and a linear head."
        )
        data = (
            f"{manifest.rows_new} new and {manifest.rows_replayed} replayed rows of ground truth from windows"
            f" {', '.join(map(str, manifest.windows))}, read at lake snapshot {manifest.snapshot_id}. SHA-256 over"
            f" their ids and labels: `{manifest.rows_digest}`. Trained to replace `{manifest.parent}`"
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
- Classes ({len(classes)}): {", ".join(classes)}
- Calibration: {calibrator.description}
- Retention: {manifest.kept or "not measured"}

## Training data

{data}

Run `{manifest.run_id}`, seed {manifest.seed}, made with {", ".join(f"{k} {v}" for k, v in manifest.made_with.items())}.

## Evaluation

On windows of ground truth sealed after the model was frozen, beside its champion and generation 0: in the table
`evaluations` of the lake (`accrual sql "select * from evaluations where model = '{manifest.model}'"`).

## Use

```python
from accrual.config import load_config
from accrual.predictor import Predictor

predictor = Predictor.load(folder, load_config())
```
"""
