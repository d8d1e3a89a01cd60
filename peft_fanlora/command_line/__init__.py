"""The command line `peft-fanlora`."""

import sys


def main() -> None:
    """Runs the command line, or exits with a message if a package is missing."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "typer"):
            raise
        sys.exit(f"The command line needs {package}: pip install 'peft-fanlora[cli]'")
    app()
