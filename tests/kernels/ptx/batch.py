"""Threads of some blocks of a launch: what each of them has, beside its registers."""

from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.memory import Access, GlobalMemory, SharedMemory
from tests.kernels.ptx.parser import Kernel
from tests.kernels.ptx.memory import BLOCK, THREAD, WARP, Actors, Index
from tests.kernels.ptx.values import Array, Lanes, Registers, dynamic_start

Dimensions = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A kernel's configuration and arguments; ``parameters`` are the bytes of the parameter space."""

    kernel: Kernel
    grid: Dimensions
    block: Dimensions
    dynamic_shared: int
    parameters: Array

    @property
    def block_threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Batch:
    """Blocks ``first`` .. ``first + blocks - 1`` of a launch, one element of every array for each thread."""

    def __init__(self, launch: Launch, memory: GlobalMemory, first: int, blocks: int) -> None:
        self.launch = launch
        self.memory = memory
        threads = blocks * launch.block_threads
        everyone = np.arange(threads)
        self.block: Index = everyone // launch.block_threads
        self.in_block: Index = everyone % launch.block_threads
        self.lane: Index = self.in_block % 32
        self._warps_per_block = -(-launch.block_threads // 32)
        self.warp: Index = self.block * self._warps_per_block + self.in_block // 32
        self._first = first
        self.threads = threads
        self.blocks, self.warps = blocks, blocks * self._warps_per_block
        self._actors = self._all_actors()
        self.registers = Registers(threads, special=self._special_registers())
        static = dynamic_start(launch.kernel) if launch.dynamic_shared else launch.kernel.shared_bytes
        self.shared = SharedMemory(blocks, static + launch.dynamic_shared, launch.kernel.granule("shared"))

    def actors(self, lanes: Lanes) -> Actors:
        """Who the threads are, in the whole grid."""
        return self._actors[lanes]

    def pass_barrier(self, lanes: Index, column: int) -> None:
        """``lanes`` have all passed a barrier of their block (``EPOCH``) or of their warp (``WARP_EPOCH``)."""
        # A new array: accesses that were noted refer to the old one.
        self._actors = self._actors.copy()
        self._actors[lanes, column] += 1

    def _all_actors(self) -> Actors:
        actors = np.zeros((self.threads, 5), np.int64)
        actors[:, THREAD] = np.arange(self.threads) + self._first * self.launch.block_threads
        actors[:, WARP] = self.warp + self._first * self._warps_per_block
        actors[:, BLOCK] = self.block + self._first
        return actors

    def load(self, space: str, addresses: Array, access: Access, lanes: Lanes) -> list[Array]:
        """What is at the addresses, by thread, for each of the access' values."""
        if space == "shared":
            return self.shared.load(addresses, access, self.actors(lanes), self.block[lanes])
        return self.memory.load(addresses, access, self.actors(lanes))

    def store(self, space: str, addresses: Array, access: Access, values: list[Array], lanes: Lanes) -> None:
        """The other way."""
        if space == "shared":
            self.shared.store(addresses, access, values, self.actors(lanes), self.block[lanes])
        else:
            self.memory.store(addresses, access, values, self.actors(lanes))

    def place(self, thread: int) -> str:
        """A thread as a message names it."""
        grid, block = self.launch.grid, self.launch.block
        at_block, at_thread = self._first + int(self.block[thread]), int(self.in_block[thread])
        return f"block {_split(at_block, grid)}, thread {_split(at_thread, block)}"

    def numbers(self, lanes: Lanes) -> Index:
        """The threads as numbers of this batch."""
        return np.arange(self.threads)[lanes]

    def _special_registers(self) -> dict[str, Array]:
        grid, block = self.launch.grid, self.launch.block
        block_number = self.block + self._first
        special: dict[str, Array] = {"%laneid": self.lane, "%warpid": self.in_block // 32}
        special["WARP_SZ"] = np.full(self.threads, 32)
        for axis, name in enumerate("xyz"):
            below_block = int(np.prod(block[:axis]))
            below_grid = int(np.prod(grid[:axis]))
            special[f"%tid.{name}"] = self.in_block // below_block % block[axis]
            special[f"%ctaid.{name}"] = block_number // below_grid % grid[axis]
            special[f"%ntid.{name}"] = np.full(self.threads, block[axis])
            special[f"%nctaid.{name}"] = np.full(self.threads, grid[axis])
        return special


def _split(number: int, dimensions: Dimensions) -> Dimensions:
    x, y, _ = dimensions
    return number % x, number // x % y, number // (x * y)
