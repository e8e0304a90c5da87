"""Who touched memory last, and whether anything orders two accesses: races in shared and in global memory.

Two accesses by different threads to the same bytes, one of them a write, are a race unless a barrier that both
passed lies between: of the block, or (same warp) ``bar.warp.sync`` of the whole warp. Threads of different blocks have
none.
"""

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.values import Array

Index = npt.NDArray[np.int64]
# Who makes an access, a row for each thread of an instruction: numbers in the whole grid, and barriers passed.
Actors = npt.NDArray[np.int64]
THREAD, WARP, BLOCK, EPOCH, WARP_EPOCH = range(5)

NOBODY, MANY = -1, -2


class Shadow:
    """The last writer and the readers since, of each ``granule`` bytes of a piece of memory."""

    def __init__(self, size: int, granule: int) -> None:
        self._granule = granule
        self._granules = size // granule + 1
        self._writer: Index | None = None
        self._reader: Index | None = None
        # Reads of memory that is only read, as inputs are, are kept here and not looked at until somebody writes.
        self._reads_before: list[tuple[Index, int, Actors]] = []

    def read(self, offsets: Index, width: int, actors: Actors) -> Array | None:
        """Notes reads of ``width`` bytes; returns which threads race with a write, None where none does."""
        if self._writer is None:
            self._reads_before.append((offsets, width, actors))
            return None
        cells, each = self._cells(offsets, width, actors)
        racing = _unordered(self._writer[cells], each)
        self._add_readers(cells, each)
        return _per_thread(racing, offsets)

    def write(self, offsets: Index, width: int, actors: Actors) -> Array | None:
        """The same for writes, which also race with reads and with each other."""
        cells, each = self._cells(offsets, width, actors)
        racing = np.zeros(len(cells), np.bool_)
        if self._writer is None:
            self._writer = self._nobody()
            for before in self._reads_before:
                self._add_readers(*self._cells(*before))
            self._reads_before.clear()
        else:
            racing |= _unordered(self._writer[cells], each)
        if self._reader is not None:
            racing |= _unordered(self._reader[cells], each)
        self._writer[cells] = each
        # Of two threads that write one place in one instruction, one was overwritten.
        racing |= self._writer[cells, THREAD] != each[:, THREAD]
        return _per_thread(racing, offsets)

    def written(self, offsets: Index, width: int) -> Array:
        """Which threads read what somebody wrote, all of it."""
        if self._writer is None:
            return np.zeros(len(offsets), np.bool_)
        return np.asarray((self._writer[self._cells_of(offsets, width), THREAD] != NOBODY).all(axis=1))

    def _cells_of(self, offsets: Index, width: int) -> Index:
        first = (offsets // self._granule)[:, None]
        return first if width <= self._granule else first + np.arange(width // self._granule)

    def _cells(self, offsets: Index, width: int, actors: Actors) -> tuple[Index, Actors]:
        cells = self._cells_of(offsets, width)
        count = cells.shape[1]
        return cells.ravel(), actors if count == 1 else np.repeat(actors, count, axis=0)

    def _nobody(self) -> Index:
        return np.full((self._granules, 5), NOBODY, np.int64)

    def _add_readers(self, cells: Index, now: Actors) -> None:
        if self._reader is None:
            self._reader = self._nobody()
        thread, warp, block, epoch, warp_epoch = self._reader[cells].T
        same_block, same_warp = block == now[:, BLOCK], warp == now[:, WARP]
        fresh = (block == NOBODY) | (same_block & (epoch < now[:, EPOCH]))
        later = same_warp & (warp_epoch < now[:, WARP_EPOCH])
        new = now.copy()
        new[~(fresh | (thread == now[:, THREAD]) | later), THREAD] = MANY
        new[~(fresh | same_warp), WARP] = MANY
        new[~(fresh | same_block), BLOCK] = MANY
        self._reader[cells] = new
        # Of several threads that read one place in one instruction one is noted: the others see that it is not them.
        noted = self._reader[cells]
        for column in (THREAD, WARP, BLOCK):
            other = noted[:, column] != new[:, column]
            if other.any():
                self._reader[cells[other], column] = MANY


def _per_thread(racing: Array, offsets: Index) -> Array | None:
    if not racing.any():
        return None
    return np.asarray(racing.reshape(len(offsets), -1).any(axis=1))


def _unordered(records: Index, now: Actors) -> Array:
    """Which of the recorded accesses nothing orders before those that are made now."""
    block = records[:, BLOCK]
    other = (block != NOBODY) & ((block != now[:, BLOCK]) | (records[:, EPOCH] >= now[:, EPOCH]))
    if not other.any():
        return np.asarray(other)
    mine = (block == now[:, BLOCK]) & (records[:, THREAD] == now[:, THREAD])
    ordered = (records[:, WARP] == now[:, WARP]) & (records[:, WARP_EPOCH] < now[:, WARP_EPOCH])
    return np.asarray(other & ~mine & ~ordered)
