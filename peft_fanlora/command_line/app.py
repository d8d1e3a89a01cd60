"""The commands and their options. Each command imports what it needs when it runs, so that `--help` is fast."""

from pathlib import Path
from typing import Annotated

import typer

from ..fanlora.choices import Engine, ScoreName, Strategy
from .output import answers_in_one_line, quiet_stdout, show_json


app = typer.Typer(
    help="Find, show, compare and export FanLoRA settings, and time FanLoRA and PARA on your own model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Where = Annotated[str, typer.Argument(help="Folder or Hub id.", show_default=False)]


@app.command(
    epilog="**Examples:** `peft-fanlora find HuggingFaceTB/SmolLM2-135M-Instruct rows.jsonl -o my-setting`, "
    "`peft-fanlora find my-model trl-lib/tldr --rows 2000 --strategy role --keep 2`, "
    "`peft-fanlora find --adapter my-lora rows.jsonl`"
)
@answers_in_one_line
def find(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub id of a causal language model. With --adapter it may be left out.", show_default=False
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="Instructions in a format that TRL's SFTTrainer accepts: a file (.jsonl, .json, .csv, .parquet, .txt), "
            "a folder or a Hub id.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="LoRA or FanLoRA adapter to score as it is: a folder or a Hub id. Without it, LoRA on all linear layers "
            "is trained first.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")] = Path("fanlora-setting"),
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration of the data set, if it has several.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Use only the first rows.  [default: all]")] = None,
    calibration_rows: Annotated[
        int, typer.Option(min=1, help="Rows for scoring, which are not used for training.")
    ] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum number of tokens per row.")] = 512,
    r: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the LoRA on all modules.")] = 8,
    method: Annotated[ScoreName, typer.Option(help="Importance score.")] = "path",
    strategy: Annotated[
        Strategy,
        typer.Option(help="Whether to select modules within each layer, whole roles, or modules of the whole model."),
    ] = "layer",
    keep: Annotated[
        int,
        typer.Option(
            min=1, help='Number to keep: modules per layer ("layer"), roles ("role") or modules in total ("global").'
        ),
    ] = 2,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep Q, K and V (and gate and up) together or not at all.")
    ] = False,
    max_slowdown: Annotated[
        float | None,
        typer.Option(
            help="Select by time instead of --keep: the most important modules with which a decoding step takes at most "
            "this multiple of the base model's, such as 1.05.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="The engine to time for --max-slowdown.")] = "transformers",
    costs: Annotated[
        Path | None,
        typer.Option(help="A file of `peft-fanlora costs` for --max-slowdown, instead of timing.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the LoRA initialization.")] = 0,
    json: Json = False,
) -> None:
    """Find a setting: train LoRA on all linear layers, or take an adapter, score the modules, and keep the best.

    Writes the setting with its heat map and model card, the pruned adapter (`adapter/`), all scores (`report.json`), and
    a page with the scores and the modules that stay at each budget (`report.html`).
    """
    from . import finding, looking, sources

    if dataset is None:
        if adapter is None:
            raise typer.BadParameter("Pass the model and the data set.", param_hint="dataset")
        model, dataset = sources.base_model_of(adapter), model
    if max_slowdown is None and costs is not None:
        raise typer.BadParameter("Pass --max-slowdown too, such as 1.05.", param_hint="--costs")
    plan = finding.Plan(
        model, adapter, output, steps, batch_size, learning_rate, max_length, r, method, strategy, keep, packed,
        max_slowdown, engine, costs, seed,
    )  # fmt: skip
    with quiet_stdout():
        report, found = finding.run(plan, dataset, split, name, rows, calibration_rows)
    if json:
        show_json(report)
    else:
        looking.show_setting(found, str(output))
        finding.show(report)


@app.command(
    epilog="**Examples:** `peft-fanlora show my-setting`, `peft-fanlora show me/my-adapter --json`, "
    "`peft-fanlora show my-setting --report report.html --costs module-costs.json`"
)
@answers_in_one_line
def show(
    where: Where,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with the scores and the modules that stay at each budget.", show_default=False
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="A file of `peft-fanlora costs`, for budgets of time instead of numbers of modules in the report.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show the modules of a setting or an adapter, their number and their size."""
    from . import looking

    if costs is not None and report is None:
        raise typer.BadParameter("Pass --report too, such as report.html.", param_hint="--costs")
    if report is not None:
        looking.write_report(where, report, costs)
    looking.show(where, json)


@app.command(epilog="**Example:** `peft-fanlora plot my-setting importance.png`")
@answers_in_one_line
def plot(
    where: Where,
    image: Annotated[Path, typer.Argument(help="Output image: .png, .svg or .pdf.", show_default=False)],
) -> None:
    """Draw the heat map of a setting: layers by roles, with a dot on each kept module."""
    from . import looking

    looking.plot(where, image)


@app.command(epilog="**Example:** `peft-fanlora compare my-setting me/another-setting`")
@answers_in_one_line
def compare(first: Where, second: Where, json: Json = False) -> None:
    """Compare two settings of models with the same depth, module by module."""
    from . import looking

    looking.compare(first, second, json)


@app.command(epilog="**Example:** `peft-fanlora export me/my-adapter plain-lora`")
@answers_in_one_line
def export(
    adapter: Where,
    output: Annotated[Path, typer.Argument(help="Output folder.", show_default=False)],
    json: Json = False,
) -> None:
    """Write a FanLoRA adapter as plain LoRA, which loads without this package.

    The weights of the base model are not needed.
    """
    from . import exporting

    exporting.export(adapter, output, json)


@app.command(
    epilog="**Examples:** `peft-fanlora bench my-model`, `peft-fanlora bench my-model --setting my-setting --tenants 8`"
)
@answers_in_one_line
def bench(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.", show_default=False)],
    setting: Annotated[
        str | None,
        typer.Option(
            help="FanLoRA setting: a folder or a Hub id.  [default: one attention and one MLP module per layer]"
        ),
    ] = None,
    tenants: Annotated[int, typer.Option(min=1, help="Number of adapters in each batch.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per batch.  [default: 8, or one per tenant]")
    ] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    r: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of LoRA and FanLoRA.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Decoding steps per method.")] = 40,
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Time a decoding step of a model without adapters, and with LoRA, FanLoRA and PARA.

    The methods take turns. The ratio is relative to the base model in the same round; a second copy of the base model
    shows the measurement noise.
    """
    from . import benching

    benching.bench(model, setting, tenants, batch_size, prompt_length, r, rounds, device, json)


@app.command(
    epilog="**Examples:** `peft-fanlora costs my-model`, `peft-fanlora costs my-model --engine vllm -o vllm-costs.json`"
)
@answers_in_one_line
def costs(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.", show_default=False)],
    engine: Annotated[Engine, typer.Option(help="The engine to time.")] = "transformers",
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file.")] = Path("module-costs.json"),
    tenants: Annotated[int, typer.Option(min=1, help="Number of adapters in a batch, one row each.")] = 8,
    r: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the adapters.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Decoding steps per variant.")] = 40,
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Measure the time that LoRA modules add to a decoding step, for `find --max-slowdown`."""
    from . import benching

    benching.costs(model, engine, output, tenants, r, rounds, device, json)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="**Examples:** `peft-fanlora run lm_eval --model hf --model_args pretrained=my-model,peft=tenants/a --tasks arc_easy`, "
    "`peft-fanlora run -m my_package.evaluate`, `peft-fanlora run evaluate.py`",
)
def run(
    program: Annotated[
        list[str],
        typer.Argument(
            metavar="PROGRAM [ARGUMENTS]...",
            help="A script, `-m` and a module, or an installed command; then its own arguments.",
            show_default=False,
        ),
    ],
) -> None:
    """Run another program that loads adapters with PEFT, with FanLoRA and PARA registered.

    The program keeps its arguments, signals and exit code. Processes that it starts itself do not have the methods.
    """
    from . import running

    running.replace_process(program)
