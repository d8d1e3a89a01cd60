"""The tasks: fixed splits of real data, as token batches, and what is measured on them."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any

import assets
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


BATCH_SIZE = 8
GROUPED_BATCHES = 10
MAX_NEW_TOKENS = 32

Batch = dict[str, torch.Tensor]
Rows = list[assets.Row]


@dataclass(frozen=True)
class Task:
    """A data set and how it is judged.

    Attributes:
        rows: loads it, in a fixed order.
        labels: the answers of a classification task; empty where the answer is free text.
    """

    rows: Callable[[], Rows]
    labels: tuple[str, ...] = ()


TASKS = {
    "gloss": Task(assets.glosses),
    "sentiment": Task(assets.sentiment, ("negative", "positive")),
    "category": Task(assets.categories, tuple(assets.NOUN_CATEGORIES.values())),
    "boolq": Task(assets.boolq, ("no", "yes")),
    "verb": Task(assets.verb_categories, tuple(assets.VERB_CATEGORIES.values())),
}

MIXTURES = {
    "three": ("gloss", "sentiment", "category"),
    "five": ("gloss", "sentiment", "category", "boolq", "verb"),
}
"""Tasks that one adapter is trained on at once."""


@dataclass(frozen=True)
class Split:
    """The rows of a task, near-duplicates removed, in parts that never overlap.

    The first three parts are the same for every run, and sorted by length, so that their batches have little padding.
    """

    name: str
    task: Task
    test_size: int = 256
    dev_size: int = 128
    calibration_size: int = 128

    @cached_property
    def _rows(self) -> Rows:
        unique = {_words(row, self.task): row for row in reversed(self.task.rows())}
        return list(reversed(unique.values()))

    @property
    def test(self) -> Rows:
        """What is reported."""
        return sorted(self._rows[: self.test_size], key=_length)

    @property
    def dev(self) -> Rows:
        """What learning rates are chosen on, and what pruning without retraining is measured on."""
        return sorted(self._rows[self.test_size :][: self.dev_size], key=_length)

    @property
    def calibration(self) -> Rows:
        """What modules are scored on."""
        return self._rows[self.test_size + self.dev_size :][: self.calibration_size]

    @property
    def commonest(self) -> float:
        """The share of the test rows that have the commonest answer."""
        answers = Counter(row["completion"][-1]["content"] for row in self.test)
        return answers.most_common(1)[0][1] / answers.total()

    def training(self, size: int, seed: int) -> Rows:
        """Returns rows drawn without replacement from all others, in the order of their batches.

        Each batch has rows of similar length, which saves a quarter of the tokens in padding: of every
        `GROUPED_BATCHES` batches drawn, the rows are sorted by length and the batches then shuffled.

        Raises:
            ValueError: there are fewer.
        """
        rest = self._rows[self.test_size + self.dev_size + self.calibration_size :]
        if size > len(rest):
            raise ValueError(f"{self.name!r} has {len(rest)} rows to train on, {size} are asked for: lower `steps`.")
        draw = random.Random(seed)
        rows = draw.sample(rest, size)
        grouped: list[Rows] = []
        for start in range(0, size, GROUPED_BATCHES * BATCH_SIZE):
            group = sorted(rows[start : start + GROUPED_BATCHES * BATCH_SIZE], key=_length)
            batches = [group[first : first + BATCH_SIZE] for first in range(0, len(group), BATCH_SIZE)]
            grouped += draw.sample(batches, len(batches))
        return [row for batch in grouped for row in batch]


@cache
def split_of(task: str) -> Split:
    """Returns the rows of a task, which are read once."""
    return Split(task, TASKS[task])


def mixed(splits: Sequence[Split], steps: int, seed: int) -> Rows:
    """Returns the training rows of `steps` batches, each of one split.

    The splits have equally many batches, give or take one, in random order.
    """
    order = [step % len(splits) for step in range(steps)]
    random.Random(seed).shuffle(order)
    rows = [iter(split.training(order.count(index) * BATCH_SIZE, seed)) for index, split in enumerate(splits)]
    return [row for index in order for row in islice(rows[index], BATCH_SIZE)]


def _words(row: assets.Row, task: Task) -> frozenset[str]:
    """Returns the words that make two rows near-duplicates: of the question, or of a definition."""
    text = row["prompt"][-1] if task.labels else row["completion"][-1]
    return frozenset(re.findall(r"\w+", text["content"].lower()))


def _length(row: assets.Row) -> int:
    return sum(len(message["content"]) for message in row["prompt"] + row["completion"])


class Tokens:
    """Makes batches of conversations.

    Only the logits that predict a label token are computed: the others, four fifths and more, enter no loss.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt(self, row: assets.Row) -> list[int]:
        """Returns the tokens up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, text: str) -> list[int]:
        """Returns the tokens of an answer."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def loader(self, rows: Rows) -> DataLoader:
        """Returns batches of the rows, in their order."""
        return DataLoader(rows, batch_size=BATCH_SIZE, collate_fn=self.batch)  # type: ignore[arg-type]

    def batch(self, rows: Rows) -> Batch:
        """Returns the arguments of a causal model's forward pass, padded on the right."""
        prompts = [self.prompt(row) for row in rows]
        answers = [[*self.answer(row["completion"][-1]["content"]), self.tokenizer.eos_token_id] for row in rows]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[index, :end] = torch.tensor(prompt + answer)
            labels[index, len(prompt) : end] = torch.tensor(answer)
            attention_mask[index, :end] = 1
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        predicting = (shifted != -100).any(0).nonzero().squeeze(1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": predicting,
            "shift_labels": shifted[:, predicting],
        }


def on(device: torch.device, batch: Batch) -> Batch:
    """Returns the batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokens: Tokens, rows: Rows, task: Task, name: str) -> dict[str, float]:
    """Returns the loss in nats per label token, and for a classification task the accuracy.

    A row is right if the first token of its label is the likeliest of the labels' first tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    firsts = torch.tensor([tokens.answer(label)[0] for label in task.labels], dtype=torch.long, device=device)
    total, count, right = 0.0, 0, 0
    for batch in tqdm(tokens.loader(rows), desc=f"Evaluating {name}", leave=False):
        moved = on(device, batch)
        logits, labels = model(**moved).logits.float(), moved["shift_labels"]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
        if task.labels:
            row, first = torch.arange(len(labels), device=device), (labels != -100).int().argmax(1)
            likeliest = firsts[logits[row, first][:, firsts].argmax(1)]
            right += int((likeliest == labels[row, first]).sum())
    return {"loss": total / count} | ({"accuracy": right / len(rows)} if task.labels else {})


@torch.no_grad()
def rouge_l(model: Any, tokens: Tokens, rows: Rows) -> float:
    """Returns the mean ROUGE-L (F) of greedy answers against the rows' own."""
    model.eval()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    total = 0.0
    for row in tqdm(rows, desc="Generating", leave=False):
        prompt = torch.tensor([tokens.prompt(row)], device=next(model.parameters()).device)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokens.tokenizer.pad_token_id,
        )
        answer = tokens.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        total += scorer.score(row["completion"][-1]["content"], answer)["rougeL"].fmeasure
    return total / len(rows)
