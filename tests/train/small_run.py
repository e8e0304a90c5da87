"""A run of a few seconds on real files, started as a user starts it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.preprocess import PreprocessOptions, preprocess
from megatron_ext.data.tokenizers import save_tokenizer, train_tokenizer

VOCABULARY = 300
WORDS = ("the", "king", "and", "queen", "of", "night", "went", "to", "sea", "with", "seven", "swans")


def write_corpus(folder: Path) -> None:
    """Write ``corpus.bin/.idx`` and ``tokenizer.json`` from made-up sentences into ``folder``."""
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(WORDS, size=200)) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_tokenizer(train_tokenizer(texts, vocab_size=VOCABULARY), folder / "tokenizer.json")
    options = PreprocessOptions(tokenizer=str(folder / "tokenizer.json"))
    preprocess((folder / "corpus.jsonl",), folder / "corpus", options)


def corpus_data(corpus: Path) -> dict[str, Any]:
    """The data section of a run on what ``write_corpus`` wrote into ``corpus``."""
    tokenizer = str(corpus / "tokenizer.json")
    return {"sources": [{"prefix": str(corpus / "corpus")}], "split": [90, 10, 0], "tokenizer": tokenizer}


def write_config(folder: Path, **sections: Any) -> Path:
    """Write a run of 40 steps, length 8 to 32 over 30 of them, checkpoint every 10; ``sections`` replace whole ones."""
    base: dict[str, Any] = {
        "name": "small",
        "output_dir": str(folder),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": corpus_data(folder),
        "training": {"seq_len": 32, "batch_size": 8, "duration": {"steps": 40}},
        "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 30}},
        "learning_rate": {"peak": 3e-3, "warmup": {"steps": 5}},
        "parallel": {"micro_batch_tokens": 64, "zero_stage": 1},
        "validation": {"every": {"steps": 20}, "samples": 8},
        "checkpoint": {"every": {"steps": 10}, "keep_last": 2},
        "metrics": {"flush_every": 1, "keep_sample_ids": True},
    }
    path = folder / "run.json"
    path.write_text(json.dumps(base | sections))
    return path


def cli(*arguments: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it printed."""
    return subprocess.run(_command(arguments), capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command line; it is killed at the end if it still runs."""
    process = subprocess.Popen(_command(arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], *, timeout: float = 120.0) -> None:
    """Return when metrics.jsonl holds ``step``; AssertionError when the process ends or time runs out before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in train_records(run)):
            return
        assert process.poll() is None, f"the run ended before step {step}: {process.communicate()[1]}"
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout:.0f} s")


def records(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def train_records(run: Path) -> list[dict[str, Any]]:
    """Train records without what the clock decides."""
    clocked = {"step_time_s", "tokens_per_s", "peak_memory_bytes"}
    kept = [record for record in records(run) if record["kind"] == "train"]
    return [{key: value for key, value in record.items() if key not in clocked} for record in kept]


def rank_processes(run: Path) -> list[int]:
    """Ids of the processes whose command line names the run's resolved config and the worker."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "megatron_ext.worker" in command and any(part.startswith(f"{run}/.launch-") for part in command):
            found.append(int(entry.name))
    return found


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "megatron_ext", *arguments]
