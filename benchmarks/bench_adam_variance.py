"""What measuring Adam's variance costs: a measurement against a training step, on one process.

Run it as ``python benchmarks/bench_adam_variance.py``. Prints medians, their ratio, and the ratio spread over the
default interval (metrics.adam_variance_every). The step is as short as it gets: one sequence per parameter update.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_ext.config.run import RunConfig
from megatron_ext.config.training import MetricsConfig
from megatron_ext.runtime.device import Device

SIZES = {"1M": (4, 128, 4, 256), "25M": (8, 512, 8, 256), "117M": (12, 768, 12, 1024)}
"""Name -> layers, width, heads, sequence length; tokens of one step are one sequence."""
REPEATS = 7
CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")


def config(layers: int, width: int, heads: int, length: int) -> RunConfig:
    """A run with a vocabulary in proportion to the model."""
    return RunConfig.model_validate(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": width,
                "num_attention_heads": heads,
                "vocab_size": 50257 if width >= 512 else 4096,
            },
            "data": {"sources": ({"prefix": "corpus"},)},
            "training": {"seq_len": length, "batch_size": 1, "duration": {"steps": 100}},
            "learning_rate": {"peak": 1.5e-4},
        }
    )


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str) -> None:
    """Print one line."""
    from megatron_ext.engine.engine import MicroBatch, TrainEngine
    from megatron_ext.model.gpt import build_gpt
    from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_ext.parallel.rng import seed_streams
    from megatron_ext.stability.adam_variance import AdamVariance

    run = config(*SIZES[name])
    layout = initialize_parallel(1, 5.0)
    streams = seed_streams(run.seed, layout, CPU.torch_device)
    model = build_gpt(run.model, layout=layout, positions=run.max_positions, seed=run.seed, streams=streams)
    engine = TrainEngine(run, model, layout=layout, device=CPU)
    variance = AdamVariance(engine, run.metrics, CPU.torch_device)
    length = run.training.seq_len
    tokens = torch.randint(0, 4096, (1, length + 1))
    batch = [MicroBatch(tokens[:, :-1], tokens[:, 1:])]
    step = median_seconds(lambda: engine.step(batch, global_tokens=length, lr=1e-4), REPEATS)
    measurement = median_seconds(lambda: variance.summary(variance.measure().tolist()), REPEATS)
    ratio, every = measurement / step, MetricsConfig().adam_variance_every
    parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    sys.stdout.write(
        f"{parameters / 1e6:6.1f}M parameters, {length:4d} tokens: step {step * 1e3:8.1f} ms, measurement "
        f"{measurement * 1e3:7.2f} ms, ratio {ratio:.4f}, every {every} steps {ratio / every:.2%}\n"
    )
    sys.stdout.flush()
    destroy_parallel()


def main() -> None:
    """Measure and print."""
    names = sys.argv[1:] or list(SIZES)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name in names:
            measure(name)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
