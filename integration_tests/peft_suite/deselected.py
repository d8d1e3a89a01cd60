"""What of PEFT's tests is not expected to pass, each with its reason: `deselected.toml`."""

import fnmatch
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


FILE = Path(__file__).with_name("deselected.toml")


@dataclass
class Entry:
    """Some tests that share a reason.

    Attributes:
        kind: "refused" tests are run, and may fail with our `error` alone. "inapplicable" ones speak of something that
            the method has not, and "left_out" ones apply, but can't run here; neither is run.
        tests: patterns of the tests' names, as in a shell; brackets mean themselves.
        reason: why.
        error: a regular expression of the refusal.
        methods: the methods that this is about.
    """

    kind: str
    tests: list[str]
    reason: str
    error: str = ""
    methods: list[str] = field(default_factory=lambda: ["FanLoRA", "PARA"])
    used: set[str] = field(default_factory=set)

    def matches(self, name: str) -> bool:
        """Says whether this is about the test, and remembers which pattern said so."""
        found = {test for test in self.tests if fnmatch.fnmatchcase(name, test.replace("[", "[[]"))}
        self.used |= found
        return bool(found)

    def explains(self, message: str) -> bool:
        """Says whether a failure is the refusal that was expected."""
        return re.search(self.error, message) is not None


def entries(method: str) -> list[Entry]:
    """Returns the entries of a method."""
    content = tomllib.loads(FILE.read_text())
    found = [Entry(kind, **entry) for kind, section in content.items() for entry in section]
    return [entry for entry in found if method in entry.methods]
