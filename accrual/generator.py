"""The generator: a causal language model that continues a prompt. Importing this module brings torch.

A row is a prompt and a completion. Where the tokenizer has a chat template the prompt is the user's turn; the
completion ends with the token that ends a turn. What is scored is every token of the completion, each as a
classification among the whole vocabulary given all that stands before it (so-called teacher forcing); a row's figure is
the mean over its tokens, since a long text is one row too. Brier score and log-loss of the next token are proper, so no
model gains by saying other than it believes; exp(log-loss) is the perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from accrual.encoder import LONGEST_TOKEN, batch_tokens, batches, load_base, padded
from accrual.errors import BundleError
from accrual.judged import Judged
from accrual.layers import first_adapted, starting_at, watching

_TOKENS_AT_ONCE = 256  # through the vocabulary: 50,000 words of 4 bytes each are 50 MB


class Written(NamedTuple):
    """Tokens of a prompt and its completion; the completion's are those from `start` on."""

    tokens: list[int]
    start: int


class Completion(NamedTuple):
    """What was written, and the probability of exactly that."""

    text: str
    probability: float


class Generator:
    """Prompts in, completions out."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, max_new_tokens: int) -> None:
        """`max_tokens`: of prompt and completion together, of which the completion has at most `max_new_tokens`."""
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_new_tokens = max_new_tokens
        self._around = len(self._turn(""))
        self._in_use = Lock()  # the adapter cannot be off for one thread only

    @classmethod
    def load(
        cls,
        base: Path,
        max_tokens: int,
        max_new_tokens: int,
        tokenizer: Path | None = None,
        adapter: Path | None = None,
        quantize: Literal["4bit", "8bit"] | None = None,
        apart: bool = False,
    ) -> Generator:
        """Load the base from its folder, and merge the adapter into this copy of it, unless it is to be `apart`.

        Raises BundleError when one of them cannot be loaded or the tokenizer has no end of a text, ConfigError when the
        base is to be quantized and there is no CUDA or no bitsandbytes.
        """
        model, words = load_base("AutoModelForCausalLM", base, tokenizer, adapter, quantize, apart)
        if words.eos_token_id is None:
            raise BundleError(f"{base}: its tokenizer has no token that ends a text: no model can be taught to stop")
        return cls(model, words, max_tokens, max_new_tokens)

    @property
    def device(self) -> torch.device:
        """Where the model is computed."""
        device: torch.device = self.model.device
        return device

    def written(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Written]:
        """The tokens of each row; what is too long is cut: the prompt's text, and the completion's end."""
        found = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = self._turn(prompt)
            after = self._ids(completion)[: self.max_new_tokens - 1]
            found.append(Written([*before, *after, self.tokenizer.eos_token_id], len(before)))
        return found

    def complete(self, prompts: Sequence[str], temperature: float = 1.0) -> list[Completion]:
        """The likeliest continuation of each prompt, token by token, and its probability at a temperature."""
        turns = [self._turn(prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        end = self.tokenizer.eos_token_id
        with self._in_use, torch.inference_mode():
            for rows in batches([len(turn) for turn in turns], batch_tokens(self.device)):
                longest = max(len(turns[row]) for row in rows)
                ids = torch.tensor([[end] * (longest - len(turns[row])) + turns[row] for row in rows])
                mask = torch.tensor([[0] * (longest - len(turns[row])) + [1] * len(turns[row]) for row in rows])
                said = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                )
                for row, tokens in zip(rows, said[:, longest:].tolist(), strict=True):
                    texts[row] = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            found = self.read(self.written(prompts, texts), temperature)
        return [
            Completion(text, float(np.exp(tokens.log_p.sum())))
            for text, tokens in zip(texts, found.rows(), strict=True)
        ]

    def read(self, rows: Sequence[Written], temperature: float = 1.0) -> Read:
        """What the model says of each token of the completions, its logits divided by `temperature`."""
        counts = _counts(rows)
        log_p, largest, squares, right = np.empty((4, counts.sum()))
        for here, logits, following in self._parts(rows):
            said = torch.log_softmax(logits / temperature, dim=1)
            likeliest = said.max(dim=1)
            log_p[here] = said.gather(1, following[:, None])[:, 0].cpu().numpy()
            largest[here] = likeliest.values.exp().cpu().numpy()
            squares[here] = said.exp().square().sum(1).cpu().numpy()
            right[here] = (likeliest.indices == following).cpu().numpy()
        return Read(counts, log_p, largest, squares, right)

    def log_losses(self, rows: Sequence[Written], temperatures: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
        """The mean log-loss of each row's tokens, [temperatures, rows]."""
        counts = _counts(rows)
        losses = np.empty((len(temperatures), counts.sum()))
        for here, logits, following in self._parts(rows):
            for n, temperature in enumerate(temperatures):
                losses[n, here] = cross_entropy(logits / temperature, following, reduction="none").cpu().numpy()
        return np.stack([_by_row(counts, of_one) for of_one in losses])

    def log_ratios(self, rows: Sequence[Written]) -> NDArray[np.float64]:
        """By how much each completion is likelier to the model than to its base: the logarithm of the ratio, [rows].

        0 where there is no adapter; `load` it `apart`. Below the lowest adapted layer one pass does for both.
        """
        if not self.is_adapted:
            return np.zeros(len(rows))
        ratios, first = np.empty(len(rows)), first_adapted(self.model)
        with self._in_use, torch.inference_mode():
            for group in self._batches(rows):
                some = [rows[row] for row in group]
                with watching(self.model, first) as seen:
                    own = self._log_p(some)
                with self.model.disable_adapter(), starting_at(self.model, first) as begin:
                    begin.states = seen.states
                    ratios[group] = own - self._log_p(some)
        return ratios

    @property
    def is_adapted(self) -> bool:
        """Whether there is an adapter that is not merged."""
        return hasattr(self.model, "disable_adapter")

    def _batches(self, rows: Sequence[Written]) -> Iterator[list[int]]:
        return batches([len(row.tokens) for row in rows], batch_tokens(self.device))

    def _parts(self, rows: Sequence[Written]) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]]:
        """Some tokens of the completions at a time: their places among all, the logits [tokens, vocabulary] of what
        comes there, and what did.
        """
        starts = np.cumsum([0, *_counts(rows)])
        with torch.inference_mode():
            for group in self._batches(rows):
                places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in group])
                for logits, following in self._said([rows[row] for row in group]):
                    here, places = places[: len(following)], places[len(following) :]
                    yield here, logits, following

    def _said(self, batch: Sequence[Written]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The logits of each token of the completions, [tokens, vocabulary], and the token; not all at once."""
        states, following = self.states_before(batch)
        for part in range(0, len(following), _TOKENS_AT_ONCE):
            now = slice(part, part + _TOKENS_AT_ONCE)
            yield self.logits(states[now]).float(), following[now]

    def _log_p(self, batch: Sequence[Written]) -> NDArray[np.float64]:
        """The logarithm of each completion's probability, [rows]."""
        by_token = [-cross_entropy(logits, token, reduction="none") for logits, token in self._said(batch)]
        counts = _counts(batch)
        return _by_row(counts, torch.cat(by_token).double().cpu().numpy()) * counts

    def log_likelihoods(self, rows: Sequence[Written]) -> torch.Tensor:
        """Of each completion the logarithm of its probability, [rows], as one batch and with a gradient."""
        states, following = self.states_before(rows)
        by_token = cross_entropy(self.logits(states).float(), following, reduction="none")
        return -torch.stack([part.sum() for part in torch.split(by_token, _counts(rows).tolist())])

    def states_before(self, rows: Sequence[Written]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token of the completions, one row behind the other: the state it follows from, and the token."""
        ids, mask = (given.to(self.device) for given in padded([row.tokens for row in rows], 0))
        states = self._bare.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        row = torch.tensor([n for n, one in enumerate(rows) for _ in range(one.start, len(one.tokens))])
        at = torch.tensor([place for one in rows for place in range(one.start, len(one.tokens))])
        row, at = row.to(self.device), at.to(self.device)
        return states[row, at - 1], ids[row, at]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of the token that follows each state, [states, vocabulary]."""
        logits: torch.Tensor = self._bare.get_output_embeddings()(states)
        return logits

    @property
    def _bare(self) -> Any:
        """The model itself, if it is wrapped for an adapter."""
        return self.model.get_base_model() if self.is_adapted else self.model

    def _turn(self, prompt: str) -> list[int]:
        """The tokens before a completion; there is at least one."""
        if self.tokenizer.chat_template is None:
            return self._cut(prompt, 0) or [self.tokenizer.eos_token_id]  # what begins follows the end of another text
        # The text is cut, not the template around it.
        room = "" if not prompt else self.tokenizer.decode(self._cut(prompt, self._around))
        said = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": room}], add_generation_prompt=True, return_dict=True
        )
        ids: list[int] = said["input_ids"]
        return ids

    def _cut(self, text: str, around: int) -> list[int]:
        return self._ids(text)[: max(1, self.max_tokens - self.max_new_tokens - around)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text[: self.max_tokens * LONGEST_TOKEN], add_special_tokens=False)["input_ids"]
        return ids


class Read(NamedTuple):
    """Of rows with `counts` tokens, one behind the other, by token: the logarithm of its probability, the largest
    probability, the sum of all squared, and whether the likeliest was right.
    """

    counts: NDArray[np.int64]
    log_p: NDArray[np.float64]
    largest: NDArray[np.float64]
    squares: NDArray[np.float64]
    right: NDArray[np.float64]

    def rows(self) -> list[Read]:
        """Each row by itself."""
        ends = np.cumsum(self.counts)[:-1]
        parts = [np.split(values, ends) for values in self[1:]]
        return [Read(self.counts[n : n + 1], *of_row) for n, of_row in enumerate(zip(*parts, strict=True))]

    def judged(self) -> Judged:
        """By row the means over its tokens; by question, every token: was the likeliest the one that came?"""
        return Judged(
            brier=_by_row(self.counts, self.squares - 2 * np.exp(self.log_p) + 1),
            log_loss=_by_row(self.counts, -self.log_p),
            hits=_by_row(self.counts, self.right),
            questions=self.counts,
            outside=np.zeros(len(self.counts), dtype=np.bool_),
            said=self.largest,
            happened=self.right,
        )


def _counts(rows: Sequence[Written]) -> NDArray[np.int64]:
    """How many tokens each completion has."""
    return np.array([len(row.tokens) - row.start for row in rows], dtype=np.int64)


def _by_row(counts: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the tokens of each row, of which there is at least one."""
    return np.asarray(np.add.reduceat(values, np.cumsum(counts) - counts) / counts) if len(counts) else values
