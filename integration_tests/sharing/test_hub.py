"""Adapters of both methods and settings go to a hub and come back, by the real `huggingface_hub`."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from integration_tests.helpers.text import save_base, sentences
from integration_tests.sharing.clients import client
from integration_tests.sharing.loopback import Hub, serve
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, load_tenant


pytestmark = pytest.mark.xdist_group("hub")  # one worker makes what its tests share


Run = Callable[..., Any]
both = pytest.mark.parametrize("method", ["FanLoRA", "PARA"])


@pytest.fixture
def hub(session_hub: Hub) -> Hub:
    """The hub without repositories."""
    session_hub.repositories.clear()
    session_hub.uploads.clear()
    session_hub.requests.clear()
    session_hub.cuts, session_hub.cut_after, session_hub.lost = 0, 0.5, None
    return session_hub


@pytest.fixture(scope="module")
def session_hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the clients."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(session_hub: Hub, home: Path) -> Iterator[Run]:
    """Runs a function in a process whose Hub is the loopback one."""
    with client(session_hub.url, home) as run:
        yield run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model in a folder."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


# What the clients do.


def trained(method: str, base: Path, seed: int = 0) -> PeftModel:
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    if method == "PARA":
        return get_peft_model(model, ParaConfig(r=4, init_para_weights=False, task_type="CAUSAL_LM")).eval()
    model = fanlora(base=model)
    randomize(model, seed=seed)
    model.prune_modules(model.score_modules([TINY["llama"].batch()], num_points=1, progress=False).select(2))
    return model


def answer(model: PeftModel) -> list[Any]:
    batch = TINY["llama"].batch()
    return logits(model, {"input_ids": batch["input_ids"]}).tolist()


def publish(method: str, base: Path, repo_id: str, seed: int = 0, **options: Any) -> list[Any]:
    model = trained(method, base, seed)
    model.push_to_hub(repo_id, **options)
    return answer(model)


def read(base: Path, repo_id: str, **options: Any) -> list[Any]:
    return answer(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), repo_id, **options).eval())


def read_in_pieces(base: Path, repo_id: str, size: int) -> list[Any]:
    """Reads an adapter with a client that writes to disk after `size` bytes; the default is 10 MB.

    Where the connection breaks, new versions of the client go on by themselves, and old ones when they are asked again.
    """
    with mock.patch.object(constants, "DOWNLOAD_CHUNK_SIZE", size):
        for _ in range(2):
            if failure(read, base, repo_id)[0] != "RemoteProtocolError":
                break
        return read(base, repo_id)


def read_as_tenant(method: str, base: Path, repo_id: str, **options: Any) -> list[Any]:
    model = trained(method, base, seed=5)
    load_tenant(model, repo_id, "tenant", **options)
    model.set_adapter("tenant")
    return answer(model)


def made_setting(base: Path) -> FanLoraSetting:
    return trained("FanLoRA", base).peft_config["default"].setting


def publish_setting(base: Path, repo_id: str, **options: Any) -> FanLoraSetting:
    setting = made_setting(base)
    setting.push_to_hub(repo_id, **options)
    return setting


def adapt_by_setting(base: Path, repo_id: str) -> list[str]:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), FanLoraConfig(setting=repo_id, r=2))
    return sorted(model.peft_config["default"].target_modules)


def type_command(*arguments: str) -> tuple[int, str, str]:
    from typer.testing import CliRunner

    from peft_fanlora.command_line.app import app

    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def run_code(base: Path, code: str, folder: Path) -> None:
    """Runs the code of a page in a folder, which begins where there are a model, its base model and a setting."""
    import peft

    import peft_fanlora

    model = trained("FanLoRA", base)
    names = {"model": model, "base": LlamaForCausalLM.from_pretrained(base), "setting": made_setting(base)}
    public = {name: getattr(peft_fanlora, name) for name in peft_fanlora.__all__}
    with contextlib.chdir(folder):
        exec(code, {**vars(peft), **public, **names})


def train_and_publish(base: Path, output: Path, repo_id: str) -> None:
    """Lets TRL's trainer upload, and the model after it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(output), use_cpu=True, max_steps=1, report_to="none", hub_model_id=repo_id)
    trainer = SFTTrainer(
        trained("FanLoRA", base),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": sentences(8)}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.push_to_hub()
    trainer.model.push_to_hub(repo_id, revision="with-our-part")


def failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def without_waiting(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a function without the pauses between the client's attempts, which add up to half a minute."""
    with mock.patch("huggingface_hub.utils._http.time.sleep"):
        return function(*args, **kwargs)


# The tests.


@pytest.mark.support("an adapter on the Hub")
@both
def test_an_adapter_is_pushed_and_loaded(method: str, hub: Hub, run: Run, base: Path) -> None:
    expected = run(publish, method, base, "me/adapter", tags=["poems"])
    files = hub.files("me/adapter")
    of_setting = {"fanlora_setting.json", "fanlora_importance.png"} if method == "FanLoRA" else set()
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | of_setting
    assert any(path.endswith(".git/info/lfs/objects/batch") for _, path, _ in hub.requests)
    card = hub.card("me/adapter")
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card
    assert {f"- {tag}\n" in card for tag in ("poems", method.lower(), "peft-fanlora")} == {True}
    assert "library_name: peft" in card
    assert run(read, base, "me/adapter") == expected
    assert run(read_as_tenant, method, base, "me/adapter") == expected


@both
def test_what_a_user_writes_into_the_card_stays(method: str, hub: Hub, run: Run, base: Path) -> None:
    run(publish, method, base, "me/adapter")
    edited = hub.card("me/adapter").replace("library_name:", "license: mit\nlibrary_name:")
    edited = edited.replace("tags:\n", "tags:\n- poems\n") + "\nTrained on sonnets.\n"
    edited = edited.replace("pip install peft-fanlora", "an old version of our own words")
    hub.repositories["me/adapter"].commit("main", {"README.md": edited.encode()})
    run(publish, method, base, "me/adapter", seed=1)
    card = hub.card("me/adapter")
    assert "license: mit" in card
    assert "- poems\n" in card
    assert "Trained on sonnets." in card
    assert "pip install peft-fanlora" in card
    assert "an old version" not in card
    assert card.count("peft_fanlora: adapter default") == 1


@both
def test_revisions(method: str, hub: Hub, run: Run, base: Path) -> None:
    first = run(publish, method, base, "me/adapter")
    second = run(publish, method, base, "me/adapter", seed=1, revision="v2")
    assert first != second
    assert hub.repositories["me/adapter"].branches.keys() == {"main", "v2"}
    assert run(read, base, "me/adapter") == first
    assert run(read, base, "me/adapter", revision="v2") == second
    commit = hub.repositories["me/adapter"].branches["main"]
    run(publish, method, base, "me/adapter", seed=2)
    assert run(read, base, "me/adapter", revision=commit) == first
    kind, message = run(failure, read, base, "me/adapter", revision="v3")
    assert kind == "ValueError" and "adapter_config.json" in message


@both
def test_a_private_repository_needs_its_token(method: str, hub: Hub, run: Run, base: Path) -> None:
    expected = run(publish, method, base, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    for token in (False, "your-token", "no-token"):
        kind, message = run(failure, read, base, "me/secret", token=token)
        assert kind == "ValueError" and "Can't find 'adapter_config.json' at 'me/secret'" in message
    assert run(read, base, "me/secret") == run(read, base, "me/secret", token="my-token") == expected
    for token, status in ((False, "401"), ("your-token", "403")):
        kind, message = run(failure, publish, method, base, "me/secret", token=token)
        assert kind == "HfHubHTTPError" and status in message


@pytest.mark.support("a setting on the Hub")
def test_a_setting_is_pushed_and_loaded(hub: Hub, run: Run, base: Path) -> None:
    setting = run(publish_setting, base, "me/setting", private=True)
    assert hub.repositories["me/setting"].private
    assert hub.files("me/setting").keys() == {"README.md", "fanlora_setting.json", "fanlora_importance.png"}
    assert 'FanLoraConfig(setting="me/setting", r=8' in hub.card("me/setting")
    assert run(FanLoraSetting.from_pretrained, "me/setting", token="my-token") == setting
    hub.repositories["me/setting"].private = False
    assert run(adapt_by_setting, base, "me/setting") == sorted(setting.names)


def test_an_adapter_brings_its_setting(hub: Hub, run: Run, base: Path) -> None:
    run(publish, "FanLoRA", base, "me/adapter")
    setting = run(FanLoraSetting.from_pretrained, "me/adapter")
    assert setting.names == made_setting(base).names
    card = hub.card("me/adapter")
    run(publish_setting, base, "me/adapter")
    assert hub.card("me/adapter") == card  # the adapter's card shows the setting already


def test_the_code_about_sharing_runs(hub: Hub, run: Run, base: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    code = "\n".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    for repo_id in ("me/another-adapter", "me/my-adapter"):
        run(publish, "FanLoRA", base, repo_id)
    run(run_code, base, code.replace("hf_...", "my-token"), tmp_path)
    assert hub.repositories.keys() == {"me/another-adapter", "me/my-adapter", "me/my-setting"}


def test_the_recipes_that_upload_run(hub: Hub, run: Run, base: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    found = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    codes = [code for code in found if "\nmodel.push_to_hub(" in code]
    assert len(codes) == 2
    for code in codes:
        run(run_code, base, code, tmp_path)
    assert "plain-lora/adapter_model.safetensors" in hub.files("me/my-adapter")
    assert json.loads(hub.files("me/my-adapter")["plain-lora/adapter_config.json"])["peft_type"] == "LORA"


def test_the_command_line_reads_from_the_hub(hub: Hub, run: Run, base: Path, tmp_path: Path) -> None:
    run(publish, "FanLoRA", base, "me/adapter", private=True)
    run(publish_setting, base, "me/setting")
    code, shown, _ = run(type_command, "show", "me/adapter", "--json")
    assert code == 0 and json.loads(shown)["modules kept"] == 6
    code, shown, _ = run(type_command, "compare", "me/adapter", "me/setting", "--json")
    assert code == 0 and json.loads(shown)["overlap"] == 1
    assert run(type_command, "export", "me/adapter", str(tmp_path / "plain"))[0] == 0
    assert (tmp_path / "plain" / "adapter_model.safetensors").exists()
    code, shown, message = run(type_command, "show", "me/nothing")
    assert (code, shown) == (1, "") and message.count("\n") == 1 and "'me/nothing'" in message


def test_trls_card_gets_a_part_when_the_model_is_pushed(hub: Hub, run: Run, base: Path, tmp_path: Path) -> None:
    run(train_and_publish, base, tmp_path, "me/run")
    by_trainer, by_model = hub.card("me/run"), hub.card("me/run", "with-our-part")
    assert "# Model Card for run" in by_trainer and "peft_fanlora" not in by_trainer
    assert "# Model Card for run" in by_model and 'PeftModel.from_pretrained(base, "me/run")' in by_model
    assert "- trl\n" in by_model and "- fanlora\n" in by_model


def test_a_setting_that_cannot_be_read_says_why(hub: Hub, run: Run, base: Path) -> None:
    run(publish_setting, base, "me/secret", private=True)
    run(publish, "PARA", base, "me/para")
    cases = [
        ("me/nothing", {}, "RepositoryNotFoundError"),
        ("me/secret", {"token": False}, "RepositoryNotFoundError"),
        ("me/secret", {"token": "your-token"}, "RepositoryNotFoundError"),
        ("me/secret", {"token": "no-token"}, "HfHubHTTPError"),
        ("me/secret", {"token": "my-token", "revision": "v9"}, "RevisionNotFoundError"),
        ("me/para", {}, "EntryNotFoundError"),
        ("not an id", {}, "HFValidationError"),
    ]
    for repo_id, options, reason in cases:
        kind, message = run(failure, FanLoraSetting.from_pretrained, repo_id, **options)
        assert kind == "FileNotFoundError"
        assert repr(repo_id) in message and reason in message
    kind, message = run(failure, FanLoraConfig, setting="me/nothing")
    assert kind == "FileNotFoundError"


def test_offline_from_the_cache(hub: Hub, run: Run, base: Path, home: Path) -> None:
    expected = {}
    for method in ("FanLoRA", "PARA"):
        expected[method] = run(publish, method, base, f"me/{method}")
        assert run(read, base, f"me/{method}") == expected[method]
    run(FanLoraSetting.from_pretrained, "me/FanLoRA")
    hub.requests.clear()
    with client(hub.url, home, offline=True) as offline:
        for method in expected:
            assert offline(read, base, f"me/{method}") == expected[method]
        assert offline(FanLoraSetting.from_pretrained, "me/FanLoRA").names == made_setting(base).names
        kind, message = offline(failure, read, base, "me/not-cached")
        assert kind == "ValueError" and "me/not-cached" in message
        kind, message = offline(failure, FanLoraSetting.from_pretrained, "me/not-cached")
        assert kind == "FileNotFoundError" and "LocalEntryNotFoundError" in message
        kind, message = offline(failure, publish, "PARA", base, "me/new")
        assert kind == "OfflineModeIsEnabled"
    assert hub.requests == []


@both
def test_an_interrupted_download_is_resumed(method: str, hub: Hub, run: Run, base: Path) -> None:
    expected = run(publish, method, base, "me/adapter", seed=7)
    hub.cuts = 2
    hub.requests.clear()
    assert run(read_in_pieces, base, "me/adapter", size=128) == expected
    ranges = [found for command, path, found in hub.requests if command == "GET" and path.startswith("/cdn/")]
    size = len(hub.files("me/adapter")["adapter_model.safetensors"])
    half, three_quarters = (int(size * part) // 128 * 128 for part in (0.5, 0.75))
    first, second, third = (int((found or "bytes=0-")[6:-1]) for found in ranges)
    assert first == 0 and second == half and three_quarters - 128 <= third <= three_quarters


def test_a_download_that_never_ends_fails_and_can_be_repeated(hub: Hub, run: Run, base: Path) -> None:
    expected = run(publish, "PARA", base, "me/adapter", seed=8)
    hub.cuts, hub.cut_after = 99, 0.0
    kind, message = run(failure, read, base, "me/adapter")
    assert kind == "RemoteProtocolError" and "without sending complete message body" in message
    hub.cuts = 0
    assert run(read, base, "me/adapter") == expected


LOST = ("RemoteProtocolError", "ReadError", "WriteError", "ConnectError", "LocalEntryNotFoundError", "RuntimeError")
"""The client's errors; a RuntimeError names the file whose upload has failed."""


@both
def test_a_network_lost_during_an_upload_leaves_the_repository_as_it_was(
    method: str, hub: Hub, run: Run, base: Path
) -> None:
    first = run(publish, method, base, "me/adapter")
    before = dict(hub.files("me/adapter"))
    for stage in ("/resolve/", "/preupload/", "/lfs/objects/batch", "/upload/", "/commit/"):
        hub.lost = stage
        kind, message = run(without_waiting, failure, publish, method, base, "me/adapter", seed=1)
        assert kind in LOST and message, (stage, kind)
        assert hub.files("me/adapter") == before, stage
    hub.lost = None
    assert run(read, base, "me/adapter") == first
    second = run(publish, method, base, "me/adapter", seed=1)
    assert run(read, base, "me/adapter") == second != first


@both
def test_a_network_lost_during_a_download_mixes_no_versions(method: str, hub: Hub, run: Run, base: Path) -> None:
    first = run(publish, method, base, "me/adapter")
    assert run(read, base, "me/adapter") == first
    second = run(publish, method, base, "me/adapter", seed=11)  # whose weights no other test has downloaded
    for stage in ("/resolve/", "/resolve/.*safetensors", "/cdn/"):
        hub.lost = stage
        kind, message = run(without_waiting, failure, read, base, "me/adapter")
        assert kind in (*LOST, "ValueError") and message, (stage, kind)
    hub.lost = None
    assert run(read, base, "me/adapter") == second


@both
def test_a_repository_is_asked_for_the_files_of_an_adapter_only(method: str, hub: Hub, run: Run, base: Path) -> None:
    """What else a stranger puts there is neither downloaded nor read."""
    expected = run(publish, method, base, "me/adapter")
    others = {
        "adapter_model.bin": b"a pickle",
        "modeling_llama.py": b"1 / 0",
        "../../escaped": b"",
        "config.json": b"[",
    }
    hub.repositories["me/adapter"].commit("main", others)
    hub.requests.clear()
    assert run(read, base, "me/adapter") == expected
    asked = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= asked
    assert not asked & {"adapter_model.bin", "modeling_llama.py", "escaped"}


def test_a_network_lost_while_a_setting_is_read(hub: Hub, run: Run, base: Path) -> None:
    setting = run(publish_setting, base, "me/new-setting")
    hub.lost = "/resolve/"
    kind, message = run(without_waiting, failure, FanLoraSetting.from_pretrained, "me/new-setting")
    assert kind == "FileNotFoundError" and "'me/new-setting'" in message
    hub.lost = None
    assert run(FanLoraSetting.from_pretrained, "me/new-setting") == setting
