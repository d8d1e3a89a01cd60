"""`peft-fanlora`, the command line."""

import sys


def main() -> None:
    """Runs the command line, or says what is missing for it."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'peft-fanlora[cli]'")
    app()
