"""Instructions as functions of a batch (threads of some blocks of a launch) and of the lanes that take part."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.memory import BLOCK, THREAD, WARP, Access, Actors, GlobalMemory, Index, SharedMemory
from tests.kernels.ptx.parser import SIZES, Instruction, Kernel, PtxError
from tests.kernels.ptx.values import (
    TYPES,
    Array,
    Lanes,
    Read,
    Registers,
    address_of,
    comparison,
    conversion,
    dynamic_start,
    function_of,
    reader,
)

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


Run = Callable[[Batch, Lanes], None]

_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_SPACES = {"global", "shared", "param"}


@dataclass(frozen=True)
class Compiled:
    """An instruction, ready to run; ``run`` is None for branches, ends and collectives, which the machine does."""

    instruction: Instruction
    run: Run | None
    guard: Read | None


def compile_kernel(kernel: Kernel) -> list[Compiled]:
    """All instructions of a kernel; raises ``PtxError`` for one that is not known."""
    return [_compile(kernel, each) for each in kernel.instructions]


def _compile(kernel: Kernel, instruction: Instruction) -> Compiled:
    guard: Read | None = None
    if instruction.guard is not None:
        name, wanted = instruction.guard
        guard = reader(kernel, name if wanted else f"!{name}", "pred")
    name = instruction.parts[0]
    if name in {"bra", "ret", "exit", "bar", "barrier", "shfl"}:
        return Compiled(instruction, None, guard)
    try:
        run = _SPECIAL.get(name, _arithmetic)(kernel, instruction)
    except (StopIteration, KeyError, PtxError) as unknown:
        raise PtxError(f"{kernel.name}: {instruction.text!r} is not interpreted ({unknown})") from unknown
    return Compiled(instruction, run, guard)


def _arithmetic(kernel: Kernel, instruction: Instruction) -> Run:
    kind = instruction.type
    parts, (target, *sources) = instruction.parts, instruction.operands
    if "wide" in parts:
        return _widening(kernel, instruction)
    function = function_of(parts, TYPES[kind])
    kinds = [kind] * len(sources)
    if parts[0] in {"shl", "shr"}:
        kinds[1] = "u32"
    reads = [reader(kernel, source, each) for source, each in zip(sources, kinds, strict=True)]
    return _assign(target, reads, function)


def _assign(target: str, reads: list[Read], function: Callable[..., Array]) -> Run:
    if len(reads) == 2:
        first, second = reads

        def run_two(batch: Batch, lanes: Lanes) -> None:
            registers = batch.registers
            registers.write(target, function(first(registers, lanes), second(registers, lanes)), lanes)

        return run_two

    def run(batch: Batch, lanes: Lanes) -> None:
        registers = batch.registers
        registers.write(target, function(*(read(registers, lanes) for read in reads)), lanes)

    return run


def _widening(kernel: Kernel, instruction: Instruction) -> Run:
    kind = instruction.type
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    target, *sources = instruction.operands
    reads = [reader(kernel, source, kind) for source in sources[:2]]
    dtype = TYPES[wide]
    if instruction.parts[0] == "mul":
        return _assign(target, reads, lambda a, b: a.astype(dtype) * b.astype(dtype))
    reads.append(reader(kernel, sources[2], wide))
    return _assign(target, reads, lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c)


def _move(kernel: Kernel, instruction: Instruction) -> Run:
    kind = instruction.type
    target, source = instruction.operands
    if source.startswith("{"):
        return _join(kernel, target, _names(source), kind)
    read = reader(kernel, source, kind)
    if not target.startswith("{"):
        return _assign(target, [read], np.copy)
    names = _names(target)
    bits = 8 * SIZES[kind] // len(names)
    part = np.dtype(f"u{bits // 8}")

    def split(batch: Batch, lanes: Lanes) -> None:
        value = read(batch.registers, lanes)
        value = value.view(np.dtype(f"u{value.dtype.itemsize}"))
        for place, name in enumerate(names):
            batch.registers.write(name, (value >> value.dtype.type(bits * place)).astype(part), lanes)

    return split


def _join(kernel: Kernel, target: str, names: list[str], kind: str) -> Run:
    bits = 8 * SIZES[kind] // len(names)
    whole = np.dtype(f"u{SIZES[kind]}")
    reads = [reader(kernel, name, f"u{bits}") for name in names]

    def join(*parts: Array) -> Array:
        result = parts[0].astype(whole)
        for place, part in enumerate(parts[1:], start=1):
            result = result | (part.astype(whole) << whole.type(bits * place))
        return result

    return _assign(target, reads, join)


def _names(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{} ").split(",")]


def _convert(kernel: Kernel, instruction: Instruction) -> Run:
    _, source, function = conversion(instruction.parts)
    reads = [reader(kernel, each, source) for each in instruction.operands[1:]]
    return _assign(instruction.operands[0], reads, function)


def _compare(kernel: Kernel, instruction: Instruction) -> Run:
    kind = instruction.type
    target, *sources = instruction.operands
    compare = comparison(instruction.parts[1], TYPES[kind])
    reads = [reader(kernel, each, kind) for each in sources[:2]]
    names = target.split("|")
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    with_other = combine[instruction.parts[2]] if len(sources) == 3 else None
    other = reader(kernel, sources[2], "pred") if len(sources) == 3 else None

    def run(batch: Batch, lanes: Lanes) -> None:
        registers = batch.registers
        result = np.asarray(compare(reads[0](registers, lanes), reads[1](registers, lanes)), np.bool_)
        for name, value in zip(names, (result, ~result), strict=False):
            combined = value if with_other is None or other is None else with_other(value, other(registers, lanes))
            registers.write(name, combined, lanes)

    return run


def _select(kernel: Kernel, instruction: Instruction) -> Run:
    kind = instruction.type
    target, yes, no, which = instruction.operands
    reads = [reader(kernel, which, "pred"), reader(kernel, yes, kind), reader(kernel, no, kind)]
    return _assign(target, reads, np.where)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _space(instruction: Instruction) -> str:
    return next(part for part in instruction.parts[1:] if part in _SPACES)


def _addressed(kernel: Kernel, operand: str) -> Read:
    match = _ADDRESS.fullmatch(operand)
    if match is None:
        raise PtxError(f"address {operand}")
    base, offset = match[1], int(match[2] or 0)
    if base not in kernel.registers:
        address = np.array([address_of(kernel, base) + offset], np.uint64)
        return lambda _registers, _lanes: address
    narrow = SIZES[kernel.registers[base]] == 4
    read = reader(kernel, base, "u32" if narrow else "u64")
    shift = np.array([offset % (1 << 64)], np.uint64)
    if narrow:
        return lambda registers, lanes: (read(registers, lanes) + shift.astype(np.uint32)).astype(np.uint64)
    return lambda registers, lanes: read(registers, lanes) + shift


def _access(instruction: Instruction) -> Access:
    counts = {"v2": 2, "v4": 4, "v8": 8}
    count = next((counts[part] for part in instruction.parts if part in counts), 1)
    return Access(TYPES[instruction.type], count, read_only="nc" in instruction.parts)


def _load(kernel: Kernel, instruction: Instruction) -> Run:
    targets = _names(instruction.operands[0])
    addressed = _addressed(kernel, instruction.operands[1])
    access, space = _access(instruction), _space(instruction)

    def run(batch: Batch, lanes: Lanes) -> None:
        registers = batch.registers
        address = addressed(registers, lanes)
        if space == "param":
            values = _parameter(batch, address, access)
        else:
            values = batch.load(space, np.broadcast_to(address, batch.block[lanes].shape), access, lanes)
        for target, value in zip(targets, values, strict=True):
            registers.write(target, value, lanes)

    return run


def _parameter(batch: Batch, address: Array, access: Access) -> list[Array]:
    size = access.dtype.itemsize
    offsets = address.astype(np.int64)[:, None] + np.arange(size)
    data = batch.launch.parameters
    return [data[offsets + size * place].view(access.dtype)[:, 0] for place in range(access.count)]


def _store(kernel: Kernel, instruction: Instruction) -> Run:
    addressed = _addressed(kernel, instruction.operands[0])
    access, space = _access(instruction), _space(instruction)
    reads = [reader(kernel, each, instruction.type) for each in _names(instruction.operands[1])]
    if access.width == 1:
        raise PtxError("races of single bytes are not followed")

    def run(batch: Batch, lanes: Lanes) -> None:
        registers = batch.registers
        where = np.broadcast_to(addressed(registers, lanes), batch.block[lanes].shape)
        values = [np.broadcast_to(read(registers, lanes), where.shape) for read in reads]
        batch.store(space, where, access, values, lanes)

    return run


def _change_space(kernel: Kernel, instruction: Instruction) -> Run:
    """Generic addresses are those of global memory."""
    if "global" not in instruction.parts:
        raise PtxError("a space that is not followed")
    return _move(kernel, instruction)


_SPECIAL: dict[str, Callable[[Kernel, Instruction], Run]] = {
    "mov": _move, "cvta": _change_space, "cvt": _convert, "setp": _compare, "selp": _select,
    "ld": _load, "st": _store,
}  # fmt: skip
