"""The quality experiments from end to end on a tiny model: run, stopped, resumed, never repeated."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import time_budget
import torch
import transformers as tf
import typer
from quality import run as runner
from quality import tasks, training
from quality.experiments import Run, Scoring, Search, Store, known, pending, read

from integration_tests.helpers.models import LLAMA
from integration_tests.helpers.processes import environment
from integration_tests.helpers.text import tokenizer
from peft_fanlora.fanlora.candidates import candidates, num_parameters_per_rank


EXPERIMENTS = """
searches:
  - task: gloss
    scorings: [{method: path, rows: 8, points: 2}, {method: ablation, rows: 8}, {method: weight_norm}]
    steps: 3
    rank: 2
runs:
  - {task: category, method: [lora, fanlora, para], learning_rate: [1.e-2, 1.e-3], parameters: 3000, steps: 3}
"""
MORE = """
runs:
  - {task: category, method: fanlora, score: random, learning_rate: 3.e-3, parameters: 3000, steps: 3}
  - {task: [category, gloss], method: fanlora, score: [path, random], parameters: 3000, steps: 3}
  - {task: category, method: fanlora, strategy: role, keep: 2, parameters: 3000, steps: 3}
  - {task: category, method: para, reads: [constant, centred, embeddings], rank: 2, steps: 3}
  - {task: category, method: [adalora, lora-qv, ia3], learning_rate: 1.e-2, parameters: 5000, steps: 10}
"""


def rows(answer: Any) -> list[dict[str, Any]]:
    made = []
    for number in range(640):
        words = f"w{number % 40} w{number // 40 % 40} w{(number * 7 + 1) % 41}"
        prompt = [{"role": "user", "content": words}]
        made.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer(number, words)}]})
    return made


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the runner: a tiny model, two tasks, and a folder for the results."""
    monkeypatch.setitem(tasks.TASKS, "gloss", tasks.Task(lambda: rows(lambda number, words: f"{words} w42")))
    labels = ("w45", "w46", "w47")
    category = tasks.Task(lambda: rows(lambda number, words: labels[number % 3]), labels)
    monkeypatch.setitem(tasks.TASKS, "category", category)
    monkeypatch.setattr(training, "split_of", lambda task: tasks.Split(task, tasks.TASKS[task], 64, 32, 64))
    config = {**LLAMA, "num_hidden_layers": 2}
    tf.LlamaForCausalLM(tf.LlamaConfig(**config)).save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "1-first.yaml").write_text(EXPERIMENTS)
    (tmp_path / "2-more.yaml").write_text(MORE)
    return {"model": str(tmp_path / "tiny"), "results": tmp_path / "results"}


FACTS = {"processor": "a", "torch": "2"}


def lines(folder: Path) -> list[str]:
    """The lines of all finished runs, without those of their machines."""
    assert {path.suffix for path in folder.iterdir()} <= {".jsonl", ""}  # and nothing half-written
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [line for text in texts for line in text.splitlines() if "facts" not in json.loads(line)]


