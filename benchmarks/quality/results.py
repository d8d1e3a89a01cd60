"""Makes docs/results.md and its pictures from the finished runs; run it again as more arrive.

python benchmarks/quality/results.py
"""

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer


sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import plots
from quality.experiments import LORA_RANK_2, Store, best_learning_rate, dev_losses, known, pending
from quality.figures import (
    ADALORA,
    CONSTANT,
    IA3,
    LORA,
    LORA_QV,
    METHODS,
    PARA,
    PATH,
    RANDOM,
    Difference,
    difference,
    difference_without_retraining,
    groups,
    mean_and_half_width,
    of_the_setting,
    pruned,
    smaller_budget,
    stability,
    table,
)
from quality.tasks import TASKS, Split


HERE = Path(__file__).parent
ROOT = HERE.parents[1]

INTRODUCTION = """\
# Results

Both papers claim better quality than PEFT's baselines at comparable numbers of parameters. This page says what came out
when that was tried on a small model. `make results` writes it from the finished runs in
`benchmarks/results/quality`, every figure and every verdict included; `python
benchmarks/quality/run.py` goes on with the runs that are missing.

## How it was measured

- **Model:** {models}, float32. **Machine:** {machines}.
- **Tasks:** definitions of words (WordNet), the sign of movie reviews (VADER), the kind of a noun (eight of WordNet's
  kinds, as many of each), BoolQ (questions whose passage has at most 70 words). Near-duplicates, rows with the same set
  of words, are removed; of what is left {test} rows are for the test, {dev} for choosing learning rates and for pruning
  without retraining, {calibration} for scoring. The split is the same for every run, and nothing is trained or scored on
  test rows.
- **Training:** {steps} steps of 8 rows, each row once, AdamW without weight decay, 6% warm-up, linear decay, gradient norm
  at most 1. Rows of similar length share a batch. The seed decides the adapter's start, the training rows and their
  order, and a random choice of modules.
- **Budgets:** {budget:,} parameters (LoRA, r = 2, on all 210 linear layers) unless a table says otherwise. The rank comes
  as near as whole ranks allow; the tables show the number trained. IA3 has a size of its own, on PARA's three
  projections. AdaLoRA starts with half as many ranks again as the budget has, which is the number shown, and ends with
  those of the budget.
- **Loss:** nats a label token on the test rows, the end of the answer included. **Accuracy:** the likeliest of the labels'
  first tokens. **ROUGE-L:** of 24 greedy answers, so it is coarse.
- **± and verdicts:** 95% t intervals over seeds, and paired over seeds where two are compared. "Better" and "worse" are
  said where the interval leaves out zero, without a correction for the number of comparisons: with three seeds such an
  interval is wide, and "no difference shown" is not "equal".
- **FanLoRA's setting** comes from one search: LoRA, r = 8, on all modules, 60 steps on definitions, scored on 16
  calibration rows; the best two modules of each layer stay. "Random" draws two modules of each layer anew for each seed.
"""

TRIED = """\
What was tried where a claim is not borne out, each with its figures below. *Learning rates*: a grid for each method. *FanLoRA's
choice*: other scores; the score divided by what a rank costs in the module, since `path` prefers the large matrices, where fewer
ranks fit into the budget; the task's own setting; roles, and modules from anywhere; one module a layer; a larger budget (1 to 3).
*PARA*: its poolings and its activation, a quarter of its rank, larger and smaller vectors, what the generators read (5).
"""


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table, numbers to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: pd.Series, digits: int = 3) -> str:
    """Writes a mean and its interval."""
    values = values.dropna()
    if values.empty:
        return ""
    mean, half_width = mean_and_half_width(values)
    return f"{mean:.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")


def picture(frame: pd.DataFrame, name: str, alt: str) -> str:
    """Returns the link to a picture of losses, if there is one."""
    frame = smaller_budget(frame)
    return f"![{alt}](images/results-{name}.png)\n" if plots.panels(frame, plots.compared(frame)[name]) else ""


