"""The FanLoRA setting: the modules of a model to adapt, found once and used for all downstream tasks."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..sharing.saving import save_with_card
from ..sharing.writing import staged
from . import setting_file
from .candidates import candidates, counterpart, model_type, num_layers, num_parameters_per_rank
from .modules import ModuleName, layers_by_role, ranges, vllm_layers
from .setting_file import HEAT_MAP, SETTING_NAME


@dataclass(frozen=True)
class FanLoraSetting:
    """The modules of a model that keep their LoRA.

    Using a setting found once, on instruction data, for all later tasks is the paper's idea [P]; the stored fields,
    the transfer to another depth and the computation of ranks are ours.

    Attributes:
        kept: the modules to keep, each with its score (None if there is no score, as in a hand-written setting; never
            NaN or infinite).
        dropped: the modules that were scored and not kept.
        num_layers: the number of layers of each stack of blocks in the scored model.
        model_type: the model type of that model, such as "llama"; None if it is not from transformers.
        calibration: how the scores were computed: method, number of label tokens, base model, versions.
    """

    kept: Mapping[ModuleName, float | None]
    dropped: Mapping[ModuleName, float | None] = field(default_factory=dict)
    num_layers: Mapping[str, int] = field(default_factory=dict)
    model_type: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    own_files: ClassVar = (HEAT_MAP,)

    def __post_init__(self) -> None:
        if not self.kept:
            raise ValueError("A FanLoRA setting must keep at least one module, but this one keeps none.")
        scored = [*self.kept, *self.dropped]
        for module in scored:
            if not isinstance(module, ModuleName):
                raise ValueError(
                    f"The setting contains {module!r}, which is not a ModuleName: use `FanLoraSetting.from_modules` "
                    "to make a setting from names."
                )
        setting_file.check(self.to_dict(), "This FanLoRA setting")
        both = sorted(self.kept.keys() & self.dropped.keys())
        if both:
            raise ValueError(f"{both[0].name} is among the kept and among the dropped modules; remove one of the two.")
        for stack in {module.stack for module in scored} - self.num_layers.keys():
            raise ValueError(
                f"The setting has modules in {stack!r}, but `num_layers` has no number of layers for that stack."
            )
        for module in scored:
            if not 0 <= module.layer < self.num_layers[module.stack]:
                raise ValueError(
                    f"{module.name} is outside of its stack, which has {self.num_layers[module.stack]} layers "
                    "according to `num_layers`."
                )

    @classmethod
    def from_modules(cls, model: nn.Module, names: Iterable[str]) -> "FanLoraSetting":
        """Returns a setting with the named modules of `model`, without scores.

        Raises:
            ValueError: a name is given twice, or is not a linear layer of the model.
        """
        names = list(names)
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise ValueError(f"{repeated[0]} is named {Counter(names)[repeated[0]]} times; name each module once.")
        _require(names, candidates(model))
        modules = [ModuleName.parse(name) for name in names]
        return cls(dict.fromkeys(modules), {}, num_layers(model, modules), model_type(model))

    @property
    def names(self) -> list[str]:
        """The qualified names of the kept modules in the scored model."""
        return [module.name for module in self.kept]

    @property
    def roles(self) -> list[str]:
        """The roles that are kept in at least one layer, which an engine that wraps layers by role must wrap."""
        return list(dict.fromkeys(module.role for module in self.kept))

    @property
    def vllm_layers(self) -> list[str]:
        """vLLM's names of the layers that contain the kept modules, for its `lora_target_modules`."""
        return vllm_layers(self.names)

    def resolve(self, model: nn.Module) -> "FanLoraSetting":
        """Returns the setting with the module names of `model`, which may be another size of the same model type.

        Layer j of D' layers gets the selection of layer round(j (D-1) / (D'-1)) of the D scored layers, so that the
        first and the last layers correspond; with D' = D the setting is unchanged. Stacks may have another prefix,
        such as `layers` of a bare model for `model.layers`.

        Args:
            model: the base model, with or without adapters.

        Raises:
            ValueError: the model has another model type, or lacks a module of the setting.
        """
        if self.model_type and model_type(model) and self.model_type != model_type(model):
            raise ValueError(
                f"The setting was found on a model of type {self.model_type!r} and cannot be used for one of type "
                f"{model_type(model)!r}; score a {model_type(model)!r} model with `score_modules` instead."
            )
        available = candidates(model)
        depths = num_layers(model, map(ModuleName.parse, available))
        stacks = {stack: counterpart(stack, depths, model) for stack in self.num_layers}
        if len(set(stacks.values())) < len(stacks):
            raise ValueError(
                f"The setting has modules in {sorted(stacks)}, which are one stack in the model, {sorted(depths)}: "
                "the setting belongs to another architecture."
            )

        def transfer(modules: Mapping[ModuleName, float | None]) -> dict[ModuleName, float | None]:
            scores = {}
            for stack, target in stacks.items():
                roles: dict[int, dict[str, float | None]] = {}
                for module, score in modules.items():
                    if module.stack == stack:
                        roles.setdefault(module.layer, {})[module.role] = score
                for layer in range(depths[target]):
                    source = _relative_layer(layer, depths[target], self.num_layers[stack])
                    for role, score in roles.get(source, {}).items():
                        scores[ModuleName(target, layer, role)] = score
            return scores

        kept = transfer(self.kept)
        _require([module.name for module in kept], available)
        dropped = {module: score for module, score in transfer(self.dropped).items() if module.name in available}
        depths = {target: depths[target] for target in stacks.values()}
        return replace(self, kept=kept, dropped=dropped, num_layers=depths, model_type=model_type(model))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Saves a heat map of the scores, with a dot on each kept module. Needs matplotlib.

        Args:
            path: the image file; its suffix sets the format, as for `matplotlib.figure.Figure.savefig`.

        Raises:
            ValueError: the setting has no scores, such as a hand-written one.
        """
        self.require_scores()
        from .plots import plot_modules

        scores = {module: score for module, score in {**self.kept, **self.dropped}.items() if score is not None}
        in_order = dict(sorted(scores.items(), key=lambda item: item[0].role))
        how = f" by {self.calibration['method']}" if "method" in self.calibration else ""
        plot_modules(in_order, path=path, title=f"Importance{how}; dots: the modules that are kept", kept=self.kept)

    @property
    def is_scored(self) -> bool:
        """Whether the setting has scores."""
        return any(score is not None for score in (*self.kept.values(), *self.dropped.values()))

    def require_scores(self) -> None:
        """Raises a ValueError if the setting has no scores."""
        if not self.is_scored:
            raise ValueError("This FanLoRA setting has no scores: use the result of `scores.select`, as it was saved.")

    def rank_for_budget(self, base: nn.Module, num_parameters: int) -> int:
        """Returns the rank at which LoRA on this setting's modules is closest to a number of parameters.

        LoRA of rank r has r · Σ_m (in_m + out_m) parameters, m over the kept modules.

        Args:
            base: the model to adapt; it may be on the meta device.
            num_parameters: the budget, in trainable parameters.

        Raises:
            ValueError: the budget is too small for rank 1.
        """
        modules = candidates(base)
        per_rank = sum(num_parameters_per_rank(modules[name]) for name in self.resolve(base).names)
        rank = round(num_parameters / per_rank)
        if rank < 1:
            raise ValueError(
                f"A budget of {num_parameters:,} parameters is too small for this setting: rank 1 on its "
                f"{len(self.kept)} modules already has {per_rank:,}. Keep fewer modules or raise the budget."
            )
        return rank

    def to_dict(self) -> dict[str, Any]:
        """Returns the setting as plain JSON types; `from_dict` reads it back."""
        return setting_file.content_of(
            self.kept,
            self.dropped,
            num_layers=self.num_layers,
            model_type=self.model_type,
            calibration=self.calibration,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "FanLoraSetting":
        """Creates a setting from the result of `to_dict`.

        Raises:
            ValueError: the format version or the structure is wrong; the error names the place and the value.
        """
        return cls(**setting_file.arguments_from(content, "This FanLoRA setting"))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, shared_as: str | None = None) -> None:
        """Saves the human-readable `fanlora_setting.json` to a folder, which is created if needed.

        A model card is added, except in the folder of an adapter, whose card already shows the setting.

        Args:
            save_directory: the folder.
            shared_as: the setting's name in the card's code; by default the folder's name.
        """
        folder = Path(save_directory)
        save_with_card(self, folder, shared_as or folder.resolve().name)

    def write(self, folder: Path) -> None:
        """Writes only `fanlora_setting.json`."""
        with staged(folder) as stage:
            (stage / SETTING_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        **download_kwargs: Any,
    ) -> "FanLoraSetting":
        """Loads a setting from a folder or a Hub repository, which may also be that of a pruned adapter.

        Args:
            pretrained_model_name_or_path: the folder or the repository's id.
            subfolder: a subfolder of it.
            download_kwargs: for `huggingface_hub.hf_hub_download`, such as `revision`, `token` and `cache_dir`.

        Raises:
            FileNotFoundError: neither the folder nor the repository has a setting.
            ValueError: the file is not a setting that this version can read.
        """
        from ..sharing.reading import read_json

        path = setting_file.find(str(pretrained_model_name_or_path), subfolder, download_kwargs)
        arguments = setting_file.arguments_from(read_json(path), str(path))
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the setting to a model repository of the Hub, which is created if needed.

        Args:
            repo_id: such as `me/my-setting`; an adapter's repository can also hold its setting.
            kwargs: `token`, `private`, `revision`; all others are passed to `huggingface_hub.HfApi.upload_folder`.

        Returns:
            The commit info of `huggingface_hub`.
        """
        from ..sharing.hub import push

        kwargs.setdefault("commit_message", "Upload FanLoRA setting")
        return push(lambda folder, full_id: self.save_pretrained(folder, shared_as=full_id), repo_id, **kwargs)

    def __repr__(self) -> str:
        return f"FanLoraSetting({len(self.kept)} modules kept, model_type={self.model_type!r})"

    def __str__(self) -> str:
        """Returns a small table: the layers that keep each role, the most frequent role first."""
        of_all = f" of {len(self.kept) + len(self.dropped)}" if self.dropped else ""
        how = f", by {self.calibration['method']}" if "method" in self.calibration else ""
        layers = layers_by_role(self.kept, with_stack=len(self.num_layers) > 1)
        width = max(map(len, layers))
        rows = [f"{role:<{width}}  {len(found):>5}  {ranges(found)}" for role, found in layers.items()]
        title = f"FanLoRA setting: {len(self.kept)}{of_all} modules{how}"
        return "\n".join([title, f"{'role':<{width}}  count  layers", *rows])


def _relative_layer(layer: int, depth: int, source_depth: int) -> int:
    """Returns the layer of `source_depth` layers at the same relative depth as `layer` of `depth` layers."""
    return round(layer * (source_depth - 1) / (depth - 1)) if depth > 1 else 0


def _require(names: Iterable[str], available: Mapping[str, nn.Module]) -> None:
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"The model has no linear layer {missing[0]!r}"
            + (f" (nor {len(missing) - 1} others that the setting has)" if len(missing) > 1 else "")
            + "; a FanLoRA setting fits models of the architecture that it was found on."
        )
