"""What a launcher starts on every rank: ``python -m megatron_ext.worker CONFIG [--set key=value ...]``.

Turns a run's outcome into an exit status, and makes sure that of several ranks that found the same mistake, or that
fail because one of them did, one says it. Exit statuses: 0 done, or stopped on request; 1 a failure; 2 bad input; 75
(EX_TEMPFAIL) stopped on request before the end and saved, for a job script that has set MEGATRON_EXT_REQUEUE=1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config.resolved import read_config
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import RunStopped, UserError
from megatron_ext.runtime.environment import (
    RankInfo,
    asks_to_requeue,
    prepare_libraries,
    rank_info,
    take_private_variables,
)
from megatron_ext.runtime.log import LOGGER, configure_logging
from megatron_ext.runtime.run_lock import run_lock
from megatron_ext.runtime.signals import StoppedEarlyError, StopRequest, catch_stop_signals, ignore_stop_signals

if TYPE_CHECKING:
    from megatron_ext.launch.preflight import Preflight
    from megatron_ext.runtime.device import Device
    from megatron_ext.runtime.heartbeat import Heartbeat
    from megatron_ext.runtime.process_group import Processes
    from megatron_ext.runtime.rendezvous import Rendezvous


_LOCK_SECONDS = 120.0


@dataclass(frozen=True)
class _Rank:
    """What this process has to do."""

    config: RunConfig
    info: RankInfo
    stop: StopRequest
    preflight_only: bool
    dry_run: bool

    @property
    def trains(self) -> bool:
        """Whether this is the run itself, which writes into its directory, and no trial of it."""
        return not (self.preflight_only or self.dry_run)


def main(arguments: Sequence[str] | None = None, *, stop: StopRequest | None = None) -> int:
    """Train as one rank and return the exit status.

    Args:
        arguments: the command line's; None: this process's own.
        stop: asks to stop; None: nothing does.
    """
    parser = argparse.ArgumentParser(prog="megatron_ext.worker", description="One rank of a training run.")
    parser.add_argument("config", type=Path, help="the run's JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--directory", type=Path, help="working directory of the run")
    parser.add_argument("--preflight-only", action="store_true", help="examine the hosts and do not train")
    parser.add_argument("--dry-run", action="store_true", help="try two steps at the longest length and stop")
    options = parser.parse_args(arguments)
    try:
        # Variables that may not stand on a command line come in a file; relative paths of the config start at the
        # directory where the command was given.
        take_private_variables()
        if options.directory is not None:
            os.chdir(options.directory)
        config = read_config(options.config, options.overrides)
        rank = _Rank(config, rank_info(), stop or StopRequest(), options.preflight_only, options.dry_run)
        locked = rank.info.is_main and rank.trains
        # A job that was started again may find the lock in the hands of its first life on a host that is cut off.
        patience = _LOCK_SECONDS if asks_to_requeue() else 1.0
        with run_lock(config.run_dir, wait_seconds=patience) if locked else nullcontext():
            return _run(rank)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one message of a bad start
        return 2


def _run(rank: _Rank) -> int:
    config, info = rank.config, rank.info
    log_file = config.run_dir / "log.txt" if rank.trains else None
    configure_logging(info.rank, log_file=log_file)
    # Imported here: a mistake in the config is told before torch and DeepSpeed have loaded, which takes seconds.
    from megatron_ext.runtime.device import select_device

    # The accelerator is named before DeepSpeed is imported, which otherwise looks for one by itself.
    device = select_device(info.local_rank)
    prepare_libraries(info, device.accelerator)

    from megatron_ext.runtime.rendezvous import join_rendezvous

    # Ranks find each other before any collective, so that one that does not come can be named.
    cluster = config.cluster
    try:
        rendezvous = join_rendezvous(
            info,
            seconds=cluster.rendezvous_seconds,
            interface=cluster.interface,
            run_dir=config.run_dir,
            stopped=lambda: rank.stop.requested,
        )
    except StoppedEarlyError:
        return _stopped_early()
    if info.world_size == 1 or not cluster.heartbeat_seconds:
        return _with_heartbeat(rank, device, rendezvous, None)
    from megatron_ext.runtime.heartbeat import heartbeat

    with heartbeat(rendezvous, seconds=cluster.heartbeat_seconds, run_dir=config.run_dir) as beating:
        return _with_heartbeat(rank, device, rendezvous, beating)


def _with_heartbeat(rank: _Rank, device: "Device", rendezvous: "Rendezvous", beating: "Heartbeat | None") -> int:
    """Do the work; a failure goes through the heartbeat, where there is one, which knows whether it is the first."""
    from megatron_ext.runtime.process_group import process_group

    minutes, info = rank.config.parallel.timeout_minutes, rank.info
    try:
        preflight = _check_hosts(rank, device, rendezvous)
        with process_group(info, device, timeout_minutes=minutes, rendezvous=rendezvous) as processes:
            try:
                return _work(rank, device, processes, preflight)
            except RunStopped as stopped:
                # All ranks come here, and a launcher ends the others with the first that leaves.
                if beating is not None:
                    beating.fail(stopped)
                if info.is_main:
                    print(f"error: {stopped}", file=sys.stderr)  # noqa: T201
                processes.barrier()
                return 1
            except Exception as error:
                # Said before the group is left, which may wait for ranks that wait for this one.
                if beating is not None:
                    beating.fail(error)
                if isinstance(error, UserError) and not processes.first_to("user error"):
                    return 2
                raise
    except (Exception, SystemExit) as error:
        if beating is None:
            raise
        beating.fail(error)


def _check_hosts(rank: _Rank, device: "Device", rendezvous: "Rendezvous") -> "Preflight | None":
    """Compare what the ranks run and, where it is due, examine their hosts."""
    if rank.info.world_size > 1:
        from megatron_ext.launch.agreement import check_agreement

        check_agreement(rendezvous, rank.config.model_dump(mode="json"), rank.config.cluster.environment)
    when = rank.config.cluster.preflight.when
    if not (rank.preflight_only or when == "always" or (when == "auto" and len(rendezvous.leaders) > 1)):
        return None
    from megatron_ext.launch.preflight import Preflight

    limits, precision = rank.config.cluster.preflight, rank.config.training.precision
    return Preflight(rendezvous, limits, rank.config.run_dir, device=device, precision=precision)


def _work(rank: _Rank, device: "Device", processes: "Processes", preflight: "Preflight | None") -> int:
    """Train, or what else this rank was started for, as one of the group."""
    if processes.any_rank(rank.stop.requested):
        return _stopped_early()
    if preflight is not None:
        for line in preflight.measure(processes):
            LOGGER.info(line)
    if rank.preflight_only:
        return 0
    if rank.dry_run:
        from megatron_ext.dry_run import dry_run

        plan = rank.config.plan()
        for line in dry_run(rank.config, plan, device=device, processes=processes).lines(plan):
            LOGGER.info(line)
        return 0
    from megatron_ext.trainer import train

    finished = train(rank.config, device=device, processes=processes, stop=rank.stop)
    return 0 if finished or not asks_to_requeue() else os.EX_TEMPFAIL


def _stopped_early() -> int:
    LOGGER.info("stopped on request before the first step; start again to train")
    return os.EX_TEMPFAIL if asks_to_requeue() else 0


def _as_program() -> int:
    stop = catch_stop_signals()
    try:
        return main(stop=stop)
    finally:
        ignore_stop_signals()


if __name__ == "__main__":
    sys.exit(_as_program())
