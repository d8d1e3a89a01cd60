"""Plots the results of a serving benchmark: time per decoding step over tenants, and a bar chart of the ratios.

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

    bars = steps[steps["method"] != BASE].pivot(index="method", columns="tenants", values="ratio")
    bars = bars.reindex(steps[steps["method"] != BASE]["method"].unique())
    axes = bars.plot.barh(figsize=(7, 0.35 * bars.size + 1.5), width=0.8)
    for container in axes.containers:
        axes.bar_label(container, fmt=lambda ratio: f"{ratio:.2f}" if ratio else "", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("decoding step / base model's step, median")
    axes.set_ylabel("")
    axes.set_title(where)
    axes.legend(title="tenants")
    axes.figure.savefig(folder / f"serving-ratios-{tag}.png", dpi=120, bbox_inches="tight")
    plt.close(axes.figure)


def main(
    results: Annotated[Path, typer.Argument(help="Result file of serving.py")],
    folder: Annotated[Path, typer.Argument(help="Folder for the images")],
) -> None:
    """Saves the plots of a result file."""
    draw(json.loads(results.read_text()), folder)


if __name__ == "__main__":
    typer.run(main)
