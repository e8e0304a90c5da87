"""``train``: one run through the deepspeed launcher, on this machine or on the hosts of a hostfile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.launch.launcher import Target

Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Ranks on this machine; by default one per GPU, or one on a CPU."),
]
MasterPort = Annotated[
    int | None,
    typer.Option("--master-port", min=1, max=65535, help="Port where ranks meet; by default a free one."),
]
Hostfile = Annotated[
    Path | None,
    typer.Option("--hostfile", help="Run on the hosts of this file, `NAME slots=N` a line, over ssh.", metavar="FILE"),
]
Include = Annotated[
    str, typer.Option("--include", help="Only these hosts or slots: NAME[:SLOT,SLOT][@NAME...].", show_default=False)
]
Exclude = Annotated[
    str, typer.Option("--exclude", help="All but these hosts or slots, in the same form.", show_default=False)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Two steps at the longest length: peak memory, tokens/s, then stop.")
]
Launcher = Annotated[str, typer.Option("--launcher", help="How other hosts are reached: pdsh.")]


def command(
    config: ConfigPath,
    *,
    overrides: Overrides = None,
    nproc: Nproc = None,
    master_port: MasterPort = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    launcher: Launcher = "pdsh",
    dry_run: DryRun = False,
) -> None:
    """Train a model; continues from the newest checkpoint of the run directory by itself.

    SIGINT (Ctrl-C) and SIGTERM finish the step, save a checkpoint and exit with status 0, on all hosts.

    Example: megatron-ext train configs/demo/shakespeare.json --nproc 2 --set name=first
    """
    from megatron_ext.config.loading import load_config

    run = load_config(config, overrides or ())
    if launcher != "pdsh":
        raise UserError(
            f"--launcher {launcher}: only pdsh is supported here; on a SLURM cluster use `submit`, and under MPI start "
            "the ranks as docs/cluster.md says"
        )
    target = target_of(nproc=nproc, master_port=master_port, hostfile=hostfile, include=include, exclude=exclude)
    from megatron_ext.launch.launcher import launch

    raise typer.Exit(launch(target, run, worker_options=("--dry-run",) if dry_run else ()))


def target_of(
    *, nproc: int | None, master_port: int | None, hostfile: Path | None, include: str, exclude: str
) -> "Target":
    """Where the ranks run, from the options of a command.

    Raises:
        UserError: the options contradict each other or the hostfile.
    """
    from megatron_ext.launch.hosts import choose_hosts, read_hostfile
    from megatron_ext.launch.launcher import Target, this_machine

    if hostfile is None:
        if include or exclude:
            raise UserError("--include and --exclude choose among the hosts of --hostfile, which is not given")
        return this_machine(nproc, master_port=master_port)
    if nproc is not None:
        raise UserError("--nproc is for this machine; the hostfile's slots say how many ranks a host has")
    hosts = choose_hosts(read_hostfile(hostfile), include=include, exclude=exclude)
    return Target(tuple(hosts), master_port=master_port)
