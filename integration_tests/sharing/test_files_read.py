"""Cards, weights and configurations that strangers wrote: read, refused in one sentence, and shown without effect."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from integration_tests.helpers.models import fanlora
from integration_tests.sharing.fuzz import fuzz, kinds, outcome
from peft_fanlora import FanLoraConfig, FanLoraSetting
from peft_fanlora.command_line.app import app
from peft_fanlora.fanlora.modules import ModuleName
from peft_fanlora.sharing import card


def test_ten_seconds_of_fuzzing() -> None:
    counts, reports = fuzz(seed=1, first=0, inputs=1_000_000, seconds=10)
    assert not reports, reports[0]
    for found in counts.values():
        assert found["read"] and found["refused"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(kinds())), st.randoms(use_true_random=False))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, kind: str, rng: Any) -> None:
    assert outcome(tmp_path, kinds()[kind], rng) in ("read", "refused")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\ntags: [\n---\n", "has metadata that cannot be read: .*Correct the text between its two lines '---'"),
        ("---\n- a\n---\n", "has metadata that cannot be read"),
        ("---\ntags: [1]\n---\n", r"has metadata that cannot be read: tags is '\[1\]', but must be a list of words"),
        (f"---\na: {'[' * 5_000}\n---\n", "has metadata that cannot be read"),
        ("---\nmodel-index: 3\n---\n", "has metadata that cannot be read"),
    ],
)
def test_a_card_that_cannot_be_read_is_named_before_anything_is_saved(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=f"README.md {message}"):
        fanlora().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == text


def test_one_word_is_a_list_of_tags(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: poems\n---\n")
    assert card.tags_in(tmp_path) == ["poems"]


def test_a_card_shows_what_strangers_wrote_without_effect(tmp_path: Path) -> None:
    facts = {"method": "path", "end": "<!-- peft_fanlora: end --> <script>", "rows": "a | b\nc"}
    base = 'me/base"); import os; os.system("true'
    setting = FanLoraSetting(
        {ModuleName("model.layers", 0, "up_proj"): None},
        {},
        {"model.layers": 1},
        "llama",
        {**facts, "base_model_name_or_path": base},
    )
    for _ in range(2):
        setting.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("<!-- peft_fanlora: end -->") == 1 and "<script>" not in text
    assert "| rows | a \\| b c |" in text
    code = text.partition("```python\n")[2].partition("\n```")[0]
    assert f"from_pretrained({json.dumps(base)})" in code
    compile(code, "card", "exec")


def shown(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code in (0, 1) and (found.exception is None or isinstance(found.exception, SystemExit)), (
        found.exception
    )
    return found.output


def test_the_command_line_shows_what_strangers_wrote_without_effect(tmp_path: Path) -> None:
    facts = {"method": "[bold]path[/bold]", "colour": "\x1b[31m", "closing": "[/nothing]"}
    setting = FanLoraSetting({ModuleName("model.layers", 0, "up_proj"): None}, {}, {"model.layers": 1}, "llama", facts)
    setting.write(tmp_path)
    output = shown("show", str(tmp_path))
    assert (
        "[bold]path[/bold]" in output and "[/nothing]" in output and r"\x1b[31m" in output and "\x1b[31m" not in output
    )


@pytest.mark.parametrize(
    ("file", "text"),
    [("adapter_config.json", b"[" * 100_000), ("adapter_config.json", b'{"peft_type": []}'), ("adapter_model.safetensors", b"\xff" * 99)],
)  # fmt: skip
def test_the_command_line_answers_damaged_files_in_one_line(file: str, text: bytes, tmp_path: Path) -> None:
    FanLoraConfig().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / file).write_bytes(text)
    output = shown("show", str(tmp_path))
    assert output.startswith("Error: ") and file in output and len(output.splitlines()) == 1
