"""Who touched memory last, and whether anything orders two accesses: races in shared and in global memory.

Two accesses by different threads to the same two bytes, one of them a write, are a race unless a barrier that both
passed lies between: of the block, or (same warp) ``bar.warp.sync`` of the whole warp. Threads of different blocks have
none.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.values import Array

Index = npt.NDArray[np.int64]
GRANULE = 2
NOBODY, MANY = -1, -2


@dataclass(frozen=True)
class Actors:
    """Who makes an access, for each thread of an instruction; numbers are those of the whole grid."""

    thread: Index
    warp: Index
    block: Index
    epoch: Index
    warp_epoch: Index

    def repeated(self, shape: tuple[int, ...]) -> "Actors":
        """The same for several granules of each thread."""
        return Actors(*(np.broadcast_to(each[:, None], shape).ravel() for each in self._fields()))

    def _fields(self) -> tuple[Index, ...]:
        return self.thread, self.warp, self.block, self.epoch, self.warp_epoch


class Shadow:
    """The last writer and the readers since, of each two bytes of a piece of memory."""

    def __init__(self, size: int) -> None:
        granules = size // GRANULE + 1
        self._writer = np.full((granules, 5), NOBODY, np.int64)
        self._reader = np.full((granules, 5), NOBODY, np.int64)
        self._any_written = self._any_read = False

    def read(self, offsets: Index, width: int, actors: Actors) -> Array | None:
        """Notes reads of ``width`` bytes; returns which threads race with a write, None where none does."""
        cells, each = self._cells(offsets, width, actors)
        racing = self._unordered(self._writer, cells, each) if self._any_written else None
        self._add_readers(cells, each)
        self._any_read = True
        return self._per_thread(racing, offsets)

    def write(self, offsets: Index, width: int, actors: Actors) -> Array | None:
        """The same for writes, which also race with reads and with each other."""
        cells, each = self._cells(offsets, width, actors)
        racing = self._unordered(self._writer, cells, each) if self._any_written else None
        if self._any_read:
            after_read = self._unordered(self._reader, cells, each)
            racing = after_read if racing is None else racing | after_read
        self._writer[cells] = np.stack([each.thread, each.warp, each.block, each.epoch, each.warp_epoch], axis=1)
        # Of two threads that write one place in one instruction, one was overwritten.
        twice = self._writer[cells, 0] != each.thread
        racing = twice if racing is None else racing | twice
        self._any_written = True
        return self._per_thread(racing, offsets)

    def unwritten(self, offsets: Index, width: int) -> Array:
        """Which threads read what nobody wrote."""
        cells = _granules(offsets, width)
        return np.asarray((self._writer[cells, 0] == NOBODY).any(axis=1))

    def written(self, offsets: Index, width: int) -> Array:
        """Which threads read what somebody wrote."""
        if not self._any_written:
            return np.zeros(len(offsets), np.bool_)
        return np.asarray((self._writer[_granules(offsets, width), 0] != NOBODY).any(axis=1))

    def _cells(self, offsets: Index, width: int, actors: Actors) -> tuple[Index, Actors]:
        cells = _granules(offsets, width)
        return cells.ravel(), actors.repeated(cells.shape)

    def _per_thread(self, racing: Array | None, offsets: Index) -> Array | None:
        if racing is None or not racing.any():
            return None
        return np.asarray(racing.reshape(len(offsets), -1).any(axis=1))

    def _unordered(self, records: Index, cells: Index, now: Actors) -> Array:
        thread, warp, block, epoch, warp_epoch = records[cells].T
        ordered = (block == now.block) & (
            (epoch < now.epoch) | (thread == now.thread) | ((warp == now.warp) & (warp_epoch < now.warp_epoch))
        )
        return np.asarray((block != NOBODY) & ~ordered)

    def _add_readers(self, cells: Index, now: Actors) -> None:
        thread, warp, block, epoch, warp_epoch = self._reader[cells].T
        fresh = (block == NOBODY) | ((block == now.block) & (epoch < now.epoch))
        same_warp = warp == now.warp
        later = same_warp & (warp_epoch < now.warp_epoch)
        new = np.empty((len(cells), 5), np.int64)
        new[:, 0] = np.where(fresh | (thread == now.thread) | later, now.thread, MANY)
        new[:, 1] = np.where(fresh | same_warp, now.warp, MANY)
        new[:, 2] = np.where(fresh | (block == now.block), now.block, MANY)
        new[:, 3] = now.epoch
        new[:, 4] = now.warp_epoch
        self._reader[cells] = new
        # Of several threads that read one place in one instruction one is noted: the others see that it is not them.
        noted = self._reader[cells]
        for column, own in ((0, now.thread), (1, now.warp), (2, now.block)):
            other = (noted[:, column] != own) & (noted[:, column] != MANY)
            self._reader[cells[other], column] = MANY


def _granules(offsets: Index, width: int) -> Index:
    return (offsets // GRANULE)[:, None] + np.arange(max(width // GRANULE, 1))
