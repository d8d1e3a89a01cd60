"""The pages of results are what the script makes of the committed runs, and its verdicts are those of the statistics."""

import json
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import typer
from quality import results, tables
from quality.experiments import Run, Scoring, Search, Store
from quality.figures import (
    CONSTANT,
    IA3,
    LORA,
    MEAN,
    PARA,
    PATH,
    RANDOM,
    Difference,
    difference,
    further,
    mean_and_half_width,
    overlap,
    pruned,
    smaller_budget,
    stability,
    table,
    variant,
)


ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "benchmarks" / "quality" / "experiments").glob("*.yaml"))
AGAIN = "base model, again"
COMMITTED = Store(ROOT / "benchmarks" / "results" / "quality")
FACTS = {"processor": "a", "threads": 1, "accelerator": "none", "torch": "2", "transformers": "5", "peft": "0"}


def save(store: Store, run: Run, loss: float, dev: float | None = None) -> None:
    training = {"curve": [1.0], "cpu_seconds": 10.0 * loss, "wall_seconds": 10.0, "peak_memory": 2**30}
    content = {"base_model": "tiny", "machine": FACTS, "parameters": 600_000, "training": training}
    held_out = {"dev": {"loss": loss if dev is None else dev}, "test": {"loss": loss, "accuracy": 0.5}}
    store.save("some", run, {**content, **held_out})


