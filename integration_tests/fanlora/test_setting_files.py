"""What a setting's file and the configurations of both methods say is checked before anything is made of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, __version__
from peft_fanlora.fanlora.modules import ModuleName


FILE = "fanlora_setting.json"
SETTING = FanLoraSetting(
    kept={ModuleName("model.layers", 0, "mlp.up_proj"): 0.5},
    dropped={ModuleName("model.layers", 0, "mlp.down_proj"): 0.25},
    num_layers={"model.layers": 2},
    model_type="llama",
    calibration={"method": "path", "num_tokens": 16},
)


def written(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / FILE).write_bytes(text)
    return folder


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """Returns the content of the setting's file with another value at one place."""
    content = SETTING.to_dict()
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return content


BLOCK = ("blocks", "model.layers.0")
PLACE = r"blocks\['model.layers.0'\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"is \[1\], but a FanLoRA setting is a JSON object"),
        (changed("blocks", to=[]), r"blocks is \[\], and has to be a valid dictionary"),
        (changed(*BLOCK, to="kept"), rf"{PLACE} is 'kept', and has to be"),
        (changed(*BLOCK, "kept", to=3), rf"{PLACE}.kept is 3, and has to be a valid dictionary"),
        (changed(*BLOCK, "kept", "mlp.up_proj", to="high"), rf"{PLACE}.kept\['mlp.up_proj'\] is 'high', .* a valid number"),
        (changed(*BLOCK, "kept", "mlp.up_proj", to=True), r"is True, and has to be a valid number"),
        (changed(*BLOCK, "kept", "mlp..up_proj", to=1), r"is 'mlp..up_proj', and has to be names joined by single dots"),
        (changed(*BLOCK, "kept", "up\n| proj", to=1), r"is 'up\\n\| proj', and has to be names"),
        (changed(*BLOCK, "kept", "../../x", to=1), r"is '../../x', and has to be names"),
        (changed("blocks", "model.layers.01", to={"kept": {"a": 1}}), "is 'a' of the block 'model.layers.1'; enter it there"),
        (changed("blocks", "model.layers.0.mlp", to={"kept": {"a": 1}}), "is 'mlp.a' of the block 'model.layers.0'"),
        (changed("num_layers", to=[2]), r"num_layers is \[2\], and has to be a valid dictionary"),
        (changed("num_layers", "model.layers", to="2"), r"num_layers\['model.layers'\] is '2', and has to be a valid integer"),
        (changed("num_layers", "model.layers", to=-1), r"is -1, and has to be greater than or equal to 1"),
        (changed("num_layers", "model.layers", to=10**9), r"is 1000000000, and has to be less than or equal to 10000"),
        (changed("num_layers", "model.layers", to=True), r"is True, and has to be a valid integer"),
        (changed("calibration", to="path"), r"calibration is 'path', and has to be"),
        (changed("calibration", "method", to=["path"]), r"calibration.method is \['path'\], and has to be a valid string"),
        (changed("calibration", "base_model_name_or_path", to="a\nb"), "text on one line, without control characters"),
        (changed("model_type", to=7), "model_type is 7, and has to be a valid string"),
        (changed("format_version", to=True), "has format version True, this peft_fanlora reads 1; it must be 1"),
        (changed("format_version", to="1"), "has format version '1'"),
        (changed(*BLOCK, "dropped", "mlp.up_proj", to=1), "among the kept and among the dropped"),
        (changed("blocks", "model.layers.5", to={"dropped": {"a": 1}}), "outside of its stack, which has 2 layers"),
        (b'{"a": NaN}', "'NaN' is not a finite number"),
        (b'{"a": -1e999}', "'-1e999' is not a finite number"),
        (b'{"a": 1, "a": 1, "a": 1}', "'a' stands 3 times in one object"),
        (b"[" * 100_000, "100,000 objects and lists stand inside of each other, at most 64 are read"),
        (b'{"a":' * 100_000, "100,000 objects and lists"),
        (b"1" * 5_000, "cannot be read: Exceeds the limit"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"", "is not JSON"),
    ],
)  # fmt: skip
def test_wrong_content_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FanLoraSetting.from_pretrained(written(tmp_path, content))
    assert str(error.value).startswith(str(tmp_path / FILE))
    assert len(str(error.value)) < len(str(tmp_path)) + 300
    if isinstance(content, dict):
        with pytest.raises(ValueError, match=r"This FanLoRA setting|is among|is outside"):
            FanLoraSetting.from_dict(content)
        with pytest.raises(ValueError, match=r"setting|stands|lies"):
            FanLoraConfig(setting=content)


