"""The fused kernels on the CPU against torch's own operations, forward and backward, through autograd.

Shapes are those of GPT-2 117M with 4,096 tokens, at the full length and at the short ones of a length warmup. Times are
CPU milliseconds of all threads, the median of an odd number of rounds in which torch and the kernels take turns, so
that other programs on the machine count for little; threads that wait sleep (spinning would be counted). Fails with
status 1 where an operation is slower than torch's, or a ratio is below its bar.

Fresh memory costs as much as what is written to it. So every row is measured twice: in a process whose allocator keeps
what it has had ("kept", which the bars are about), and with glibc's defaults, where every large result is new pages
("fresh").

    python benchmarks/bench_cpu_kernels.py [--only softmax] [--dtype bfloat16] [--threads 2] [--compile]
    python benchmarks/bench_cpu_kernels.py --quick    # small tensors, one round, no bars: whether it runs at all
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from megatron_ext.ops.adam_variance import adam_variance
from megatron_ext.ops.add_layer_norm import add_layer_norm
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.bias_gelu import bias_gelu
from megatron_ext.ops.cross_entropy import VocabSlice, cross_entropy
from megatron_ext.ops.layer_norm import layer_norm
from megatron_ext.ops.loading import load_operators
from megatron_ext.ops.softmax import causal_softmax

DROPOUT, EPS, SCALE = 0.1, 1e-5, 0.125
KEPT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000",
}
COLUMNS = f"{'operation':32s} {'shape':22s} {'torch':>9s} {'compiled':>9s} {'fused':>9s} {'ratio':>7s} {'bar':>4s}"

Function = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """What the tensors hold, and how long a round is."""

    tokens: int = 4096
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 50257
    padded: int = 50304
    lengths: tuple[int, ...] = (1024, 256, 64, 8)
    moments: int = 20_000_000
    seconds: float = 0.05
    """Of CPU time in a round, at least."""


QUICK = Sizes(32, 16, 2, 50, 64, (16, 8), 1000, 0.0)


@dataclass(frozen=True)
class Case:
    """An operation on one shape: from ``inputs`` to results whose gradients are ``gradients``, torch's way and ours."""

    name: str
    own: Function
    fused: Function
    inputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...] = ()
    bar: float = 1.0
    shape: tuple[int, ...] = field(default=())

    def once(self, function: Function) -> object:
        """Forward, and backward where there is one."""
        results = function(*self.inputs)
        if not self.gradients:
            return results
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, [each for each in self.inputs if each.requires_grad], self.gradients)


