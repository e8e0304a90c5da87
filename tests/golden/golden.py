"""Losses on record: small runs of the program, started as a launcher starts them, compared with what was written down.

``python -m tests.golden.golden`` (``make golden``) writes ``losses.json`` anew. A change of numerics has to; a
refactoring must not. Nothing here imports the package: the worker's command line, the config's keys, Megatron's token
files and metrics.jsonl are what these tests stand on.
"""

import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

LOSSES = Path(__file__).parent / "losses.json"
TOLERANCE = {"same_platform": 0.0, "elsewhere": 1e-5}
"""Relative difference allowed: none where the file was written; elsewhere matrix products and exponentials round
otherwise, by which losses of these runs differed by 2e-7 and gradient norms by 1e-6."""
VOCABULARY = 96

CONFIG: dict[str, Any] = {
    "name": "golden",
    "output_dir": ".",
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "kernels": "reference",
    },
    "data": {"sources": [{"prefix": "corpus"}], "split": [90, 10, 0]},
    "training": {"seq_len": 64, "batch_size": 8, "duration": {"steps": 50}},
    "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 35}},
    "learning_rate": {"peak": 1e-2, "warmup": {"steps": 5}},
    "parallel": {"micro_batch_tokens": 128, "zero_stage": 1},
    "validation": {"every": {"steps": 25}, "samples": 8},
    "metrics": {"tensorboard": False, "adam_variance_every": 10},
}
"""Sequence Length Warmup from 8 to 64 over 35 of 50 steps, in micro-batches, fp32, one rank."""


def write_corpus(prefix: Path, *, documents: int = 120, length: int = 100) -> None:
    """Write PREFIX.bin and PREFIX.idx in Megatron's format: a noisy walk over the vocabulary, from a fixed seed."""
    # RandomState is frozen: the same numbers with every numpy.
    noise = np.random.RandomState(2108).randint(0, 4, size=(documents, length))
    tokens = np.zeros((documents, length), dtype=np.int64)
    for place in range(1, length):
        tokens[:, place] = (5 * tokens[:, place - 1] + noise[:, place]) % VOCABULARY
    prefix.with_suffix(".bin").write_bytes(tokens.astype("<u2").tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1)
    lengths = np.full(documents, length, dtype="<i4").tobytes()
    positions = (np.arange(documents, dtype="<i8") * 2 * length).tobytes()
    boundaries = np.arange(documents + 1, dtype="<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(header + lengths + positions + boundaries)


def one_rank(folder: Path, *arguments: str) -> str:
    """What ``python ARGUMENTS``, started in ``folder`` as the only rank, on the CPU, prints; it has to succeed."""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(folder: Path, config: dict[str, Any]) -> Path:
    """Train ``config`` in ``folder`` on one CPU rank; the run directory."""
    path = folder / f"{config['name']}.json"
    path.write_text(json.dumps(config))
    one_rank(folder, "-m", "megatron_ext.worker", path.name)
    return folder / str(config["name"])


def records(metrics: Path) -> list[dict[str, Any]]:
    """What a metrics.jsonl says of steps, validations and decisions, without times and paths."""
    left_out = {"step_time_s", "tokens_per_s", "mfu", "path", "checkpoint"}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [line for line in lines if line["kind"] != "event" or line["name"] in {"pacing", "guard", "rollback"}]
    return [{key: value for key, value in line.items() if key not in left_out} for line in kept]


def written_on() -> dict[str, str]:
    """What decides about the last bits of a loss."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def compare(found: list[dict[str, Any]], recorded: list[dict[str, Any]], *, origin: dict[str, Any]) -> None:
    """AssertionError at the first record that differs in a key that was recorded; newer keys do not count.

    Args:
        found: what a run of today says.
        recorded: what was written down.
        origin: ``platform`` where it was written down, and the ``tolerance`` there and elsewhere.
    """
    tolerance = origin["tolerance"]["same_platform" if origin["platform"] == written_on() else "elsewhere"]
    assert [_name(line) for line in found] == [_name(line) for line in recorded]
    for new, old in zip(found, recorded, strict=True):
        for key, value in old.items():
            assert key in new, f"{_name(old)} has no {key}"
            same = new[key] == value or _near(new[key], value, tolerance)
            assert same, f"{_name(old)}: {key} is {new[key]!r}, recorded was {value!r}"


def _name(record: dict[str, Any]) -> str:
    return f"{record['kind']} {record.get('name', '')} {record.get('step', '')}"


def _near(found: object, recorded: object, tolerance: float) -> bool:
    if isinstance(recorded, str):
        return isinstance(found, str) and tolerance > 0  # a reason that cites a number
    try:
        return bool(np.allclose(np.asarray(found, float), np.asarray(recorded, float), rtol=tolerance, atol=0))
    except (TypeError, ValueError):
        return False


def golden_records(folder: Path) -> list[dict[str, Any]]:
    """Train the golden run in ``folder``."""
    write_corpus(folder / "corpus")
    return records(train(folder, CONFIG) / "metrics.jsonl")


def main() -> None:
    """Write losses.json."""
    with tempfile.TemporaryDirectory() as folder:
        found = golden_records(Path(folder))
    head = {"platform": written_on(), "tolerance": TOLERANCE, "config": CONFIG}
    lines = ",\n  ".join(json.dumps(record) for record in found)
    LOSSES.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "records": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
