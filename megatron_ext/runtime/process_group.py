"""The process group of the run: rank 0's store, a group on the device's backend, and one on gloo for the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import RankInfo
from megatron_ext.runtime.rendezvous import Rendezvous, join_rendezvous

_RENDEZVOUS_SECONDS = 300.0


@dataclass(frozen=True)
class Processes:
    """The ranks of the run. ``host_group`` carries small host values: asking a question never waits on a GPU."""

    info: RankInfo
    host_group: dist.ProcessGroup
    store: Store

    def first_to(self, what: str) -> bool:
        """Whether this rank is the first of all to ask for ``what``; used to say one thing once."""
        try:
            return bool(self.store.add(f"first/{what}", 1) == 1)
        except dist.DistError:
            # Rank 0, which keeps the store, was first and has left.
            return False

    def agree_from_main(self, value: object) -> object:
        """Return rank 0's ``value`` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather(self, value: object) -> list[object]:
        """Return the ``value`` of every rank, in the order of ranks, on every rank."""
        values: list[object] = [None] * self.info.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def any_rank(self, wish: bool) -> bool:
        """Whether ``wish`` is true on any rank."""
        flag = torch.tensor([int(wish)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(flag[0] > 0)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Make a UserError that one rank raises in the body one on every rank, so that none waits for a rank that left.

        The body, which every rank enters, is without collectives. Waits for every rank.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for message in messages:
            if message is not None:
                raise UserError(str(message))

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.host_group)


@contextmanager
def process_group(
    info: RankInfo, device: Device, *, timeout_minutes: float, rendezvous: Rendezvous | None = None
) -> Iterator[Processes]:
    """Join the other ranks in collectives; leave the group at the end whatever happens.

    Args:
        info: this process.
        device: decides the backend.
        timeout_minutes: how long a collective may take.
        rendezvous: of the ranks; None: it is held here.

    Raises:
        UserError: the ranks do not all come, or the port is taken by another program.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if rendezvous is None:
        rendezvous = join_rendezvous(info, seconds=_RENDEZVOUS_SECONDS)
    dist.init_process_group(
        device.backend,
        store=PrefixStore("ranks", rendezvous.store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=timeout,
    )
    try:
        host_group = dist.new_group(backend="gloo", timeout=timeout)
        yield Processes(info=info, host_group=host_group, store=PrefixStore("messages", rendezvous.store))
    finally:
        dist.destroy_process_group()


class StopAgreement:
    """Lets all ranks stop after the same step although a signal reaches them at different moments.

    The question travels while the step computes: ``ask`` starts a reduction of every rank's flag over gloo, ``answer``
    waits for it after the step.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def ask(self, wants_to_stop: bool) -> None:
        """Start to collect the ranks' wishes; every rank calls this once a step."""
        assert self._work is None, "ask() called twice without answer()"
        self._flag.fill_(int(wants_to_stop))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._processes.host_group, async_op=True)

    def answer(self) -> bool:
        """Whether any rank wanted to stop when this step began."""
        assert self._work is not None, "answer() called before ask()"
        self._work.wait()
        self._work = None
        return bool(self._flag[0] > 0)
