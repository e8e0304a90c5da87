"""What measuring Adam's variance costs: a measurement against a training step, on one process.

Run it as ``python benchmarks/bench_adam_variance.py``. Prints medians, their ratio, and the ratio spread over the
default interval (metrics.adam_variance_every). The step is as short as it gets: one sequence per parameter update.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist

from measuring import median_seconds, parser_of
from megatron_ext.config.run import RunConfig
from megatron_ext.config.training import MetricsConfig
from megatron_ext.runtime.device import Device

SIZES = {"1M": (4, 128, 4, 256), "25M": (8, 512, 8, 256), "117M": (12, 768, 12, 1024)}
"""Name -> layers, width, heads, sequence length; tokens of one step are one sequence."""
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


def measure(name: str, repeats: int) -> None:
    """Print one line: medians of ``repeats`` calls, after one that does not count."""
    from megatron_ext.build import build_engine
    from megatron_ext.engine.engine import MicroBatch
    from megatron_ext.metrics.adam_variance import AdamVariance
    from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_ext.parallel.rng import seed_streams

    run = config(*SIZES[name])
    layout = initialize_parallel(1, 5.0)
    streams = seed_streams(run.seed, layout, CPU.torch_device)
    engine = build_engine(run, layout, streams, device=CPU)
    variance = AdamVariance(engine, run.metrics, CPU.torch_device)
    length = run.training.seq_len
    tokens = torch.randint(0, 4096, (1, length + 1))
    batch = [MicroBatch(tokens[:, :-1], tokens[:, 1:])]

    def train() -> object:
        return engine.step(batch, global_tokens=length, lr=1e-4)

    def look() -> object:
        return variance.summary(variance.measure().tolist())

    train(), look()
    step, measurement = median_seconds(train, repeats), median_seconds(look, repeats)
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
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    names, repeats = (["1M"], 1) if options.quick else (options.only, 7)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name in names:
            measure(name, repeats)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
