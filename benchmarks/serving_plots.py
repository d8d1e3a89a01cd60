"""Plots the results of a serving benchmark in transformers (time per decoding step, ratios) or in vLLM (ratios).

python benchmarks/serving_plots.py benchmarks/results/serving-cpu.json docs/images
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import pandas as pd
import typer
from contestants import BASE
from matplotlib import pyplot as plt


mpl.use("Agg")


def draw(content: dict[str, Any], folder: Path) -> None:
    """Saves both plots of the decoding steps; nothing if the results have none.

    Args:
        content: the content of a result file of `serving.py`.
        folder: folder for the images.
    """
    results = pd.DataFrame(content["results"])
    steps = results[(results["measure"] == "decode") & (results["method"] != f"{BASE}, again")]
    if steps.empty:
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{content['model']}, {content['dtype']}, {content['device']}"
    tag = "gpu" if content["device"] == "cuda" else content["device"]

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, own in steps[steps["tenants"].groupby(steps["method"]).transform("nunique") > 1].groupby(
        "method", sort=False
    ):
        axes.plot(
            own["tenants"], own["median_ms"], marker="o", label=method, color="black" if method == BASE else None
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(steps["tenants"].unique()), sorted(steps["tenants"].unique()))
    axes.set_xlabel("tenants in the batch (rows: 8, or the tenants where they are more)")
    axes.set_ylabel("one decoding step, ms")
    axes.set_title(where)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / f"serving-steps-{tag}.png", dpi=120)
    plt.close(figure)

    _bars(steps[steps["method"] != BASE], "tenants", where, folder / f"serving-ratios-{tag}.png")


def draw_vllm(content: dict[str, Any], folder: Path) -> None:
    """Saves the ratios of each measure.

    Args:
        content: the content of a result file of `vllm_serving.py`.
        folder: folder for the image.
    """
    results = pd.DataFrame(content["results"]).rename(columns={"variant": "method"})
    where = f"vLLM {content['machine']['vllm']}, {content['model']}, {content['dtype']}, {content['device']}"
    folder.mkdir(parents=True, exist_ok=True)
    _bars(results[results["method"] != BASE], "measure", where, folder / f"vllm-ratios-{content['device']}.png")


def _bars(results: pd.DataFrame, by: str, title: str, path: Path) -> None:
    """Saves a bar chart of the ratios to the base model, with one group of bars per method."""
    bars = results.pivot(index="method", columns=by, values="ratio")
    bars = bars.reindex(index=results["method"].unique(), columns=results[by].unique())
    axes = bars.plot.barh(figsize=(7, 0.35 * bars.size + 1.5), width=0.8)
    for container in axes.containers:
        axes.bar_label(container, fmt=lambda ratio: f"{ratio:.2f}" if ratio else "", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time / base model's time, median")
    axes.set_ylabel("")
    axes.set_title(title)
    axes.legend(title=by)
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(axes.figure)


def main(
    results: Annotated[Path, typer.Argument(help="Result file of serving.py or vllm_serving.py")],
    folder: Annotated[Path, typer.Argument(help="Folder for the images")],
) -> None:
    """Saves the plots of a result file."""
    content = json.loads(results.read_text())
    (draw_vllm if "vllm" in content["machine"] else draw)(content, folder)


if __name__ == "__main__":
    typer.run(main)
