"""``train``: one run through the deepspeed launcher on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Argument(help="The run's JSON file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. training.batch_size=8."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Ranks on this machine; by default one per GPU, or one on a CPU."),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option("--master-port", min=1, max=65535, help="Port where ranks meet; by default a free one."),
    ] = None,
) -> None:
    """Train a model; continues from the newest checkpoint of the run directory by itself.

    SIGINT (Ctrl-C) and SIGTERM finish the step, save a checkpoint and exit with status 0.

    Example: megatron-ext train configs/demo/shakespeare.json --nproc 2 --set name=first
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.curriculum.plan import TrainingPlan
    from megatron_ext.runtime.device import gpu_names
    from megatron_ext.runtime.launcher import LaunchOptions, launch

    # What is wrong with the config is told here, before ranks start.
    run = load_config(config, overrides or ())
    TrainingPlan.from_config(run)
    gpus = len(gpu_names())
    options = LaunchOptions(ranks=nproc or max(1, gpus), on_cpu=not gpus, master_port=master_port)
    arguments = [str(config)]
    for override in overrides or ():
        arguments += ["--set", override]
    raise typer.Exit(launch(options, arguments))
