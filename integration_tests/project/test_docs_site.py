"""The documentation builds without a warning, asks no other host for anything, and its pictures are what the code draws."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import peft_fanlora


pytestmark = pytest.mark.xdist_group("docs_site")  # one worker makes what its tests share


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, str]:
    """Each HTML file of the site with its text."""
    return {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_and_picture_is_there(pages: dict[Path, str]) -> None:
    checked = 0
    for path, html in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]+)"', html):
            if re.match(r"https?:|data:|mailto:", target):
                continue
            file, anchor = urldefrag(unquote(target))
            there = (path.parent / file).resolve() if file else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path}: {target}"
            if anchor and there in pages and not anchor.startswith("__"):
                assert f'id="{anchor}"' in pages[there], f"{path}: {target}"
            checked += 1
    assert checked > 500


def test_every_page_is_linked_within_three_clicks_of_the_landing_page(site: Path, pages: dict[Path, str]) -> None:
    """By the links of the text; the navigation beside it lists all pages anyway."""
    seen = clicked = {site / "index.html"}
    for _ in range(3):
        clicked = {
            (path.parent / urldefrag(unquote(target))[0] / "index.html").resolve()
            for path in clicked
            for target in re.findall(
                r'href="([^":]+)"', pages[path].partition("<article")[2].partition("</article>")[0]
            )
        } & pages.keys()
        seen = seen | clicked
    assert seen == pages.keys()


def test_no_page_loads_anything_from_another_host(pages: dict[Path, str]) -> None:
    for path, html in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]+)"', html)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|icon|preconnect)"[^>]*href="(https?:[^"]+)"', html)
        assert not loaded, path


def test_the_api_page_has_every_public_name(site: Path) -> None:
    api = (site / "api/index.html").read_text()
    for name in peft_fanlora.__all__:
        assert f'id="peft_fanlora.{name}"' in api
    assert "&gt;&gt;&gt;" in api
    assert (
        '<details class="example"' not in api
    )  # a docstring's section "Example:" loses its code; "Examples:" keeps it


def test_files_of_the_repository_are_copied(site: Path) -> None:
    file = "benchmarks/results/serving-cpu.json"
    assert (site / "repository" / file).read_bytes() == (ROOT / file).read_bytes()


def test_the_pictures_are_what_the_code_draws(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs/diagrams/draw.py"))["draw"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == {"fanlora.svg", "para.svg"}
    for name, picture in drawn.items():
        kept = (ROOT / "docs/images" / name).read_text()
        version = re.search(r"Matplotlib v[\d.]+", kept)
        if version and version[0] in picture:  # another version draws the same with other digits
            assert picture == kept
        else:
            assert re.search('viewBox="[^"]+"', picture)[0] in kept
