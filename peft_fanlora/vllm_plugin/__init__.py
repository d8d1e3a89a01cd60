"""PARA in vLLM: adapters that see the prompt, served beside LoRA adapters and the base model in one batch.

vLLM finds `register` through its entry point `vllm.general_plugins` and calls it in each of its processes. An engine
serves PARA where `additional_config` has the key "para"; for all others nothing changes.
"""

from __future__ import annotations


def register() -> None:
    """Puts PARA into vLLM; to do so again does nothing.

    Where this version of vLLM lacks something that PARA needs, nothing is put in, and an engine that asks for PARA says so
    when it starts.
    """
    from . import compatibility, hooks

    found = compatibility.problems()
    if found:
        hooks.refuse(compatibility.refusal(found))
    else:
        hooks.install()


__all__ = ["register"]
