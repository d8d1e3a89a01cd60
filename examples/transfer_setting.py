"""A setting that was found on one model is used on a model with another depth of the same family.

`smollm2-setting/` was found on SmolLM2-135M-Instruct with 30 blocks. The target is the same model without four of its later
blocks, or any other Llama model from the Hub. A new adapter on the transferred setting is compared with LoRA on Q and V
with the same number of parameters.

    python examples/transfer_setting.py
    python examples/transfer_setting.py --target HuggingFaceTB/SmolLM2-360M-Instruct
"""

from pathlib import Path
from typing import Annotated

import assets
import torch
import typer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from training import BATCH_SIZE, held_out_loss, sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTTrainer

from peft_fanlora import FanLoraConfig, FanLoraSetting


SETTING = Path(__file__).parent / "smollm2-setting"
NUM_HELD_OUT = 64

console = Console()


def shallower(base_model: str, folder: Path) -> str:
    """Writes a Llama model without a seventh of its blocks, starting at two thirds of its depth; returns the folder."""
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    blocks = list(model.model.layers)
    first, number = 2 * len(blocks) // 3, max(1, len(blocks) // 7)
    kept = blocks[:first] + blocks[first + number :]
    for index, block in enumerate(kept):
        block.self_attn.layer_idx = index  # its place in the KV cache
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return str(folder)


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a Llama [default: SmolLM2-135M-Instruct]")] = "",
    target: Annotated[
        str, typer.Option(help="Folder or Hub id of the target [default: the model without some blocks]")
    ] = "",
    setting: Annotated[str, typer.Option(help="Folder or Hub id of a setting")] = str(SETTING),
    output: Annotated[Path, typer.Option(help="Output folder")] = Path("transfer-output"),
    steps: Annotated[int, typer.Option(help="Training steps of each adapter")] = 25,
    rank: Annotated[int, typer.Option(help="Rank of the adapter on the setting")] = 12,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Transfers a setting and trains an adapter on it."""
    target = target or shallower(model or str(assets.model_folder()), output / "shallower")
    base = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    transferred = FanLoraSetting.from_pretrained(setting).resolve(base)
    console.print(str(transferred), highlight=False)

    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    on_q_v = FanLoraSetting.from_modules(base, [name for name in linear if name.endswith(("q_proj", "v_proj"))])
    budget = get_peft_model(base, FanLoraConfig(setting=transferred, r=rank)).get_nb_trainable_parameters()[0]
    configs = {
        "FanLoRA, transferred": FanLoraConfig(setting=transferred, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"),
        "LoRA on Q and V": LoraConfig(
            r=(same := on_q_v.rank_for_budget(base, budget)),
            lora_alpha=2 * same,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    }
    rows = Dataset.from_list(assets.glosses()[: NUM_HELD_OUT + steps * BATCH_SIZE])
    table = Table("", "r", "parameters", "before", "after", title=f"Loss on {NUM_HELD_OUT} held-out definitions")
    for name, config in configs.items():
        set_seed(seed)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), config)
        trainer = SFTTrainer(
            adapted,
            args=sft_arguments(output, steps, learning_rate=1e-3, seed=seed),
            processing_class=AutoTokenizer.from_pretrained(target),
            train_dataset=rows.select(range(NUM_HELD_OUT, len(rows))),
            eval_dataset=rows.select(range(NUM_HELD_OUT)),
        )
        before = held_out_loss(trainer)
        trainer.train()
        parameters = adapted.get_nb_trainable_parameters()[0]
        table.add_row(name, str(config.r), f"{parameters:,}", f"{before:.3f}", f"{held_out_loss(trainer):.3f}")
        adapted.save_pretrained(output / name.split(",")[0].replace(" ", "-").lower())
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