def save_search(store: Store, search: Search, *, best: str) -> None:
    roles = ("mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.q_proj")
    values = {f"model.layers.{layer}.{role}": float(role.endswith(best)) for layer in range(2) for role in roles}
    scored = [
        {"scoring": vars(scoring), "cpu_seconds": 3.0, "num_tokens": 9, "values": values}
        for scoring in search.scorings
    ]
    pruned = [
        {"choice": choice, "method": "path", "loss": 3.0}
        for choice in ("1 per layer", "2 per layer", "2 roles", "60 anywhere")
    ]
    limits = [{"choice": name, "method": name, "loss": loss} for name, loss in (("all", 2.5), ("none", 4.5))]
    store.save(
        "searches", search, {"base_model": "tiny", "machine": FACTS, "scored": scored, "pruned": [*limits, *pruned]}
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three seeds, in which `path` beats random by about 0.1 and PARA differs from IA3 by chance alone."""
    store = Store(tmp_path)
    save_search(store, Search("gloss", (Scoring("path"),)), best="_proj")
    save_search(store, Search("gloss", (Scoring("path"),), seed=1), best="up_proj")
    for seed, (chosen, drawn, para, ia3) in enumerate(
        [(0.30, 0.40, 0.5, 0.6), (0.32, 0.43, 0.6, 0.5), (0.31, 0.40, 0.55, 0.55)]
    ):
        for task in ("category", "sentiment"):
            save(store, Run(task, "fanlora", seed, 3e-3), chosen)
            save(store, Run(task, "fanlora", seed, 3e-3, score="random"), drawn)
        save(store, Run("category", "para", seed, 3e-3), para)
        save(store, Run("category", "ia3", seed, 3e-3), ia3)
    return store


def test_the_pages_are_made_of_the_committed_runs() -> None:
    for name, text in results.pages(COMMITTED, EXPERIMENTS).items():
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert page == text, "run `make results` and commit what it changes"
        for picture in page.split("](images/")[1:]:
            assert (ROOT / "docs" / "images" / picture.partition(")")[0]).exists()


def test_the_readme_has_the_claims_of_the_committed_runs() -> None:
    """Each difference stands in the README, whose words say these verdicts."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = tables.claims(smaller_budget(table(COMMITTED)), pruned(COMMITTED)).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert all(f"({difference})" in readme for _, _, difference, *_ in cells), "take the figures of docs/results.md"
    verdicts = [verdict for _, _, _, _, verdict, *_ in cells]
    assert verdicts == ["holds", "not shown", "not shown", "not shown", "the opposite", "not shown"], (
        "reword the README"
    )


def test_the_readme_has_the_claims_about_one_adapter_for_three_tasks() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = smaller_budget(further(COMMITTED)).query("setting == 'three, 120 steps'")
    claims = (
        (MEAN, IA3, "better"),
        (MEAN, LORA, "worse"),
        ("gloss", CONSTANT, "better"),
        (MEAN, CONSTANT, "no difference shown"),
    )
    for task, other, verdict in claims:
        found = difference(runs[runs["task"] == task], PARA, other)
        assert found is not None and found.verdict == verdict, "reword the README"
        assert f"({tables.interval(found)})" in readme, "take the figures of docs/results.md"


def test_the_readme_and_the_page_about_serving_have_the_speed_that_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/serving-cpu.json").read_text())["results"]
    ratios: dict[str, list[str]] = {}
    for result in measured:
        if result["measure"] == "decode":
            ratios.setdefault(result["method"], []).append(f"{result['ratio']:.2f}")
    methods = (
        "PEFT LoRA, 7 roles",
        "FanLoRA, all modules",
        "PEFT LoRA, 2 roles",
        "FanLoRA, 2 per layer",
        "PARA",
        AGAIN,
    )
    for page, order in (("README.md", methods), ("docs/serving.md", (AGAIN, *methods[:-1]))):
        text = (ROOT / page).read_text(encoding="utf-8").replace("**", "")
        first, *others = (f" | {' | '.join(ratios[method])} |\n" for method in order)
        assert text.count(first) == 1, page
        for row in others:  # in this order in the same table
            text = text.partition(first)[2]
            assert row in text, page
            first = row


def test_each_file_of_runs_has_its_experiment_and_each_machine_once() -> None:
    files = sorted(COMMITTED.folder.glob("*.jsonl"))
    assert {path.stem for path in files} <= {path.stem for path in EXPERIMENTS}
    for path in files:
        contents = [json.loads(line) for line in path.read_text().splitlines()]
        machines = [content["machine"] for content in contents if "facts" in content]
        assert len(set(machines)) == len(machines) > 0


def test_a_field_that_committed_runs_lack_has_the_default_that_they_were_made_with() -> None:
    """Another default would make them other runs, on the page and for `run.py`."""
    contents = [content["run"] for content in COMMITTED.finished().values() if "run" in content]
    lacking = {field.name: field.default for run in contents for field in fields(Run) if field.name not in run}
    assert lacking == {"start": 1.0, "scale": 1.0, "contrast": 0.0, "targets": "usual"}


def test_differences_are_paired_over_seeds(store: Store) -> None:
    frame = table(store)
    found = difference(frame[frame["task"] == "category"], PATH, RANDOM)
    assert found is not None and found.pairs == 3 and found.verdict == "better"
    assert found.mean == pytest.approx(-0.1) and found.half_width == pytest.approx(
        0.0248, abs=1e-4
    )  # t = 4.303, s = 0.01
    other = difference(frame, PARA, "IA3")
    assert other is not None and other.verdict == "no difference shown" and other.p == pytest.approx(1)
    both = difference(frame, PATH, RANDOM)
    assert both is not None and both.pairs == 3  # the mean over the tasks for each seed
    assert difference(frame, PATH, "AdaLoRA") is None

    one_seed = frame[frame["seed"] == 0]
    single = difference(one_seed, PATH, RANDOM)
    assert single is not None and single.half_width is None and single.verdict == "one pair, no interval"
    assert mean_and_half_width(pd.Series([2.0])) == (2.0, None)


def test_the_page_says_what_the_figures_say() -> None:
    assert tables.says(Difference(-0.1, 0.025, 0.003, 3)) == "is better by 0.100 ± 0.025 (3 seeds)"
    assert tables.says(Difference(0.1, 0.025, 0.003, 5)) == "is worse by 0.100 ± 0.025 (5 seeds)"
    assert tables.says(Difference(-0.01, 0.025, 0.3, 3)) == "shows no difference (-0.010 ± 0.025, 3 seeds)"
    assert tables.says(Difference(-0.01, None, None, 1)) == "has one pair (-0.010)"
    assert tables.says(None) == "has no runs to compare"


def test_the_dev_rows_choose_the_learning_rate(store: Store) -> None:
    """And the test rows do not; rates are compared on the seeds that they share."""
    before = table(store)
    for seed, test in enumerate((0.01, 0.02, 0.03)):
        save(store, Run("category", "fanlora", seed, 1e-2), test, dev=0.9)
    save(store, Run("category", "fanlora", 9, 1e-2), 0.01, dev=0.001)
    pd.testing.assert_frame_equal(table(store), before)
    assert store.best_learning_rate("fanlora") == 3e-3
    for seed in range(3):
        assert store.best_learning_rate("fanlora") == 3e-3  # with one seed or two a rate has not been tried yet
        save(store, Run("category", "fanlora", seed, 2e-2), 9.0, dev=0.1)
    assert set(table(store).query("variant == @PATH and task == 'category'")["loss"]) == {9.0}
    assert store.best_learning_rate("fanlora") == 2e-2
    assert store.best_learning_rate("fanlora", "output_norm") == 2e-2
    assert store.best_learning_rate("fanlora", "random") == 3e-3  # a method of its own
    with pytest.raises(LookupError, match="'lora' has been tried"):
        store.best_learning_rate("lora")


def test_pages_without_a_search_say_which_to_run(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"no finished search on 'gloss'.*1-search.yaml"):
        results.main(results=tmp_path / "none", docs=tmp_path)


def test_the_pages_say_what_is_missing(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "3-some.yaml"
    file.write_text("runs: [{seed: [0, 1, 2, 3], task: category, method: fanlora}]")
    page, page_of_tables = results.pages(store, [file]).values()
    assert "| 3-some.yaml | 3 of 4 | category-fanlora-0.003-seed3 |" in page_of_tables
    assert "| FanLoRA, path vs. FanLoRA, random | mean over these tasks | -0.100 ± 0.025 |" in page_of_tables
    assert "One adapter for several tasks" not in page  # no section without runs
    assert "Several tasks" not in page_of_tables
    save(store, Run("category", "fanlora", 0, 1e-2), 0.5)
    rates = "| FanLoRA, path, category, 610,560 | 0.003: **0.310 ± 0.025** (3); 0.01: 0.500 (1) | lower |"
    assert rates in results.pages(store, [file])["results-tables.md"]
    file.write_text("runs: [{task: category, method: [fanlora, lora]}]")
    assert "| 3-some.yaml | 1 of 1 or more |" in results.pages(store, [file])["results-tables.md"]


def save_mixture(store: Store, run: Run, gloss: float, category: float) -> None:
    training = {"curve": [9.0, 9.0, 1.0], "cpu_seconds": 10.0, "wall_seconds": 10.0, "peak_memory": 2**30}
    by_task = {"gloss": {"loss": gloss}, "category": {"loss": category, "accuracy": 0.75}}
    held_out = {"loss": (gloss + category) / 2, "tasks": by_task}
    content = {"base_model": "tiny", "machine": FACTS, "parameters": 600_000, "training": training}
    store.save("mixtures", run, {**content, "dev": held_out, "test": held_out})


def test_mixtures_and_longer_runs_have_tables_of_their_own(store: Store) -> None:
    """And take no part in the comparisons of single tasks."""
    before = table(store)
    for seed, (para, ia3) in enumerate([(3.0, 3.1), (3.1, 3.3)]):
        save_mixture(store, Run("three", "para", seed, 1e-2, steps=120), para, 0.2)
        save_mixture(store, Run("three", "ia3", seed, 2e-2, steps=120), ia3, 0.2)
        save(store, Run("category", "lora", seed, 1e-2, steps=160), 0.1)
    pd.testing.assert_frame_equal(table(store), before)
    page, page_of_tables = results.pages(store, []).values()
    section = page.partition("## One adapter")[2].partition("## 1.")[0]
    losses = "| PARA | 600,000 | 0.01 | 2 | 1.625 ± 0.318 | 3.050 ± 0.635 | 0.200 ± 0.000 (0.750) | 1.000 |"
    assert losses in page_of_tables.partition("## Several tasks")[2].partition("## Scores")[0]
    assert "PARA differs by -0.050 and -0.100 (2 seeds, too few for an interval) compared with IA3" in section
    assert (
        "| PARA vs. IA3 | 2 | -0.050 and -0.100 | too few seeds | -0.100 and -0.200 | +0.000 and +0.000 |" in section
    )
    assert "**category, 160 steps**: no comparison is finished yet." in section
    save_mixture(store, Run("three", "para", 2, 1e-2, steps=120), 3.0, 0.2)
    save_mixture(store, Run("three", "ia3", 2, 2e-2, steps=120), 3.16, 0.2)
    frame = further(store)
    assert "PARA is better by 0.077 ± 0.063 (3 seeds) compared with IA3." in tables.reading(frame, "three, 120 steps")
    table_of_three = tables.further_comparison(frame[frame["setting"] == "three, 120 steps"])
    assert "| PARA vs. IA3 | 3 | -0.077 ± 0.063 | better | -0.153 ± 0.125 | +0.000 ± 0.000 |" in table_of_three


def test_variants_have_different_names() -> None:
    runs = [
        Run("category", "fanlora"),
        Run("category", "fanlora", score="random"),
        Run("category", "fanlora", keep=1),
        Run("category", "fanlora", strategy="role"),
        Run("category", "fanlora", source="category"),
        Run("category", "lora"),
        Run("category", "lora-qv"),
        Run("category", "para"),
        Run("category", "para", reads="constant"),
        Run("category", "lora-o-down"),
        Run("category", "para", reads="task"),
        Run("category", "para", reads="centred"),
        Run("category", "para", reads="embeddings"),
        Run("category", "para", pooling="mean"),
        Run("category", "para", activation="rational"),
        Run("category", "para", rank=3),
        Run("category", "para", start=3.0),
        Run("category", "para", scale=3.0),
        Run("category", "fanlora", score="path_per_parameter"),
    ]
    assert len({variant(vars(run)) for run in runs}) == len(runs)
    assert variant(vars(runs[0])) == PATH and variant(vars(runs[1])) == RANDOM and variant(vars(runs[7])) == PARA


def test_overlap_with_the_choice_that_is_used(store: Store) -> None:
    assert overlap(["a", "b"], ["b", "c"]) == 0.5
    (row,) = stability(store).itertuples(index=False)
    assert row.what == "seed 1" and row.share in (0.5, 1.0)
