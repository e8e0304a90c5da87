"""How long the contestants of a case take.

They take turns, so that a machine that slows down slows all of them; each works on another set of buffers every time,
of which there are so many that no cache still holds the set when its turn comes again. Times are medians: of a GPU's
own clock between events; on a CPU, of CPU seconds divided by torch's threads, which other programs disturb least.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.ops.bench.contestants import Compute, Problem, contestants, make_problem
from megatron_ext.ops.bench.results import FUSED, Measured
from megatron_ext.ops.bench.traffic import Case, traffic
from megatron_ext.runtime.device import Device, mark, seconds_between


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 7
    """Of which the median is taken."""

    seconds: float = 0.1
    """Of a contestant in a round, at least one call."""

    cold_bytes: int = 2**29
    """Buffers of all sets together; one set where a single one is larger."""

    compiled: bool = True
    """Whether torch.compile takes part."""


def measure(case: Case, device: Device, effort: Effort) -> Measured:
    """Time every contestant of ``case``, forward, and forward with backward."""
    generator = torch.Generator(device.torch_device).manual_seed(1)
    moved = traffic(case).forward
    sets = [
        make_problem(case, device.torch_device, generator)
        for _ in range(max(1, min(64, effort.cold_bytes // max(1, moved))))
    ]
    failures: dict[str, str] = {}
    runs = contestants(case.op, compiled=effort.compiled)
    forward = _timed({name: _forward(run, sets) for name, run in runs.items()}, device, effort, failures)
    both: Mapping[str, float] = {}
    if sets[0].differentiated:
        left = {name: _both(run, sets) for name, run in runs.items() if name in forward}
        both = _timed(left, device, effort, failures)
    return Measured(case, forward, both, failures)


def copy_rate(device: Device, effort: Effort) -> float:
    """Bytes a second, read and written, of a copy that no cache helps."""
    source = torch.empty(effort.cold_bytes // 2, dtype=torch.uint8, device=device.torch_device).fill_(1)
    target = torch.empty_like(source)
    seconds = _timed({FUSED: lambda _: target.copy_(source)}, device, effort, {})[FUSED]
    return 2 * source.numel() / seconds


Call = Callable[[int], object]
"""Computes once, on the set of buffers of that number."""


def _forward(run: Compute, sets: Sequence[Problem]) -> Call:
    def call(turn: int) -> object:
        with torch.no_grad():
            return run(*sets[turn % len(sets)].inputs)

    return call


def _both(run: Compute, sets: Sequence[Problem]) -> Call:
    grads: dict[int, torch.Tensor] = {}

    def call(turn: int) -> object:
        problem = sets[turn % len(sets)]
        leaves = [tensor.detach().requires_grad_() for tensor in problem.inputs[: problem.differentiated]]
        result = run(*leaves, *problem.inputs[problem.differentiated :])
        grad = grads.setdefault(turn % len(sets), torch.randn_like(result))
        return torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)

    return call


def _timed(calls: Mapping[str, Call], device: Device, effort: Effort, failures: dict[str, str]) -> dict[str, float]:
    """Median seconds of a call of each; those that raise are put into ``failures`` and left out."""
    counts: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call(0)
            one = _seconds(call, range(1, 3), device)
        except Exception as error:
            if name == FUSED:
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        counts[name] = max(1, int(effort.seconds / max(one, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in counts}
    turn = 3
    for _ in range(effort.rounds):
        for name, count in counts.items():
            taken[name].append(_seconds(calls[name], range(turn, turn + count), device))
            turn += count
    return {name: statistics.median(values) for name, values in taken.items()}


def _seconds(call: Call, turns: range, device: Device) -> float:
    """Mean seconds of the calls of ``turns``."""
    if not device.is_gpu:
        start = time.process_time()
        for turn in turns:
            call(turn)
        return (time.process_time() - start) / len(turns) / torch.get_num_threads()
    first = mark(device)
    for turn in turns:
        call(turn)
    last = mark(device)
    device.wait()
    return seconds_between(first, last) / len(turns)
