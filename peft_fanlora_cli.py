"""Starts the command line `peft-fanlora`, without messages of other libraries that do not concern its user.

Not part of the package `peft_fanlora`, because importing the package imports PEFT, which already logs some of them. The
examples in the repository use `quiet_libraries` too; importing `peft_fanlora` alone does not change any message.
"""

import logging
import warnings


def quiet_libraries() -> None:
    """Hides deprecations inside libraries, and messages about optional parts of them. Call it before importing PEFT."""
    libraries = r"(accelerate|datasets|peft|torch|torchao|transformers|trl)\."
    # The module is where the deprecated name is used: deprecations in the user's own code are shown.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    # Compiled kernels for other devices, and a deprecated call of torch by torchao.
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def main() -> None:
    """Runs the command line."""
    quiet_libraries()
    from peft_fanlora.command_line import main

    main()