def _leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_cases(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """LayerNorm, alone and after the residual add."""
    hidden = sizes.hidden
    shape = (4, sizes.tokens // 4, hidden)
    x, residual = _leaf(*shape, dtype=dtype), _leaf(*shape, dtype=dtype)
    weight, bias, x_bias = (_leaf(hidden, dtype=dtype) for _ in range(3))
    dy, dsum = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    yield Case(
        "layer_norm",
        lambda x, weight, bias: functional.layer_norm(x, (hidden,), weight, bias, EPS),
        lambda x, weight, bias: layer_norm(x, weight, bias, eps=EPS, kernels="fused"),
        (x, weight, bias),
        (dy,),
    )
    for dropout in (0.0, DROPOUT):

        def own(*t: torch.Tensor, p: float = dropout) -> tuple[torch.Tensor, torch.Tensor]:
            total = t[2] + functional.dropout(t[0] + t[1], p)
            return total, functional.layer_norm(total, (hidden,), t[3], t[4], EPS)

        def fused(*t: torch.Tensor, p: float = dropout) -> tuple[torch.Tensor, torch.Tensor]:
            return add_layer_norm(t[0], t[1], t[2], (t[3], t[4], EPS), dropout=p, kernels="fused")

        inputs = (x, x_bias, residual, weight, bias)
        yield Case(f"add_layer_norm, dropout {dropout}", own, fused, inputs, (dsum, dy))
        yield Case(
            f"bias_dropout_add, dropout {dropout}",
            lambda x, bias, residual, p=dropout: residual + functional.dropout(x + bias, p),
            lambda x, bias, residual, p=dropout: bias_dropout_add(x, bias, residual, dropout=p, kernels="fused"),
            (x, x_bias, residual),
            (dy,),
        )


def gelu_cases(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Bias and GELU in both forms."""
    shape = (4, sizes.tokens // 4, 4 * sizes.hidden)
    inputs, dy = (_leaf(*shape, dtype=dtype), _leaf(shape[-1], dtype=dtype)), torch.randn(shape).to(dtype)
    for exact, form in ((False, "tanh"), (True, "erf")):
        yield Case(
            f"bias_gelu, {form}",
            lambda x, bias, form=form: functional.gelu(x + bias, approximate="tanh" if form == "tanh" else "none"),
            lambda x, bias, exact=exact: bias_gelu(x, bias, exact=exact, kernels="fused"),
            inputs,
            (dy,),
            2.0,
        )


def softmax_cases(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Softmax of attention scores at every length."""
    for length in sizes.lengths:
        shape = (sizes.tokens // length, sizes.heads, length, length)
        inputs, dy = (_leaf(*shape, dtype=dtype),), torch.randn(shape).to(dtype)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)

        def own(scores: torch.Tensor, future: torch.Tensor = future, p: float = 0.0) -> torch.Tensor:
            return functional.dropout((scores * SCALE).masked_fill(future, -torch.inf).softmax(dim=-1), p)

        def fused(scores: torch.Tensor, p: float = 0.0) -> torch.Tensor:
            return causal_softmax(scores, scale=SCALE, dropout=p, kernels="fused")

        yield Case("causal_softmax", own, fused, inputs, (dy,), 2.0)
        yield Case(
            f"causal_softmax, dropout {DROPOUT}",
            lambda scores, own=own: own(scores, p=DROPOUT),
            lambda scores, fused=fused: fused(scores, p=DROPOUT),
            inputs,
            (dy,),
            2.0,
        )


def loss_cases(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Cross-entropy, whose kernels write the gradient over the logits, and the statistic of Adam's second moment."""
    logits = _leaf(sizes.tokens, sizes.padded, dtype=dtype)
    labels = torch.randint(0, sizes.vocabulary, (sizes.tokens,))
    yield Case(
        "cross_entropy",
        lambda logits, labels: functional.cross_entropy(logits.float(), labels, reduction="none"),
        lambda logits, labels: cross_entropy(logits, labels, VocabSlice(0, sizes.vocabulary), kernels="fused"),
        (logits, labels),
        (torch.rand(sizes.tokens),),
        2.0,
    )
    roots = (torch.rand(sizes.moments).to(dtype),)
    yield Case(
        "adam_variance",
        lambda v: adam_variance(v, kernels="reference"),
        lambda v: adam_variance(v, kernels="fused"),
        roots,
    )


GROUPS = {"norm": norm_cases, "gelu": gelu_cases, "softmax": softmax_cases, "loss": loss_cases}


def cpu_ms(run: Callable[[], object], times: int) -> float:
    """CPU milliseconds of all threads for one call."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times * 1e3


def measure(case: Case, rounds: int, seconds: float, *, compiled: bool) -> list[float | None]:
    """Medians for torch's way, the compiled one (None: not asked for, or it does not compile), and the kernels'."""
    functions: list[Function | None] = [case.own, torch.compile(case.own) if compiled else None, case.fused]
    times: list[int] = []
    for place, function in enumerate(functions):
        try:
            first = 0.0 if function is None else min(cpu_ms(lambda f=function: case.once(f), 1) for _ in range(2))  # type: ignore[misc]
        except torch._dynamo.exc.TorchDynamoException as error:
            sys.stderr.write(f"{case.name}: torch.compile: {str(error).splitlines()[0]}\n")
            functions[place], first = None, 0.0
        times.append(max(1, int(seconds * 1e3 / max(first, 1e-3))))
    seen: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for place, function in enumerate(functions):
            if function is not None:
                seen[place].append(cpu_ms(lambda f=function: case.once(f), times[place]))  # type: ignore[misc]
    return [statistics.median(each) if each else None for each in seen]


def work(options: argparse.Namespace) -> int:
    """Measure in this process; returns how many bars were missed."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    load_operators("cpu")
    sizes, missed = QUICK if options.quick else Sizes(), 0
    for group in options.only or GROUPS:
        for case in GROUPS[group](getattr(torch, options.dtype), sizes):
            rounds = 1 if options.quick else options.rounds
            own, compiled, fused = measure(case, rounds, sizes.seconds, compiled=options.compile)
            assert own is not None
            assert fused is not None
            ratio = own / fused
            missed += ratio < case.bar
            shape = "x".join(str(size) for size in case.inputs[0].shape)
            sys.stdout.write(
                f"{case.name:32s} {shape:22s} {own:9.3f} {'' if compiled is None else f'{compiled:.3f}':>9s} "
                f"{fused:9.3f} {ratio:6.2f}x {case.bar:4.0f}{'' if ratio >= case.bar else ' missed'}\n"
            )
            sys.stdout.flush()
    return 0 if options.quick else missed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The CPU kernels against torch's own operations.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS))
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile too (a compiler run for every row)"
    )
    parser.add_argument("--quick", action="store_true", help="small tensors, one round, no bars")
    parser.add_argument("--memory", choices=["kept", "fresh"], help="one of the two, in a process of its own")
    return parser.parse_args()


def main() -> int:
    """Measure both ways, each in a process whose allocator is set at its start."""
    options = parse()
    if os.environ.get("BENCH_CPU_KERNELS") == json.dumps(sys.argv[1:]):
        return 1 if work(options) else 0
    status = 0
    for memory, more in (("kept", KEPT), ("fresh", {})):
        if options.memory not in {None, memory}:
            continue
        sys.stdout.write(
            f"\nmemory {memory}: torch {torch.__version__}, {options.threads} threads, {options.dtype}, CPU ms, "
            f"load {os.getloadavg()[0]:.1f}\n{COLUMNS}\n"
        )
        sys.stdout.flush()
        marked = {"BENCH_CPU_KERNELS": json.dumps(sys.argv[1:]), "GOMP_SPINCOUNT": "0", **more}
        done = subprocess.run([sys.executable, *sys.argv], env={**os.environ, **marked}, check=False)
        if memory == "kept" or done.returncode not in {0, 1}:
            status = max(status, done.returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