def other_process(code: str, folder: Path) -> subprocess.Popen[str]:
    """Starts Python with a store of the folder."""
    preamble = (
        "import sys; from pathlib import Path; from quality.experiments import *; store = Store(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", f"{preamble}\n{code}", str(folder)]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_experiments_run_once_and_resume(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "1-first.yaml", tmp_path / "2-more.yaml"]
    results = tiny["results"]

    runner.main(files, at_most=2, **tiny)
    assert len(lines(results)) == 2
    assert "2 runs done, 6 and more to go" in capsys.readouterr().out  # some wait for a learning rate

    real, calls = training.run_once, []

    def killed(bench: training.Bench, run: Run) -> dict[str, Any]:
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(bench, run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "run_once", killed)
        runner.main(files, **tiny)
    before = lines(results)
    assert len(before) == 4

    runner.main(files, **tiny)
    after = lines(results)
    assert set(before) <= set(after)
    assert len(after) == 7 + 3 + 1 + 3 + 3  # one of the four is in the grid already
    assert [path.name for path in sorted(results.glob("*.jsonl"))] == ["1-first.jsonl", "2-more.jsonl"]

    runner.main(files, **tiny)
    assert lines(results) == after
    assert "0 runs done, 0 to go" in capsys.readouterr().out

    store = Store(results)
    fanlora = [content for content in store.load("run") if content["run"]["method"] == "fanlora"]
    drawn = [content["run"] for content in fanlora if content["run"]["score"] == "random"]
    assert {run["learning_rate"] for run in drawn} == {3e-3} and len(drawn) == 2
    own = [content for content in fanlora if content["run"]["score"] != "random"]
    grid = {
        content["run"]["learning_rate"]: content["dev"]["loss"]
        for content in own
        if content["run"]["task"] == "category" and Run(**content["run"]).is_plain
    }
    assert sorted(grid) == [1e-3, 1e-2]
    (used,) = {content["run"]["learning_rate"] for content in own if content["run"]["task"] == "gloss"}
    assert used == min(grid, key=lambda rate: grid[rate])

    (search,) = store.load("search")
    assert [len(scored["values"]) for scored in search["scored"]] == [14, 14, 14]
    losses = {(entry["choice"], entry["method"]): entry["loss"] for entry in search["pruned"]}
    assert losses["all", "all"] != losses["none", "none"] != losses["2 per layer", "path"]
    for content in store.load("run"):
        assert content["parameters"] > 0 and len(content["training"]["curve"]) == content["run"]["steps"]
        assert content["dev"]["loss"] > 0 and content["test"]["loss"] > 0
        assert ("rouge_l" in content["test"]) == (content["run"]["task"] == "gloss")


def test_a_run_gives_the_same_figures_again(tiny: dict[str, Any]) -> None:
    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    run = Run("category", "para", seed=1, learning_rate=1e-2, steps=3, rank=2)
    first, again = (training.run_once(bench, run) for _ in range(2))
    assert first["test"] == again["test"] and first["training"]["curve"] == again["training"]["curve"]
    other = training.run_once(bench, Run("category", "para", seed=2, learning_rate=1e-2, steps=3, rank=2))
    assert other["training"]["curve"] != first["training"]["curve"]


def test_a_constant_makes_the_same_vectors_for_every_prompt(tiny: dict[str, Any]) -> None:
    """Otherwise the comparison would not say what reading the prompt is worth."""
    from quality.generators import generators
    from quality.methods import adapted

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    made: dict[str, list[Any]] = {"prompt": [], "constant": []}
    for reads, vectors in made.items():
        model = adapted(bench.base(0), Run("category", "para", reads=reads, rank=2), bench.store)
        for generator in generators(model):
            for name in generator.targets:
                getattr(generator, f"up_{name}").data.normal_()
            generator.register_forward_hook(lambda module, inputs, output, to=vectors: to.extend(output.values()))
        model(**next(iter(bench.tokens.loader(bench.split("category").test))))
        assert len(vectors) == 6
    assert all((vector == vector[:1]).all() and not (vector == 1).all() for vector in made["constant"])
    assert not any((vector == vector[:1]).all() for vector in made["prompt"])


def test_the_task_alone_makes_the_same_vectors_for_all_of_its_rows(tiny: dict[str, Any]) -> None:
    from quality.generators import generators
    from quality.methods import adapted

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    model = adapted(bench.base(0), Run("category", "para", reads="task", rank=2), bench.store)
    made: list[list[torch.Tensor]] = []
    for generator in generators(model):
        for name in generator.targets:
            getattr(generator, f"up_{name}").data.normal_()
        generator.register_forward_hook(lambda module, inputs, output: made[-1].extend(output.values()))
    for system in ("w50 w51", "w52"):
        made.append([])
        told = [
            {**row, "prompt": [{"role": "system", "content": system}, *row["prompt"]]}
            for row in bench.split("category").test[:8]
        ]
        model.train()(**bench.tokens.batch(told))
    assert all(torch.allclose(vector, vector[:1], atol=1e-5) for vector in made[0] + made[1])
    assert not any(torch.allclose(vector[0], other[0], atol=1e-3) for vector, other in zip(*made, strict=True))


