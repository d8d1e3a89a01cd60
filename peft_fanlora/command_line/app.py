"""The commands and their options."""

from pathlib import Path
from typing import Annotated

import typer

from ..fanlora.importance import SCORES
from ..fanlora.scores import Strategy
from . import benching, exporting, finding, looking
from .output import answers_in_one_line, quiet_stdout, show_json


app = typer.Typer(
    help="Finds, shows, compares and exports FanLoRA settings, and times FanLoRA and PARA on your own model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Where = Annotated[str, typer.Argument(help="A folder or the id of a Hub repository.", show_default=False)]


def _known_score(name: str) -> str:
    if name not in SCORES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(SCORES)}.")
    return name


@app.command(
    epilog="**Examples:** `peft-fanlora find HuggingFaceTB/SmolLM2-135M-Instruct rows.jsonl -o my-setting`, "
    "`peft-fanlora find my-model trl-lib/tldr --rows 2000 --strategy role --keep 2`"
)
@answers_in_one_line
def find(
    model: Annotated[str, typer.Argument(help="A language model: a folder or an id.", show_default=False)],
    dataset: Annotated[
        str,
        typer.Argument(
            help="Instructions in a form that TRL's SFTTrainer takes: a file (.jsonl, .json, .csv, .parquet, .txt), a "
            "folder or an id.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("fanlora-setting"),
    split: Annotated[str, typer.Option(help="Which split of the data set.")] = "train",
    name: Annotated[str | None, typer.Option(help="Which configuration of the data set, if it has several.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Use the first rows only.  [default: all]")] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="Rows to score on; not trained on.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row, at most.")] = 512,
    r: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of LoRA on all modules.")] = 8,
    method: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(SCORES)}]", callback=_known_score, help="The score.")
    ] = "path",
    strategy: Annotated[Strategy, typer.Option(help="What is ranked against what.")] = "layer",
    keep: Annotated[
        int,
        typer.Option(min=1, help='How many to keep: modules per layer ("layer"), roles ("role"), modules ("global").'),
    ] = 2,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep Q, K, V (and gate, up) together or not at all.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the data and the start of LoRA.")] = 0,
    json: Json = False,
) -> None:
    """Finds a setting: LoRA on all linear layers, trained; a score for each; the best stay.

    Writes the setting with its heat map and a card, the pruned adapter (`adapter/`) and all scores (`report.json`).
    """
    plan = finding.Plan(
        model, output, steps, batch_size, learning_rate, max_length, r, method, strategy, keep, packed, seed
    )
    with quiet_stdout():
        report, found = finding.run(plan, dataset, split, name, rows, calibration_rows)
    if json:
        show_json(report)
    else:
        looking.show_setting(found, str(output))
        finding.show(report)


@app.command(epilog="**Examples:** `peft-fanlora show my-setting`, `peft-fanlora show me/my-adapter --json`")
@answers_in_one_line
def show(where: Where, json: Json = False) -> None:
    """Shows a setting or an adapter: which modules it has, how many, and its size."""
    looking.show(where, json)


@app.command(epilog="**Example:** `peft-fanlora plot my-setting importance.png`")
@answers_in_one_line
def plot(
    where: Where,
    image: Annotated[Path, typer.Argument(help="The picture to write: .png, .svg or .pdf.", show_default=False)],
) -> None:
    """Draws the heat map of a setting: layers by roles, a dot on each module that stays."""
    looking.plot(where, image)


@app.command(epilog="**Example:** `peft-fanlora compare my-setting me/another-setting`")
@answers_in_one_line
def compare(first: Where, second: Where, json: Json = False) -> None:
    """Compares two settings of models of one depth, module by module."""
    looking.compare(first, second, json)


@app.command(epilog="**Example:** `peft-fanlora export me/my-adapter plain-lora`")
@answers_in_one_line
def export(
    adapter: Where,
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Writes a FanLoRA adapter as plain LoRA, which loads without this package. Needs no weights of the base model."""
    exporting.export(adapter, output, json)


@app.command(
    epilog="**Examples:** `peft-fanlora bench my-model`, `peft-fanlora bench my-model --setting my-setting --tenants 8`"
)
@answers_in_one_line
def bench(
    model: Annotated[str, typer.Argument(help="A language model: a folder or an id.", show_default=False)],
    setting: Annotated[
        str | None,
        typer.Option(
            help="FanLoRA's modules: a folder or an id.  [default: one of attention and one of the MLP in each layer]"
        ),
    ] = None,
    tenants: Annotated[int, typer.Option(min=1, help="Adapters in each batch.")] = 1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows.  [default: 8, or one per tenant]")] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    r: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of LoRA and FanLoRA.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Decoding steps of each contestant.")] = 40,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Json = False,
) -> None:
    """Times one decoding step of a model: bare, with LoRA, FanLoRA and PARA, in turns.

    What to read is the ratio to the bare model in the same round; a second copy of it shows how far equal things differ.
    """
    benching.bench(model, setting, tenants, batch_size, prompt_length, r, rounds, device, json)
