"""What is run: each run is a value, and the experiment files are products of lists of such values."""

import fcntl
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TextIO

import yaml


LORA_RANK_2 = 610_560
"""Parameters of LoRA with r = 2 on all 210 linear layers of SmolLM2-135M, the smaller of the two budgets."""

READS = ("prompt", "constant", "task", "embeddings", "centred")
"""What PARA's generators may see, see `generators.py`."""
TARGETS = ("usual", "all-linear")
"""What PARA may scale."""


@dataclass(frozen=True)
class Run:
    """One adapter, trained on a task or a mixture of tasks and evaluated.

    Attributes:
        task: a name of `tasks.TASKS` or `tasks.MIXTURES`.
        method: a name of `methods.METHODS`.
        seed: of the adapter, of the choice and order of the training rows, and of a random setting.
        learning_rate: its peak; None for the best of those tried on the noun task, see `Store.best_learning_rate`.
        parameters: the budget. The rank comes as near to it as whole ranks allow; IA3 has a size of its own.
        steps: training steps.
        source: FanLoRA: the task whose search gave the setting.
        score: FanLoRA: a score, "random", or a score whose values are divided by the parameters that a rank costs in the
            module, such as "path_per_parameter".
        strategy: FanLoRA: "layer", "role" or "global".
        keep: FanLoRA: how many modules of each layer, roles, or modules stay.
        pooling: PARA.
        activation: PARA.
        reads: PARA: one of `READS`: "constant" for the same generators fed with ones, "task" for the system message, which
            all rows of a task share, "embeddings" for the first block's input in all of them, "centred" for the prompt less
            the mean of others.
        rank: PARA: its rank, in place of the one that the budget gives.
        start: PARA: the standard deviation of D before training.
        scale: PARA: what l - 1 is multiplied by, so that with a learning rate as many times smaller U learns as fast, and D
            and w more slowly.
        contrast: PARA: how large what a prompt has of its own is beside what all prompts share, see
            `generators.standardise`; 0 for the hidden states as they are.
        targets: PARA: one of `TARGETS`, "usual" for Q, V and up.
    """

    task: str
    method: str
    seed: int = 0
    learning_rate: float | None = None
    parameters: int = LORA_RANK_2
    steps: int = 40
    source: str = "gloss"
    score: str = "path"
    strategy: str = "layer"
    keep: int = 2
    pooling: str = "attention"
    activation: str = "gelu"
    reads: str = "prompt"
    rank: int | None = None
    start: float = 1.0
    scale: float = 1.0
    contrast: float = 0.0
    targets: str = "usual"

    def __post_init__(self) -> None:
        if self.reads not in READS:  # it would be trained as if it were "prompt"
            raise ValueError(f"reads={self.reads!r} is none of {', '.join(READS)}.")
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets!r} is none of {', '.join(TARGETS)}.")

    @property
    def is_plain(self) -> bool:
        """Whether the method has its default options; a random choice of modules counts as a method."""
        whatever = {"task", "method", "seed", "learning_rate", "parameters", "steps", "score"}
        return self.score in (Run.score, "random") and changed(self).keys() <= whatever

    @property
    def label(self) -> str:
        """What the run is, without what has its default."""
        named = ("task", "method", "seed", "learning_rate")
        options = [
            value if isinstance(value, str) else f"{name}{value:g}"
            for name, value in changed(self).items()
            if name not in named
        ]
        return "-".join([self.task, self.method, *options, f"{self.learning_rate:g}", f"seed{self.seed}"])


@dataclass(frozen=True)
class Scoring:
    """One score of a search.

    Attributes:
        method: a score of `peft_fanlora`.
        rows: how many calibration rows it sees.
        points: K of `path`.
        first: the first of these rows.
    """

    method: str
    rows: int = 16
    points: int = 8
    first: int = 0


@dataclass(frozen=True)
class Search:
    """LoRA on all modules, trained on a source task and scored: steps (a) to (c) of FanLoRA.

    Attributes:
        task: the source.
        scorings: the scores, in order.
        prune: whether to evaluate what each score keeps, before anything is retrained.
        seed: of the adapter, and of the choice and order of the training rows.
        learning_rate: its peak.
        steps: training steps.
        rank: r.
    """

    task: str
    scorings: tuple[Scoring, ...]
    prune: bool = True
    seed: int = 0
    learning_rate: float = 1e-3
    steps: int = 60
    rank: int = 8

    @property
    def label(self) -> str:
        """What the run is."""
        scores = dict.fromkeys(scoring.method for scoring in self.scorings)
        return "-".join(["search", self.task, *scores, f"seed{self.seed}"])


