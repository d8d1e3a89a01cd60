"""The methods, each at the rank that comes nearest to a run's number of parameters."""

import random
from collections.abc import Callable, Mapping

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_fanlora import FanLoraConfig, FanLoraSetting, ImportanceScores, ParaConfig
from peft_fanlora.fanlora.candidates import candidates, num_parameters_per_rank
from peft_fanlora.fanlora.modules import ModuleName

from .experiments import Run, Store
from .generators import feed_constant, feed_embeddings, generators, scale_vectors


SCALED = ["q_proj", "v_proj", "up_proj"]
"""PARA's targets, on which IA3 is trained too."""

PER_PARAMETER = "_per_parameter"
"""Ends the name of a score whose values are divided by a module's inputs and outputs, what a rank costs there."""


def adapted(base: PreTrainedModel, run: Run, store: Store) -> PeftModel:
    """Returns the base model with the run's adapter, untrained."""
    model = get_peft_model(base, METHODS[run.method](base, run, store))
    if run.method == "para":
        if run.reads == "constant":
            feed_constant(model)
        if run.reads == "embeddings":
            feed_embeddings(model)
        if run.scale != 1:
            scale_vectors(model, run.scale)
        for generator in generators(model):
            generator.down.data *= run.start
    return model


def lora(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """LoRA on all linear layers."""
    return _lora(base, run, list(candidates(base)))


def lora_qv(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """LoRA on the query and value projections, PEFT's default for Llama."""
    return _lora(base, run, [name for name in candidates(base) if name.endswith(("q_proj", "v_proj"))])


def lora_o_down(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """LoRA on the two roles that vLLM does not pack with others, so that it computes no modules beside them."""
    return _lora(base, run, [name for name in candidates(base) if name.endswith(("o_proj", "down_proj"))])


def _lora(base: PreTrainedModel, run: Run, names: list[str]) -> LoraConfig:
    rank = FanLoraSetting.from_modules(base, names).rank_for_budget(base, run.parameters)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")


def adalora(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """AdaLoRA on all linear layers: it starts with half as many ranks again as it ends with."""
    names = list(candidates(base))
    rank = FanLoraSetting.from_modules(base, names).rank_for_budget(base, run.parameters)
    return AdaLoraConfig(
        init_r=rank + max(1, rank // 2),
        target_r=rank,
        lora_alpha=2 * rank,
        tinit=run.steps // 10,
        tfinal=run.steps // 2,
        deltaT=1,
        total_step=run.steps,
        target_modules=names,
        task_type="CAUSAL_LM",
    )


def ia3(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """IA3 on PARA's targets. All of its vectors scale outputs, as PARA's do."""
    return IA3Config(target_modules=SCALED, feedforward_modules=[], task_type="CAUSAL_LM")


def fanlora(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """FanLoRA with a setting of the search on the run's source, or with a random one of the same shape."""
    if run.score == "random":
        setting = random_setting(base, run.seed, run.strategy, run.keep)
    else:
        setting = scored_setting(base, run, store)
    rank = setting.rank_for_budget(base, run.parameters)
    return FanLoraConfig(setting=setting, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")


def scored_setting(base: PreTrainedModel, run: Run, store: Store) -> FanLoraSetting:
    """Returns what the run's score keeps."""
    score = run.score.removesuffix(PER_PARAMETER)
    values = store.scores(run.source, score)["values"]
    if score != run.score:
        modules = candidates(base)
        values = {name: value / num_parameters_per_rank(modules[name]) for name, value in values.items()}
    return importance(values, run.score, base.config.model_type).select(run.keep, strategy=run.strategy)


def importance(values: Mapping[str, float], method: str, model_type: str | None = None) -> ImportanceScores:
    """Makes numbers into what `peft_fanlora` selects modules from; they may come from a model of another depth."""
    depths: dict[str, int] = {}
    for module in map(ModuleName.parse, values):
        depths[module.stack] = max(depths.get(module.stack, 0), module.layer + 1)
    facts = {"num_tokens": 0, "num_layers": depths, "model_type": model_type, "calibration": {}}
    return ImportanceScores(values, method=method, **facts)


def random_setting(base: PreTrainedModel, seed: int, strategy: str, keep: int) -> FanLoraSetting:
    """Returns a setting chosen as by a score, with random numbers for scores."""
    draw = random.Random(seed)
    values = {name: draw.random() for name in candidates(base)}
    return importance(values, "random", base.config.model_type).select(keep, strategy=strategy)


def para(base: PreTrainedModel, run: Run, store: Store) -> PeftConfig:
    """PARA with the default targets.

    Where it reads the task alone, its prompt ends with the first turn, which is the system message of the task.
    """
    return ParaConfig(
        r=run.rank or para_rank(base, run),
        pooling=run.pooling,
        activation=run.activation,
        target_modules="all-linear" if run.targets == "all-linear" else None,
        prompt_end_token_ids=[base.config.eos_token_id] if run.reads == "task" else None,
        task_type="CAUSAL_LM",
    )


def para_rank(base: PreTrainedModel, run: Run) -> int:
    """Returns the width of the generators whose parameters come nearest to the budget."""
    width, modules = base.config.hidden_size, candidates(base)
    scaled = tuple(SCALED) if run.targets == "usual" else ""
    outputs = [module.out_features for name, module in modules.items() if name.endswith(scaled)]
    layers = len({ModuleName.parse(name).block for name in modules})
    query = width * layers if run.pooling == "attention" else 0
    return max(1, round((run.parameters - query) / (layers * width + sum(outputs))))


METHODS: dict[str, Callable[[PreTrainedModel, Run, Store], PeftConfig]] = {
    "lora": lora,
    "lora-qv": lora_qv,
    "lora-o-down": lora_o_down,
    "adalora": adalora,
    "ia3": ia3,
    "fanlora": fanlora,
    "para": para,
}
