"""Runs for the tests of reports, as columns and as files."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.analysis.run_data import RunData


def run_data(
    label: str, *, group: str | None = None, steps: int = 50, valid: dict[int, float] | None = None, **columns: Any
) -> RunData:
    """A run of 64 tokens and half a second a step; ``valid`` is step -> validation loss."""
    step = np.arange(1, steps + 1, dtype=np.float64)
    train: dict[str, Any] = {
        "step": step,
        "tokens": step * 64,
        "seconds": step / 2,
        "seq_len": np.full(steps, 8.0),
        "batch_size": np.full(steps, 8.0),
        "lr": 1e-3 / step,
        "loss": 2 + 5 / step,
        "loss_ratio": np.ones(steps),
        "grad_norm": np.ones(steps),
        "tokens_per_s": np.full(steps, 128.0),
        **{name: np.full(steps, np.nan) for name in ("prefix_loss", "adam_var_l1", "adam_var_max", "peak_memory_gib")},
    }
    at = np.array(list(valid or {}), dtype=np.float64)
    losses = np.array(list((valid or {}).values()), dtype=np.float64)
    return RunData(
        label=label,
        group=label if group is None else group,
        train={name: np.asarray(values, dtype=np.float64) for name, values in (train | columns).items()},
        resume_tokens=np.empty(0),
        valid={"step": at, "tokens": at * 64, "seconds": at / 2, "loss": losses},
    )


def write_metrics(folder: Path, *, steps: int, seed: int = 0) -> Path:
    """A run directory with a metrics file of ``steps`` steps, as the recorder writes it, made in bulk."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    form = (
        '{"kind": "train", "step": %d, "tokens": %d, "samples": %d, "seq_len": 1024, "batch_size": 512, '
        '"micro_batch_size": 4, "micro_batches": 16, "lr": %r, "loss": %r, "loss_ratio": %r, "grad_norm": %r, '
        '"step_time_s": %r, "tokens_per_s": %r, "mfu": null, "skipped": false, "adam_var_l1": %r, "adam_var_max": %r}\n'
    )
    noise = rng.standard_normal((7, steps)).tolist()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            a, b, c, d, e, f, g = (row[step - 1] for row in noise)
            file.write(
                form
                % (
                    *(step, step * 524_288, step * 512),
                    *(1e-4 + 1e-9 * step, 3 + a / 10, 1 + abs(b) / 10, 1 + abs(c)),
                    *(2 + abs(d) / 10, 260_000 + e, 50 + f, 0.01 + abs(g)),
                )
            )
            if step % 1000 == 0:
                file.write(f'{{"kind": "eval", "step": {step}, "tokens": {step * 524_288}, "loss": {3 + 100 / step}, ')
                file.write(f'"perplexity": {20.0 + step}}}\n')
    return folder
