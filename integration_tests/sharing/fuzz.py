"""Reads thousands of damaged files: each is read or refused with a ValueError, and no other error comes out.

`make fuzz` runs this; `python integration_tests/sharing/fuzz.py --seed 7 --inputs 100000` tries others. A bare error is
printed with its seed, which gives the same input again: `--seed 7 --first 4711 --inputs 1`.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig
from peft_fanlora.command_line.sources import adapter_or_setting
from peft_fanlora.fanlora.modules import ModuleName
from peft_fanlora.sharing import card


SETTING = FanLoraSetting(
    kept={ModuleName("model.layers", layer, "mlp.up_proj"): 0.5 * layer - 1 for layer in range(3)},
    dropped={ModuleName("model.layers", layer, "self_attn.q_proj"): None for layer in range(3)},
    num_layers={"model.layers": 3},
    model_type="llama",
    calibration={"method": "path", "num_tokens": 16, "base_model_name_or_path": "me/base", "facts": [1, {"x": True}]},
)
CARD = """---
library_name: peft
license: mit
tags:
- fanlora
- poems
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText}
    metrics: [{type: perplexity, value: 7.5}]
---
# A card

<!-- peft_fanlora: adapter default. -->

Text.

<!-- peft_fanlora: end -->
"""
STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2.5,
    1e300,
    10**20,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "3",
    "none",
    "all-linear",
    "model..layers",
    "../../secrets",
    "a\nb",
    "\x1b[31m",
    "[/red]",
    "\ud800",
    "é" * 300,
    "model.layers.0",
    [],
    [1],
    [[]],
    ["q_proj"],
    {},
    {"kept": {}},
    {"a": {"b": [None]}},
    {"model.layers.0": {"kept": {"mlp.up_proj": 1}}},
)
TOKENS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN", b"-Infinity", b"1e999", b"null", b"\\u0000", b"\xff", b"\xef\xbb\xbf", b"---\n")  # fmt: skip


def nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each place in JSON content as its container and the key or index there."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from nodes(value)


def strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(STRANGE))


def damage_structure(content: Any, rng: random.Random) -> Any:
    """Returns JSON content with one to three strange values, keys, or things that are missing."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        places = list(nodes(content))
        if not places or rng.random() < 0.02:
            return strange(rng)
        container, key = rng.choice(places)
        how = rng.random()
        if how < 0.6:
            container[key] = strange(rng)
        elif how < 0.75:
            del container[key]
        elif isinstance(container, dict):
            name = rng.choice([value for value in STRANGE if isinstance(value, str)])
            container[name] = copy.deepcopy(container[key]) if how < 0.9 else strange(rng)
        else:
            container.append(strange(rng))
    return content


def damage_bytes(text: bytes, rng: random.Random) -> bytes:
    """Returns a text with some bytes changed, cut, repeated or inserted, or deep inside of brackets."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randint(1, 40))
        how = rng.random()
        if how < 0.2:
            text = text[:start]
        elif how < 0.4:
            text = text[:start] + text[end:]
        elif how < 0.6:
            text = text[:end] + text[start:end] + text[end:]
        elif how < 0.8:
            text = text[:start] + rng.choice(TOKENS) + text[end:]
        elif how < 0.97:
            text = text[:start] + bytes([rng.randrange(256)]) + text[start + 1 :]
        else:
            text = text[:start] + rng.choice((b"[", b'{"a":')) * rng.choice((50, 1_000, 100_000)) + text[start:]
    return text


def read_setting(folder: Path) -> None:
    setting = FanLoraSetting.from_pretrained(folder)
    assert FanLoraSetting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    str(setting)


def read_adapter(folder: Path) -> None:
    found = adapter_or_setting(str(folder))
    assert type(found.config)(**{**found.config.to_dict(), "peft_type": None}).to_dict() == found.config.to_dict()


def kinds() -> dict[str, tuple[str, Any, Callable[[Path], None]]]:
    """Returns the name, the content and the reader of each kind of file."""
    fanlora = FanLoraConfig(setting=SETTING, target_modules=SETTING.names, rank_pattern={"up_proj": 4}).to_dict()
    para = ParaConfig(target_modules=["q_proj"], prompt_end_token_ids=[5, 6], layers_to_transform=[0, 2]).to_dict()
    return {
        "setting": ("fanlora_setting.json", SETTING.to_dict(), read_setting),
        "FanLoRA adapter_config.json": ("adapter_config.json", fanlora, read_adapter),
        "PARA adapter_config.json": ("adapter_config.json", para, read_adapter),
        "card": ("README.md", CARD, card.tags_in),
    }


def outcome(folder: Path, kind: tuple[str, Any, Callable[[Path], None]], rng: random.Random) -> str:
    """Returns what becomes of one damaged file: "read", "refused", or the traceback of a bare error."""
    name, content, read = kind
    if isinstance(content, str):
        text = damage_bytes(content.encode(), rng)
    elif rng.random() < 0.5:
        text = json.dumps(damage_structure(content, rng)).encode()
    else:
        text = damage_bytes(json.dumps(content, indent=2).encode(), rng)
    (folder / name).write_bytes(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except ValueError as error:
        return "refused" if name in str(error) else f"a message without the file: {error}"
    except Exception:
        return traceback.format_exc()[-3_000:]
    return "read"


def fuzz(
    seed: int, first: int, inputs: int, seconds: float = float("inf")
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Returns how many files of each kind were read and refused, and a report of each bare error.

    Args:
        seed: gives the same inputs again.
        first: the number of the first input.
        inputs: how many to try at most.
        seconds: stops after this time.
    """
    tried = list(kinds().items())
    counts: dict[str, Counter[str]] = {name: Counter() for name, _ in tried}
    reports, end = [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(first, first + inputs):
            if time.monotonic() > end:
                break
            name, kind = tried[number % len(tried)]
            folder = Path(scratch, str(number % len(counts)))
            folder.mkdir(exist_ok=True)
            found = outcome(folder, kind, random.Random(f"{seed} {number}"))
            if found not in ("read", "refused"):
                reports.append(f"{name}, --seed {seed} --first {number} --inputs 1:\n{found}")
                found = "bare error"
            counts[name][found] += 1
    return counts, reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=10_000)
    options = parser.parse_args()
    counts, reports = fuzz(options.seed, options.first, options.inputs)
    print("\n".join(reports))
    for name, found in counts.items():
        print(f"{name}: {', '.join(f'{number:,} {what}' for what, number in sorted(found.items()))}")
    sys.exit(1 if reports else 0)
