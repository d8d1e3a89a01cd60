"""The command line, on tiny models in folders."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner, Result

from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from integration_tests.helpers.processes import environment, run_new_python, run_python
from integration_tests.helpers.text import save_base, sentences
from peft_fanlora import FanLoraConfig, FanLoraSetting, ModuleCosts, ParaConfig
from peft_fanlora.command_line import main
from peft_fanlora.command_line.app import app
from peft_fanlora.command_line.output import quiet_stdout
from peft_fanlora.fanlora.candidates import candidates
from peft_fanlora_cli import quiet_libraries


pytestmark = pytest.mark.xdist_group("command_line")  # one worker makes what its tests share


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def places(base_folder: Path) -> dict[str, Path]:
    """Folders with an adapter of each kind, and the setting by itself."""
    folders = {name: base_folder.parent / name for name in ("pruned", "whole", "para", "lora", "setting", "other")}
    model = fanlora(base=load(base_folder))
    model.save_pretrained(folders["whole"])
    scores = model.score_modules([TINY["llama"].batch()], num_points=1, progress=False)
    model.prune_modules(scores.select(2)).save_pretrained(folders["setting"])
    scores.select(strategy="role", keep=1).save_pretrained(folders["other"])
    model.save_pretrained(folders["pruned"])
    para = ParaConfig(r=3, task_type="CAUSAL_LM", prompt_end_token_ids=[5, 6])
    get_peft_model(load(base_folder), para).save_pretrained(folders["para"])
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(base_folder), lora).save_pretrained(folders["lora"])
    return folders


def load(folder: Path) -> PreTrainedModel:
    return type(TINY["llama"].base()).from_pretrained(folder)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer_json(*arguments: Any) -> dict[str, Any]:
    return json.loads(answer(*arguments, "--json"))


def refusal(*arguments: Any) -> str:
    """Returns the one line that a command fails with."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.stderr
    return line


def test_show_a_setting(places: dict[str, Path]) -> None:
    setting = FanLoraSetting.from_pretrained(places["setting"])
    for place in ("setting", "pruned"):
        shown = answer("show", places[place])
        for role in setting.roles:
            assert role in shown
        assert "path" in shown and "6" in shown
    content = answer_json("show", places["setting"])
    assert content["kept"] == {module.name: score for module, score in setting.kept.items()}
    assert content["calibration"]["method"] == "path"
    assert len(content["dropped"]) == 15


def test_show_writes_a_report(places: dict[str, Path], tmp_path: Path) -> None:
    found = FanLoraSetting.from_pretrained(places["setting"])
    positive = replace(found, kept=dict.fromkeys(found.kept, 2.0), dropped=dict.fromkeys(found.dropped, 1.0))
    positive.save_pretrained(tmp_path / "setting")
    file, costs = tmp_path / "new" / "report.html", tmp_path / "costs.json"
    assert answer_json("show", places["pruned"], "--report", file)["modules kept"] == 6
    assert 'id="heat"' in file.read_text()
    answer("show", tmp_path / "setting", "--report", file)
    assert choices_of(file).keys() == {"global", "by role", "per layer", "all modules"}
    parameters = {module.name: 100 for module in [*found.kept, *found.dropped]}
    ModuleCosts("transformers", 0.0, 0.01, 0.0, parameters, 0.01).save(costs)
    answer("show", tmp_path / "setting", "--report", file, "--costs", costs)
    assert choices_of(file)["time budget"][0]["cost"] == pytest.approx(1.01)
    before = file.read_bytes()
    assert invoke("show", tmp_path / "setting", "--costs", costs).exit_code == 2
    ModuleCosts("transformers", 0.0, 0.01, 0.0, {"model.a": 1, "model.b": 1}, 0.01).save(costs)
    of_another_model = refusal("show", tmp_path / "setting", "--report", file, "--costs", costs)
    assert "is not a module of the timed model" in of_another_model
    assert "never pruned" in refusal("show", places["whole"], "--report", file)
    FanLoraSetting.from_modules(TINY["llama"].base(), found.names).save_pretrained(tmp_path / "by-hand")
    assert "has no scores" in refusal("show", tmp_path / "by-hand", "--report", file)
    assert file.read_bytes() == before


