"""``preflight``: examine the hosts of a run without training."""

import typer

from megatron_ext.cli.common import ConfigPath, Overrides
from megatron_ext.cli.train import Exclude, Hostfile, Include, MasterPort, Nproc, target_of


def command(
    config: ConfigPath,
    *,
    overrides: Overrides = None,
    nproc: Nproc = None,
    master_port: MasterPort = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
) -> None:
    """Examine what a run needs of its hosts: versions, shared files, room, ports, clocks, devices and rates.

    Exits with 0 where all of them are fit; otherwise every unfit host is named. `train` does this by itself.

    Example: megatron-ext preflight configs/gpt2/117m_slw.json --hostfile hosts
    """
    from megatron_ext.config.loading import load_config

    run = load_config(config, overrides or ())
    target = target_of(nproc=nproc, master_port=master_port, hostfile=hostfile, include=include, exclude=exclude)
    from megatron_ext.launch.launcher import launch

    raise typer.Exit(launch(target, run, worker_options=["--preflight-only"]))
