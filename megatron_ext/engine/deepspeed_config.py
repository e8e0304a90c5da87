"""An engine's settings -> DeepSpeed's own dictionary, as a pure function."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ext.config.model import ParallelConfig
from megatron_ext.config.training import OptimizerConfig


@dataclass(frozen=True)
class EngineSettings:
    """What the engine has to know of a run."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr: float = 1e-3
    """Learning rate that the optimizer is made with; every step sets its own."""

    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's dictionary, which win over those made here."""


def deepspeed_config(settings: EngineSettings, *, data_size: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``.

    The caller owns accumulation, learning rate and loss normalization, so the batch keys that DeepSpeed wants to see
    are placeholders for its own bookkeeping and decide nothing.

    Args:
        settings: The engine's.
        data_size: Data-parallel ranks.
    """
    result: dict[str, Any] = {
        "train_batch_size": data_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "gradient_clipping": 0.0 if clips_outside_engine(settings) else settings.optimizer.clip_grad,
        "optimizer": _optimizer(settings),
        "zero_optimization": _zero(settings.parallel),
        **_precision(settings),
    }
    if not settings.deepspeed:
        return result
    from megatron_ext.config.merging import merge

    return merge(result, dict(settings.deepspeed))


def clips_outside_engine(settings: EngineSettings) -> bool:
    """Whether norm and clipping are ours: DeepSpeed wraps no optimizer in fp32 without ZeRO and keeps no norm."""
    return settings.parallel.zero_stage == 0 and settings.precision == "fp32"


def may_compile(settings: EngineSettings) -> bool:
    """Whether DeepSpeed may need kernels of its own, which it compiles at first use."""
    offloads = "cpu" in (settings.parallel.offload_optimizer, settings.parallel.offload_params)
    return offloads or settings.optimizer.implementation.startswith("deepspeed_") or bool(settings.deepspeed)


def _optimizer(settings: EngineSettings) -> dict[str, Any]:
    adam, implementation = settings.optimizer, settings.optimizer.implementation
    parameters: dict[str, Any] = {
        "lr": settings.lr,
        "betas": list(adam.betas),
        "eps": adam.eps,
        "weight_decay": adam.weight_decay,
    }
    if implementation == "auto":
        implementation = "deepspeed_cpu" if settings.parallel.offload_optimizer == "cpu" else "torch"
    if implementation == "torch":
        parameters |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": parameters}


def _zero(parallel: ParallelConfig) -> dict[str, Any]:
    stage = parallel.zero_stage
    result: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return result
    # overlap_comm reduces while later gradients are still accumulated; DeepSpeed allows it with our own accumulation
    # boundary only where gradients are partitioned.
    result["overlap_comm"] = stage >= 2
    if parallel.offload_optimizer == "cpu":
        result["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload_params == "cpu":
        result["offload_param"] = {"device": "cpu"}
    if stage == 3:
        # A fresh checkpoint must hold every rank's own part, not a gathered copy.
        result["stage3_gather_16bit_weights_on_model_save"] = False
    return result


def _precision(settings: EngineSettings) -> dict[str, Any]:
    precision = settings.precision
    if precision == "fp32":
        return {}
    result: dict[str, Any] = {precision: {"enabled": True}}
    if precision == "fp16":
        result["fp16"] |= {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    if settings.parallel.zero_stage > 0:
        # Sums over many micro-batches lose bits in half precision. Without ZeRO DeepSpeed has no such option.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
