"""A whole training step with the fused kernels against the same step with PyTorch's own operations.

Both models have the same weights, the same optimizer and the same tokens, and take turns in this process, step by step:
forward, backward, clipping and AdamW, without DeepSpeed. Prints medians (on a CPU: CPU seconds of all threads, so that
other programs count for little) and the ratio reference / fused, for the demo's model and for layers of GPT-2 117M.

    python benchmarks/bench_kernels_step.py [--only demo] [--steps 15] [--dropout 0.1] [--attention fused_softmax]
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ext.config.run import RunConfig
from megatron_ext.model.gpt import build_gpt
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.loading import load_operators
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device, select_device
from megatron_ext.runtime.environment import prepare_deepspeed, rank_info
from megatron_ext.runtime.process_group import process_group

KINDS: tuple[Kernels, ...] = ("reference", "fused")


@dataclass(frozen=True)
class Shape:
    """A model and the batches that it is given."""

    model: dict[str, object]
    batches: tuple[tuple[int, int], ...]
    """(sequences, tokens in each)."""


SHAPES = {
    "demo": Shape(
        {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 4096}, ((8, 8), (8, 64), (8, 128))
    ),
    "gpt2": Shape(
        {"num_layers": 2, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257}, ((8, 64), (1, 1024))
    ),
}


def config_of(shape: Shape, options: argparse.Namespace) -> RunConfig:
    longest = max(seq_len for _, seq_len in shape.batches)
    dropout = {"attention_dropout": options.dropout, "hidden_dropout": options.dropout}
    return RunConfig.model_validate(
        {
            "model": {**shape.model, **dropout, "attention": options.attention},
            "data": {"sources": ({"prefix": "unused"},)},
            "training": {"seq_len": longest, "batch_size": 8, "duration": {"steps": 100}},
            "learning_rate": {"peak": 1e-3},
        }
    )


def step_of(config: RunConfig, layout: Layout, device: Device, kernels: Kernels) -> Callable[[torch.Tensor], None]:
    streams = seed_streams(config.seed, layout, device.torch_device)
    model = build_gpt(
        config.model,
        layout=layout,
        positions=config.max_positions,
        seed=config.seed,
        streams=streams,
        kernels=kernels,
    ).to(device.torch_device)
    settings = config.optimizer
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


def measure(name: str, options: argparse.Namespace, layout: Layout, device: Device) -> None:
    """One line for each batch of a shape."""
    shape = SHAPES[name]
    config = config_of(shape, options)
    steps = [step_of(config, layout, device, kernels) for kernels in KINDS]
    for batch, seq_len in shape.batches:
        ids = torch.randint(config.model.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(1))
        ids = ids.to(device.torch_device)
        first = [min(seconds_of(step, ids, device, 1) for _ in range(2)) for step in steps]
        times = max(1, int(0.2 / max(first)))
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
    options = parser.parse_args()
    device = select_device(0)
    prepare_deepspeed(rank_info(), device.accelerator)
    load_operators("cuda" if device.is_gpu else "cpu")
    sys.stdout.write(
        f"attention {options.attention}, dropout {options.dropout}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}; ms\n"
        f"{'model':6s} {'batch':12s} {'reference':>11s} {'fused':>11s} {'ratio':>8s}\n"
    )
    with process_group(rank_info(), device, timeout_minutes=5.0):
        layout = initialize_parallel(1, 5.0)
        for name in options.only:
            measure(name, options, layout, device)
        destroy_parallel()


if __name__ == "__main__":
    main()