def read(path: Path, store: "Store") -> Iterator[Run | Search]:
    """Yields the runs of an experiment file, those of the first entry first.

    Each entry of `searches` and `runs` gives a field a value or a list; the runs are the product of the lists, the
    first field varying slowest. `source: own` stands for the task.

    Raises:
        ValueError: a field is unknown.
    """
    content = yaml.safe_load(path.read_text())
    best_learning_rate = cache(store.best_learning_rate)  # it reads all finished runs
    for entry in content.get("searches", []):
        scorings = tuple(Scoring(**scoring) for scoring in entry.pop("scorings"))
        for values in _product(entry, Search, path):
            yield Search(scorings=scorings, **values)
    for entry in content.get("runs", []):
        for values in _product(entry, Run, path):
            if values.get("source") == "own":
                values["source"] = values["task"]
            if values.get("learning_rate") is None:
                values["learning_rate"] = best_learning_rate(values["method"], values.get("score"))
            yield Run(**values)


def _product(entry: dict[str, Any], kind: type, path: Path) -> Iterator[dict[str, Any]]:
    unknown = sorted(set(entry) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(
            f"{path.name}: a {kind.__name__} has no {unknown[0]!r}; it has {', '.join(kind.__annotations__)}."
        )
    lists = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in itertools.product(*lists):
        yield dict(zip(entry, values, strict=True))


def changed(run: Run | Search) -> dict[str, Any]:
    """Returns the fields of a run that do not have their default."""
    values = ((field, getattr(run, field.name)) for field in fields(run))
    return {field.name: value for field, value in values if value != field.default}


class Store:
    """A folder of finished runs: one `.jsonl` file per experiment file, with one line per run.

    A line with `facts` describes a machine; the runs below it refer to it by its `machine`. Runs are identified by their
    fields, so a new field with a default leaves finished runs as they are.

    Several processes can share a folder. They lock bytes of the file `.lock`: byte 0 while writing, and one byte per run
    while making the run. The operating system releases the locks of a process that ends or is killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _locks(self) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        return (self.folder / ".lock").open("w")

    def claim(self, runs: Iterable[Run | Search]) -> Run | Search | None:
        """Returns the first run that no other process has claimed, and claims it until this process ends.

        The run may have been finished by another process in the meantime. Returns None if all runs are claimed, or if the
        next one is a search that is claimed: the runs after it may need its scores.
        """
        for run in runs:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 + zlib.crc32(run.label.encode()))
            except (BlockingIOError, PermissionError):  # another process has the lock; POSIX allows both errors
                if isinstance(run, Search):
                    return None
            else:
                return run
        return None

    def save(self, experiment: str, run: Run | Search, result: dict[str, Any]) -> None:
        """Adds a run to the file of an experiment.

        The file is replaced as a whole, so that a killed process leaves either the old file or the new one.

        Raises:
            ValueError: the run is finished already.
        """
        machine = hashlib.sha256(json.dumps(result["machine"]).encode()).hexdigest()[:8]
        content = {type(run).__name__.lower(): asdict(run), **result, "machine": machine}
        added = [json.dumps({"machine": machine, "facts": result["machine"]}), json.dumps(content)]
        path = self.folder / f"{experiment}.jsonl"
        partial = path.with_suffix(".partial")
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, 0)
        try:
            if run in self.finished():
                raise ValueError(f"{run.label} is finished already: delete its line to repeat it.")
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            lines += [line for line in added if line not in lines]
            with partial.open("w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 0)

    def finished(self) -> dict[Run | Search, dict[str, Any]]:
        """Returns all finished runs and their results, in the order of their labels.

        Raises:
            ValueError: a line cannot be read, or two lines have the same run.
        """
        found: dict[Run | Search, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for run, content in _results(path):
                if run in found:
                    raise ValueError(f"{path.name}: {run.label} has another line already; delete one of them.")
                found[run] = content
        return dict(sorted(found.items(), key=lambda item: item[0].label))

    def load(self, kind: str) -> list[dict[str, Any]]:
        """Returns all finished results of a kind, "run" or "search", with all fields that it has today."""
        return [{**content, kind: asdict(run)} for run, content in self.finished().items() if kind in content]

    def scores(self, source: str, method: str) -> dict[str, Any]:
        """Returns what the search of seed 0 on a task found with a score.

        Raises:
            LookupError: no such search is finished.
        """
        for content in self.load("search"):
            if content["search"]["task"] == source and content["search"]["seed"] == 0 and content["search"]["prune"]:
                for scored in content["scored"]:
                    if scored["scoring"]["method"] == method:
                        return scored
        raise LookupError(f"no finished search on {source!r} has the score {method!r}: run one first (1-search.yaml)")

    def best_learning_rate(self, method: str, score: str | None = None) -> float:
        """Returns the learning rate that a method has where none is named: the best of those tried on the noun task.

        A method's runs with its smallest budget and the fewest steps there choose it, for all budgets and lengths.

        Args:
            method: its name.
            score: what chooses FanLoRA's modules; a random choice has a learning rate of its own.

        Raises:
            LookupError: none has been tried.
        """
        tried = []
        for content in self.load("run"):
            run = Run(**content["run"])
            same = run.method == method and (run.score == "random") == (score == "random")
            if run.is_plain and run.task == "category" and same:
                tried.append(content)
        if not tried:
            what = f"{method!r} with random modules" if score == "random" else repr(method)
            raise LookupError(f"no learning rate of {what} has been tried: run some on the noun task first")
        sizes = [(content["run"]["parameters"], content["run"]["steps"]) for content in tried]
        return best_learning_rate(content for content, size in zip(tried, sizes, strict=True) if size == min(sizes))


def _results(path: Path) -> Iterator[tuple[Run | Search, dict[str, Any]]]:
    machines = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            if "facts" in content:
                machines[content["machine"]] = content["facts"]
                continue
            content["machine"] = machines[content["machine"]]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{path.name}, line {number}: {error!r}. A line is a whole JSON object, and the line of its machine comes"
                " before it. Repair it, or delete it to repeat the run."
            ) from error
        if "run" in content:
            yield Run(**content["run"]), content
        else:
            scorings = tuple(Scoring(**scoring) for scoring in content["search"]["scorings"])
            yield Search(**{**content["search"], "scorings": scorings}), content


def dev_losses(contents: Iterable[dict[str, Any]]) -> dict[float, dict[int, float]]:
    """Returns the dev loss of runs by their learning rate and seed."""
    losses: dict[float, dict[int, float]] = {}
    for content in contents:
        losses.setdefault(content["run"]["learning_rate"], {})[content["run"]["seed"]] = content["dev"]["loss"]
    return dict(sorted(losses.items()))


def best_learning_rate(contents: Iterable[dict[str, Any]]) -> float:
    """Returns the learning rate with the lowest mean dev loss over the seeds that the rates have in common.

    A rate with fewer than three seeds takes no part where another has three. Without a seed in common it is the rate with
    the most seeds.
    """
    losses = dev_losses(contents)
    enough = min(3, max(len(by_seed) for by_seed in losses.values()))
    losses = {rate: by_seed for rate, by_seed in losses.items() if len(by_seed) >= enough}
    common = set.intersection(*(set(by_seed) for by_seed in losses.values()))
    if not common:
        return max(losses, key=lambda rate: len(losses[rate]))
    return min(losses, key=lambda rate: sum(losses[rate][seed] for seed in common))


def known(files: Iterable[Path], store: Store) -> tuple[dict[Run | Search, str], bool]:
    """Returns the runs of the files, each with the name of the first file that has it.

    It stops at the first run whose learning rate is not known yet; the second value says whether there is one.
    """
    runs: dict[Run | Search, str] = {}
    try:
        for file in files:
            for run in read(file, store):
                runs.setdefault(run, file.stem)
    except LookupError:
        return runs, True
    return runs, False


def pending(runs: Iterable[Run | Search], store: Store) -> list[Run | Search]:
    """Returns the runs that are not finished."""
    finished = store.finished()
    return [run for run in runs if run not in finished]
