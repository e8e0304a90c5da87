"""Runs that measure Adam's variance: torch's own AdamW, and the engine on any layout."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_optimizer_state

from megatron_ext.config.run import RunConfig
from megatron_ext.engine.deepspeed_engine import DeepSpeedEngine
from megatron_ext.engine.engine import StepResult
from megatron_ext.engine.second_moments import SecondMoment
from megatron_ext.metrics.adam_variance import AdamVariance, VarianceSummary
from megatron_ext.model.gpt import build_gpt
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from tests.engine.training import CPU, Setup, run_steps, set_up, small_config

STEPS = 5
Norms = dict[str, tuple[float, float]]
"""Parameter -> l1 norm and largest element of sqrt(v)."""


def variance_config(**sections: dict[str, Any]) -> RunConfig:
    """A few steps at growing lengths; one step of warmup, so that every step moves the weights."""
    defaults: dict[str, dict[str, Any]] = {
        "training": {"seq_len": 32, "batch_size": 12, "duration": {"steps": 36}},
        "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": STEPS - 1}},
        "learning_rate": {"peak": 1e-3},
    }
    for name, values in sections.items():
        defaults[name] = defaults.get(name, {}) | values
    return small_config(**defaults)


def norms(v: torch.Tensor) -> tuple[float, float]:
    """By the definition, in float64."""
    root = v.double().sqrt()
    return float(root.abs().sum()), float(root.abs().max())


def torch_reference(config: RunConfig, layout: Layout) -> Norms:
    """The run with torch's AdamW on one rank: no DeepSpeed, no micro-batches, gradients clipped by torch."""
    streams = seed_streams(config.seed, layout, CPU.torch_device)
    model = build_gpt(config.model, layout=layout, positions=config.max_positions, seed=config.seed, streams=streams)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), settings.weight_decay),
        lr=1.0,
        betas=settings.betas,
        eps=settings.eps,
        foreach=False,
    )
    engine = _Bare(model, optimizer, config.optimizer.clip_grad)
    plan = config.plan()
    run_steps(Setup(config, plan, layout, None, engine), 0, STEPS)  # type: ignore[arg-type]
    return {name: norms(optimizer.state[parameter]["exp_avg_sq"]) for name, parameter in model.named_parameters()}


class _Bare:
    """The step of DeepSpeedEngine, written out."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip

    def step(self, micro_batches: Any, *, global_tokens: int, lr: float) -> Any:
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for micro_batch in micro_batches:
            loss = self.model(micro_batch.tokens, micro_batch.labels).sum() / global_tokens
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return StepResult(loss=total, grad_norm=norm, skipped=False)


class GivenMoments:
    """Stands in for an engine: second moments as they are given."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.module = torch.nn.Module()
        self.module.named_parameters = lambda: iter((name, None) for name in names)  # type: ignore[method-assign, assignment, misc]
        self.moments: list[SecondMoment] = []

    def second_moments(self) -> list[SecondMoment]:
        return self.moments


@dataclass(frozen=True)
class Measured:
    """What a layout measured."""

    wrapper: str
    """Class of DeepSpeed's optimizer."""
    before: list[float]
    """Values before the first step."""
    values: list[float]
    """Values after the last."""
    summary: VarianceSummary
    counted: int
    """Elements that all ranks counted."""
    elements: int
    """Elements of the model."""
    gathered: Norms
    """Norms of whole second moments, gathered by DeepSpeed's own accessor; {} with tensor ranks or plain AdamW."""
    padding: int
    """Elements of all ranks' optimizer states that belong to no parameter of theirs."""
    with_garbage: list[float]
    """Values after what fills flat partitions up was overwritten with a large number."""


def measure_layouts(_rank: int, _world_size: int, configs: list[str]) -> list[Measured]:
    """One run after the other; for run_ranks."""
    return [measure_run(RunConfig.model_validate_json(config)) for config in configs]


def reference_and_layouts(rank: int, world_size: int, config: str, configs: list[str]) -> tuple[Norms, list[Measured]]:
    """torch's run and then layouts of one rank; for run_ranks."""
    try:
        reference = torch_reference(RunConfig.model_validate_json(config), initialize_parallel(1, 2.0))
    finally:
        destroy_parallel()
    return reference, measure_layouts(rank, world_size, configs)


def measure_run(config: RunConfig) -> Measured:
    """A few steps of the run on this process's group, and everything that can be said about its measurement."""
    try:
        setup = set_up(config)
        engine = setup.engine
        variance = AdamVariance(engine, config.metrics, CPU.torch_device)
        before = variance.measure().tolist()
        run_steps(setup, 0, STEPS)
        values = variance.measure()
        moments = engine.second_moments()
        counted = torch.tensor(sum(moment.values.numel() for moment in moments))
        dist.all_reduce(counted)
        gathered = _gathered(engine) if setup.layout.tensor_size == 1 else {}
        padding = torch.tensor(_spoil_padding(engine, moments))
        dist.all_reduce(padding)
        return Measured(
            wrapper=type(engine._engine.optimizer).__name__,
            before=before,
            values=values.tolist(),
            summary=variance.summary(values.tolist()),
            counted=int(counted),
            elements=sum(p.numel() for p in _whole_model(config)),
            gathered=gathered,
            padding=int(padding),
            with_garbage=variance.measure().tolist(),
        )
    finally:
        destroy_parallel()


def _gathered(engine: DeepSpeedEngine) -> Norms:
    optimizer = engine._engine.optimizer
    named = list(engine.module.named_parameters())
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        # No accessor, but every rank holds all of it.
        inner = optimizer.optimizer.state
        pairs = [
            pair
            for groups in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for pair in zip(*groups, strict=True)
        ]
        names = {id(parameter): name for name, parameter in named}
        by_name = {names[id(parameter)]: norms(inner[master]["exp_avg_sq"]) for parameter, master in pairs}
        return {name: by_name[name] for name, _ in named}
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # ZeRO 1 and 2 link the state while they step the first group of parameters, when the others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    full = {name: safe_get_full_optimizer_state(parameter, "exp_avg_sq") for name, parameter in named}
    return {} if None in full.values() else {name: norms(v) for name, v in full.items()}


def _spoil_padding(engine: DeepSpeedEngine, moments: list[SecondMoment]) -> int:
    """Overwrite every element of ZeRO's flat states that no part shows, and return how many there are."""
    optimizer = engine._engine.optimizer
    if not hasattr(optimizer, "dp_process_group"):
        return 0
    kept = [moment.values.clone() for moment in moments]
    states: list[torch.Tensor] = [state["exp_avg_sq"] for state in optimizer.optimizer.state.values()]
    for state in states:
        state.fill_(1e6)
    for moment, values in zip(moments, kept, strict=True):
        moment.values.copy_(values)
    return sum(state.numel() for state in states) - sum(values.numel() for values in kept)


def _whole_model(config: RunConfig) -> list[torch.nn.Parameter]:
    destroy_parallel()
    layout = initialize_parallel(1, 2.0)
    model = build_gpt(config.model, layout=layout, positions=config.max_positions, seed=config.seed)
    return list(model.parameters())
