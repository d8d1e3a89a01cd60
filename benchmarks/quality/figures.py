"""The finished runs as a table, and the statistics over seeds."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd
from scipy import stats

from .experiments import LORA_RANK_2, Run, Store, best_learning_rate
from .methods import importance
from .tasks import TASKS


PATH = "FanLoRA, path"
RANDOM = "FanLoRA, random"
OWN = f"{PATH}, own setting"
LORA = "LoRA, all modules"
LORA_QV = "LoRA, Q and V"
LORA_O_DOWN = "LoRA, O and down"
ADALORA = "AdaLoRA"
PARA = "PARA"
CONSTANT = "PARA, constant input"
TASK_ONLY = "PARA, task only"
IA3 = "IA3"
METHODS = [PATH, RANDOM, LORA, LORA_QV, ADALORA, PARA, IA3]
"""Each method with its defaults."""
MEAN = "mean"
"""In place of a task, the mean over a mixture's tasks."""


def variant(run: dict[str, Any]) -> str:
    """Returns what a run is, in words, without its task, budget and seed."""
    plain = {"lora": LORA, "lora-qv": LORA_QV, "lora-o-down": LORA_O_DOWN, "adalora": ADALORA, "ia3": IA3}
    if run["method"] in plain:
        return plain[run["method"]]
    if run["method"] == "para":
        return ", ".join(["PARA", *_para_options(run)])
    options = [run["score"].replace("_per_", " per ")]
    if (run["strategy"], run["keep"]) != ("layer", 2):
        options.append(
            f"{run['keep']} {({'layer': 'per layer', 'role': 'roles', 'global': 'anywhere'})[run['strategy']]}"
        )
    if run["source"] == run["task"] != "gloss":
        options.append("own setting")
    return ", ".join(["FanLoRA", *options])


def _para_options(run: dict[str, Any]) -> list[str]:
    options = []
    if run["reads"] != "prompt":
        reads = {
            "constant": "constant input",
            "task": "task only",
            "centred": "centered prompt",
            "embeddings": "embeddings only",
        }
        options.append(reads[run["reads"]])
    if run["pooling"] != "attention":
        options.append(f"{run['pooling']} pooling")
    if run["activation"] != "gelu":
        options.append(run["activation"])
    if run["rank"]:
        options.append(f"r = {run['rank']}")
    if run["start"] != 1:
        options.append(f"D init x {run['start']:g}")
    if run["scale"] != 1:
        options.append(f"vectors x {run['scale']:g}")
    if run["contrast"]:
        options.append(f"standardized prompt x {run['contrast']:g}")
    if run["targets"] != "usual":
        options.append("all linear layers")
    return options


def setting(run: dict[str, Any]) -> str:
    """Returns the task or mixture of a run, and its steps if they are not as usual."""
    return run["task"] if run["steps"] == Run.steps else f"{run['task']}, {run['steps']} steps"


def groups(store: Store) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Returns the finished runs by setting, budget and variant: each group's differ in seed and learning rate."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for content in store.load("run"):
        run = content["run"]
        found.setdefault((setting(run), run["parameters"], variant(run)), []).append(content)
    return found


def table(store: Store) -> pd.DataFrame:
    """Returns a row a finished run on a task of the usual length.

    Of several learning rates of a group, it has those with the best on the dev rows.
    """
    frame = _table(store)
    return frame[frame["setting"].isin(TASKS)].drop(columns="setting").reset_index(drop=True)


def further(store: Store) -> pd.DataFrame:
    """Returns the other runs likewise, those on mixtures and of other lengths: a row a task, and one for their mean."""
    frame = _table(store)
    return frame[~frame["setting"].isin(TASKS)].reset_index(drop=True)


