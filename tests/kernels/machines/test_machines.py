"""The emulator, in every order, and the interpreter report each fault of faulty.cu, and nothing in what is correct."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.building import CannotBuildError, ptx_of
from tests.kernels.emulator.backend import emulator_module, load
from tests.kernels.interface import GuardedMemory
from tests.kernels.ptx.backend import PtxModule
from tests.kernels.ptx.parser import PtxError

SOURCE = Path(__file__).with_name("faulty.cu")
DECLARATION = 'extern "C" int mx_cuda_faulty(const void*, void*, int, int64_t, void*);'
CASES = (
    "correct", "no barrier", "divergent barrier", "early return", "absent lane", "unwritten", "behind tensor",
    "misaligned", "before tensor", "blocks write one place", "too many threads", "shared index", "read then write",
    "warp barrier", "no warp barrier", "own mask", "too much shared",
)  # fmt: skip
ORDERS = ("forward", "reverse", "random")
INVALID_CONFIGURATION = 9

# A part of what is said of each case; other words where the interpreter sees it from another side.
REPORTS = {
    "no barrier": ("shared memory", "shared memory"),
    "divergent barrier": ("divergent barrier|shared memory", "divergent barrier|shared memory"),
    "early return": ("has ended", "threads have ended"),
    "absent lane": ("warp collective names lane", "absent"),
    "unwritten": ("nobody wrote", "nobody wrote"),
    "behind tensor": ("outside of global memory", "outside of every tensor"),
    "before tensor": ("outside of global memory", "outside of every tensor"),
    "misaligned": ("misaligned access of 16 bytes", "misaligned access of 16 bytes"),
    "blocks write one place": ("race in global memory", "race in global memory"),
    "shared index": ("shared memory", "shared"),
    "read then write": ("race in shared memory", "race in shared memory"),
    "no warp barrier": ("shared memory", "shared memory"),
}
RIGHT = ("correct", "warp barrier", "own mask")


def _expected(case: str, value: torch.Tensor) -> torch.Tensor:
    turned = value.flip(0)
    if case == "warp barrier":
        return value.view(2, 32).flip(1).flatten()
    if case == "own mask":
        lanes = torch.arange(64)
        return torch.where(lanes % 2 == 0, turned[lanes ^ 2], turned)
    return turned


@cache
def _tensors(rows: int) -> tuple[GuardedMemory, torch.Tensor, torch.Tensor]:
    memory = GuardedMemory()
    # Its last element ends at the guard page.
    return memory, memory.copy(torch.arange(64.0), alignment=4), memory.empty(rows, 64, dtype=torch.float32)


def _emulated(case: str, order: str, rows: int) -> torch.Tensor:
    module = load(emulator_module([SOURCE], declarations=DECLARATION), [SOURCE])
    memory, value, result = _tensors(rows)
    module.configure(order, 3)
    module.watch(sorted({memory.region(value), memory.region(result)}))
    status = module.faulty(value.data_ptr(), result.data_ptr(), CASES.index(case), rows, 0)
    assert status == 0, status
    return result


def _interpreted(case: str, architecture: int, rows: int) -> torch.Tensor:
    module = load(emulator_module([SOURCE], declarations=DECLARATION), [SOURCE])
    memory, value, result = _tensors(rows)
    module.configure("record", 0)
    assert module.faulty(value.data_ptr(), result.data_ptr(), CASES.index(case), rows, 0) == 0
    tensors = [(data, end - data) for _, data, end, _ in (memory.region(value), memory.region(result))]
    ptx = PtxModule.of_files(ptx_of([SOURCE], architecture))
    for launch in module.recorded():
        ptx.run(launch, tensors)
    return result


def _built(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return run()
    except CannotBuildError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("order", ORDERS)
def test_emulator_runs_what_is_right(case: str, order: str) -> None:
    result = _built(lambda: _emulated(case, order, 3))
    assert torch.equal(result[0], _expected(case, torch.arange(64.0)))


# g++ may take a 16-byte load apart: that it is misaligned is for the interpreter to see.
@pytest.mark.parametrize("case", [case for case in REPORTS if case != "misaligned"])
@pytest.mark.parametrize("order", ORDERS)
def test_emulator_reports(case: str, order: str) -> None:
    with pytest.raises(RuntimeError, match=REPORTS[case][0]) as report:
        _built(lambda: _emulated(case, order, 2))
    assert "faulty_kernel" in str(report.value)
    assert "thread (" in str(report.value)
    # A machine that stopped in the middle of a block runs the next launch as if nothing had been.
    assert torch.equal(_emulated("correct", order, 1)[0], torch.arange(64.0).flip(0))


@pytest.mark.parametrize("case", ["too many threads", "too much shared"])
def test_a_launch_that_a_device_refuses_has_its_status(case: str) -> None:
    module = _load()
    assert module.faulty(0, 0, CASES.index(case), 1, 0) == INVALID_CONFIGURATION
    assert module.faulty(0, 0, 0, 0, 0) == INVALID_CONFIGURATION


def test_an_access_to_nobodys_memory_is_reported_and_survived() -> None:
    module = _load()
    _, value, result = _tensors(1)
    module.configure("forward", 0)
    module.watch([])
    with pytest.raises(RuntimeError, match="memory that is nobody's"):
        module.faulty(64, result.data_ptr(), 0, 1, 0)
    assert module.faulty(value.data_ptr(), result.data_ptr(), 0, 1, 0) == 0


def _load() -> ModuleType:
    try:
        return load(emulator_module([SOURCE], declarations=DECLARATION), [SOURCE])
    except CannotBuildError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("case", RIGHT)
def test_interpreter_runs_what_is_right(case: str) -> None:
    result = _built(lambda: _interpreted(case, 90, 3))
    assert torch.equal(result[0], _expected(case, torch.arange(64.0)))


@pytest.mark.parametrize("case", REPORTS)
def test_interpreter_reports(case: str) -> None:
    with pytest.raises(PtxError, match=REPORTS[case][1]) as report:
        _built(lambda: _interpreted(case, 90, 2))
    assert "faulty_kernel" in str(report.value)
