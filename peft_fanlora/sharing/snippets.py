"""The runnable code in a model card."""

import json
from dataclasses import dataclass

import transformers
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel


TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_GENERATE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_CALL = """\
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(model(**inputs))"""


@dataclass(frozen=True)
class BaseModel:
    """How a card's code loads the base model.

    Attributes:
        name: the folder or Hub id; None if the model has none.
        loader: the transformers class; None for a model of another library.
        options: further arguments, such as the number of labels.
        use: the lines that use the model; empty if its input is not text.
    """

    name: str | None
    loader: str | None
    options: str = ""
    use: str = ""

    @property
    def lines(self) -> str:
        """The line that creates `base`."""
        if self.name is None or self.loader is None:
            return "base = ...  # the model that the adapter was trained on"
        return f"base = {self.loader}.from_pretrained({quoted(self.name)}{self.options})"

    @property
    def imports(self) -> str:
        """The import line for transformers."""
        names = [name for name in (self.loader, "AutoTokenizer" if self.use else None) if name]
        return f"from transformers import {', '.join(names)}" if names and self.name else ""


def base_model_of(model: nn.Module, config: PeftConfig) -> BaseModel:
    """Returns how to load the base model of an adapter.

    Args:
        model: the base model.
        config: the adapter's configuration.
    """
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    if not isinstance(model, PreTrainedModel):
        return BaseModel(name, None)
    own = type(model).__name__
    loader = TASKS.get(config.task_type or "", own if hasattr(transformers, own) else None)
    has_labels = config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    options = f", num_labels={model.config.num_labels}" if has_labels else ""
    if model.main_input_name != "input_ids" or name is None or loader is None:
        return BaseModel(name, loader, options)
    return BaseModel(name, loader, options, _GENERATE if model.can_generate() else _CALL)


def use_adapter(method: str, base: BaseModel, location: str, subfolder: str | None) -> str:
    """Returns code that loads an adapter and uses it.

    Args:
        method: PEFT's name of the method.
        base: the base model.
        location: the adapter's folder or Hub id.
        subfolder: its subfolder, if it is not at the top level.
    """
    where = f", subfolder={quoted(subfolder)}" if subfolder else ""
    lines = [
        f"import peft_fanlora  # registers {method} with PEFT",
        "from peft import PeftModel",
        base.imports,
        "",
        base.lines,
        f"model = PeftModel.from_pretrained(base, {quoted(location)}{where})",
    ]
    if base.use and base.name is not None:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({quoted(base.name)})", base.use]
    return code_of(lines)


def quoted(text: str) -> str:
    """Returns text as a Python string literal, with any special characters escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def code_of(lines: list[str]) -> str:
    """Joins lines of code, with at most one empty line between two."""
    code = "\n".join(line for line in lines if line or lines)
    return code.replace("\n\n\n", "\n\n")