def _table(store: Store) -> pd.DataFrame:
    rows = []
    for (where, budget, name), contents in groups(store).items():
        best = best_learning_rate(contents)
        for content in contents:
            if content["run"]["learning_rate"] == best:
                training = content["training"]
                row = {
                    "setting": where,
                    "budget": budget,
                    "variant": name,
                    "seed": content["run"]["seed"],
                    "learning_rate": best,
                    "parameters": content["parameters"],
                    "cpu_seconds": training["cpu_seconds"],
                    "memory": training["peak_memory"],
                    "training_loss": fmean(training["curve"][-(len(training["curve"]) // 3 or 1) :]),
                }
                by_task = content["test"].get("tasks")
                own = by_task or {content["run"]["task"]: content["test"]}
                whole = {MEAN: {"loss": content["test"]["loss"]}} if by_task else {}
                rows += [{**row, "task": task, **one} for task, one in (whole | own).items()]
    columns = ["setting", "task", "budget", "variant", "seed", "learning_rate", "parameters", "loss", "accuracy"]
    return pd.DataFrame(rows, columns=[*columns, "rouge_l", "cpu_seconds", "memory", "training_loss"])


def mean_and_half_width(values: pd.Series) -> tuple[float, float | None]:
    """Returns the mean and half of its 95% t interval, None where there is one value."""
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


@dataclass(frozen=True)
class Difference:
    """The test loss of a variant minus that of another, paired over the seeds that both have.

    Attributes:
        mean: below zero where the first is better.
        half_width: of the 95% t interval; None with one pair.
        p: of the paired t-test; None with one pair.
        pairs: how many.
        gaps: the difference of each pair, in the order of the seeds.
    """

    mean: float
    half_width: float | None
    p: float | None
    pairs: int
    gaps: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether the interval of the difference excludes zero, and on which side it lies."""
        if self.half_width is None:
            return "one pair, no interval"
        if abs(self.mean) <= self.half_width:
            return "no difference shown"
        return "better" if self.mean < 0 else "worse"


def difference(frame: pd.DataFrame, first: str, second: str) -> Difference | None:
    """Compares two variants over all (task, budget, seed) that both have; None where there is none.

    With several tasks the pairs are means over the tasks, one pair a seed that all tasks have.
    """
    frame = frame[frame["variant"].isin([first, second])]
    losses = frame.pivot_table(index=["seed"], columns=["task", "budget", "variant"], values="loss")
    gaps = [
        losses[(task, budget, first)] - losses[(task, budget, second)]
        for task, budget in frame[["task", "budget"]].drop_duplicates().itertuples(index=False)
        if {(task, budget, first), (task, budget, second)} <= set(losses.columns)
    ]
    return _paired((sum(gaps) / len(gaps)).dropna() if gaps else pd.Series(dtype=float))


def _paired(gap: pd.Series) -> Difference | None:
    if gap.empty:
        return None
    mean, half_width = mean_and_half_width(gap)
    p = None if half_width is None else float(stats.ttest_1samp(gap, 0).pvalue)
    return Difference(mean, half_width, p, len(gap), tuple(gap))


def smaller_budget(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs at the smaller budget, where most were made."""
    return frame[frame["budget"] == LORA_RANK_2]


def overlap(first: list[str], second: list[str]) -> float:
    """Returns the share of modules that two choices of the same size have in common."""
    return len(set(first) & set(second)) / len(first)


def pruned(store: Store) -> pd.DataFrame:
    """Returns the dev loss of each choice without retraining: `task`, `seed`, `choice`, `score`, `loss`."""
    rows = [
        {
            "task": content["search"]["task"],
            "seed": content["search"]["seed"],
            "choice": entry["choice"],
            "score": _score(entry),
            "loss": entry["loss"],
        }
        for content in store.load("search")
        for entry in content.get("pruned", ())
    ]
    return pd.DataFrame(rows, columns=["task", "seed", "choice", "score", "loss"])


def of_the_setting(lost: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the search whose setting all tasks use."""
    return lost[(lost["task"] == "gloss") & (lost["seed"] == 0)]


def difference_without_retraining(lost: pd.DataFrame, choice: str) -> Difference | None:
    """Compares `path` with the mean of the random draws, over the seeds of the searches."""
    own = lost[lost["choice"] == choice].pivot_table(index="seed", columns="score", values="loss")
    if not {"path", "random"} <= set(own.columns):
        return None
    return _paired((own["path"] - own["random"]).dropna())


def _score(entry: dict[str, Any]) -> str:
    return "random" if entry["method"].startswith("random") else entry["method"]


def stability(store: Store) -> pd.DataFrame:
    """Returns how far each choice by `path` agrees with the one that is used: `what`, `share`, `cpu_seconds`."""
    used = importance(store.scores("gloss", "path")["values"], "path").select(keep=2).names
    rows = []
    for content in store.load("search"):
        run = content["search"]
        for scored in content["scored"]:
            scoring = scored["scoring"]
            if scoring["method"] != "path":
                continue
            what = {
                f"{scoring['rows']} rows": scoring["rows"] != 16,
                "16 other rows": scoring["first"] != 0,
                f"{scoring['points']} points": scoring["points"] != 8,
                f"seed {run['seed']}": run["seed"] != 0,
                f"a search on {run['task']}": run["task"] != "gloss",
            }
            names = [name for name, differs in what.items() if differs]
            if names:
                choice = importance(scored["values"], "path").select(keep=2).names
                rows.append((", ".join(names), overlap(choice, used), scored["cpu_seconds"]))
    return pd.DataFrame(rows, columns=["what", "share", "cpu_seconds"])