def methods_table(frame: pd.DataFrame, names: list[str]) -> str:
    """Returns what each variant reached."""
    rows = []
    for name in names:
        own = frame[frame["variant"] == name]
        if not own.empty:
            parameters = f"{round(own['parameters'].mean()):,}"
            rate = " ".join(f"{rate:g}" for rate in sorted(own["learning_rate"].unique()))
            figures = [spread(own[column]) for column in ("loss", "accuracy", "rouge_l")]
            rows.append([name, parameters, rate, str(len(own)), *figures])
    columns = ["", "parameters", "lr", "seeds", "loss", "accuracy", "ROUGE-L"]
    kept = [index for index, column in enumerate(columns) if not column or any(row[index] for row in rows)]
    return markdown([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def comparison(frame: pd.DataFrame, pairs: list[tuple[str, str]]) -> str:
    """Returns how variants differ in loss, for each task and over the tasks."""
    rows = []
    for first, second in pairs:
        tasks = [task for task in TASKS if difference(frame[frame["task"] == task], first, second)]
        for task in [*tasks, *(["mean over these tasks"] if len(tasks) > 1 else [])]:
            own = frame[frame["task"] == task] if task in TASKS else frame[frame["task"].isin(tasks)]
            found = difference(own, first, second)
            if found:
                rows.append([f"{first} less {second}", task, *_columns(found)])
    if not rows:
        return "*No runs yet.*\n"
    return markdown(["loss of", "task", "difference", "p", "pairs", "verdict"], rows)


def _columns(found: Difference) -> list[str]:
    interval = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    p = "" if found.p is None else f"{found.p:.2g}"
    return [f"{found.mean:+.3f}{interval}", p, str(found.pairs), found.verdict]


def claims_section(frame: pd.DataFrame, store: Store) -> str:
    """Returns what each claim comes to, over all tasks and task by task."""
    small, lost = smaller_budget(frame), pruned(store)
    kept = difference_without_retraining(lost[lost["task"] == "gloss"], "2 a layer")
    rows = [] if kept is None else [["What `path` keeps beats a random choice before retraining", *_claim(kept), ""]]
    for claim, first, second in (
        ("FanLoRA with `path` beats FanLoRA with random modules", PATH, RANDOM),
        ("FanLoRA with `path` beats LoRA on all modules", PATH, LORA),
        ("PARA beats IA3", PARA, IA3),
        ("PARA beats LoRA on all modules", PARA, LORA),
        ("PARA beats its generators fed a constant", PARA, CONSTANT),
    ):
        found = difference(small, first, second)
        if found is not None:
            of_tasks = {task: difference(small[small["task"] == task], first, second) for task in TASKS}
            each = ", ".join(f"{task} {one.mean:+.3f}{'*' * (one.verdict in ('better', 'worse'))}"
                             for task, one in of_tasks.items() if one is not None)  # fmt: skip
            rows.append([claim, *_claim(found), each])
    text = """\
## In short

Differences in test loss, the mean over all tasks that both have been run on, at the smaller budget; below zero is better. A star
stands where the interval of a single task leaves out zero.
"""
    return text + "\n" + markdown(["claim", "difference", "seeds", "", "task by task"], rows) + "\n" + TRIED


def _claim(found: Difference) -> list[str]:
    says = {"better": "holds", "worse": "the opposite", "no difference shown": "not shown"}
    interval, _, pairs, verdict = _columns(found)
    return [interval, pairs, says.get(verdict, verdict)]


def methods_section(frame: pd.DataFrame) -> str:
    """Returns the tables of all methods, by task and budget."""
    parts = ["## The methods side by side\n"]
    for budget in sorted(frame["budget"].unique()):
        for task in TASKS:
            own = frame[(frame["task"] == task) & (frame["budget"] == budget)]
            if not own.empty:
                what = f"**{task}**, {budget:,} parameters"
                if TASKS[task].labels:
                    what += f"; the commonest answer is right on {Split(task, TASKS[task]).commonest:.3f}"
                parts.append(f"{what}\n\n{methods_table(own, METHODS)}")
    parts.append(picture(frame, "methods", "Test loss of each method"))
    parts.append("The claims, as differences in test loss at the smaller budget:\n")
    pairs = [(PATH, LORA), (PATH, LORA_QV), (PATH, ADALORA), (PATH, RANDOM), (PARA, IA3), (PARA, LORA)]
    parts.append(comparison(smaller_budget(frame), pairs))
    larger = frame[frame["budget"] != LORA_RANK_2]
    if not larger.empty:
        parts += ["At the larger budget:\n", comparison(larger, pairs[:4])]
    return "\n".join(parts)


def learning_rates_section(store: Store) -> str:
    """Returns the dev losses that learning rates were chosen by."""
    rows = []
    for (task, budget, name), contents in groups(store).items():
        losses = dev_losses(contents)
        if len(losses) > 1:
            best = best_learning_rate(contents)
            cells = [f"{rate:g}: {_emphasised(spread(pd.Series(list(values.values()))), rate == best)} ({len(values)})"
                     for rate, values in losses.items()]  # fmt: skip
            edge = "lower" if best == min(losses) else "upper" if best == max(losses) else "none"
            rows.append([f"{name}, {task}, {budget:,}", "; ".join(cells), edge])
    text = """\
## Learning rates

The rates are 0.001, 0.003, 0.01, 0.03 and 0.1, tried on the noun task until the best of a method had a worse one on either side,
and then one between the best two. Loss on the dev rows, over as many seeds as the parentheses say; those that all rates
with three seeds or more have in common choose the best, in bold type, which the tables show. The best of a method on the noun task serves its variants and larger
budgets too, a random choice of modules being a method of its own. Other tasks take it from there: their rows below say which others they tried.
"""
    return text + "\n" + markdown(["", "rate: dev loss (seeds)", "best at the edge"], rows)


def _emphasised(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def choice_section(frame: pd.DataFrame, store: Store) -> str:
    """Question 1: which score picks the best modules."""
    lost = pruned(store)
    searches = lost[lost["choice"].str.endswith("a layer") & (lost["task"] == "gloss")]
    before = of_the_setting(searches)
    means = before.pivot_table(index="score", columns="choice", values="loss", aggfunc="mean").sort_values("2 a layer")
    rows = [
        [str(score), *(f"{value:.3f}" if pd.notna(value) else "" for value in row), *_cost(store, str(score))]
        for score, *row in means.itertuples()
    ]
    differences = [
        [choice, *_columns(found)]
        for choice in means.columns
        if (found := difference_without_retraining(searches, choice)) is not None
    ]
    limits = of_the_setting(lost).groupby("choice")["loss"].mean()
    scores = ["ablation", "output_norm", "sensitivity", "weight_norm", "path per parameter"]
    pairs = [(PATH, RANDOM), *((PATH, f"FanLoRA, {score}") for score in scores)]
    numbers = [(f"{PATH}, {keep} a layer", other) for keep in (1, 3) for other in (f"{RANDOM}, {keep} a layer", PATH)]
    return f"""\
## 1. Which score picks the best modules?

*Before retraining.* The modules that a score does not keep are switched off in the trained LoRA of the search; loss on
dev rows of the definitions. With all 210 modules it is {limits["all"]:.3f}, with none {limits["none"]:.3f}. "Random" is the mean of
three draws. The table is of the search with seed 0, whose `path` scores give the setting used everywhere on this page.

{markdown(["kept", *means.columns, "CPU seconds", "calibration tokens"], rows)}
`path` less random, paired over the seeds of the searches:

{markdown(["kept", "difference", "p", "pairs", "verdict"], differences)}
![Loss without retraining, by score](images/results-pruned.png)

*After retraining.* Fresh adapters on the kept modules, two of each layer, at equal parameters:

{comparison(smaller_budget(frame), pairs)}
One and three of each layer:

{comparison(smaller_budget(frame), numbers)}
{picture(frame, "settings", "Settings after retraining")}"""


def _cost(store: Store, score: str) -> tuple[str, str]:
    """Returns the seconds and the tokens that scoring took, nothing for a random choice."""
    if score == "random":
        return "", ""
    scored = store.scores("gloss", score)
    return f"{scored['cpu_seconds']:.0f}", f"{scored['num_tokens']:,}"


def transfer_section(frame: pd.DataFrame) -> str:
    """Question 2: does a setting transfer."""
    own = f"{PATH}, own setting"
    return f"""\
## 2. Does a setting found on definitions serve other tasks?

Against the setting that a search on the task itself finds, with the same score:

{comparison(smaller_budget(frame), [(PATH, own), (own, RANDOM), (own, LORA)])}
{picture(frame, "transfer", "The task's own setting, and others")}"""


def strategy_section(frame: pd.DataFrame, store: Store) -> str:
    """Question 3: per layer, by role, or global."""
    lost = of_the_setting(pruned(store))
    ways = ["2 a layer", "2 roles", "60 anywhere"]
    means = lost[lost["choice"].isin(ways)].pivot_table(index="score", columns="choice", values="loss")[ways]
    rows = [[str(score), *(f"{value:.3f}" for value in row)] for score, *row in means.itertuples()]
    return f"""\
## 3. Two of each layer, two roles, or the best 60 anywhere?

*Before retraining*, as in 1; each keeps 60 of 210 modules:

{markdown(["kept", *ways], rows)}
![Loss without retraining, by what is kept](images/results-strategy.png)

*After retraining*, by `path`; the last picture of 1 has them all:

{comparison(smaller_budget(frame), [(PATH, f"{PATH}, 2 roles"), (PATH, f"{PATH}, 60 anywhere")])}"""


def stability_section(store: Store) -> str:
    """Question 4: calibration data, points, and the stability of the choice."""
    found = stability(store)
    rows = [[what, f"{share:.0%}", f"{cpu:.0f}"] for what, share, cpu in found.itertuples(index=False)]
    return f"""\
## 4. How little calibration is enough, and how stable is the choice?

The share of the 60 modules (two a layer) that a choice has in common with the one used here (definitions, 16 rows, 8 points, seed 0);
two random choices share 29%, two of seven, on average.

{markdown(["path, with", "in common", "CPU seconds"], rows) if rows else "*No runs yet.*"}
{"![Overlap of choices](images/results-stability.png)" if rows else ""}
"""


def para_section(frame: pd.DataFrame) -> str:
    """Question 5: PARA's parts."""
    _, *others = plots.compared(frame)["para"]
    return f"""\
## 5. Which parts of PARA matter, and is it worth reading the prompt?

"Fed a constant" has the same generators with the same parameters, but they see ones in place of the prompt: what is left is one
learned vector a module. "Embeddings alone" shows all of them the first block's input, where PARA shows each the input of its own
block. "Prompt centred" takes the mean over 128 training prompts away from what they see. "Vectors x s" multiplies l - 1 by s, at
about 1/s of the learning rate: U learns as fast, and D and w more slowly or faster. The default is attention pooling with GELU.

{comparison(smaller_budget(frame), [(PARA, name) for name in [CONSTANT, *(name for name in others if name != CONSTANT)]])}
{picture(frame, "para", "PARA's variants")}"""


def cost_section(frame: pd.DataFrame) -> str:
    """Question 6: what training costs."""
    rows = []
    own = smaller_budget(frame)
    for task in TASKS:
        lora = own[(own["task"] == task) & (own["variant"] == LORA)]
        for name in METHODS:
            runs = own[(own["task"] == task) & (own["variant"] == name)]
            if not runs.empty:
                ratio = "" if lora.empty else f"{runs['cpu_seconds'].median() / lora['cpu_seconds'].median():.2f}"
                low, high = runs["cpu_seconds"].min(), runs["cpu_seconds"].max()
                memory = f"{runs['memory'].median() / 2**30:.2f}"
                rows.append([name, task, f"{runs['cpu_seconds'].median():.0f} ({low:.0f}-{high:.0f})", ratio, memory])
    return f"""\
## 6. What does training cost?

CPU seconds of the training steps on one core, median and range over seeds, and the most memory that the process held. The machine
had other work, which makes CPU time vary by tens of percent: read differences smaller than the ranges as nothing.

{markdown(["", "task", "CPU seconds", "of LoRA's", "GiB"], rows)}
![CPU time of training](images/results-cost.png)
"""


def missing_section(files: list[Path], store: Store) -> str:
    """Returns how much of each experiment is finished, and what no experiment tries."""
    rows = []
    for file in files:
        runs, waiting = known([file], store)
        left = pending(runs, store)
        finished = f"{len(runs) - len(left)} of {len(runs)}{' or more' if waiting else ''}"
        rows.append([file.name, finished, left[0].label if left else ""])
    return f"""\
## What is missing, and what was not tried

{markdown(["experiment", "finished", "next"], rows)}
Not tried here: models above 135M parameters, more than 60 steps, more than five seeds, a whole grid of learning rates for each task and budget, LoRA's
alpha (always 2r), dropout, generators of PARA that read inside of their block or after it, a setting from a large instruction set such as the paper's. How far any of this holds at the papers'
scale (7B) is open; `benchmarks/peft_method_comparison` has the runs for who has a GPU.
"""


def page(store: Store, files: list[Path]) -> str:
    """Returns docs/results.md."""
    frame = table(store)
    contents = store.load("run") + store.load("search")
    split = Split("", next(iter(TASKS.values())))
    introduction = INTRODUCTION.format(
        models=", ".join(sorted({content["base_model"] for content in contents})),
        machines="; ".join(sorted({_machine(content["machine"]) for content in contents})),
        steps=" or ".join(sorted({str(content["run"]["steps"]) for content in store.load("run")})),
        budget=LORA_RANK_2,
        test=split.test_size,
        dev=split.dev_size,
        calibration=split.calibration_size,
    )
    sections = [
        introduction,
        claims_section(frame, store),
        methods_section(frame),
        learning_rates_section(store),
        choice_section(frame, store),
        transfer_section(frame),
        strategy_section(frame, store),
        stability_section(store),
        para_section(frame),
        cost_section(frame),
        missing_section(files, store),
    ]
    return "\n".join(sections)


def _machine(facts: dict[str, str | int]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "peft"))
    where = (
        facts["accelerator"] if facts["accelerator"] != "none" else f"{facts['processor']}, {facts['threads']} thread"
    )
    return f"{where}, {versions}"


def main(
    results: Annotated[Path, typer.Option(help="Folder of the finished runs")] = ROOT / "benchmarks/results/quality",
    docs: Annotated[Path, typer.Option(help="Folder of the page")] = ROOT / "docs",
) -> None:
    """Writes the page and the pictures."""
    store = Store(results)
    plots.draw(store, docs / "images")
    (docs / "results.md").write_text(page(store, sorted((HERE / "experiments").glob("*.yaml"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
