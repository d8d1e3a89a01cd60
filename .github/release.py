"""Gets a checkout ready for the release of a tag: checks that they fit, and makes the README's links absolute.

    python .github/release.py v0.1.0 https://github.com/OWNER/REPOSITORY

The README goes into the package's metadata, and an index shows it where no file of the repository lies beside it.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def check(tag: str, root: Path) -> None:
    """Raises where the package or the change log is not of the tag's version."""
    version = re.search(r'^__version__ = "(.+)"$', (root / "peft_fanlora/version.py").read_text(), re.MULTILINE)
    if version is None or tag != f"v{version[1]}":
        raise SystemExit(
            f"The tag is {tag!r}, but peft_fanlora/version.py has {version and version[1]!r}: make them one."
        )
    if not re.search(
        rf"^## \[{re.escape(version[1])}\] - \d{{4}}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.MULTILINE
    ):
        raise SystemExit(f"CHANGELOG.md has no section '## [{version[1]}] - YYYY-MM-DD': date it.")


def absolute_links(text: str, tag: str, repository: str) -> str:
    """Returns Markdown whose relative links and pictures go to a tag of the repository."""
    pictures = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)([^)]+)\)", rf"\1{repository}/raw/{tag}/\2)", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)([^)]+)\)", rf"\1{repository}/blob/{tag}/\2)", pictures)


if __name__ == "__main__":
    tag, repository = sys.argv[1:]
    check(tag, ROOT)
    readme = ROOT / "README.md"
    readme.write_text(absolute_links(readme.read_text(), tag, repository))
