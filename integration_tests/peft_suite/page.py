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

PEFT tests each of its methods with the same suite. Its source distribution holds that suite, and `make test-peft` runs it
with FanLoRA and PARA in place of LoRA: `peft.LoraConfig` is our configuration while a test module is imported, and PEFT's
tables hold our rows. FanLoRA has every row of LoRA's. PARA has those whose options it has too, under its own names, and
whose targets are linear layers. No file of PEFT is changed. The models of the Hub have tiny stand-ins with random weights.

Each test starts from the same random seed. A few rows are changed before they run:

| rows | change | why |
|---|---|---|
| model cards | no `lora` tag | the Hub knows PEFT's own type LORA by it |
| FanLoRA, feature extraction, no target modules | the pooler is left out | "all-linear" has it, and feature extraction does not use it |
| FanLoRA, aLoRA, no target modules | OPT's MLP is left out | it sees the tokens of all sequences in one row, where PEFT's aLoRA cannot find the invocation tokens |
| PARA, causal models | `prompt_end_token_ids=[1]` | the tests train without labels, so that nothing else tells where a prompt ends |
| PARA, the MLP without tokens | `pooling="mean"` | attention has nothing to choose in a row of one vector |

| outcome | meaning |
|---|---|
| passed | the test made a configuration of ours and passed |
| failed | the test was run and failed, for a reason that nobody has judged yet |
| refused | the test was run, and failed with our error, or PEFT's, that says that this is not supported; another failure would count as failed |
| left out | the test applies and was not run, for the reason below |
| inapplicable | not run: the test speaks of something that the method has not |
| skipped | PEFT's test skipped itself: for a lack of GPUs or libraries, or because PEFT excludes the combination |

Of the tests that apply, which are those that passed, failed, were refused or left out, "run" says how many were run.
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
                parts.append(f"| {kind} | {rest} | other reasons of PEFT's |")
        parts.append("")
    parts.append(
        "Which tests each reason is about stands in [deselected.toml](../integration_tests/peft_suite/deselected.toml); a "
        "pattern there that no test needs any more makes `make test-peft` fail.\n"
    )
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