def test_embeddings_are_what_every_generator_sees(tiny: dict[str, Any]) -> None:
    from quality.generators import generators
    from quality.methods import adapted

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    seen: list[Any] = []
    model = adapted(bench.base(0), Run("category", "para", reads="embeddings", rank=2), bench.store)
    for generator in generators(model):
        generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in bench.tokens.loader(bench.split("category").test[:24]):
        model(**batch)
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        normalised = model.base_model.model.model.layers[0].input_layernorm(embeddings)
        assert len(seen) == 2 and all(torch.equal(hidden, normalised) for hidden in seen)
        seen.clear()


def test_scaled_vectors_and_another_start(tiny: dict[str, Any]) -> None:
    from quality.generators import generators
    from quality.methods import adapted

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    vectors: list[list[Any]] = []
    for options in ({}, {"start": 0.5}, {"scale": 3.0}):
        model = adapted(
            bench.base(0), Run("category", "para", pooling="mean", activation="linear", rank=2, **options), bench.store
        )
        made: list[Any] = []
        vectors.append(made)
        for generator in generators(model):
            for name in generator.targets:
                getattr(generator, f"up_{name}").data.fill_(0.1)
        next(generators(model)).register_forward_hook(
            lambda _, inputs, output, made=made: made.extend(output.values())
        )
        model(**next(iter(bench.tokens.loader(bench.split("category").test))))
    for plain, started, scaled in zip(*vectors, strict=True):
        torch.testing.assert_close(started - 1, 0.5 * (plain - 1))
        torch.testing.assert_close(scaled - 1, 3 * (plain - 1))


def test_scores_per_parameter_prefer_small_modules(tiny: dict[str, Any]) -> None:
    from quality.methods import scored_setting

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    base = bench.base(0)
    values = {name: 1.1 if name.endswith("up_proj") else 1.0 for name in candidates(base)}
    scored = [{"scoring": vars(Scoring("path")), "cpu_seconds": 1.0, "num_tokens": 9, "values": values}]
    result = {"machine": FACTS, "scored": scored, "pruned": []}
    bench.store.save("some", Search("gloss", (Scoring("path"),)), result)
    sizes = {name: num_parameters_per_rank(module) for name, module in candidates(base).items()}
    chosen = [scored_setting(base, Run("category", "fanlora", score=score, keep=1), bench.store).names
              for score in ("path", "path_per_parameter")]  # fmt: skip
    assert all(name.endswith("up_proj") for name in chosen[0])
    assert {sizes[name] for name in chosen[1]} == {min(sizes.values())}


def test_centred_prompts_have_the_mean_zero(tiny: dict[str, Any]) -> None:
    from quality.generators import centre, generators
    from quality.methods import adapted

    from peft_fanlora.para.core.generator import pool

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    model = adapted(bench.base(0), Run("category", "para", rank=2), bench.store)
    batches = list(bench.tokens.loader(bench.split("category").test[:24]))
    centre(model, batches)
    seen: dict[Any, list[Any]] = {}
    for generator in generators(model):
        generator.register_forward_hook(
            lambda module, inputs, _: seen.setdefault(module, []).append(pool(*inputs, "mean"))
        )
    for batch in batches:
        model(**batch)
    for pooled in seen.values():
        prompts = torch.cat(pooled).flatten(0, 1).detach()
        assert prompts.std() > 0.01 and prompts.mean(0).abs().max() < 1e-5


def test_what_prompts_share_is_beside_what_each_has_of_its_own(tiny: dict[str, Any]) -> None:
    from quality.generators import pooled_states, standardise
    from quality.methods import adapted

    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    run = Run("category", "para", rank=2, contrast=0.3, targets="all-linear")
    model = adapted(bench.base(0), run, bench.store)
    assert len(model.targeted_module_names) == 14
    batches = list(bench.tokens.loader(bench.split("category").test[:24]))
    standardise(model, batches, run.contrast)
    for prompts in pooled_states(model, batches).values():
        assert prompts.mean(0).square().mean().sqrt() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(prompts.std(0), torch.full_like(prompts[0], run.contrast), atol=1e-3, rtol=0)


