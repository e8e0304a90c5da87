"""What the deepspeed launcher starts on every rank: ``python -m megatron_ext.worker CONFIG [--set key=value ...]``.

Turns a run's outcome into an exit status (0 done or stopped on request, 2 bad input, 1 a failure), and
makes sure that of several ranks that found the same mistake one says it.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from megatron_ext.config.loading import load_config
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import RankInfo, prepare_deepspeed, rank_info, supervisor
from megatron_ext.runtime.log import configure_logging
from megatron_ext.runtime.run_lock import run_lock


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank and return the exit status."""
    parser = argparse.ArgumentParser(prog="megatron_ext.worker", description="One rank of a training run.")
    parser.add_argument("config", type=Path, help="the run's JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    try:
        return _run(options.config, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one message of a bad start
        return 2


def _run(path: Path, overrides: Sequence[str]) -> int:
    config = load_config(path, overrides)
    info = rank_info()
    with run_lock(config.run_dir) if info.is_main else nullcontext():
        return _train(config, info)


def _train(config: RunConfig, info: RankInfo) -> int:
    configure_logging(info.rank, log_file=config.run_dir / "log.txt")
    # Imported here: a mistake in the config is told before torch and DeepSpeed have loaded, which takes seconds.
    from megatron_ext.runtime.device import select_device

    device = select_device(info.local_rank)
    prepare_deepspeed(info, device.accelerator)

    from megatron_ext.runtime.process_group import process_group
    from megatron_ext.runtime.signals import stop_on_signal
    from megatron_ext.stability.guard import GuardStop
    from megatron_ext.train import train

    with process_group(info, device, timeout_minutes=config.parallel.timeout_minutes) as processes:
        try:
            with stop_on_signal(supervisor()) as stop:
                train(config, device=device, processes=processes, stop=stop)
        except UserError:
            if processes.first_to("user error"):
                raise
            return 2
        except GuardStop as stopped:
            # All ranks come here, and the launcher ends the others with the first that leaves.
            if info.is_main:
                print(f"error: {stopped}", file=sys.stderr)  # noqa: T201
            processes.barrier()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
