"""Training throughput: the project's fine-tuning beside plainer loops and Hugging Face's Trainer, and what each learns.

    python bench/train.py --rounds 2                           the first table of docs/performance.md, "Training"
    python bench/train.py --rows 0 --seeds 3                   what is learned, over three seeds
    python bench/train.py --rows 1024 --only ours --profile    where the time of one run goes, by operation

Questions of banking77 in an order of their own, MiniLM, and the low-rank adapter of the contract support-intents: the
same rows, epochs, adapter and learning rate for all, no dropout. A sample is a row in an epoch; what is timed begins
with the texts and the loaded base model and ends with the trained weights.

    padded           each text padded to 128 tokens, 32 rows a batch, in random order
    dynamic          padded to the longest of its batch
    buckets          rows of like length together, 32 a batch
    token-budget     rows of like length together, as many as make 1024 tokens (accrual.encoder.batches)
    ours             trainer.finetune.fine_tune: a token budget, and what the frozen layers give computed once
    hf-trainer       transformers.Trainer with dynamic padding, 32 rows a batch
    hf-from-probe    the same, its head begun as ours is, from a logistic regression on the base model's vectors
    bf16             token-budget under bf16 autocast
    ours-bf16        ours, the encoder under bf16 autocast
    ours-compiled    ours, the layers that learn by torch.compile, for any shape

The slow ones get a part of the rows (SHARES), unless `--all` says otherwise. hf-from-probe and ours-compiled are timed
only where they are asked for: the first run of the latter in a process compiles, so give it more than one round. Before
the table stands which share of the tokens that are computed is padding: packed sequences could save that much, and no
more.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow.csv
import torch
from machine import machine
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, normalize

from accrual import scores
from accrual.contract import load_contract
from accrual.encoder import Encoder, base_folder, batches, padded
from trainer.calibrate import calibrate
from trainer.finetune import fine_tune

ROOT = Path(__file__).parents[1]
TRAINING = load_contract(ROOT / "schemas" / "contracts" / "support-intents.yaml").training
PADDED_TO = 128
BATCH_ROWS = 32
LEARN, KEPT_BACK, JUDGED = 600, 400, 1500  # rows, in this order, where it is compared what is learned
# A contender is timed on the rows divided by this.
SHARES = {
    "padded": 8,
    "dynamic": 4,
    "buckets": 1,
    "token-budget": 1,
    "ours": 1,
    "hf-trainer": 4,
    "bf16": 4,
    "ours-bf16": 1,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPARED = ("ours", "ours-bf16", "ours-compiled", "hf-trainer", "hf-from-probe")

Batching = Callable[[Sequence[int], np.random.Generator], Iterator[list[int]]]
Logits = Callable[[Sequence[str]], NDArray[np.float32]]


class Rows(NamedTuple):
    """Texts and the numbers of their classes."""

    texts: list[str]
    truth: NDArray[np.int64]
    classes: list[str]

    def part(self, start: int, end: int) -> Rows:
        """The rows from `start` to before `end`."""
        return Rows(self.texts[start:end], self.truth[start:end], self.classes)


# Given rows and a seed: the training, ready to run, which returns what it made.
Contender = Callable[[Rows, int], Callable[[], Logits]]


def main() -> None:
    """Time the contenders, then compare what is learned; each where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="to train on, 0 for no timing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(SHARES), metavar="CONTENDER")
    parser.add_argument("--all", action="store_true", help="all rows for the slow ones too")
    parser.add_argument("--seeds", type=int, default=0, help="to compare what is learned (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="operations by their time, in place of the table")
    given = parser.parse_args()
    rows = banking()
    where = machine() if DEVICE.type == "cpu" else f"{torch.cuda.get_device_name()}; {machine()}"
    print(f"{where}; torch {torch.__version__}, {torch.get_num_threads()} threads; {TRAINING.epochs} epochs\n")
    if given.profile:
        for name in given.only:
            train = CONTENDERS[name](rows.part(0, given.rows), 1)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                train()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    elif given.rows:
        sizes = {name: given.rows // (1 if given.all else SHARES.get(name, 1)) for name in given.only}
        print_rates(rows, sizes, given.rounds)
    if given.seeds:
        print_quality(rows, given.seeds)


def banking() -> Rows:
    """All questions, in an order that is always the same."""
    table = pyarrow.csv.read_csv(ROOT / "examples" / "data" / "banking77" / "train.csv")
    mixed = table.take(np.random.default_rng(17).permutation(table.num_rows))
    labels = mixed["category"].to_pylist()
    classes = sorted(set(labels))
    return Rows(mixed["text"].to_pylist(), scores.indices_of(labels, classes), classes)


def print_rates(rows: Rows, sizes: Mapping[str, int], rounds: int) -> None:
    """Samples a second of each contender on so many rows; in a round they run one after the other."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
    CONTENDERS["dynamic"](rows.part(0, BATCH_ROWS), 1)()  # threads start, memory is mapped
    for _ in range(rounds):
        for name in sizes:
            train = CONTENDERS[name](rows.part(0, sizes[name]), 1)
            wall, cpu = time.perf_counter(), time.process_time()
            train()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            samples = sizes[name] * TRAINING.epochs
            measured[name].append((samples / wall, samples / cpu))
            print(f"{name}: {samples:,} samples, {wall:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr, flush=True)
    print_padding(rows.part(0, max(sizes.values())))
    rates = {name: np.median(np.array(of), axis=0).tolist() for name, of in measured.items()}
    print(
        "| contender | rows | samples/s | to padded | to hf-trainer | samples / CPU s | to padded | to hf-trainer |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, both in rates.items():
        cells = []
        for kind, rate in enumerate(both):  # by the wall clock, by CPU time
            to = (f"{rate / rates[of][kind]:.2f}" if of in rates else "" for of in ("padded", "hf-trainer"))
            cells += [f"{rate:.1f}", *to]
        print(f"| {name} | {sizes[name]:,} | {' | '.join(cells)} |")
    print(f"\nmedian of {rounds} round(s)\n")


def print_padding(rows: Rows) -> None:
    """Of each way to make batches, how much of what is computed is padding."""
    lengths = [len(tokens) for tokens in _load().tokenize(rows.texts)]
    shares = {"padded": 1 - sum(lengths) / (PADDED_TO * len(lengths))}
    for name, batching in (("dynamic", _shuffled), ("buckets", _bucketed), ("token-budget", _budgeted)):
        groups = batching(lengths, np.random.default_rng(1))
        shares[name] = 1 - sum(lengths) / sum(len(group) * max(lengths[row] for row in group) for group in groups)
    print("padding: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + "\n")


def print_quality(rows: Rows, seeds: int) -> None:
    """Accuracy and Brier on later rows of those in COMPARED, for each seed and in the mean."""
    kept_back = rows.part(LEARN, LEARN + KEPT_BACK)
    judged = rows.part(LEARN + KEPT_BACK, LEARN + KEPT_BACK + JUDGED)
    print("| contender | accuracy, each seed | mean | Brier, each seed | mean |\n|---|---:|---:|---:|---:|")
    for name in COMPARED:
        figures = []
        for seed in range(1, seeds + 1):
            logits = CONTENDERS[name](rows.part(0, LEARN), seed)()
            said = calibrate(logits(kept_back.texts), kept_back.truth).probabilities(logits(judged.texts))
            figures.append((scores.accuracy(said, judged.truth), scores.brier(said, judged.truth)))
        columns = [
            f"{' '.join(f'{one:.4f}' for one in column)} | {np.mean(column):.4f}"
            for column in zip(*figures, strict=True)
        ]
        print("|", name, "|", " | ".join(columns), "|", flush=True)
    print(f"\n{LEARN:,} rows trained on, {KEPT_BACK} calibrated on, {JUDGED:,} judged\n")


class Classifier(torch.nn.Module):
    """The encoder with the adapter in it, and a head, in one module as a Trainer wants them."""

    def __init__(self, encoder: Encoder, rows: Rows, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        last = encoder.model.config.num_hidden_layers
        layers = "|".join(str(layer) for layer in range(last - TRAINING.lora.layers, last))
        self.encoder = get_peft_model(
            encoder.model,
            LoraConfig(
                r=TRAINING.lora.rank,
                lora_alpha=TRAINING.lora.alpha,
                target_modules=rf".*encoder\.layer\.({layers})\..*(query|key|value|dense)",
            ),
        )
        self.head = torch.nn.Linear(encoder.model.config.hidden_size, len(rows.classes))
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The logits of a batch, and the loss where there are labels."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        logits = self.head(normalize((states * weight).sum(1) / weight.sum(1), dim=1))
        return {"logits": logits} if labels is None else {"logits": logits, "loss": cross_entropy(logits, labels)}


def _load() -> Encoder:
    return Encoder.load(base_folder("minilm"), TRAINING.max_tokens)


def _logits(encoder: Encoder, model: Classifier) -> Logits:
    weight, bias = model.head.weight.detach().cpu().numpy(), model.head.bias.detach().cpu().numpy()
    encoder.model = model.encoder.eval()
    return lambda texts: np.asarray(encoder.embed(texts) @ weight.T + bias, dtype=np.float32)


def _ours(rows: Rows, seed: int) -> Callable[[], Logits]:
    encoder, labels = _load(), [rows.classes[i] for i in rows.truth]
    return lambda: fine_tune(encoder, rows.texts, labels, rows.classes, TRAINING, seed).logits


def _ours_in_bf16(rows: Rows, seed: int) -> Callable[[], Logits]:
    encoder, labels = _load(), [rows.classes[i] for i in rows.truth]
    in_bf16 = msgspec.structs.replace(TRAINING, precision="bf16")
    return lambda: fine_tune(encoder, rows.texts, labels, rows.classes, in_bf16, seed).logits


def _ours_compiled(rows: Rows, seed: int) -> Callable[[], Logits]:
    encoder, labels = _load(), [rows.classes[i] for i in rows.truth]
    for layer in encoder.model.encoder.layer[-TRAINING.lora.layers :]:
        layer.compile(dynamic=True)
    return lambda: fine_tune(encoder, rows.texts, labels, rows.classes, TRAINING, seed).logits


def _shuffled(lengths: Sequence[int], chance: np.random.Generator) -> Iterator[list[int]]:
    mixed = chance.permutation(len(lengths)).tolist()
    return (mixed[at : at + BATCH_ROWS] for at in range(0, len(mixed), BATCH_ROWS))


def _bucketed(lengths: Sequence[int], chance: np.random.Generator) -> Iterator[list[int]]:
    by_length = np.argsort(lengths, kind="stable").tolist()
    groups = [by_length[at : at + BATCH_ROWS] for at in range(0, len(by_length), BATCH_ROWS)]
    return (groups[i] for i in chance.permutation(len(groups)))


def _budgeted(lengths: Sequence[int], chance: np.random.Generator) -> Iterator[list[int]]:
    groups = list(batches(lengths))
    return (groups[i] for i in chance.permutation(len(groups)))


def _plain(batching: Batching, padded_to: int = 0, autocast: bool = False) -> Contender:
    """A loop as one writes it: every layer of every row in every epoch."""

    def contender(rows: Rows, seed: int) -> Callable[[], Logits]:
        encoder = _load()
        model = Classifier(encoder, rows, seed).to(DEVICE)

        def train() -> Logits:
            tokens, chance = encoder.tokenize(rows.texts), np.random.default_rng(seed)
            lengths, truth = [len(t) for t in tokens], torch.from_numpy(rows.truth).to(DEVICE)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=TRAINING.learning_rate, weight_decay=0.01)
            steps = TRAINING.epochs * len(list(batching(lengths, chance)))
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda at: 0.5 * (1 + math.cos(math.pi * at / steps))
            )
            for _ in range(TRAINING.epochs):
                for group in batching(lengths, chance):
                    ids, mask = padded([tokens[i] for i in group], encoder.tokenizer.pad_token_id)
                    if padded_to:
                        more = (0, padded_to - ids.shape[1])
                        ids = torch.nn.functional.pad(ids, more, value=encoder.tokenizer.pad_token_id)
                        mask = torch.nn.functional.pad(mask, more)
                    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                        loss = model(ids.to(DEVICE), mask.to(DEVICE), truth[group])["loss"]
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    schedule.step()
            return _logits(encoder, model)

        return train

    return contender


def _hugging_face(from_probe: bool) -> Contender:
    """Hugging Face's Trainer, its settings as ours where it has them."""

    def contender(rows: Rows, seed: int) -> Callable[[], Logits]:
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

        encoder = _load()

        def train() -> Logits:
            head = _probe(encoder, rows) if from_probe else None
            model = Classifier(encoder, rows, seed)
            if head is not None:
                model.head.load_state_dict(head)
            with tempfile.TemporaryDirectory(prefix="accrual-bench-") as folder:
                settings = TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=BATCH_ROWS,
                    num_train_epochs=TRAINING.epochs,
                    learning_rate=TRAINING.learning_rate,
                    lr_scheduler_type="cosine",
                    weight_decay=0.01,
                    seed=seed,
                    use_cpu=DEVICE.type == "cpu",
                    save_strategy="no",
                    logging_strategy="no",
                    log_level="error",
                    report_to=[],
                    disable_tqdm=True,
                )
                tokens = encoder.tokenize(rows.texts)
                data: Any = [
                    {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": int(label)}
                    for ids, label in zip(tokens, rows.truth, strict=True)
                ]
                collator = DataCollatorWithPadding(encoder.tokenizer)
                trainer = Trainer(model, settings, data_collator=collator, train_dataset=data)
                trainer.remove_callback(PrinterCallback)  # what this prints is the table
                trainer.train()
            return _logits(encoder, model)

        return train

    return contender


def _probe(encoder: Encoder, rows: Rows) -> dict[str, torch.Tensor]:
    fitted = LogisticRegression(C=20.0, max_iter=200).fit(encoder.embed(rows.texts), rows.truth)
    weight = np.zeros((len(rows.classes), encoder.model.config.hidden_size), dtype=np.float32)
    bias = np.full(len(rows.classes), fitted.intercept_.min(), dtype=np.float32)  # of a class without a row
    weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}


CONTENDERS: dict[str, Contender] = {
    "padded": _plain(_shuffled, padded_to=PADDED_TO),
    "dynamic": _plain(_shuffled),
    "buckets": _plain(_bucketed),
    "token-budget": _plain(_budgeted),
    "ours": _ours,
    "hf-trainer": _hugging_face(from_probe=False),
    "hf-from-probe": _hugging_face(from_probe=True),
    "bf16": _plain(_budgeted, autocast=True),
    "ours-bf16": _ours_in_bf16,
    "ours-compiled": _ours_compiled,
}

if __name__ == "__main__":
    main()
