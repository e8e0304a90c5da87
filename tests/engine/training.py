"""A small training run on made-up tokens, for tests that compare layouts, precisions and micro-batches."""

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ext.build import build_engine
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.sampler import global_batch, micro_batch_sizes, rank_block
from megatron_ext.engine.deepspeed_engine import DeepSpeedEngine
from megatron_ext.engine.engine import cut_micro_batches
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.loading import load_operators
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.runtime.device import Device

VOCABULARY = 96
SEQ_LEN = 32
CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """SLW from 8 to 32 over 24 of 36 steps, batch 8, two layers; ``sections`` are merged over it."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "vocab_multiple": 8,
        },
        "data": {"sources": [{"prefix": "unused"}]},
        "training": {"seq_len": SEQ_LEN, "batch_size": 8, "duration": {"steps": 36}},
        "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 24}},
        "learning_rate": {"peak": 1e-2, "warmup": {"steps": 5}},
        "parallel": {"micro_batch_tokens": 64},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return RunConfig.model_validate_json(_json(base))


@dataclass(frozen=True)
class Curve:
    """What a run left behind, step by step."""

    losses: list[float]
    grad_norms: list[float]
    skipped: list[bool]
    seq_lens: list[int]
    micro_batches: list[tuple[int, ...]]
    prefix_losses: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """One rank's parts of a run."""

    config: RunConfig
    plan: TrainingPlan
    layout: Layout
    streams: RngStreams
    engine: DeepSpeedEngine


def set_up(config: RunConfig, *, prefix: int = 0) -> Setup:
    """Build everything on an initialized process group; with fused kernels where the config says so and no "auto"."""
    layout = initialize_parallel(config.parallel.tensor, 2.0)
    streams = seed_streams(config.seed, layout, CPU.torch_device)
    kernels: Kernels = "fused" if config.model.kernels == "fused" else "reference"
    if kernels == "fused":
        load_operators("cpu")
    engine = build_engine(config, layout, streams, device=CPU, kernels=kernels, prefix=prefix)
    return Setup(config, config.plan(), layout, streams, engine)


def run_steps(setup: Setup, first: int = 0, last: int | None = None) -> Curve:
    """Train steps [first, last) of the plan on tokens that depend on the sample alone."""
    corpus = _corpus(setup.plan.samples)
    curve = Curve([], [], [], [], [])
    for step in range(first, setup.plan.steps if last is None else last):
        planned = setup.plan[step]
        block = rank_block(global_batch(setup.plan, step), setup.layout.data_rank, setup.layout.data_size)
        rows = corpus[torch.from_numpy(block.samples)]
        tokens, labels = rows[:, : planned.seq_len], rows[:, 1 : planned.seq_len + 1]
        sizes = micro_batch_sizes(len(block), planned.seq_len, setup.config.micro_batch_tokens)
        result = setup.engine.step(
            cut_micro_batches(tokens, labels, sizes), global_tokens=planned.tokens, lr=planned.lr
        )
        curve.losses.append(float(result.loss))
        curve.grad_norms.append(float(result.grad_norm))
        curve.skipped.append(bool(result.skipped))
        curve.seq_lens.append(planned.seq_len)
        curve.micro_batches.append(sizes)
        curve.prefix_losses.append(None if result.prefix_loss is None else float(result.prefix_loss))
    return curve


def train_rank(_rank: int, _world_size: int, config_json: str) -> Curve:
    """The whole run on one rank; for run_ranks."""
    setup = set_up(RunConfig.model_validate_json(config_json))
    try:
        return run_steps(setup)
    finally:
        destroy_parallel()


def _corpus(samples: int) -> torch.Tensor:
    """[samples, SEQ_LEN + 1] ids with something to learn: each id follows from the one before, with noise."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.empty(samples, SEQ_LEN + 1, dtype=torch.int64)
    rows[:, 0] = torch.randint(VOCABULARY, (samples,), generator=generator)
    noise = torch.randint(4, (samples, SEQ_LEN), generator=generator)
    for column in range(SEQ_LEN):
        rows[:, column + 1] = (rows[:, column] * 5 + 3 + noise[:, column]) % VOCABULARY
    return rows


def _json(value: object) -> str:
    import json

    return json.dumps(value)
