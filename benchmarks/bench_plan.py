"""How long a 300,000-step plan takes: building it, one step by number, all steps as arrays. Prints medians.

Run it as ``python benchmarks/bench_plan.py``.
"""

import sys

from measuring import median_seconds, parser_of
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.sampler import global_batch


def config(steps: int) -> RunConfig:
    """GPT-2 1.5B's baseline length of run with a warmup over half of it, lengths 8 to 1024: 128 segments."""
    return RunConfig.model_validate(
        {
            "model": {"num_layers": 48, "hidden_size": 1600, "num_attention_heads": 25},
            "data": {"sources": ({"prefix": "corpus"},)},
            "training": {"seq_len": 1024, "batch_size": 512, "duration": {"steps": steps}},
            "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": steps // 2}},
            "learning_rate": {"peak": 1.5e-4, "min": 1e-5, "warmup": {"steps": 3000}},
        }
    )


def main() -> None:
    """Measure and print."""
    quick = parser_of(__doc__).parse_args().quick
    steps = 9_000 if quick else 300_000
    run = config(steps)
    plan = run.plan()
    assert plan.steps == steps
    middle, repeats = steps * 2 // 5, 1 if quick else 20
    rows = [
        ("build", median_seconds(run.plan, repeats)),
        ("plan[t]", median_seconds(lambda: plan[middle], 100 * repeats)),
        ("slices(t)", median_seconds(lambda: global_batch(plan, middle), 100 * repeats)),
        ("arrays", median_seconds(plan.arrays, repeats)),
    ]
    sys.stdout.write(f"{steps:,} steps in {len(plan.segments)} segments\n")
    for name, seconds in rows:
        sys.stdout.write(f"{name:10} {seconds * 1e3:9.3f} ms\n")


if __name__ == "__main__":
    main()
