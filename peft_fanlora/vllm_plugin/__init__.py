"""vLLM plugin for PARA: PARA adapters, LoRA adapters and the base model in one batch.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`. An engine serves
PARA if `additional_config` has the key "para". Other engines are unchanged.
"""

from __future__ import annotations


def register() -> None:
    """Patches vLLM to serve PARA. Further calls do nothing.

    If this version of vLLM is not compatible, engines with the "para" option fail at startup.
    """
    from . import compatibility, hooks

    found = compatibility.problems()
    if found:
        hooks.refuse(compatibility.refusal(found))
    else:
        hooks.install()


__all__ = ["register"]
