"""The engine's step against the bare loop: same module, same optimizer, same tokens, no DeepSpeed.

Both run in this process in turn, step by step, so that a machine that slows down slows both. Prints the medians and the
ratio engine / bare for ZeRO 0 and ZeRO 1 on one rank.

    python benchmarks/bench_step.py [--steps 9] [--batch 8] [--layers 6] [--width 512]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from measuring import parser_of
from megatron_ext.build import build_engine
from megatron_ext.config.run import RunConfig
from megatron_ext.engine.engine import cut_micro_batches
from megatron_ext.model.gpt import build_gpt
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device, select_device
from megatron_ext.runtime.environment import prepare_libraries, rank_info
from megatron_ext.runtime.process_group import process_group

SEQ_LEN, VOCABULARY = 256, 8192


def config_of(options: argparse.Namespace, zero_stage: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "num_layers": options.layers,
                "hidden_size": options.width,
                "num_attention_heads": 8,
                "vocab_size": VOCABULARY,
            },
            "data": {"sources": ({"prefix": "unused"},)},
            "training": {"seq_len": SEQ_LEN, "batch_size": options.batch, "duration": {"steps": 100}},
            "learning_rate": {"peak": 1e-3},
            "parallel": {"zero_stage": zero_stage, "micro_batch_tokens": SEQ_LEN * options.batch // 2},
        }
    )


def engine_step(config: RunConfig, layout: Layout, device: Device) -> Callable[[torch.Tensor], object]:
    streams = seed_streams(config.seed, layout, device.torch_device)
    engine = build_engine(config, layout, streams, device=device)
    batch = config.training.batch_size
    sizes = (batch // 2, batch // 2)
    return lambda ids: engine.step(
        cut_micro_batches(ids[:, :-1], ids[:, 1:], sizes), global_tokens=batch * SEQ_LEN, lr=1e-3
    )


def bare_step(config: RunConfig, layout: Layout, device: Device) -> Callable[[torch.Tensor], object]:
    streams = seed_streams(config.seed, layout, device.torch_device)
    model = build_gpt(config.model, layout=layout, positions=config.max_positions, seed=config.seed, streams=streams)
    model = model.to(device.torch_device)
    settings, batch = config.optimizer, config.training.batch_size
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), settings.weight_decay),
        lr=1e-3,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )

    def step(ids: torch.Tensor) -> None:
        for part in torch.split(ids, batch // 2):
            (model(part[:, :-1], part[:, 1:]).sum() / (batch * SEQ_LEN)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens a step, in two micro-batches")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    if options.quick:
        options = argparse.Namespace(steps=1, batch=2, layers=1, width=64)
    device = select_device(0)
    prepare_libraries(rank_info(), device.accelerator)
    ids = torch.randint(VOCABULARY, (options.batch, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device.torch_device)
    with process_group(rank_info(), device, timeout_minutes=5.0):
        layout = initialize_parallel(1, 5.0)
        for zero_stage in (0, 1):
            config = config_of(options, zero_stage)
            steps = {"engine": engine_step(config, layout, device), "bare": bare_step(config, layout, device)}
            report(zero_stage, measure(steps, ids, device, options.steps))
        destroy_parallel()
    assert not dist.is_initialized()


def measure(
    steps: dict[str, Callable[[torch.Tensor], object]], ids: torch.Tensor, device: Device, count: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(ids)
            if device.is_gpu:
                torch.accelerator.synchronize()
            if turn >= 2:  # the first ones allocate
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(zero_stage: int, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(e / b for e, b in zip(seconds["engine"], seconds["bare"], strict=True))
    sys.stdout.write(
        f"ZeRO {zero_stage}: engine {medians['engine']:.3f} s, bare loop {medians['bare']:.3f} s a step, "
        f"ratio {ratio:.3f} (median of {len(seconds['bare'])} pairs)\n"
    )


if __name__ == "__main__":
    main()
