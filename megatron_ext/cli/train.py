"""``train``: one run through the deepspeed launcher, on this machine or on the hosts of a hostfile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import ConfigPath, Overrides
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig
    from megatron_ext.runtime.signals import StopRequest

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


@dataclass(frozen=True)
class Place:
    """Where a run takes place: on this machine, or on the hosts of a hostfile."""

    nproc: int | None = None
    master_port: int | None = None
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    launcher: str = "pdsh"


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
    place = Place(nproc, master_port, hostfile, include, exclude, launcher)
    worker_options = ("--dry-run",) if dry_run else ()
    raise typer.Exit(start_at(place, config, overrides or (), worker_options=worker_options))


def start(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    master_port: int | None = None,
    stop: "StopRequest | None" = None,
) -> int:
    """Train on this machine; as ``start_at``."""
    return start_at(Place(nproc=nproc, master_port=master_port), config, overrides, stop=stop)


def start_at(
    place: Place,
    config: Path,
    overrides: Sequence[str] = (),
    *,
    worker_options: Sequence[str] = (),
    stop: "StopRequest | None" = None,
) -> int:
    """Check the config, start the ranks, and return the run's exit status; ``stop`` is told of signals.

    Raises:
        UserError: the config, the data or the hosts are wrong, the ranks cannot share the batch, the port is taken, or
            the launcher is not installed.
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.data.sources import check_data

    # What is wrong with config and data is told here, at once; starting ranks takes many seconds.
    loaded = load_config(config, overrides)
    check_data(loaded.data, seq_len=loaded.training.seq_len, vocab_size=loaded.model.vocab_size)
    if place.hostfile is not None:
        return _on_hosts(place, place.hostfile, loaded, worker_options, stop=stop)
    if place.include or place.exclude:
        raise UserError("--include and --exclude choose among the hosts of --hostfile, which is not given")
    from megatron_ext.runtime.device import gpu_names
    from megatron_ext.runtime.launcher import LaunchOptions, launch

    gpus = len(gpu_names())
    options = LaunchOptions(ranks=place.nproc or max(1, gpus), on_cpu=not gpus, master_port=place.master_port)
    _check_ranks(loaded, options.ranks)
    arguments = [str(config)]
    for override in overrides:
        arguments += ["--set", override]
    return launch(options, [*arguments, *worker_options], stop=stop)


def _on_hosts(
    place: Place, hostfile: Path, config: "RunConfig", worker_options: Sequence[str], *, stop: "StopRequest | None"
) -> int:
    from megatron_ext.runtime.host_launcher import HostOptions, launch_on_hosts
    from megatron_ext.runtime.hostfile import choose_hosts, read_hostfile

    if place.launcher != "pdsh":
        raise UserError(
            f"--launcher {place.launcher}: only pdsh is supported here; on a SLURM cluster use `submit`, and under MPI "
            "start the ranks as docs/cluster.md says"
        )
    if place.nproc is not None:
        raise UserError("--nproc is for this machine; the hostfile's slots say how many ranks a host has")
    hosts = choose_hosts(read_hostfile(hostfile), include=place.include, exclude=place.exclude)
    options = HostOptions(
        hosts=tuple(hosts),
        environment=config.cluster.environment,
        interface=config.cluster.interface,
        silence_seconds=config.cluster.heartbeat_seconds,
        master_port=place.master_port,
    )
    _check_ranks(config, options.ranks)
    values = config.model_dump(mode="json")
    return launch_on_hosts(options, values, config.run_dir, worker_options=worker_options, stop=stop)


def _check_ranks(config: "RunConfig", ranks: int) -> None:
    """Whether the ranks can share every batch; what else does not fit, the ranks themselves say."""
    from megatron_ext.curriculum.sampler import check_batches_divide

    plan = config.plan()
    if ranks % config.parallel.tensor == 0:
        check_batches_divide(plan, ranks // config.parallel.tensor)