def test_brackets_in_text_are_no_depth(tmp_path: Path) -> None:
    facts = {"method": "path", "text": '[{"' * 500, "escapes": '\\"[' * 500}
    setting = replace(SETTING, calibration=facts)
    setting.save_pretrained(tmp_path)
    assert FanLoraSetting.from_pretrained(tmp_path) == setting


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (written(tmp_path, {}) / FILE).open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, more than the 67,108,864 that are read"):
        FanLoraSetting.from_pretrained(tmp_path)


def test_a_later_format_says_which_version_to_install(tmp_path: Path) -> None:
    content = {"format_version": 2, "peft_fanlora_version": "3.1.0", "blocks": "of another shape"}
    with pytest.raises(ValueError, match=r"format version 2.*`pip install -U 'peft-fanlora>=3.1.0'`"):
        FanLoraSetting.from_pretrained(written(tmp_path, content))
    content["peft_fanlora_version"] = "1'; rm -r x; '\n"
    with pytest.raises(ValueError, match=r"format version 2.*`pip install -U peft-fanlora`"):
        FanLoraSetting.from_pretrained(written(tmp_path, content))
    assert SETTING.to_dict()["peft_fanlora_version"] == __version__


def test_later_fields_are_ignored_with_a_warning(tmp_path: Path) -> None:
    content = changed(*BLOCK, "shared", to=[])
    content["colour"] = "blue"
    with pytest.warns(UserWarning, match=r"does not know and ignores: \['colour', 'shared'\]"):
        assert FanLoraSetting.from_pretrained(written(tmp_path, content)) == SETTING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": {ModuleName("model.layers", 0, "a"): float("nan")}}, "is nan, and has to be a finite number"),
        ({"kept": {ModuleName("model.layers", 0, "a"): float("inf")}}, "is inf, and has to be a finite number"),
        ({"kept": {"model.layers.0.a": 1.0}}, "is not a ModuleName: use `FanLoraSetting.from_modules`"),
        ({"num_layers": {"model.layers": 2.0}}, "is 2.0, and has to be a valid integer"),
        ({"calibration": {"facts": (1, 2)}}, r"calibration.facts is \(1, 2\), and has to be"),
        ({"calibration": {"loss": float("nan")}}, "calibration.loss is nan, and has to be a finite number"),
    ],
)
def test_a_setting_that_would_not_read_back_is_not_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTING, **change)


names = st.text("abcxyz_09-", min_size=1, max_size=8).filter(lambda name: not name.isdigit())
scores = st.none() | st.floats(allow_nan=False, allow_infinity=False)
facts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def any_setting(draw: st.DrawFn) -> FanLoraSetting:
    depths = draw(
        st.dictionaries(st.lists(names, min_size=1, max_size=3).map(".".join), st.integers(1, 5), min_size=1)
    )
    roles = st.lists(names | st.just("0"), min_size=1, max_size=3).map(".".join)
    modules = st.one_of([st.builds(ModuleName, st.just(s), st.integers(0, n - 1), roles) for s, n in depths.items()])
    scored = draw(st.dictionaries(modules, scores, min_size=1, max_size=8))
    count = draw(st.integers(1, len(scored)))
    pairs = list(scored.items())
    calibration = draw(
        st.dictionaries(
            st.text(max_size=8).filter(lambda key: key not in ("method", "base_model_name_or_path")), facts, max_size=4
        )
    )
    return FanLoraSetting(dict(pairs[:count]), dict(pairs[count:]), depths, draw(st.none() | names), calibration)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(any_setting())
