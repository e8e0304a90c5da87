"""How long a 300,000-step plan takes: building it, one step by number, all steps as arrays. Prints medians.

Run it as ``python benchmarks/bench_plan.py``.
"""

import statistics
import sys
import time
from collections.abc import Callable

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.sampler import global_batch

STEPS = 300_000


def config() -> RunConfig:
    """GPT-2 1.5B's baseline length of run with a warmup over half of it, lengths 8 to 1024: 128 segments."""
    return RunConfig.model_validate(
        {
            "model": {"num_layers": 48, "hidden_size": 1600, "num_attention_heads": 25},
            "data": {"sources": ({"prefix": "corpus"},)},
            "training": {"seq_len": 1024, "batch_size": 512, "duration": {"steps": STEPS}},
            "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": STEPS // 2}},
            "learning_rate": {"peak": 1.5e-4, "min": 1e-5, "warmup": {"steps": 3000}},
        }
    )


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    run = config()
    plan = run.plan()
    assert plan.steps == STEPS
    rows = [
        ("build", median_seconds(run.plan, 50)),
        ("plan[t]", median_seconds(lambda: plan[123_456], 2000)),
        ("slices(t)", median_seconds(lambda: global_batch(plan, 123_456), 2000)),
        ("arrays", median_seconds(plan.arrays, 20)),
    ]
    sys.stdout.write(f"{STEPS:,} steps in {len(plan.segments)} segments\n")
    for name, seconds in rows:
        sys.stdout.write(f"{name:10} {seconds * 1e3:9.3f} ms\n")


if __name__ == "__main__":
    main()