def test_splits_have_no_row_in_common(tiny: dict[str, Any]) -> None:
    """The same words in another order are the same row."""
    doubled = [
        *rows(lambda number, words: "w45"),
        *({**row, "prompt": [{"role": "user", "content": " ".join(reversed(row["prompt"][0]["content"].split()))}]}
          for row in rows(lambda number, words: "w45")),
    ]  # fmt: skip
    split = tasks.Split("category", tasks.Task(lambda: doubled, ("w45",)))
    parts = [split.test, split.dev, split.calibration, split.training(80, 0)]
    words = [{frozenset(row["prompt"][0]["content"].split()) for row in part} for part in parts]
    assert [len(part) for part in parts] == [256, 128, 128, 80]
    assert split.commonest == 1
    assert len(set.union(*words)) == sum(map(len, words)) == 592
    assert split.training(80, 0) != split.training(80, 1)
    with pytest.raises(ValueError, match="rows to train on, 800 are asked for"):
        split.training(800, 0)


def test_the_batches_of_a_mixture_have_one_task_each(tiny: dict[str, Any]) -> None:
    splits = [tasks.Split(name, tasks.TASKS[name]) for name in ("gloss", "category")]
    rows = tasks.mixed(splits, 15, seed=0)
    named = {id(row): split.name for split in splits for row in split.training(64, 0)}
    batches = [rows[start : start + tasks.BATCH_SIZE] for start in range(0, len(rows), tasks.BATCH_SIZE)]
    kinds = [{"w42" in row["completion"][0]["content"] for row in batch} for batch in batches]
    assert len(named) == 128 and all(len(kind) == 1 for kind in kinds)
    assert sum(kind == {True} for kind in kinds) == 8 and kinds != sorted(kinds, key=lambda kind: min(kind))
    assert tasks.mixed(splits, 15, seed=1) != rows
    assert tasks.mixed(splits[:1], 8, seed=0) == splits[0].training(64, 0)


def test_a_mixture_is_evaluated_on_each_of_its_tasks(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.MIXTURES, "both", ("gloss", "category"))
    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    result = training.run_once(bench, Run("both", "lora", learning_rate=1e-2, parameters=3000, steps=4))
    assert len(result["training"]["curve"]) == 4
    for part in ("dev", "test"):
        by_task = result[part]["tasks"]
        assert list(by_task) == ["gloss", "category"] and set(by_task["category"]) == {"loss", "accuracy"}
        assert result[part]["loss"] == pytest.approx((by_task["gloss"]["loss"] + by_task["category"]["loss"]) / 2)
    assert result["dev"]["loss"] != result["test"]["loss"]


def test_logits_are_computed_only_where_a_label_is_predicted(tiny: dict[str, Any]) -> None:
    """And the loss is the one that all logits would give."""
    bench = training.Bench(tiny["model"], "cpu", Store(tiny["results"]))
    batch = next(iter(bench.tokens.loader(bench.split("gloss").test)))
    model = bench.base(0)
    few = model(**batch)
    full = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    assert few.logits.shape[1] < full.logits.shape[1]
    assert few.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)


def test_unknown_fields_and_missing_searches_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("runs: [{task: gloss, method: lora, learning_rat: 1.e-3}]")
    with pytest.raises(ValueError, match="reads='embedding' is none of prompt, constant, task, embeddings, centred"):
        Run("category", "para", reads="embedding")
    with pytest.raises(ValueError, match="targets='all_linear' is none of usual, all-linear"):
        Run("category", "para", targets="all_linear")
    with pytest.raises(ValueError, match="a Run has no 'learning_rat'"):
        list(read(path, Store(tmp_path)))
    path.write_text("runs: [{task: gloss, method: lora}]")
    with pytest.raises(LookupError, match="no learning rate of 'lora' has been tried"):
        list(read(path, Store(tmp_path)))
    with pytest.raises(typer.BadParameter, match="the next run has no learning rate"):
        runner.main([path], results=tmp_path)
    with pytest.raises(LookupError, match="no finished search on 'gloss' has the score 'path'"):
        Store(tmp_path).scores("gloss", "path")


