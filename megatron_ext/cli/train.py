"""``train``: one run through the deepspeed launcher, on this machine or on the hosts of a hostfile."""

from typing import Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides, TargetOptions, grouped
from megatron_ext.errors import UserError


@grouped
def command(
    config: ConfigPath,
    *,
    overrides: Overrides = None,
    where: TargetOptions,
    launcher: Annotated[str, typer.Option("--launcher", help="How other hosts are reached: pdsh.")] = "pdsh",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Two steps at the longest length: peak memory, tokens/s, then stop.")
    ] = False,
) -> None:
    """Train a model; continues from the newest checkpoint of the run directory by itself.

    SIGINT (Ctrl-C) and SIGTERM finish the step, save a checkpoint and exit with status 0, on all hosts.

    Example: megatron-ext train configs/demo/shakespeare.json --nproc 2 --set name=first
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.launch.launcher import launch

    run = load_config(config, overrides or ())
    if launcher != "pdsh":
        raise UserError(
            f"--launcher {launcher}: only pdsh is supported here; on a SLURM cluster use `submit`, and under MPI start "
            "the ranks as docs/cluster.md says"
        )
    raise typer.Exit(launch(where.target(), run, worker_options=("--dry-run",) if dry_run else ()))
