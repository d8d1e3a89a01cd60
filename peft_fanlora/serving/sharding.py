"""Weights of which each process holds a share: those of FSDP, tensor parallelism and DeepSpeed ZeRO stage 3."""

from collections.abc import Iterable, Mapping

import torch


def is_sharded(parameters: Iterable[torch.Tensor]) -> bool:
    """Returns whether any of the parameters is divided among processes."""
    return any(hasattr(each, "device_mesh") or hasattr(each, "ds_id") for each in parameters)


def require_whole(tensors: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Checks that the tensors to save are not what DeepSpeed or offloading leaves of a weight between forward passes.

    Raises:
        ValueError: a tensor has no elements, or no data.
    """
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"The weights of adapter {adapter_name!r} are offloaded, so that {offloaded[0]} has no data here. Pass "
            "state_dict=accelerate.utils.modeling.get_state_dict_offloaded_model(model) to save_pretrained."
        )
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise ValueError(
            f"The weights of adapter {adapter_name!r} are sharded over processes by DeepSpeed ZeRO-3, so that "
            f"{empty[0]} is empty here. Call trainer.save_model(), which gathers them, or save in all processes in "
            "`with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])`."
        )
