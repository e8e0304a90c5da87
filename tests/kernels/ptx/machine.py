"""Runs launches: which threads go on, branches, barriers and warp collectives.

Of the threads that can run, those at the lowest instruction do, until they reach the next higher place where others
stand. A thread that comes to a barrier or a collective waits there for the others it names; when nobody can run and
somebody waits, what is waited for does not come.
"""

from collections.abc import Iterator

import numpy as np

from tests.kernels.ptx.memory import EPOCH, WARP_EPOCH, AccessError, GlobalMemory, Index
from tests.kernels.ptx.parser import Instruction, Kernel, PtxError
from tests.kernels.ptx.program import Batch, Compiled, Launch, compile_kernel
from tests.kernels.ptx.values import ALL, Array, Lanes, reader

# Threads that are run together: enough to pay for an instruction's overhead, few enough for caches.
BATCH_THREADS = 8192
_END = 1 << 40


def run_launch(launch: Launch, code: list[Compiled], tensors: list[tuple[int, int]]) -> None:
    """Runs all blocks; ``tensors`` are address and size of the memory that may be touched. Raises ``PtxError``."""
    if launch.block_threads > launch.kernel.max_threads:
        raise PtxError(
            f"{launch.kernel.name}: {launch.block_threads} threads, compiled for {launch.kernel.max_threads}"
        )
    memory = GlobalMemory(tensors, launch.kernel.granule("global"))
    together = max(1, BATCH_THREADS // launch.block_threads)
    with np.errstate(all="ignore"):
        for first in range(0, launch.blocks, together):
            blocks = min(together, launch.blocks - first)
            _Runner(Batch(launch, memory, first, blocks), code).run()


class Program:
    """A kernel, compiled when it is first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.code = compile_kernel(kernel)


class _Runner:
    def __init__(self, batch: Batch, code: list[Compiled]) -> None:
        self._batch = batch
        self._code = code
        self._at: Index = np.zeros(batch.threads, np.int64)
        self._alive = np.ones(batch.threads, np.bool_)
        self._waiting = np.zeros(batch.threads, np.bool_)

    def run(self) -> None:
        while True:
            runnable = self._alive & ~self._waiting
            if not runnable.any():
                if self._alive.any():
                    self._fail_stuck()
                return
            places = self._at[runnable]
            place = int(places.min())
            later = places[places > place]
            group = runnable & (self._at == place)
            lanes: Lanes = ALL if group.all() else np.flatnonzero(group)
            self._advance(place, lanes, int(later.min()) if len(later) else _END)

    def _advance(self, place: int, lanes: Lanes, limit: int) -> None:
        """Runs a group that stands at ``place`` until it comes to ``limit``, parts, waits, or ends."""
        while place < limit:
            compiled = self._code[place]
            chosen = self._chosen(compiled, lanes)
            place += 1
            if chosen is None:
                continue
            if compiled.run is not None:
                self._run(compiled, chosen)
                continue
            after = self._leave(compiled.instruction, chosen)
            if after is not None and chosen is lanes:
                place = after
                continue
            rest = self._rest(lanes, chosen)
            self._at[rest] = place
            return
        self._at[lanes] = place

    def _chosen(self, compiled: Compiled, lanes: Lanes) -> Lanes | None:
        """The threads of the group that the guard lets through: ``lanes`` itself, some of it, or None."""
        if compiled.guard is None:
            return lanes
        passes = compiled.guard(self._batch.registers, lanes)
        if passes.all():
            return lanes
        if not passes.any():
            return None
        return np.asarray(self._batch.numbers(lanes)[np.broadcast_to(passes, self._batch.block[lanes].shape)])

    def _rest(self, lanes: Lanes, chosen: Lanes) -> Index:
        if chosen is lanes:
            return np.empty(0, np.int64)
        return np.setdiff1d(self._batch.numbers(lanes), self._batch.numbers(chosen), assume_unique=True)

    def _run(self, compiled: Compiled, lanes: Lanes) -> None:
        assert compiled.run is not None
        try:
            compiled.run(self._batch, lanes)
        except AccessError as error:
            thread = int(self._batch.numbers(lanes)[error.position])
            raise self._error(error.what, compiled.instruction, thread) from None

    def _leave(self, instruction: Instruction, lanes: Lanes) -> int | None:
        """Does a branch, end or collective; returns where all of ``lanes`` go on at once, None where they stopped."""
        name = instruction.parts[0]
        if name == "bra":
            target = self._batch.launch.kernel.labels[instruction.operands[0]]
            self._at[lanes] = target
            return target
        if name in {"ret", "exit"}:
            self._alive[lanes] = False
            return None
        self._at[lanes] = instruction.place
        self._waiting[lanes] = True
        self._release(instruction)
        return None

    def _release(self, instruction: Instruction) -> None:
        """Lets those go on who wait at this instruction and whose partners have all come."""
        here = self._waiting & (self._at == instruction.place)
        if instruction.parts[0] in {"bar", "barrier"} and "warp" not in instruction.parts:
            counts = np.bincount(self._batch.block[here], minlength=self._batch.blocks)
            full = counts == self._batch.launch.block_threads
            released = here & full[self._batch.block]
            self._batch.pass_barrier(np.flatnonzero(released), EPOCH)
        else:
            masks = self._masks(instruction, here)
            came = self._came(here)
            complete = (masks & ~came[self._batch.warp]) == 0
            released = here & complete
            if released.any():
                self._meet(instruction, np.flatnonzero(released), masks)
        self._waiting[released] = False
        self._at[released] = instruction.place + 1

    def _masks(self, instruction: Instruction, here: Array) -> Array:
        """The mask that each waiting thread names, for every thread of the batch."""
        batch = self._batch
        waiting = np.flatnonzero(here)
        read = reader(batch.launch.kernel, instruction.operands[-1], "u32")
        named = np.broadcast_to(read(batch.registers, waiting), waiting.shape)
        own = (named >> batch.lane[waiting].astype(np.uint32)) & np.uint32(1)
        if not own.all():
            raise self._error("the mask leaves out the lane that calls", instruction, int(waiting[np.argmin(own)]))
        masks = np.zeros(batch.threads, np.uint32)
        masks[waiting] = named
        return masks

    def _came(self, here: Array) -> Array:
        bits = np.zeros((self._batch.warps, 32), np.uint32)
        bits[self._batch.warp[here], self._batch.lane[here]] = 1
        return np.asarray((bits << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32))

    def _meet(self, instruction: Instruction, lanes: Index, masks: Array) -> None:
        """Does a warp collective for threads whose partners are all among ``lanes``."""
        batch = self._batch
        if instruction.parts[0] in {"bar", "barrier"}:
            whole = self._came(batch.registers.special["WARP_SZ"] > 0)[batch.warp[lanes]] == masks[lanes]
            batch.pass_barrier(lanes[whole], WARP_EPOCH)
        else:
            self._shuffle(instruction, lanes, masks)

    def _shuffle(self, instruction: Instruction, lanes: Index, masks: Array) -> None:
        batch, registers, kernel = self._batch, self._batch.registers, self._batch.launch.kernel
        target, source, by, clamp, _ = instruction.operands
        lane = batch.lane[lanes]
        if instruction.parts[2] != "bfly":
            raise PtxError(f"{kernel.name}: {instruction.text!r} is not interpreted")
        count = np.broadcast_to(reader(kernel, by, "u32")(registers, lanes), lanes.shape).astype(np.int64) & 31
        limits = np.broadcast_to(reader(kernel, clamp, "u32")(registers, lanes), lanes.shape).astype(np.int64)
        segment = limits >> 8 & 31
        inside = lane ^ count <= (lane & segment) | (limits & 31 & ~segment)
        partner = np.where(inside, lane ^ count, lane)
        named = (masks[lanes] >> partner.astype(np.uint32)) & np.uint32(1)
        if not named.all():
            what = "shuffle reads from a lane that its mask leaves out"
            raise self._error(what, instruction, int(lanes[np.argmin(named)]))
        everyone = np.broadcast_to(reader(kernel, source, "b32")(registers, ALL), (batch.threads,))
        names = target.split("|")
        registers.write(names[0], everyone[lanes - lane + partner], lanes)
        if len(names) == 2:
            registers.write(names[1], inside, lanes)

    def _fail_stuck(self) -> None:
        """Somebody waits and nobody can run."""
        waiting = np.flatnonzero(self._alive & self._waiting)
        instruction = self._code[int(self._at[waiting[0]])].instruction
        others = "; ".join(self._whereabouts(int(waiting[0])))
        what = (
            "divergent barrier"
            if instruction.parts[0] in {"bar", "barrier"}
            else "a lane that the mask names is absent"
        )
        raise self._error(f"{what}: of its block {others}", instruction, int(waiting[0]))

    def _whereabouts(self, thread: int) -> Iterator[str]:
        same = self._batch.block == self._batch.block[thread]
        ended = int((same & ~self._alive).sum())
        if ended:
            yield f"{ended} threads have ended"
        for place in np.unique(self._at[same & self._alive]):
            count = int((same & self._alive & (self._at == place)).sum())
            yield f"{count} wait at {self._code[int(place)].instruction.text!r} ({place})"

    def _error(self, what: str, instruction: Instruction, thread: int) -> PtxError:
        name = self._batch.launch.kernel.name
        return PtxError(f"{name}: {what} [{instruction.text}; {self._batch.place(thread)}]")
