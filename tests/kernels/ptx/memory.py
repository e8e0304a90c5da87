"""Memory of a launch: tensors and shared memory, with every access checked before it is made, races among them.

Two accesses by different threads to the same bytes, one of them a write, are a race unless a barrier that both
passed lies between: of the block, or (same warp) ``bar.warp.sync`` of the whole warp. Threads of different blocks have
none.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.parser import PtxError
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


POISON = 0xFF


class AccessError(PtxError):
    """A wrong access; ``position`` is the place, among the threads of the instruction, of one that made it."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(what)
        self.what = what
        self.position = position


@dataclass
class Piece:
    """A tensor, or the shared memory of the blocks of a batch: ``data`` are its bytes, from address ``start`` on."""

    start: int
    data: Array
    shadow: Shadow

    @staticmethod
    def of_address(start: int, size: int, granule: int) -> "Piece":
        """The bytes of a tensor, themselves."""
        buffer = (ctypes.c_uint8 * size).from_address(start)
        return Piece(start, np.ctypeslib.as_array(buffer), Shadow(size, granule))

    @staticmethod
    def poisoned(size: int, granule: int) -> "Piece":
        """New memory that nobody wrote."""
        return Piece(0, np.full(size, POISON, np.uint8), Shadow(size, granule))


@dataclass(frozen=True)
class Access:
    """One load or store: ``count`` values of ``dtype`` side by side for each thread."""

    dtype: np.dtype[Any]
    count: int
    read_only: bool = False

    @property
    def width(self) -> int:
        return self.dtype.itemsize * self.count


class GlobalMemory:
    """The tensors of a launch; ``granule`` is the size of its narrowest access."""

    def __init__(self, tensors: list[tuple[int, int]], granule: int) -> None:
        self._pieces = [Piece.of_address(*tensor, granule) for tensor in sorted(set(tensors)) if tensor[1] > 0]

    def load(self, addresses: Array, access: Access, actors: Actors) -> list[Array]:
        results = [np.empty(len(addresses), access.dtype) for _ in range(access.count)]
        for piece, who in self._split(addresses, access):
            offsets = addresses[who].astype(np.int64) - piece.start
            if access.read_only:
                _check(piece.shadow.written(offsets, access.width), who, "read-only load of what the launch writes")
            _check(piece.shadow.read(offsets, access.width, actors[who]), who, "race in global memory (read and write)")
            for result, value in zip(results, _gather(piece, offsets, access), strict=True):
                result[who] = value
        return results

    def store(self, addresses: Array, access: Access, values: list[Array], actors: Actors) -> None:
        for piece, who in self._split(addresses, access):
            offsets = addresses[who].astype(np.int64) - piece.start
            racing = piece.shadow.write(offsets, access.width, actors[who])
            _check(racing, who, "race in global memory (write)")
            _scatter(piece, offsets, access, [value[who] for value in values])

    def _split(self, addresses: Array, access: Access) -> list[tuple[Piece, Index | slice]]:
        """The pieces that the addresses lie in, and the positions of those that lie in each."""
        width = np.uint64(access.width)
        _check(addresses % width != 0, slice(None), f"misaligned access of {access.width} bytes")
        for piece in self._pieces:
            inside = _inside(piece, addresses, width)
            if inside.all():
                return [(piece, slice(None))]
            if inside.any():
                break
        found = [(piece, np.flatnonzero(_inside(piece, addresses, width))) for piece in self._pieces]
        covered = np.zeros(len(addresses), np.bool_)
        for _, who in found:
            covered[who] = True
        _check(~covered, slice(None), f"global access of {access.width} bytes outside of every tensor")
        return [(piece, who) for piece, who in found if len(who)]


class SharedMemory:
    """Shared memory of the blocks of a batch, one after the other."""

    def __init__(self, blocks: int, size: int, granule: int) -> None:
        self.size = size
        self._stride = -(-size // 16) * 16
        self._piece = Piece.poisoned(blocks * self._stride, granule)

    def load(self, addresses: Array, access: Access, actors: Actors, block: Index) -> list[Array]:
        offsets = self._offsets(addresses, access, block)
        _check(~self._piece.shadow.written(offsets, access.width), slice(None), "read of shared memory nobody wrote")
        _check(self._piece.shadow.read(offsets, access.width, actors), slice(None), "race in shared memory (read)")
        return _gather(self._piece, offsets, access)

    def store(self, addresses: Array, access: Access, values: list[Array], actors: Actors, block: Index) -> None:
        offsets = self._offsets(addresses, access, block)
        _check(self._piece.shadow.write(offsets, access.width, actors), slice(None), "race in shared memory (write)")
        _scatter(self._piece, offsets, access, values)

    def _offsets(self, addresses: Array, access: Access, block: Index) -> Index:
        at = addresses.astype(np.int64)
        outside = (at < 0) | (at + access.width > self.size)
        _check(outside, slice(None), f"shared access of {access.width} bytes outside of the block's {self.size}")
        _check(at % access.width != 0, slice(None), f"misaligned access of {access.width} bytes")
        return np.asarray(at + block * self._stride)


def _inside(piece: Piece, addresses: Array, width: Any) -> Array:
    return np.asarray((addresses >= piece.start) & (addresses + width <= piece.start + len(piece.data)))


def _check(wrong: Array | None, who: Index | slice, what: str) -> None:
    if wrong is None or not wrong.any():
        return
    first = int(np.flatnonzero(wrong)[0])
    raise AccessError(what, first if isinstance(who, slice) else int(who[first]))


def _elements(piece: Piece, dtype: np.dtype[Any]) -> tuple[Array, int]:
    """The piece's values, and the offset of the first: a tensor may start and end anywhere in it."""
    skipped = -piece.start % dtype.itemsize
    whole = (len(piece.data) - skipped) // dtype.itemsize * dtype.itemsize
    return piece.data[skipped : skipped + whole].view(dtype), skipped


def _gather(piece: Piece, offsets: Index, access: Access) -> list[Array]:
    values, skipped = _elements(piece, access.dtype)
    first = (offsets - skipped) // access.dtype.itemsize
    return [values[first + place] for place in range(access.count)]


def _scatter(piece: Piece, offsets: Index, access: Access, values: list[Array]) -> None:
    target, skipped = _elements(piece, access.dtype)
    first = (offsets - skipped) // access.dtype.itemsize
    for place, value in enumerate(values):
        target[first + place] = value
