"""The examination of a run's hosts: first without collectives, then with them."""

import time

from megatron_ext.config.run import RunConfig
from megatron_ext.preflight.hosts import RankFacts, check_hosts
from megatron_ext.preflight.rates import Rates, check_rates
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.meeting import Meeting
from megatron_ext.runtime.process_group import Processes


class Examination:
    """What was found out about the hosts; every rank makes one."""

    def __init__(self, meeting: Meeting, config: RunConfig, device: Device) -> None:
        """Ask all ranks what can be known before they are a group.

        Raises:
            UserError: on every rank, the hosts that are not fit, and why.
        """
        self._meeting, self._config, self._device = meeting, config, device
        self._started = time.perf_counter()
        self._facts = check_hosts(meeting, config, device)

    def measure(self, processes: Processes) -> list[str]:
        """Measure with all ranks at once, and return the report: a line for each host, and one for all of them.

        Raises:
            UserError: on every rank, what was too slow.
        """
        rates = check_rates(self._meeting, self._config, processes, self._device)
        return report_lines(self._meeting, self._facts, rates, time.perf_counter() - self._started)


def report_lines(meeting: Meeting, facts: list[RankFacts], rates: Rates, seconds: float) -> list[str]:
    """What preflight found, for people."""
    lines = []
    for leader in meeting.leaders:
        ranks = [member.rank for member in meeting.members if member.machine == leader.machine]
        fact = facts[leader.rank]
        tflops = min(rates.tflops[rank] for rank in ranks)
        skew = fact.seconds - facts[0].seconds
        lines.append(
            f"{leader.host}: {len(ranks)} x {fact.device}, {leader.address}, matmul {tflops:.3g} TFLOP/s a rank, "
            f"{fact.free_gib:.1f} GiB free, clock {skew:+.2f} s"
        )
    bandwidth = f", all-reduce {rates.bandwidth:.3g} GB/s" if rates.bandwidth else ""
    lines.append(
        f"preflight passed in {seconds:.1f} s: hosts {len(meeting.leaders)}, ranks {len(meeting.members)}{bandwidth}"
    )
    return lines
