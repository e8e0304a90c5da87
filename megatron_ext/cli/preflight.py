"""``preflight``: examine the hosts of a run without training."""

import typer

from megatron_ext.cli.common import ConfigPath, Overrides, TargetOptions, grouped


@grouped
def command(config: ConfigPath, *, overrides: Overrides = None, where: TargetOptions) -> None:
    """Examine what a run needs of its hosts: versions, shared files, room, ports, clocks, devices and rates.

    Exits with 0 where all of them are fit; otherwise every unfit host is named. `train` does this by itself.

    Example: megatron-ext preflight configs/gpt2/117m_slw.json --hostfile hosts
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.launch.launcher import launch

    run = load_config(config, overrides or ())
    raise typer.Exit(launch(where.target(), run, worker_options=["--preflight-only"]))
