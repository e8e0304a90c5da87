"""``train``: one run through the deepspeed launcher on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides

if TYPE_CHECKING:
    from megatron_ext.runtime.signals import StopRequest


def command(
    config: ConfigPath,
    *,
    overrides: Overrides = None,
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
    raise typer.Exit(start(config, overrides or (), nproc=nproc, master_port=master_port))


def start(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    master_port: int | None = None,
    stop: "StopRequest | None" = None,
) -> int:
    """Check the config, start the ranks, and return the run's exit status; ``stop`` is told of signals.

    Raises:
        UserError: the config or the data are wrong, the ranks cannot share the batch, the port is taken, or the
            launcher is not installed.
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.curriculum.plan import TrainingPlan
    from megatron_ext.curriculum.sampler import check_batches_divide
    from megatron_ext.data.parts import check_data
    from megatron_ext.runtime.device import gpu_names
    from megatron_ext.runtime.launcher import LaunchOptions, launch

    # What is wrong with config and data is told here, at once; starting ranks takes many seconds.
    loaded = load_config(config, overrides)
    plan = TrainingPlan.from_config(loaded)
    check_data(loaded)
    gpus = len(gpu_names())
    options = LaunchOptions(ranks=nproc or max(1, gpus), on_cpu=not gpus, master_port=master_port)
    if options.ranks % loaded.parallel.tensor == 0:  # otherwise the ranks say what is wrong
        check_batches_divide(plan, options.ranks // loaded.parallel.tensor)
    arguments = [str(config)]
    for override in overrides:
        arguments += ["--set", override]
    return launch(options, arguments, stop=stop)
