"""``megatron-ext plan``: what a run will do and cost, before a device is taken."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.cli.common import AsJson, ConfigPath, Overrides
from megatron_ext.config.loading import load_config

Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Devices of the run, a multiple of parallel.tensor.", show_default="parallel.tensor: one replica"
    ),
]
DeviceTflops = Annotated[
    float | None,
    typer.Option(
        help="Peak rate of one device at the run's precision, in TFLOP/s; gives the time.", show_default=False
    ),
]
Mfu = Annotated[float, typer.Option(help="Share of that rate which the run is expected to reach.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Draw length, batch size and LR by steps and tokens; .png, .pdf or .svg.",
        show_default=False,
    ),
]


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    ranks: Ranks = None,
    device_tflops: DeviceTflops = None,
    mfu: Mfu = 0.4,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Show a run before it starts: steps, tokens, lengths, learning rate, parameters, FLOPs, memory, time.

    Under adaptive pacing these are the fastest and the slowest plan, between which the run decides.

    Example: megatron-ext plan configs/gpt2/1.5b_slw.json --ranks 64 --device-tflops 312 --plot plan.png
    """
    from rich.console import Console

    from megatron_ext.cli.plan_report import Machine, plan_report, tables

    run = load_config(config, overrides or ())
    plans = run.possible_plans()
    machine = Machine(ranks=ranks or run.parallel.tensor, device_tflops=device_tflops, mfu=mfu)
    reports = {which: plan_report(run, plan, machine) for which, plan in plans.items()}
    if plot is not None:
        from megatron_ext.cli.plan_figure import draw_plan

        draw_plan(plans, plot)
    if as_json:
        told = {which: report.to_json() for which, report in reports.items()}
        typer.echo(json.dumps(told if len(told) > 1 else next(iter(told.values())), indent=2))
        return
    console = Console(highlight=False)
    for which, report in reports.items():
        if len(reports) > 1:
            console.rule(f"The {which} plan", align="left")
        for table in tables(run, report):
            console.print(table)
    if plot is not None:
        console.print(f"Plot: {plot}", soft_wrap=True)