def choices_of(report: Path) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', report.read_text())
    return json.loads(content)["choices"]


def test_show_an_adapter(places: dict[str, Path]) -> None:
    pruned, whole, para = (answer_json("show", places[name]) for name in ("pruned", "whole", "para"))
    assert (pruned["type"], pruned["modules kept"], pruned["of"]) == ("FanLoRA adapter", 6, 21)
    assert whole["modules kept"] == 21 and "of" not in whole
    assert pruned["bytes"] == (places["pruned"] / "adapter_model.safetensors").stat().st_size
    assert pruned["parameters"] < whole["parameters"]
    assert (para["type"], para["r"], para["prompt ends with"]) == ("PARA adapter", 3, [5, 6])
    parameters = get_peft_model(
        TINY["llama"].base(), ParaConfig(r=3, task_type="CAUSAL_LM")
    ).get_nb_trainable_parameters()[0]
    assert para["parameters"] == parameters
    assert "attention" in answer("show", places["para"])


def test_plot(places: dict[str, Path], tmp_path: Path) -> None:
    answer("plot", places["pruned"], tmp_path / "new" / "map.png")
    assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "never pruned" in refusal("plot", places["whole"], tmp_path / "map.png")
    assert "not supported" in refusal("plot", places["pruned"], tmp_path / "map.docx")


def test_compare(places: dict[str, Path], tmp_path: Path) -> None:
    one, other = (FanLoraSetting.from_pretrained(places[name]) for name in ("setting", "other"))
    content = answer_json("compare", places["setting"], places["other"])
    assert content["shared"] == len(one.kept.keys() & other.kept.keys())
    assert content["overlap"] == pytest.approx(content["shared"] / len(one.kept.keys() | other.kept.keys()), abs=1e-4)
    assert content["rank_correlation"] == 1
    assert set(content["only_first"]) == set(one.names) - set(other.names)
    assert content["only_second"] == [name for name in other.names if name not in one.names]
    shown = answer("compare", places["setting"], places["other"])
    assert "rank correlation" in shown and other.roles[0] in shown
    one.resolve(TINY["llama"].base(num_hidden_layers=5)).save_pretrained(tmp_path)
    assert "of the same model type and depth" in refusal("compare", places["setting"], tmp_path)


