"""Files are never half-written: after a kill, or a save that cannot be done, each is the earlier one or the new one."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration_tests.helpers.models import TINY, fanlora
from integration_tests.helpers.processes import CAN_RESUME_IN_TWO, environment, run_python
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig
from peft_fanlora.sharing.writing import STAGE_PREFIX, staged


pytestmark = pytest.mark.xdist_group("files_written")  # one worker makes what its tests share

HERE = Path(__file__).parent
CONFIG, WEIGHTS, SETTING = "adapter_config.json", "adapter_model.safetensors", "fanlora_setting.json"
State = dict[str, str]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    printed = run_python(HERE / "faults.py", "kills-and-refusals", tmp_path_factory.mktemp("faults") / "folder")
    return json.loads(printed.splitlines()[-1])


@pytest.fixture
def kills(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return found["kills"]


@pytest.fixture
def refusals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return found["refusals"]


@pytest.fixture
def runs(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return found["runs"]


def test_runs_are_killed_at_each_kind_of_stage(runs: dict[str, dict[str, Any]]) -> None:
    by_trainer = runs["a run of the trainer"]
    assert by_trainer["stages"].keys() == {
        "file",
        "half of the weights",
        "half of a checkpoint's state",
        "forward in training",
        "before the optimizer",
        "after the optimizer",
        "forward in scoring",
        "pruning",
    }
    assert runs["by hand"]["stages"].keys() == {"file", "half of the weights", "forward in scoring", "pruning"}
    for found in runs.values():
        assert found["killed"] >= len(found["stages"]) and found["expected"]


def test_a_killed_run_ends_as_if_it_had_not_been_killed(runs: dict[str, dict[str, Any]]) -> None:
    """From its last complete checkpoint, each file of the final adapter is the same, bit for bit."""
    for name, found in runs.items():
        assert len(found["restarts"]) > 2, name
        for restart in found["restarts"]:
            assert restart == {"final": found["expected"]}, name


def test_a_checkpoint_that_is_not_complete_is_refused(runs: dict[str, dict[str, Any]]) -> None:
    """The trainer writes its state last: a run never goes on from the weights alone."""
    refusals = runs["a run of the trainer"]["incomplete"]
    assert len(refusals) > 5
    assert {refusal.get("error") for refusal in refusals} <= {"FileNotFoundError", "JSONDecodeError", "ValueError"}


@pytest.mark.skipif(not CAN_RESUME_IN_TWO, reason="transformers before 5.18 does not resume in several CPU processes")
def test_a_process_that_is_lost_leaves_the_last_checkpoint_whole(found: dict[str, Any]) -> None:
    """The other process ends with an error, and both go on from that checkpoint to the same files, bit for bit."""
    lost = found["lost"]
    assert lost["ends"]["whole"] == lost["ends"]["resumed"] == ["", 0]
    error, status = lost["ends"]["lost"]
    assert error and status == signal.SIGKILL
    assert {Path(file).parts[0] for file in lost["left"]} == {"checkpoint-2", "checkpoint-4"}
    assert lost["left"].items() < lost["expected"].items()
    assert lost["resumed"] == lost["expected"]


def test_each_save_has_many_steps_and_kills_leave_what_they_show(kills: dict[str, dict[str, Any]]) -> None:
    assert len(kills) == 9
    for case, found in kills.items():
        assert len(found["left"]) > 20 and found["killed"] > 2, case
        assert found["old"] != found["new"] == found["left"][-1], case
        assert found["left"][0] == found["old"], case


def test_a_kill_leaves_no_half_file(kills: dict[str, dict[str, Any]]) -> None:
    for case, found in kills.items():
        old, new = found["old"], found["new"]
        for step, left in enumerate(found["left"], 1):
            for file in {*old, *new, *left}:
                is_known = left.get(file) in (old.get(file), new.get(file))
                assert is_known or (file.endswith(CONFIG) and file not in left), (case, step, file)


def test_a_kill_leaves_no_weights_beside_a_configuration_of_others(kills: dict[str, dict[str, Any]]) -> None:
    removed = 0
    for case, found in kills.items():
        old, new = found["old"], found["new"]
        for step, left in enumerate(found["left"], 1):
            for weights in (file for file in new if file.endswith(WEIGHTS)):
                config = weights.replace(WEIGHTS, CONFIG)
                pair = left.get(config), left.get(weights)
                removed += config in old and config not in left
                if config in left and old.get(config) != new[config]:
                    assert pair in ((old.get(config), old.get(weights)), (new[config], new[weights])), (case, step)
    assert 0 < removed < 30  # of some 600 steps


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        ("a file in the place of the folder", "a file"),
        ("a folder in the place of a file", "is a folder, but a file of this name must be written"),
        ("a read-only folder", "Permission denied: "),
        ("files limited to 512 bytes", "File too large"),
    ],
)
def test_a_save_that_cannot_be_done_says_so_and_changes_nothing(
    obstacle: str, message: str, refusals: dict[str, dict[str, Any]]
) -> None:
    tried = {name: found for name, found in refusals.items() if name.startswith(obstacle)}
    assert len(tried) == 4
    for name, found in tried.items():
        assert found["error"] is not None and found["intact"], (name, found)
        assert message in found["message"], name


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=512k tmpfs {tmp_path}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    faults = [sys.executable, str(HERE / "faults.py"), "full-disk", str(tmp_path / "folder")]
    command = [*unshare, f'{mount} && exec "$@"', "sh", *faults]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["error"] in ("OSError", "SafetensorError") and found["intact"], (name, found)
        assert "No space left on device" in found["message"], name


def test_a_save_that_fails_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), staged(tmp_path / "new") as stage:
        (stage / "file").write_text("new")
        raise RuntimeError("in the middle")
    assert not (tmp_path / "new").exists()


def test_what_is_not_written_stays_but_for_own_files(tmp_path: Path) -> None:
    for name in ("mine", "own", "file"):
        (tmp_path / name).write_text("old")
    with staged(tmp_path, own=["own", "file"]) as stage:
        assert stage.name.startswith(STAGE_PREFIX) and not list(stage.iterdir())
        (stage / "file").write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine": "old", "file": "new"}


def test_files_that_others_may_read_stay_readable(tmp_path: Path) -> None:
    """A temporary file is made for its owner alone, and would keep that when it is moved."""
    (tmp_path / "plain").touch()
    FanLoraConfig().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "config", [FanLoraConfig(target_modules=list("abcdefgh")), ParaConfig(target_modules=list("abcdefgh"))]
)
def test_equal_configurations_are_equal_files(config: Any, tmp_path: Path) -> None:
    """The order of a set of names differs from process to process, and with it the file did."""
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == list("abcdefgh")


def test_a_setting_in_an_adapters_folder_keeps_the_adapters_card(tmp_path: Path) -> None:
    model = fanlora()
    setting = model.prune_modules(model.score_modules([TINY["llama"].batch()], num_points=1, progress=False).select(2))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes(), (tmp_path / "fanlora_importance.png").read_bytes()
    setting.save_pretrained(tmp_path)
    assert before == ((tmp_path / "README.md").read_bytes(), (tmp_path / "fanlora_importance.png").read_bytes())


def test_an_unpruned_adapter_over_a_pruned_one_takes_its_files_away(tmp_path: Path) -> None:
    model = fanlora()
    model.prune_modules(model.score_modules([TINY["llama"].batch()], num_points=1, progress=False).select(2))
    model.save_pretrained(tmp_path)
    assert FanLoraSetting.from_pretrained(tmp_path)
    fanlora().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", CONFIG, WEIGHTS}
