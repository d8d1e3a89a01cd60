"""Writes docs/peft-tests.md from the results of `run.py` and the reasons in `deselected.toml`.

python integration_tests/peft_suite/page.py
"""

import json
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/peft-tests.json"
PAGE = ROOT / "docs/peft-tests.md"
INTRODUCTION = """# PEFT's own tests on our methods

PEFT tests all of its methods with the same test suite, which is part of its source distribution. `make test-peft` runs this suite
with FanLoRA and PARA instead of LoRA: while a test module is imported, `peft.LoraConfig` is our configuration, and PEFT's
parameter tables contain our rows. FanLoRA has all rows of LoRA. PARA has those whose options it supports and
whose targets are linear layers. No file of PEFT is changed. Models of the Hub are replaced by tiny models with random weights.

Each test starts with the same random seed. A few rows are changed before they run:

| rows | change | reason |
|---|---|---|
| model cards | no `lora` tag | the Hub uses this tag for PEFT's own type LORA |
| FanLoRA, feature extraction, no target modules | the pooler is excluded | it is part of "all-linear", and feature extraction does not use it |
| FanLoRA, aLoRA, no target modules | OPT's MLP is excluded | it sees the tokens of all sequences in one row, where PEFT's aLoRA cannot find the invocation tokens |
| PARA, causal models | `prompt_end_token_ids=[1]` | the tests train without labels, so that nothing else defines where a prompt ends |
| PARA, the MLP without tokens | `pooling="mean"` | attention has no effect on a row of one vector |

| outcome | meaning |
|---|---|
| passed | the test created a configuration of ours and passed |
| failed | the test failed, for a reason that has not been examined yet |
| refused | the test failed with an error of ours or of PEFT that says that the feature is not supported; any other failure would count as failed |
| left out | the test applies but was not run, for the reason given below |
| inapplicable | the test was not run because it tests something that the method does not have |
| skipped | PEFT's test skipped itself, because GPUs or libraries are missing or because PEFT excludes the combination |

"run" is the share of applicable tests (passed, failed, refused or left out) that were run.
"""
KINDS = ("passed", "failed", "refused", "left_out", "inapplicable", "skipped")
SKIPS_SHOWN = 12


def page(content: dict) -> str:
    """Returns the page of some results."""
    parts = [INTRODUCTION, "| | " + " | ".join(KINDS).replace("_", " ") + " | run |\n|---|" + "---:|" * 7]
    for method, files in content["methods"].items():
        totals = Counter({kind: sum(sum(file.get(kind, {}).values()) for file in files.values()) for kind in KINDS})
        applicable = sum(totals[kind] for kind in KINDS[:4])
        run = f"{1 - totals['left_out'] / applicable:.1%}"
        parts.append(f"| {method} | " + " | ".join(f"{totals[kind]:,}" for kind in KINDS) + f" | {run} |")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts.append(f"\n{versions}, on a CPU ([figures](../benchmarks/results/peft-tests.json)).\n")
    for method, files in content["methods"].items():
        parts.append(
            f"## {method}\n\n| file of PEFT | " + " | ".join(KINDS).replace("_", " ") + " |\n|---|" + "---:|" * 6
        )
        for name, file in files.items():
            parts.append(f"| {name} | " + " | ".join(str(sum(file.get(kind, {}).values())) for kind in KINDS) + " |")
        parts.append("\n| | tests | reason |\n|---|---:|---|")
        for kind in KINDS[2:]:
            reasons: Counter[str] = Counter()
            for file in files.values():
                reasons.update(file.get(kind, {}))
            shown = reasons.most_common(SKIPS_SHOWN if kind == "skipped" else None)
            parts += [f"| {kind.replace('_', ' ')} | {count} | {_cell(reason)} |" for reason, count in shown]
            if rest := reasons.total() - sum(count for _, count in shown):
                parts.append(f"| {kind} | {rest} | other reasons |")
        parts.append("")
    parts.append(
        "[deselected.toml](../integration_tests/peft_suite/deselected.toml) lists the tests for each reason. `make test-peft` "
        "fails if a pattern in this file is no longer needed.\n"
    )
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
