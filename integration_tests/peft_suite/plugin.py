"""A pytest plugin that runs PEFT's tests on FanLoRA or PARA.

While a test module is imported, `peft.LoraConfig` is the configuration of the method under test, and its tables hold
that method's rows. Rows of PEFT's own methods are left out, and so are tests that make no configuration of ours.
"""

import collections
import gc
import inspect
import json
import re
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch

from peft_fanlora import FanLoraConfig, ParaConfig
from peft_fanlora.para.layer import ParaLayer

from . import offline
from .deselected import Entry, entries
from .stand_ins import CONFIGS, STAND_INS, ParaForLora, configs_in, row_for


MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
SPEAKS_OF_LORA = re.compile('(?<!Ada)LoraConfig|peft-internal-testing/[^"]*lora|PEFT_MODELS_TO_TEST')
"""A test without rows that matches this may make a configuration of LoRA, or load an adapter from the Hub."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft_suite")
    group.addoption("--method", choices=list(STAND_INS), required=True)
    group.addoption("--results", type=Path, help="where to write the outcome of each test, as JSON")


def pytest_collection_finish() -> None:
    """Exempts what the imports made from garbage collection: PEFT's tests collect after each test."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: a marker of PEFT's tests")
    config.pluginmanager.register(Suite(config), "peft_suite")


class Suite:
    """The run of one method.

    Attributes:
        method: "FanLoRA" or "PARA".
        outcomes: the test -> "passed", "failed", "refused: why", "left_out: why", "inapplicable: why", "skipped: why", or
            "not ours" where a test made no configuration of ours.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.method: str = config.getoption("method")
        self.stand_in = STAND_INS[self.method]
        self.entries = entries(self.method)
        self.outcomes: dict[str, str] = {}
        self.made_ours = False
        for config_class in (FanLoraConfig, ParaConfig):
            self._notice(config_class)
        if self.method == "PARA":  # the helpers' special cases for LoRA are not PARA's
            offline.prepare(self.method)

    def _notice(self, config_class: type) -> None:
        """Lets the suite know when a configuration of ours is made."""
        check = config_class.__post_init__

        def noticed(config: Any) -> None:
            self.made_ours = True
            check(config)

        config_class.__post_init__ = noticed

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        if not isinstance(collector, pytest.Module):
            return (yield)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(peft, "LoraConfig", self.stand_in))
            if self.method == "PARA":
                for module in (peft.tuners.lora, peft.tuners.lora.layer):
                    stack.enter_context(mock.patch.object(module, "LoraLayer", ParaLayer))
                stack.enter_context(mock.patch.object(ParaForLora, "in_table", True))
            offline.prepare(self.method)
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parametrize = metafunc.parametrize

        def only_ours(names: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
            rows, ids = list(rows), kwargs.get("ids")
            if any(True for _ in configs_in([getattr(row, "values", row) for row in rows])):
                single = len(names.split(",") if isinstance(names, str) else names) == 1
                kept = [self._row(row, single) for row in rows]
                if ids is not None and not callable(ids):
                    kwargs["ids"] = [name for name, row in zip(ids, kept, strict=True) if row is not None]
                rows = [row for row in kept if row is not None]
            parametrize(names, rows, *args, **kwargs)

        metafunc.parametrize = only_ours

    def _row(self, row: Any, single: bool) -> Any:
        """Returns a row of a `parametrize` as the method's, or None."""
        marked = hasattr(row, "marks")
        values = row_for(self.method, row.values if marked else [row] if single else row)
        if values is None:
            return None
        return pytest.param(*values, marks=row.marks, id=row.id) if marked else values[0] if single else values

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, others = [], []
        for item in items:
            if not self._may_be_ours(item):
                others.append(item)
                continue
            entries = (entry for entry in self.entries if entry.kind != "refused" and entry.matches(_name(item)))
            entry = next(entries, None)
            if entry is None:
                kept.append(item)
            else:
                self.outcomes[_name(item)] = f"{entry.kind}: {entry.reason}"
                others.append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=others)

    def _may_be_ours(self, item: pytest.Item) -> bool:
        """Says whether a test has a row of ours, or has no row and speaks of LoRA."""
        if any(
            marker.name == "skip" and "got empty parameter set" in str(marker.kwargs) for marker in item.iter_markers()
        ):
            return False
        params = getattr(item, "callspec", None)
        if params is not None and any(True for _ in configs_in(list(params.params.values()))):
            return True
        functions = [item.function]
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            functions += [definition.func for definition in definitions]
        if item.cls is not None:
            functions += [
                member
                for kind in item.cls.__mro__
                for name, member in vars(kind).items()
                if inspect.isfunction(member) and not name.startswith(("test", "_test"))
            ]
        return any(SPEAKS_OF_LORA.search(inspect.getsource(function)) for function in functions)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        params = getattr(item, "callspec", None)
        ours = STAND_INS[self.method], CONFIGS[self.method]
        torch.manual_seed(0)  # not all tests do, and then the order of tests would decide about the weights
        self.made_ours = params is not None and any(
            issubclass(config, ours) for config in configs_in(list(params.params.values()))
        )
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if report.passed and report.when != "call":
            return report
        outcome = report.outcome
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            outcome = f"skipped: {reason.removeprefix('Skipped: ')}"
        elif report.failed and "OnlyLora: " in (text := report.longreprtext):
            outcome = "inapplicable: The test needs an option that only LoRA has."
            report.outcome, report.wasxfail = "skipped", outcome
        elif report.failed and (refusal := self._refusal(item, text)) is not None:
            outcome = f"refused: {refusal.reason}"
            report.outcome, report.wasxfail = "skipped", outcome
        elif report.passed and not self.made_ours:
            outcome = "not ours"
        self.outcomes[_name(item)] = outcome
        return report

    def _refusal(self, item: pytest.Item, message: str) -> Entry | None:
        """Returns the entry that expects a test to fail like this."""
        refusals = (entry for entry in self.entries if entry.kind == "refused" and entry.explains(message))
        return next((entry for entry in refusals if entry.matches(_name(item))), None)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        file = self.config.getoption("results")
        if file is not None:
            content = {
                "outcomes": self.outcomes,
                "unused": [test for entry in self.entries for test in entry.tests if test not in entry.used],
            }
            file.write_text(json.dumps(content, indent=1))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        totals = collections.Counter(outcome.partition(":")[0] for outcome in self.outcomes.values())
        terminalreporter.section(f"{self.method} in PEFT's tests")
        terminalreporter.line(", ".join(f"{count} {outcome}" for outcome, count in totals.items()))


def _name(item: pytest.Item) -> str:
    return item.nodeid.removeprefix("tests/")