def test_the_smallest_budget_chooses_the_learning_rate(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for parameters, losses in ((5000, {1e-2: 0.3, 1e-3: 0.2}), (3000, {1e-2: 0.1, 1e-3: 0.4}), (4000, {1e-2: 0.9})):
        for rate, loss in losses.items():
            run = Run("category", "para", learning_rate=rate, parameters=parameters)
            store.save("some", run, {"machine": FACTS, "dev": {"loss": loss}})
    store.save(
        "some",
        Run("category", "para", learning_rate=1e-4, parameters=3000, steps=80),
        {"machine": FACTS, "dev": {"loss": 0.0}},
    )  # nor a longer run
    assert store.best_learning_rate("para") == 1e-2


def test_a_run_that_differs_in_anything_is_another_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    runs = [Run("gloss", "para", learning_rate=1e-3), Run("gloss", "para", learning_rate=1e-3, pooling="mean")]
    searches = [Search("gloss", ()), Search("gloss", (), prune=False), Search("gloss", (Scoring("path"),))]
    for run in (runs[0], *searches[::2]):
        store.save("some", run, {"machine": FACTS, "parameters": 3})
    assert set(store.finished()) == {runs[0], *searches[::2]}
    assert pending([*runs, *searches], store) == [runs[1], searches[1]]
    with pytest.raises(ValueError, match=r"^gloss-para-0.001-seed0 is finished already: delete its line"):
        store.save("others", runs[0], {"machine": FACTS, "parameters": 4})
    assert store.finished()[runs[0]]["parameters"] == 3


def test_a_new_field_leaves_finished_runs_alone(tmp_path: Path) -> None:
    """A line that lacks a field of today has its default, and is the same run."""
    store = Store(tmp_path)
    run = Run("gloss", "para", learning_rate=1e-3, rank=3)
    store.save("some", run, {"machine": FACTS, "parameters": 3})
    path = tmp_path / "some.jsonl"
    assert ', "scale": 1.0' in path.read_text()
    path.write_text(path.read_text().replace(', "scale": 1.0', ""))
    (loaded,) = store.load("run")
    assert loaded["run"]["scale"] == 1 and set(store.finished()) == {run}


def test_each_machine_is_written_once_and_read_with_its_runs(tmp_path: Path) -> None:
    machines = [FACTS, {**FACTS, "processor": "b"}, FACTS, {**FACTS, "processor": "b"}]
    store = Store(tmp_path)
    for seed, machine in enumerate(machines):
        store.save("some", Run("gloss", "lora", seed, 1e-3), {"machine": machine})
    contents = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert [content["facts"] for content in contents if "facts" in content] == machines[:2]
    assert [content["machine"] for content in store.load("run")] == machines


def test_a_kill_while_a_run_is_written_leaves_the_finished_ones(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    first, second = (Run("gloss", "lora", seed, 1e-3) for seed in range(2))
    store.save("some", first, {"machine": FACTS})
    before = (tmp_path / "some.jsonl").read_text()
    code = """
import os, signal
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is in its place
store.save("some", Run("gloss", "lora", 1, 1e-3), {"machine": {}})
"""
    with other_process(code, tmp_path) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert (tmp_path / "some.jsonl").read_text() == before
    assert pending([first, second], store) == [second]
    store.save("some", second, {"machine": FACTS})
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("broken", ['{"run": {"task": "gl', '{"run": {}, "machine": "unknown"}'])
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, broken: str) -> None:
    """It would be a run that is silently missing from the page."""
    store = Store(tmp_path)
    store.save("some", Run("gloss", "lora", 0, 1e-3), {"machine": FACTS})
    path = tmp_path / "some.jsonl"
    path.write_text(path.read_text() + broken)
    with pytest.raises(ValueError, match=r"^some.jsonl, line 3: .*Repair it, or delete it to repeat the run."):
        store.finished()


def test_a_run_with_two_lines_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("some", Run("gloss", "lora", 0, 1e-3), {"machine": FACTS})
    (tmp_path / "others.jsonl").write_text((tmp_path / "some.jsonl").read_text())
    with pytest.raises(ValueError, match=r"^some.jsonl: gloss-lora-0.001-seed0 has another line already"):
        store.finished()


def test_processes_that_write_at_once_lose_no_run(tmp_path: Path) -> None:
    code = """
for seed in range(20):
    run = Run("gloss", "lora", seed, float(sys.stdin.readline()))
    store.save("some", run, {"machine": {"process": run.learning_rate}})
"""
    processes = [other_process(code, tmp_path) for _ in range(3)]
    for rate, process in enumerate(processes, 1):
        assert process.stdin is not None
        process.stdin.write(f"{rate}\n" * 20)
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    finished = Store(tmp_path).finished()
    assert {(run.seed, content["machine"]["process"]) for run, content in finished.items()} == {
        (seed, float(rate)) for seed in range(20) for rate in (1, 2, 3)
    }


def test_a_run_that_another_process_is_making_is_not_repeated(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once that process is killed, the run starts again."""
    path, results = tmp_path / "3-few.yaml", tiny["results"]
    path.write_text(
        "runs: [{task: category, method: lora, learning_rate: [1.e-2, 1.e-3], parameters: 3000, steps: 3}]"
    )
    first, second = known([path], Store(results))[0]
    code = f"assert store.claim(known([Path({str(path)!r})], store)[0]); print(flush=True); sys.stdin.readline()"
    with other_process(code, results) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        runner.main([path], **tiny)
        assert "1 runs done, 1 to go; another process is making the next one" in capsys.readouterr().out
        assert list(Store(results).finished()) == [second]
        process.kill()
    runner.main([path], **tiny)
    assert "1 runs done, 0 to go" in capsys.readouterr().out
    assert set(Store(results).finished()) == {first, second}


def test_no_run_starts_before_a_search_of_another_process_is_finished(tmp_path: Path) -> None:
    """The run may need the scores of that search."""
    search, run = Search("gloss", (Scoring("path"),)), Run("category", "fanlora", learning_rate=1e-3)
    code = 'store.claim([Search("gloss", (Scoring("path"),))]); print(flush=True); sys.stdin.readline()'
    with other_process(code, tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        assert Store(tmp_path).claim([search, run]) is None
        assert Store(tmp_path).claim([run, search]) == run
        process.kill()


def test_a_run_that_another_process_has_just_finished_is_not_repeated(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, results = tmp_path / "3-few.yaml", tiny["results"]
    path.write_text("runs: [{task: category, method: lora, learning_rate: 1.e-2, parameters: 3000, steps: 3}]")
    claim = Store.claim

    def late(store: Store, runs: Any) -> Any:
        claimed = claim(store, runs)
        if claimed and claimed not in store.finished():
            store.save("3-few", claimed, {"machine": FACTS})
        return claimed

    monkeypatch.setattr(Store, "claim", late)
    runner.main([path], **tiny)
    assert "0 runs done, 0 to go" in capsys.readouterr().out and len(lines(results)) == 1


def test_choices_by_time_and_per_layer_are_compared(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {
        "engine": "transformers",
        "per_step": 0.0,
        "per_module": 1e-3,
        "per_parameter": 1e-6,
        "error": 0.01,
        "conditions": {"r": 8},
    }
    (tmp_path / "costs.json").write_text(json.dumps({"costs": costs}))
    monkeypatch.setattr(time_budget, "LORA_RANK_2", 3000)
    monkeypatch.setattr(time_budget, "STEPS", {"gloss": 3, "category": 2})
    output = tmp_path / "budget.json"
    monkeypatch.setattr(time_budget, "BUDGETS", ("two per layer", 1.01))
    run = {"costs": tmp_path / "costs.json", "output": output}
    time_budget.main(tiny["model"], seeds=1, **run)
    content = json.loads(output.read_text())
    every, per_layer, by_score, *fewer = content["pruned"]
    assert (every["modules"], per_layer["modules"]) == (14, 4)
    assert by_score["slowdown"] <= per_layer["slowdown"] and by_score["score"] >= per_layer["score"]
    assert all(1 < one["slowdown"] <= 1.01 for one in fewer)
    pruned, _ = content["differences"]["pruned"]
    assert (pruned["choice"], pruned["minus"], pruned["budget"]) == ("global", "per layer", "two per layer")
    assert pruned["by_seed"] == [pytest.approx(by_score["loss"] - per_layer["loss"], abs=1e-4)]
    compared = [(one["choice"], one["minus"]) for one in content["differences"]["retrained"]]
    assert compared == [("global", "per layer"), ("per layer", "all modules"), ("global", "all modules")]
    monkeypatch.setattr(time_budget, "after_pruning", lambda *_: pytest.fail("it runs a seed again"))
    time_budget.main(tiny["model"], seeds=1, **run)
    assert json.loads(output.read_text()) == content
    assert all(one["parameters"] == pytest.approx(3000, rel=0.4) for one in content["retrained"])
