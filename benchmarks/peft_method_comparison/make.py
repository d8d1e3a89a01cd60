"""Writes the experiments of this folder: FanLoRA and PARA at the size of PEFT's LoRA with r = 32 on Llama-3.2-3B.

python benchmarks/peft_method_comparison/make.py
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


sys.path.insert(0, str(Path(__file__).parents[1]))

from quality.experiments import Run, Store
from quality.methods import para_rank, scored_setting

from peft_fanlora import FanLoraConfig, ParaConfig


HERE = Path(__file__).parent
PARAMETERS = 9_175_040
"""Of PEFT's `lora/llama-3.2-3B-rank32`, on the query and value projections."""
PROMPT_END = [627, 16533]
"""".\\nAnswer" in Llama 3's vocabulary, with which the benchmark's prompts end. The ":" after it is left out: before an
answer that begins with a sign, the two are one token."""
LEARNING_RATES = {"fanlora": 3e-4, "para": 3e-3}


def llama_3b() -> PreTrainedModel:
    """Returns a model of Llama-3.2-3B's shape, without weights."""
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def configs() -> dict[str, PeftConfig]:
    """Returns the adapters by the folder of their experiment."""
    model = llama_3b()
    run = Run("gloss", "fanlora", parameters=PARAMETERS)
    setting = scored_setting(model, run, Store(HERE.parent / "results" / "quality")).resolve(model)
    rank = setting.rank_for_budget(model, PARAMETERS)
    width = para_rank(model, run)
    return {
        f"fanlora/llama-3.2-3B-rank{rank}-2-per-layer": FanLoraConfig(
            setting=setting, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"
        ),
        f"para/llama-3.2-3B-rank{width}": ParaConfig(r=width, prompt_end_token_ids=PROMPT_END, task_type="CAUSAL_LM"),
    }


def main() -> None:
    """Writes `adapter_config.json` and `training_params.json` of each experiment."""
    for name, config in configs().items():
        folder = HERE / "experiments" / name
        config.save_pretrained(str(folder))
        parameters = {"optimizer_kwargs": {"lr": LEARNING_RATES[name.partition("/")[0]], "weight_decay": 0.1}}
        (folder / "training_params.json").write_text(json.dumps(parameters, indent=2) + "\n")


if __name__ == "__main__":
    main()
