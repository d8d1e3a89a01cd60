"""The page with the scores and the choices: its data, and that it loads and runs nothing of others."""

import json
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from integration_tests.helpers.costs import costs, scores
from peft_fanlora import ImportanceScores
from peft_fanlora.fanlora.report import page
from peft_fanlora.fanlora.tradeoff import tradeoff


HOSTILE = "</script><img src=https://host/x onerror=alert(1)>&amp;"


class Tags(HTMLParser):
    """The elements of a page and their attributes, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += "" if self.tags and self.tags[-1][0] in ("script", "style") else data


def two_stacks(method: str = "path") -> ImportanceScores:
    chance = random.Random(0)
    roles = {"encoder.layers": ("fc1&copy;", "q_proj"), "decoder.layers": ("fc1&copy;", "q_proj", "cross.q_proj")}
    names = [f"{stack}.{layer}.{role}" for stack, found in roles.items() for layer in range(4) for role in found]
    return ImportanceScores(
        {name: chance.gauss(0.5, 0.5) for name in names},
        method=method,
        num_tokens=1,
        num_layers={"encoder.layers": 4, "decoder.layers": 4},
        model_type=method,
        calibration={"base_model_name_or_path": method, method: method},
    )


def figure_of(text: str, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the traces and the layout that a page passes to plotly."""
    rest = re.split(rf'Plotly\.newPlot\(\s*"{name}",\s*', text)[1]
    traces, end = json.JSONDecoder().raw_decode(rest)
    layout, _ = json.JSONDecoder().raw_decode(rest[end:].lstrip(", \n"))
    return traces, layout


def data_of(text: str) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', text)
    return json.loads(content)


def test_the_heat_map_has_each_score_under_the_pointer() -> None:
    own = scores()
    setting = own.select(2)
    (cells, dots), _ = figure_of(page(own, setting), "heat")
    about = {name: (score, rank) for line in cells["customdata"] for name, score, rank in line}
    assert about.keys() == set(own)
    best = sorted(own, key=lambda name: -own[name])
    for name, (score, rank) in about.items():
        assert float(score) == pytest.approx(own[name], rel=1e-3) and best[rank - 1] == name
    shades = {name: shade for line, names in zip(cells["z"], cells["customdata"], strict=True) for (name, *_), shade in zip(names, line, strict=True)}  # fmt: skip
    assert sorted(own, key=lambda name: -shades[name]) == best
    marked = {cells["customdata"][role][layer][0] for layer, role in zip(dots["x"], dots["y"], strict=True)}
    assert marked == set(setting.names)


@pytest.mark.parametrize("engine", [None, "vllm"])
def test_the_slider_marks_what_stays_and_names_the_setting(engine: str | None) -> None:
    own, measured = scores(), None if engine is None else costs(engine)
    setting = own.select(3, strategy="role")
    text = page(own, setting, measured)
    data, (traces, layout) = data_of(text), figure_of(text, "curves")
    curves = tradeoff(own, own.select, measured)
    assert list(data["choices"]) == list(curves)
    assert [trace["name"] for trace in traces] == [*curves, "saved setting", "shown"]
    for trace, shown, expected in zip(traces, data["choices"].values(), curves.values(), strict=False):
        for one, choice, x, y in zip(shown, expected, trace["x"], trace["y"], strict=True):
            assert (one["cost"], one["share"]) == (x, y) == (choice.cost, choice.share)
            assert {list(own)[module] for module in one["kept"]} == set(choice.names)
            assert sum(int(count) for _, count, _ in one["roles"]) == len(choice.names)
            for call in (call for call in one["calls"] if call.startswith("scores")):
                kept = eval(call, {"scores": own, "costs": measured}).names
                assert set(kept) == set(choice.names)
    label, index = data["start"]
    assert (label, index) == ("by role", 2)
    assert "This is the saved setting." in data["choices"][label][index]["summary"]
    assert "--strategy role --keep 3" in data["choices"][label][index]["calls"][1]
    assert ("predicted decoding step in vllm" in layout["xaxis"]["title"]["text"]) == (engine is not None)
    assert ("number of modules" in layout["xaxis"]["title"]["text"]) == (engine is None)


def test_a_model_with_two_stacks_has_two_panels() -> None:
    own = two_stacks()
    text = page(own, own.select(1))
    traces, layout = figure_of(text, "heat")
    assert [trace["type"] for trace in traces] == ["heatmap", "scatter"] * 2
    assert layout["xaxis2"]["title"]["text"] == "layer of decoder.layers"
    data = data_of(text)
    for (panel, layer, row), name in zip(data["modules"], own, strict=True):
        assert traces[2 * panel]["customdata"][row][layer][0] == name.replace("&", "&amp;")


def test_the_page_needs_no_network_and_is_always_the_same() -> None:
    own = scores()
    text = page(own, own.select(2), costs())
    assert text == page(own, own.select(2), costs())
    assert "plotly.js v" in text  # the library is inside
    tags = Tags(text).tags
    assert not [attributes for _, attributes in tags if {"src", "href"} & attributes.keys()]
    (policy,) = (attributes["content"] for tag, attributes in tags if tag == "meta" and "http-equiv" in attributes)
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_names_from_files_are_text() -> None:
    """Axes and hover text of plotly take HTML too."""
    own = two_stacks(HOSTILE)
    text = page(own, own.select(1))
    harmless = two_stacks()
    found, expected = Tags(text), Tags(page(harmless, harmless.select(1)))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    assert found.text.count(HOSTILE) == 7
    _, layout = figure_of(text, "heat")
    assert layout["yaxis"]["ticktext"][0] == "fc1&amp;copy;"


def test_scores_without_a_positive_sum_are_shown_without_choices() -> None:
    own = scores()
    about: dict[str, Any] = {"num_layers": own.num_layers, "model_type": "llama", "calibration": {}}
    negative = ImportanceScores(dict.fromkeys(own, -1.0), method="path", num_tokens=1, **about)
    text = page(negative, negative.select(2))
    assert len(figure_of(text, "heat")[0]) == 2
    assert 'id="data"' not in text and "Plotly.restyle" not in text.rpartition("</details>")[0].rpartition("heat")[2]