def test_what_is_written_reads_back_equal(tmp_path: Path, setting: FanLoraSetting) -> None:
    setting.write(tmp_path)
    assert FanLoraSetting.from_pretrained(tmp_path) == setting
    loaded = FanLoraConfig(setting=json.loads(json.dumps(setting.to_dict()))).setting
    assert loaded == setting


CONFIGS: dict[str, Callable[..., PeftConfig]] = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("FanLoRA", {"r": "8"}, "FanLoraConfig: r is '8', and has to be a valid integer"),
        ("FanLoRA", {"r": True}, "r is True, and has to be a valid integer"),
        ("FanLoRA", {"r": -2}, "r is -2, and has to be greater than or equal to 1"),
        ("FanLoRA", {"lora_alpha": float("nan")}, "lora_alpha is nan, and has to be a finite number"),
        ("FanLoRA", {"lora_dropout": "0.1"}, "lora_dropout is '0.1', and has to be a valid number"),
        ("FanLoRA", {"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj is '4', and has to be a valid integer"),
        ("FanLoRA", {"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], and has to be a valid dictionary"),
        ("FanLoRA", {"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj is None, and has to be a valid number"),
        ("FanLoRA", {"target_modules": 5}, "target_modules is 5, and has to be a valid list or a valid set"),
        ("FanLoRA", {"target_modules": ["a", 3]}, r"target_modules\[1\] is 3, and has to be a valid string"),
        ("FanLoRA", {"setting": [1]}, "`setting` is a list; pass a FanLoraSetting"),
        ("FanLoRA", {"use_dora": "yes"}, "use_dora is 'yes', and has to be a valid boolean"),
        ("FanLoRA", {"base_model_name_or_path": 3}, "base_model_name_or_path is 3, and has to be a valid string"),
        ("FanLoRA", {"base_model_name_or_path": "a\nb"}, "has to be text on one line"),
        ("FanLoRA", {"monteclora_config": {"later": 1}}, "a field that this version of PEFT does not know: .*'later'"),
        ("PARA", {"r": "12"}, "r='12' is not a width"),
        ("PARA", {"pooling": {}}, r"ParaConfig: pooling is \{\}, and has to be a valid string"),
        ("PARA", {"activation": ["gelu"]}, r"activation is \['gelu'\], and has to be a valid string"),
        ("PARA", {"para_dropout": "0"}, "para_dropout is '0', and has to be a valid number"),
        ("PARA", {"para_dropout": False}, "para_dropout is False, and has to be a valid number"),
        ("PARA", {"init_para_weights": None}, "init_para_weights is None, and has to be a valid boolean"),
        ("PARA", {"prompt_end_token_ids": 5.5}, r"prompt_end_token_ids=5.5 is not a list of token ids"),
        ("PARA", {"prompt_end_token_ids": {"a": 1}}, "is not a list of token ids"),
        ("PARA", {"prompt_end_token_ids": [True]}, r"prompt_end_token_ids=\[True\]"),
        ("PARA", {"target_modules": {"q": 1}}, r"target_modules is \{'q': 1\}, and has to be"),
        ("PARA", {"layers_to_transform": "0"}, "layers_to_transform is '0', and has to be"),
        ("PARA", {"trainable_token_indices": [-1]}, r"trainable_token_indices\[0\] is -1, and has to be greater"),
        ("PARA", {"modules_to_save": "classifier"}, "modules_to_save is 'classifier', and has to be a valid list"),
    ],
)
def test_fields_of_another_type_are_named(method: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIGS[method](**fields)


def test_loading_an_adapter_reads_no_setting_from_elsewhere(tmp_path: Path) -> None:
    """A stranger's adapter_config.json could make the reader ask the Hub for a repository, or read a local folder."""
    FanLoraConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "setting": str(tmp_path)}))
    for config_class in (PeftConfig, FanLoraConfig):
        with pytest.raises(ValueError, match=r"is part of a saved configuration, which must not refer to other files"):
            config_class.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[" * 100_000, "100,000 objects"), (b'{"r": 1, "r": 2}', "'r' stands twice"), (b"[]", "JSON object")],
)
def test_a_configurations_file_is_read_within_limits(
    method: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CONFIGS[method].from_pretrained(str(tmp_path))  # type: ignore[attr-defined]
