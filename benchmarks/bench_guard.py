"""What a guard costs: time of a training step with a guard over that of one without.

    python benchmarks/bench_guard.py [--steps 30]

One rank on this machine's device. Steps with and without take turns, so that whatever else the machine does hits both;
the ratio is that of the medians.
"""

import json
import os
import statistics
import sys
import tempfile

import torch
import torch.distributed as dist

from measuring import parser_of
from megatron_ext.build import build_engine
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.guards import Guard, GuardsConfig, LossRatio
from megatron_ext.engine.engine import MicroBatch
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import mark, seconds_between, select_device
from megatron_ext.runtime.environment import prepare_libraries, rank_info

VOCABULARY, SEQ_LEN, BATCH = 4096, 256, 8
MODEL = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": VOCABULARY}
TINY = MODEL | {"num_layers": 1, "hidden_size": 32}
CONFIG = {
    "data": {"sources": [{"prefix": "unused"}]},
    "training": {"seq_len": SEQ_LEN, "batch_size": BATCH, "duration": {"steps": 1000}},
    "learning_rate": {"peak": 1e-4},
    "parallel": {"zero_stage": 1},
}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each kind")
    options = parser.parse_args()
    steps, model = (1, TINY) if options.quick else (options.steps, MODEL)
    device = select_device(0)
    prepare_libraries(rank_info(), device.accelerator)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(device.backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            without, guarded = measure(steps, model)
        finally:
            destroy_parallel()
            dist.destroy_process_group()
    ratio = statistics.median(guarded) / statistics.median(without)
    sys.stdout.write(
        f"{device.accelerator}, medians of {steps} steps: without {1e3 * statistics.median(without):.2f} ms, "
        f"with a guard {1e3 * statistics.median(guarded):.2f} ms, ratio {ratio:.4f}, load {os.getloadavg()[0]:.1f}\n"
    )


def measure(steps: int, model: dict[str, int]) -> tuple[list[float], list[float]]:
    """Seconds of the steps (without, with) a guard."""
    device = select_device(0)
    config = RunConfig.model_validate_json(json.dumps(CONFIG | {"model": model}))
    layout = initialize_parallel(1, 2.0)
    streams = seed_streams(config.seed, layout, device.torch_device)
    engine = build_engine(config, layout, streams, device=device)
    guard = Guard(GuardsConfig(non_finite="log"), LossRatio())
    generator = torch.Generator().manual_seed(1)
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(2 * (steps + 3)):
        rows = torch.randint(VOCABULARY, (BATCH, SEQ_LEN + 1), generator=generator)
        pieces = [MicroBatch(rows[:, :-1], rows[:, 1:])]
        start = mark(device)
        engine.step(pieces, global_tokens=BATCH * SEQ_LEN, lr=1e-4, policy=guard if step % 2 else None)
        end = mark(device)
        if step >= 6:
            times[step % 2].append(seconds_between(start, end))
    return times


if __name__ == "__main__":
    main()
