"""Tokens per second of the loader: batches made one after the other on one core, no prefetch, at several lengths.

Run it as ``python benchmarks/bench_loader.py``. The corpus is random, 20M tokens in documents of 20 to 2,000; its pages
are in memory after the first pass, so this is the loader's own cost, not the disk's.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from measuring import parser_of
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import TrainLoader
from megatron_ext.data.token_files import TokenPaths
from megatron_ext.data.token_writer import TokenFileWriter

VOCABULARY = 50257
BATCH = 512


def write_corpus(prefix: Path, tokens: int) -> None:
    """Random token files, as another tool would write them."""
    random = np.random.default_rng(0)
    with TokenFileWriter(prefix, dtype=np.uint16) as writer:
        while writer.tokens < tokens:
            lengths = random.integers(20, 2000, size=500)
            writer.add(random.integers(0, VOCABULARY, size=lengths.sum()), lengths)
        writer.commit(tokenizer="random", tokenizer_digest="", vocab_size=VOCABULARY, eod=None)
    TokenPaths.of(prefix).sidecar.unlink()


def config(prefix: Path, length: int, tail: str) -> RunConfig:
    """A run at one length for its whole duration."""
    curriculum = {"pacing": "discrete", "stages": ({"seq_len": length, "duration": {"steps": 99}},)}
    return RunConfig.model_validate(
        {
            "model": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
            "data": {"sources": ({"prefix": str(prefix)},), "tail": tail},
            "training": {"seq_len": 1024, "batch_size": BATCH, "duration": {"steps": 100}},
            "curriculum": curriculum if length < 1024 else {"pacing": "constant"},
            "learning_rate": {"peak": 1.5e-4},
        }
    )


def measure(plan: TrainingPlan, datasets: Datasets, enough: float) -> tuple[float, float]:
    """Seconds a batch, tokens a second, in about ``enough`` seconds."""
    with TrainLoader(datasets.train, plan, prefetch=0) as loader:
        loader.batch(plan[0])
        start, steps, tokens = time.perf_counter(), 0, 0
        while time.perf_counter() - start < enough:
            tokens += loader.batch(plan[steps % 99]).tokens.numel()
            steps += 1
        seconds = time.perf_counter() - start
    return seconds / steps, tokens / seconds


def main() -> None:
    """Measure and print."""
    corpus, enough = (200_000, 0.01) if parser_of(__doc__).parse_args().quick else (20_000_000, 2.0)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        write_corpus(prefix, corpus)
        sys.stdout.write(f"batch {BATCH}, full length 1024, one process\n")
        for tail in ("truncate", "recycle"):
            for length in (8, 64, 512, 1024):
                run = config(prefix, length, tail)
                plan = run.plan()
                sizes = {"seq_len": plan.seq_len, "samples": plan.samples, "valid_samples": 1}
                datasets = build_datasets(run.data, **sizes, vocab_size=VOCABULARY, seed=run.seed)
                seconds, rate = measure(plan, datasets, enough)
                sys.stdout.write(
                    f"{tail:9} length {length:5}: {seconds * 1e3:7.2f} ms a batch, {rate:13,.0f} tokens/s\n"
                )


if __name__ == "__main__":
    main()
