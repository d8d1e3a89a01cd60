"""The commands `show`, `plot` and `compare`, which do not load a model."""

import sys
from pathlib import Path
from typing import Any

from ..fanlora.card import facts_of, modules_of
from ..fanlora.config import FanLoraConfig
from ..fanlora.costs import ModuleCosts
from ..fanlora.modules import layers_by_role, ranges
from ..fanlora.scores import ImportanceScores
from ..fanlora.setting import FanLoraSetting
from ..sharing.saved import SavedAdapter
from ..sharing.writing import staged
from . import sources
from .output import quiet_stdout, show_facts, show_json, show_table


def show(where: str, as_json: bool) -> None:
    """Prints an adapter or a setting."""
    found = sources.adapter_or_setting(where)
    if as_json:
        show_json(_setting_content(found) if isinstance(found, FanLoraSetting) else _adapter_content(found))
    elif isinstance(found, FanLoraSetting):
        show_setting(found, where)
    else:
        content = _adapter_content(found)
        modules, calibration = content.pop("modules", None), content.pop("calibration", {})
        show_facts(where, content)
        if modules:
            _show_modules(modules_of(found))
        if calibration:
            show_facts("calibration", facts_of(calibration))


def show_setting(setting: FanLoraSetting, where: str) -> None:
    """Prints a setting."""
    of_all = f" of {len(setting.kept) + len(setting.dropped)}" if setting.dropped else ""
    facts = {"modules": f"{len(setting.kept)}{of_all}", "layers": sum(setting.num_layers.values())}
    show_facts(where, {"type": "FanLoRA setting", "model type": setting.model_type, **facts})
    _show_modules(setting.kept)
    if setting.calibration:
        show_facts("calibration", facts_of(setting.calibration))


def write_report(where: str, file: Path, costs: Path | None) -> None:
    """Writes a setting's page.

    Raises:
        ValueError: there is no setting with scores, or the costs are those of another model.
        ModuleNotFoundError: plotly is missing.
    """
    from ..fanlora import report

    setting = sources.setting(where)
    scores = ImportanceScores.from_setting(setting)
    with quiet_stdout():
        page = report.page(scores, setting, None if costs is None else ModuleCosts.load(costs))
    with staged(file.parent) as stage:
        (stage / file.name).write_text(page, encoding="utf-8")
    print(f"Wrote {file}", file=sys.stderr)


def plot(where: str, image: Path) -> None:
    """Draws a setting's heat map."""
    setting = sources.setting(where)
    image.parent.mkdir(parents=True, exist_ok=True)
    setting.plot(image)
    print(f"Wrote {image}")


def compare(first: str, second: str, as_json: bool) -> None:
    """Compares two settings.

    Raises:
        ValueError: their models have different model types or depths.
    """
    one, other = sources.setting(first), sources.setting(second)
    if (one.model_type, one.num_layers) != (other.model_type, other.num_layers):
        raise ValueError(
            f"{first} belongs to a {one.model_type!r} model with {one.num_layers} layers, {second} to a "
            f"{other.model_type!r} model with {other.num_layers}: only settings of the same model type and depth can "
            "be compared module by module."
        )
    both = one.kept.keys() & other.kept.keys()
    either = one.kept.keys() | other.kept.keys()
    content = {
        "first": {"where": first, "modules": len(one.kept)},
        "second": {"where": second, "modules": len(other.kept)},
        "shared": len(both),
        "overlap": round(len(both) / len(either), 4),
        "rank_correlation": _rank_correlation(one, other),
        "only_first": [module.name for module in one.kept if module not in both],
        "only_second": [module.name for module in other.kept if module not in both],
    }
    if as_json:
        show_json(content)
        return
    correlation = content["rank_correlation"]
    facts = {
        f"modules of {first}": len(one.kept),
        f"modules of {second}": len(other.kept),
        "shared": f"{len(both)}, {content['overlap']:.0%} of the modules that at least one of them keeps",
        "rank correlation of the scores": "no scores" if correlation is None else f"{correlation:.2f}",
    }
    show_facts("comparison of two settings", facts)
    with_stack = len(one.num_layers) > 1
    grouped = [layers_by_role(modules, with_stack=with_stack) for modules in (one.kept, other.kept)]
    roles = list(dict.fromkeys(role for layers in grouped for role in layers))
    rows = [(role, *(len(layers.get(role, ())) for layers in grouped), _both(role, grouped)) for role in roles]
    show_table("layers that keep each role", ["role", "first", "second", "both"], rows)


def _both(role: str, grouped: list[dict[str, list[int]]]) -> str:
    shared = set(grouped[0].get(role, ())) & set(grouped[1].get(role, ()))
    return f"{len(shared)}: {ranges(shared)}" if shared else "0"


def _rank_correlation(one: FanLoraSetting, other: FanLoraSetting) -> float | None:
    scores = [{**setting.kept, **setting.dropped} for setting in (one, other)]
    shared = [module for module in scores[0] if None not in (scores[0][module], scores[1].get(module))]
    if len(shared) < 3:
        return None
    import pandas

    ranks = [pandas.Series([found[module] for module in shared]).rank() for found in scores]
    return round(float(ranks[0].corr(ranks[1])), 4)


def _show_modules(modules: Any) -> None:
    modules = list(modules)
    roles = layers_by_role(modules, with_stack=len({module.stack for module in modules}) > 1)
    show_table(
        "modules",
        ["role", "number of layers", "layers"],
        ((role, len(found), ranges(found)) for role, found in roles.items()),
    )


def _adapter_content(adapter: SavedAdapter[Any]) -> dict[str, Any]:
    config = adapter.config
    content: dict[str, Any] = {
        "type": f"{'FanLoRA' if isinstance(config, FanLoraConfig) else 'PARA'} adapter",
        "base model": config.base_model_name_or_path,
        "task": getattr(config.task_type, "value", config.task_type),
        "r": config.r,
        "parameters": adapter.num_parameters,
        "bytes": adapter.num_bytes,
    }
    if isinstance(config, FanLoraConfig):
        setting: Any = config.setting
        of_all = len(setting.kept) + len(setting.dropped) if setting is not None and setting.dropped else None
        modules = modules_of(adapter)
        content |= {"alpha": config.lora_alpha, "modules kept": len(modules), "of": of_all}
        content["modules"] = [module.name for module in modules]
        content["calibration"] = dict(setting.calibration) if setting is not None else {}
    else:
        content |= {"pooling": config.pooling, "activation": config.activation}
        content["prompt ends with"] = config.prompt_end_token_ids
    return {key: value for key, value in content.items() if value is not None}


def _setting_content(setting: FanLoraSetting) -> dict[str, Any]:
    names = {"kept": setting.kept, "dropped": setting.dropped}
    scores = {key: {module.name: score for module, score in modules.items()} for key, modules in names.items()}
    return {
        "type": "FanLoRA setting",
        "model_type": setting.model_type,
        "num_layers": dict(setting.num_layers),
        "calibration": dict(setting.calibration),
        **scores,
    }
