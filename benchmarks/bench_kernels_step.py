"""A whole training step with the fused kernels against the same step with PyTorch's own operations.

Both models have the same weights, the same optimizer and the same tokens, and take turns in this process, step by step:
forward, backward, clipping and AdamW, without DeepSpeed. Prints medians (on a CPU: CPU seconds of all threads, so that
other programs count for little) and the ratio reference / fused, for the demo's model and for layers of GPT-2 117M.

    python benchmarks/bench_kernels_step.py [--only demo] [--steps 15] [--dropout 0.1] [--attention fused_softmax]
    python benchmarks/bench_kernels_step.py --quick
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.training import OptimizerConfig
from megatron_ext.model.gpt import build_gpt
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.loading import load_operators
from megatron_ext.parallel.groups import Layout, single_rank_layout
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device, select_device

KINDS: tuple[Kernels, ...] = ("reference", "fused")


@dataclass(frozen=True)
class Shape:
    """A model and the batches that it is given."""

    model: ModelConfig
    batches: tuple[tuple[int, int], ...]
    """(sequences, tokens in each)."""


SHAPES = {
    "demo": Shape(
        ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4, vocab_size=4096),
        ((8, 8), (8, 64), (8, 128)),
    ),
    "gpt2": Shape(
        ModelConfig(num_layers=2, hidden_size=768, num_attention_heads=12, vocab_size=50257),
        ((8, 64), (1, 1024)),
    ),
}


def step_of(
    shape: Shape, options: argparse.Namespace, *, layout: Layout, device: Device, kernels: Kernels
) -> Callable[[torch.Tensor], None]:
    """A training step of a new model on token ids [sequences, tokens + 1]."""
    changed = dict.fromkeys(("attention_dropout", "hidden_dropout"), options.dropout)
    config = shape.model.model_copy(update={**changed, "attention": options.attention})
    model = build_gpt(
        config,
        layout=layout,
        positions=max(seq_len for _, seq_len in shape.batches),
        seed=1,
        streams=seed_streams(1, layout, device.torch_device),
        kernels=kernels,
    ).to(device.torch_device)
    settings = OptimizerConfig()
    groups = parameter_groups(model.named_parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=settings.betas, eps=settings.eps, fused=True)

    def step(ids: torch.Tensor) -> None:
        (model(ids[:, :-1], ids[:, 1:]).sum() / ids[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[torch.Tensor], None], ids: torch.Tensor, device: Device, times: int) -> float:
    clock = time.perf_counter if device.is_gpu else time.process_time
    start = clock()
    for _ in range(times):
        step(ids)
    if device.is_gpu:
        torch.accelerator.synchronize()
    return (clock() - start) / times


def measure(name: str, options: argparse.Namespace, *, layout: Layout, device: Device) -> None:
    """One line for each batch of a shape."""
    shape = SHAPES[name]
    steps = [step_of(shape, options, layout=layout, device=device, kernels=kernels) for kernels in KINDS]
    for batch, seq_len in shape.batches[: 1 if options.quick else None]:
        ids = torch.randint(shape.model.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(1))
        ids = ids.to(device.torch_device)
        first = [min(seconds_of(step, ids, device, 1) for _ in range(2)) for step in steps]
        times = 1 if options.quick else max(1, int(0.2 / max(first)))
        turns = [[seconds_of(step, ids, device, times) for step in steps] for _ in range(options.steps)]
        reference, fused = (statistics.median(turn[kind] for turn in turns) * 1e3 for kind in range(len(KINDS)))
        ratio = statistics.median(turn[0] / turn[1] for turn in turns)
        sys.stdout.write(f"{name:6s} {batch:4d} x {seq_len:<5d} {reference:11.1f} {fused:11.1f} {ratio:8.3f}\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step with and without the fused kernels.")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=15, help="turns of each")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "fused_softmax", "reference"])
    parser.add_argument("--quick", action="store_true", help="one turn of the smallest batch: whether it runs at all")
    options = parser.parse_args()
    if options.quick:
        options.only, options.steps = ["demo"], 1
    device = select_device(0)
    load_operators("cuda" if device.is_gpu else "cpu")
    sys.stdout.write(
        f"attention {options.attention}, dropout {options.dropout}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}; ms\n"
        f"{'model':6s} {'batch':12s} {'reference':>11s} {'fused':>11s} {'ratio':>8s}\n"
    )
    with single_rank_layout() as layout:
        for name in options.only:
            measure(name, options, layout=layout, device=device)


if __name__ == "__main__":
    main()
