"""How long ``analyze`` takes on a metrics file of 300,000 steps: the whole command, and reading alone. Prints medians.

The file is made by the project's own writer: a validation every 1,000 steps, Adam's variance every 10 (its default), a
loss with noise and spikes. Run it as ``python benchmarks/bench_analyze.py [--steps N]``.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from measuring import median_seconds, parser_of
from megatron_ext.analysis.statistics import AnalysisSettings, Steps, analyze, loss_ratios
from megatron_ext.metrics.reading import read_columns, read_metrics
from megatron_ext.metrics.records import EvalRecord, TrainRecord, encode

NAMES = ("step", "tokens", "loss", "loss_ratio", "adam_var_l1", "adam_var_max")


def write(path: Path, steps: int) -> None:
    """A run at batch 512 and length 1024."""
    rng = np.random.default_rng(1)
    loss = 2 + 6 / np.sqrt(1 + np.arange(steps) / 50) + rng.normal(0, 0.02, steps)
    loss[rng.integers(steps, size=steps // 3000)] *= 1.5
    ratios, numbers = loss_ratios(loss), rng.random((steps, 4))
    tokens = 512 * 1024
    with path.open("w", encoding="utf-8") as file:
        for index in range(steps):
            step = index + 1
            measured = {} if step % 10 else {"adam_var_l1": 9e3 * numbers[index, 0], "adam_var_max": numbers[index, 1]}
            record = TrainRecord(
                step=step,
                tokens=step * tokens,
                samples=step * 512,
                seq_len=1024,
                batch_size=512,
                micro_batch_size=8,
                micro_batches=64,
                lr=1.5e-4 * numbers[index, 2],
                loss=float(loss[index]),
                loss_ratio=float(ratios[index]),
                grad_norm=numbers[index, 3],
                step_time_s=1 + numbers[index, 2],
                tokens_per_s=tokens / (1 + numbers[index, 2]),
                prefix_loss=float(loss[index]) + 1,
                **measured,
            )
            file.write(encode(record) + "\n")
            if step % 1000 == 0:
                losses = np.full(1024, loss[index])
                evaluation = EvalRecord.from_positions(losses, step=step, tokens=step * tokens, buckets=True)
                file.write(encode(evaluation) + "\n")


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=300_000)
    options = parser.parse_args()
    steps, repeats = (500, 1) if options.quick else (options.steps, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write(path, steps)
        command = [sys.executable, "-m", "megatron_ext", "analyze", str(path), "--json"]
        columns = read_columns(path, NAMES)
        rows = [
            ("the command", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)),
            ("read_columns", lambda: read_columns(path, NAMES)),
            ("analyze", lambda: analyze(Steps.from_columns(columns, NAMES[4:]), AnalysisSettings())),
            ("read_metrics", lambda: read_metrics(path)),
        ]
        sys.stdout.write(f"{steps:,} steps, {path.stat().st_size / 1e6:.0f} MB; load average {os.getloadavg()[0]:.1f} ")
        sys.stdout.write(f"on {os.cpu_count()} CPUs; medians of {repeats}\n")
        for name, work in rows:
            sys.stdout.write(f"{name:14} {median_seconds(work, repeats):7.2f} s\n")


if __name__ == "__main__":
    main()
