"""What is released: the wheel and the source distribution, the README on an index, and the workflows."""

import os
import re
import runpy
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import peft_fanlora


pytestmark = pytest.mark.xdist_group("release")  # one worker makes what its tests share


ROOT = Path(__file__).parents[2]
RELEASE = runpy.run_path(str(ROOT / ".github/release.py"), run_name="release")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_wheel_has_the_package_and_its_command_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(wheel(dist)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "peft_fanlora").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "peft_fanlora/py.typed" in names
    assert names == package | {"peft_fanlora_cli.py"}


def test_the_source_distribution_has_what_a_build_needs(dist: Path) -> None:
    (found,) = dist.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert tops == {
        "peft_fanlora", "peft_fanlora_cli.py", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip


def test_the_metadata(dist: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())])
    assert done.returncode == 0
    with zipfile.ZipFile(wheel(dist)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == peft_fanlora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_the_wheel_works_where_nothing_else_of_the_repository_is(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the dependencies of this one but not its editable install."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel(dist)]
    subprocess.run(install, check=True)
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    code = """
import peft_fanlora, torch
from importlib.metadata import version
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
print(peft_fanlora.__file__)
assert version("peft-fanlora") == peft_fanlora.__version__
make = lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                            num_attention_heads=2))
for config in (peft_fanlora.FanLoraConfig(r=2, task_type="CAUSAL_LM"), peft_fanlora.ParaConfig(task_type="CAUSAL_LM")):
    get_peft_model(make(), config).save_pretrained("adapter")
    assert PeftModel.from_pretrained(make(), "adapter")(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
"""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.strip()).is_relative_to(packages)


def test_the_readme_on_an_index_has_no_relative_links() -> None:
    text = (ROOT / "README.md").read_text()
    link = re.compile(r"(!?)\[[^]]*\]\(([^)]+)\)")
    relative = [(picture, target) for picture, target in link.findall(text) if not target.startswith("http")]
    assert len(relative) > 10
    assert all((ROOT / target.partition("#")[0]).exists() for _, target in relative)
    there = RELEASE["absolute_links"](text, "v1", "https://host/owner/name")
    for picture, target in relative:
        assert f"](https://host/owner/name/{'raw' if picture else 'blob'}/v1/{target})" in there
    assert all(target.startswith("http") for _, target in link.findall(there))


def test_a_release_needs_a_tag_of_its_version_and_a_dated_change_log(tmp_path: Path) -> None:
    (tmp_path / "peft_fanlora").mkdir()
    (tmp_path / "peft_fanlora/version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - 2026-01-02\n")
    RELEASE["check"]("v1.2.0", tmp_path)
    with pytest.raises(SystemExit, match=r"The tag is 'v1.2.1', but .* has '1.2.0'"):
        RELEASE["check"]("v1.2.1", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - unreleased\n")
    with pytest.raises(SystemExit, match="date it"):
        RELEASE["check"]("v1.2.0", tmp_path)


def test_the_version_that_comes_next_is_in_the_change_log() -> None:
    coming = peft_fanlora.__version__.partition(".dev")[0]
    assert f"\n## [{coming}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflows_call_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in (ROOT / ".github/workflows").iterdir():
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for command in (step["run"] for step in job["steps"] if "run" in step):
                program, argument, *_ = command.split()
                if program == "pipx":
                    continue
                assert program in ("make", "python")
                assert argument in targets if program == "make" else (ROOT / argument).is_file()
                called.add(argument)
    assert called == {"quality", "test", "test-project", "test-oldest", "docs", "build", ".github/release.py"}