@pytest.mark.parametrize("place", ["pruned", "whole"])
def test_export(place: str, places: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    content = answer_json("export", places[place], tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert content["bytes"] == (tmp_path / "plain/adapter_model.safetensors").stat().st_size
    expected, found = (
        logits(PeftModel.from_pretrained(load(base_folder), folder).eval(), TINY["llama"].batch())
        for folder in (places[place], tmp_path / "plain")
    )
    torch.testing.assert_close(found, expected)


def test_export_a_classifier(tmp_path: Path) -> None:
    base = TINY["bert"].base()
    base.save_pretrained(tmp_path / "base")
    model = fanlora("bert", base=type(base).from_pretrained(tmp_path / "base"), modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "adapter")
    answer("export", tmp_path / "adapter", tmp_path / "plain")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(loaded, TINY["bert"].batch()), logits(model, TINY["bert"].batch()))


def test_what_cannot_be_exported(places: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    dora = get_peft_model(load(base_folder), FanLoraConfig(use_dora=True, task_type="CAUSAL_LM"))
    dora.save_pretrained(tmp_path / "dora")
    assert "a DoraLinearVariant" in refusal("export", tmp_path / "dora", tmp_path / "plain")
    assert "is a PARA adapter" in refusal("export", places["para"], tmp_path / "plain")
    assert "is a setting, which has no weights" in refusal("export", places["setting"], tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in sentences(24)))
    return file


def find(base: Path, rows: Path, output: Path, *options: str) -> dict[str, Any]:
    small = ("--steps", 2, "--batch-size", 4, "--calibration-rows", 4, "--output", output)
    return answer_json("find", base, rows, *small, *options)


def test_find(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    report = find(base_folder, rows, tmp_path / "found")
    assert (report["modules_scored"], report["modules_kept"], report["rows_trained_on"]) == (21, 6, 20)
    assert report["calibration_loss"]["all modules"] < report["calibration_loss"]["base model"]
    setting = FanLoraSetting.from_pretrained(tmp_path / "found")
    assert len(setting.kept) == 6 and setting.is_scored
    assert (tmp_path / "found" / "fanlora_importance.png").exists()
    written = json.loads((tmp_path / "found" / "report.json").read_text())
    assert len(written["scores"]) == 21
    assert choices_of(tmp_path / "found" / "report.html").keys() == {"global", "by role", "per layer", "all modules"}
    assert not (tmp_path / "found" / "module-costs.json").exists()
    model = PeftModel.from_pretrained(load(base_folder), tmp_path / "found" / "adapter")
    assert model.peft_config["default"].target_modules == set(setting.names)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--strategy", "role", "--keep", "1"), 3),
        (("--strategy", "global", "--keep", "5", "--method", "weight_norm"), 5),
        (("--keep", "1", "--packed"), None),
    ],
)
def test_find_otherwise(
    options: tuple[str, ...], kept: int | None, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    report = find(base_folder, rows, tmp_path / "found", *options)
    setting = FanLoraSetting.from_pretrained(tmp_path / "found")
    if kept is not None:
        assert report["modules_kept"] == len(setting.kept) == kept
    assert setting.calibration["packed"] == ("--packed" in options)


def test_find_within_a_time_budget(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    content = answer_json("costs", base_folder, "--tenants", 2, "--rounds", 2, "-o", file)
    assert content["conditions"]["tenants"] == 2 and len(content["measured"]) == 6
    modules = len(content["parameters"])
    file.write_text(json.dumps({**content, "per_step": 0.0, "per_module": 0.01, "per_parameter": 0.0}))
    options = ("--adapter", tmp_path / "lora", "--calibration-rows", 4, "-o", tmp_path / "found")
    lora = get_peft_model(load(base_folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(lora, std=0.2).save_pretrained(tmp_path / "lora")
    report = answer_json("find", rows, *options, "--max-slowdown", 1.06, "--costs", file, "--method", "weight_norm")
    assert (report["modules_scored"], report["modules_kept"]) == (modules, 6)
    setting = FanLoraSetting.from_pretrained(tmp_path / "found")
    assert (setting.calibration["strategy"], setting.calibration["predicted_slowdown"]) == ("layer", 1.06)
    assert [one["cost"] for one in choices_of(tmp_path / "found" / "report.html")["time budget"]] == pytest.approx(
        [1 + 0.01 * kept for kept in range(1, modules + 1)]
    )
    assert ModuleCosts.load(tmp_path / "found" / "module-costs.json") == ModuleCosts.load(file)
    assert invoke("find", rows, *options, "--costs", file).exit_code == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--max-slowdown", 1.04), "leaves no time for any of the 21 modules: the fastest choice makes a step 1.060"),
        (("--max-slowdown", "nan"), "max_slowdown=nan is not above 1 and finite"),
        (("--max-slowdown", 1.1, "--keep", 3), "Pass either `max_slowdown` and `costs`, or `keep` and `packed`"),
        (("--keep", 7), "there are 7 to choose from, so it must be at least 1 and less than 7"),
    ],
)
def test_a_choice_that_no_scores_allow_is_refused_before_training(
    options: tuple[Any, ...],
    reason: str,
    base_folder: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = dict.fromkeys(candidates(load(base_folder)), 1)
    ModuleCosts("vllm", 0.05, 0.01, 0.0, parameters, 0.0).save(tmp_path / "costs.json")
    monkeypatch.setattr("trl.SFTTrainer.train", lambda *_: pytest.fail("it trains"))
    if "--max-slowdown" in options:
        options = (*options, "--costs", tmp_path / "costs.json")
    where = ("--calibration-rows", 4, "-o", tmp_path / "found")
    assert reason in refusal("find", base_folder, rows, *where, *options)
    assert not (tmp_path / "found").exists()


def test_costs_prints_a_report(base_folder: Path, tmp_path: Path) -> None:
    shown = answer("costs", base_folder, "--tenants", 1, "--rounds", 2, "-o", tmp_path / "costs.json")
    assert "per module" in shown and "error of a predicted ratio" in shown
    assert "vLLM, which is not installed" in refusal("costs", base_folder, "--engine", "vllm", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("names_model", [True, False])
def test_find_scores_an_adapter_of_others(names_model: bool, base_folder: Path, rows: Path, tmp_path: Path) -> None:
    base = load(base_folder)
    lora = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "up_proj", "v_proj"], task_type="CAUSAL_LM"))
    randomize(lora, std=0.2).save_pretrained(tmp_path / "lora")
    where = (base_folder, rows) if names_model else (rows,)
    options = ("--adapter", tmp_path / "lora", "--calibration-rows", 4, "-o", tmp_path / "found")
    report = answer_json("find", *where, *options, "--keep", 1)
    assert (report["modules_scored"], report["modules_kept"]) == (9, 3)
    assert (report["rows_trained_on"], report["steps"], report["model"]) == (0, 0, str(base_folder))
    found = PeftModel.from_pretrained(load(base_folder), tmp_path / "found" / "adapter")
    kept = {name: value for name, value in found.named_parameters() if "lora_A" in name}
    assert len(kept) == 3
    trained = dict(lora.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in kept.items())


def test_find_prints_a_report(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    options = ("--steps", 1, "--calibration-rows", 2, "--rows", 8, "-o", tmp_path / "found")
    shown = answer("find", base_folder, rows, *options)
    assert "kept modules" in shown and "loss" in shown
    assert "{'loss'" not in shown  # what the trainer prints goes to stderr


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt", "folder"])
def test_find_reads_data_of_several_kinds(suffix: str, base_folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    data, where = Dataset.from_dict({"text": sentences(8)}), tmp_path / f"rows.{suffix}"
    if suffix == "txt":
        where.write_text("\n".join(data["text"]))
    else:
        {"csv": data.to_csv, "parquet": data.to_parquet, "folder": data.save_to_disk}[suffix](str(where))
    report = find(base_folder, where, tmp_path / "found", "--steps", "1", "--method", "weight_norm")
    assert report["rows_trained_on"] == 4


def test_bench(base_folder: Path, places: dict[str, Path]) -> None:
    options = ("--rounds", 3, "--prompt-length", 4, "--batch-size", 2)
    content = answer_json("bench", base_folder, *options)
    assert [one["method"] for one in content["results"]] == [
        "base model",
        "base model, again",
        "LoRA, all linear layers",
        "FanLoRA, all linear layers",
        "FanLoRA, 6 modules",
        "PARA",
    ]
    assert content["results"][0]["ratio"] == 1
    assert all(one["median_ms"] > 0 for one in content["results"])
    lora, fanlora = (content["results"][place]["parameters"] for place in (2, 3))
    assert lora == fanlora
    shown = answer("bench", base_folder, *options, "--tenants", 2, "--setting", places["other"])
    assert "FanLoRA, 3 modules" in shown and "2 tenant(s)" in shown


def test_bench_leaves_out_what_a_model_cannot_have(tmp_path: Path) -> None:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, MambaConfig, MambaForCausalLM

    config = GPTBigCodeConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    GPTBigCodeForCausalLM(config).save_pretrained(tmp_path / "bigcode")
    content = answer_json("bench", tmp_path / "bigcode", "--rounds", 2, "--prompt-length", 4)
    assert list(content["not_available"]) == ["PARA"] and len(content["results"]) == 5
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).save_pretrained(
        tmp_path / "mamba"
    )
    assert "has no KV cache" in refusal("bench", tmp_path / "mamba", "--rounds", 2)


def one_row(folder: Path) -> Path:
    file = folder / "row.jsonl"
    file.write_text('{"text": "A row."}\n')
    return file


WRONG: list[tuple[Callable[[dict[str, Path], Path], tuple[Any, ...]], str]] = [
    (lambda places, tmp: ("show", "/no/such/folder"), "no FanLoRA or PARA adapter and no FanLoRA setting"),
    (lambda places, tmp: ("show", "me/not-cached"), "no FanLoRA or PARA adapter and no FanLoRA setting"),
    (lambda places, tmp: ("show", tmp), "no FanLoRA or PARA adapter and no FanLoRA setting"),
    (lambda places, tmp: ("show", places["lora"]), "is an adapter of type"),
    (lambda places, tmp: ("plot", places["para"], tmp / "x.png"), "never pruned"),
    (lambda places, tmp: ("compare", places["setting"], "me/nothing"), "'me/nothing'"),
    (lambda places, tmp: ("export", "me/nothing", tmp / "x"), "'me/nothing'"),
    (lambda places, tmp: ("bench", "me/nothing"), "There is no model at 'me/nothing'"),
    (lambda places, tmp: ("bench", places["base"], "--tenants", 9, "--batch-size", 2), "pass at least 9"),
    (lambda places, tmp: ("find", "me/nothing", "rows.jsonl"), "There is no model at 'me/nothing'"),
    (lambda places, tmp: ("find", places["base"], "me/no-rows"), "There is no readable data set"),
    (lambda places, tmp: ("find", places["base"], one_row(tmp), "--split", "x"), "has 1 rows"),
    (lambda places, tmp: ("find", places["base"], places["base"] / "README.md"), "There is no readable data set"),
    (lambda places, tmp: ("find", "--adapter", "me/nothing", one_row(tmp)), "There is no adapter at 'me/nothing'"),
    (lambda places, tmp: ("find", "--adapter", places["para"], one_row(tmp)), "is of type PARA: pass a LoRA adapter"),
]


@pytest.mark.parametrize(("command", "reason"), WRONG, ids=range(len(WRONG)))
def test_what_is_not_there_is_said_in_one_line(
    command: Callable[[dict[str, Path], Path], tuple[Any, ...]],
    reason: str,
    places: dict[str, Path],
    base_folder: Path,
    tmp_path: Path,
) -> None:
    (base_folder / "README.md").touch()
    assert reason in refusal(*command({**places, "base": base_folder}, tmp_path))


def test_find_wants_a_data_set(base_folder: Path) -> None:
    assert invoke("find", base_folder).exit_code == 2


def test_an_unknown_choice_is_said_in_one_line(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    options = ("--steps", 1, "--calibration-rows", 2, "--method", "weight_norm", "-o", tmp_path / "found")
    assert "keeps nothing or drops nothing" in refusal("find", base_folder, rows, *options, "--keep", 7)
    assert not (tmp_path / "found").exists()


def test_the_page_names_the_commands() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    commands = get_command(app).commands
    assert set(re.findall(r"^\| `peft-fanlora (\w+)", page, re.MULTILINE)) == commands.keys()
    options = {option for command in commands.values() for made in command.params for option in made.opts}
    own = page.partition("\n## run")[0]  # what follows shows the options of other programs
    assert set(re.findall(r"--[a-z][a-z-]+", own)) <= options | {"--help"}


def test_help_has_examples() -> None:
    for command in ("find", "show", "plot", "compare", "export", "bench", "costs", "run"):
        shown = answer(command, "--help")
        assert f"peft-fanlora {command}" in shown and "Example" in shown
        assert command in answer("--help")
    assert invoke("show").exit_code == invoke("find", "a", "b", "--steps", "0").exit_code == 2


def test_help_imports_neither_torch_nor_peft() -> None:
    code = """
import sys
from peft_fanlora_cli import main
sys.argv = ["peft-fanlora", "find", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert not {"numpy", "peft", "torch", "transformers"} & set(sys.modules)
"""
    assert "--max-slowdown" in run_new_python("-c", code)


def test_messages_of_other_libraries_are_not_shown(places: dict[str, Path], tmp_path: Path) -> None:
    code = "from peft_fanlora_cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(places["pruned"]), str(tmp_path / "plain")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_user_must_know_is_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        quiet_libraries()
        place = {"filename": "file.py", "lineno": 1}
        for category, module in (
            (FutureWarning, "transformers.training_args"),
            (DeprecationWarning, "torch.jit"),
            (UserWarning, "peft.peft_model"),
            (FutureWarning, "my_script"),
        ):
            warnings.warn_explicit(f"from {module}", category, module=module, **place)
    assert [str(one.message) for one in shown] == ["from peft.peft_model", "from my_script"]


@pytest.mark.parametrize("package", ["rich", "typer"])
def test_without_its_packages_the_command_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("peft_fanlora.command_line.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"^The command line needs {package}: pip install 'peft-fanlora\\[cli\\]'$"):
        main()


def test_the_report_says_that_it_needs_plotly(
    base_folder: Path, places: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    needed = "report.html needs plotly: pip install 'peft-fanlora[report]'"
    assert needed in refusal("find", base_folder, rows, "-o", tmp_path / "found")
    assert needed in refusal("show", places["setting"], "--report", tmp_path / "report.html")
    assert not list(tmp_path.glob("found")) and not (tmp_path / "report.html").exists()


def test_output_of_compiled_libraries_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """SciPy's solver prints to the file descriptor, which would spoil the JSON."""
    with quiet_stdout():
        os.write(1, b"from a library")
    os.write(1, b"result")
    assert capfd.readouterr() == ("result", "from a library")


def test_find_says_that_it_needs_trl(base_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "find trains with TRL: pip install 'peft-fanlora[cli,trl]'" in refusal("find", base_folder, rows)


PROGRAM = """
import json, os, signal, sys
from peft import PeftConfig
print(json.dumps([sys.argv[1:], __name__, sys.path[0], PeftConfig.from_pretrained(sys.argv[1]).r]), flush=True)
if sys.argv[2] == "--killed":
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("form", "method", "option", "status"),
    [("script", "para", "--model", 3), ("module", "pruned", "--killed", -signal.SIGTERM)],
)
def test_run_gives_a_program_both_methods_and_leaves_the_rest_to_it(
    form: str, method: str, option: str, status: int, places: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "inside").mkdir()
    script = tmp_path / "inside" / "evaluate.py"
    script.write_text(PROGRAM)
    program = [str(script)] if form == "script" else ["-m", "inside.evaluate"]
    given = [str(places[method]), option, "-h", "--json"]
    command = [sys.executable, "-c", "from peft_fanlora_cli import main; main()", "run", *program, *given]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    arguments, name, path, r = json.loads(done.stdout)
    assert (arguments, name) == (given, "__main__")
    assert Path(path) == (script.parent if form == "script" else tmp_path)
    assert r == PeftConfig.from_pretrained(places[method]).r


def test_run_knows_installed_commands(places: dict[str, Path]) -> None:
    code = "import sys; from peft_fanlora.command_line.running import run; run(sys.argv[1:])"
    shown = run_python("-c", code, "peft-fanlora", "show", places["para"], "--json")
    assert json.loads(shown)["type"] == "PARA adapter"
    missing = invoke("run", "no-such-command")
    assert missing.exit_code == 2
    assert "no file and no console script 'no-such-command'" in missing.stderr
