"""Lets pages link to files of the repository that lie outside docs/, such as the figures of a benchmark.

In the repository such a link works as it stands. For the site the file is copied to `repository/`, so that the site needs
no address of a repository. mkdocs calls the function below for each page.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


_LINK = re.compile(r"(?<=\]\()\.\./(?P<path>[^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Returns the page with its links to the repository's files going to their copies."""
    root = Path(config.config_file_path).parent

    def copied(link: re.Match[str]) -> str:
        source = (Path(page.file.abs_src_path).parent / link[0]).resolve()
        if not source.is_file() or not source.is_relative_to(root):
            return link[0]  # which mkdocs reports
        target = f"repository/{source.relative_to(root).as_posix()}"
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(source)))
        return Path(os.path.relpath(target, Path(page.file.src_uri).parent)).as_posix()

    return _LINK.sub(copied, markdown)
