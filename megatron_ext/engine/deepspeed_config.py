"""RunConfig -> DeepSpeed's own dictionary, as a pure function."""

from typing import Any

from megatron_ext.config.run import RunConfig


def deepspeed_config(config: RunConfig, *, data_size: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``.

    The caller owns accumulation, learning rate and loss normalization, so the batch keys that DeepSpeed wants to see
    are placeholders for its own bookkeeping and decide nothing.

    Args:
        config: The run.
        data_size: Data-parallel ranks.
    """
    result: dict[str, Any] = {
        "train_batch_size": data_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "gradient_clipping": _engine_clipping(config),
        "optimizer": _optimizer(config),
        "zero_optimization": _zero(config),
        **_precision(config),
    }
    return _merged(result, config.deepspeed)


def clips_outside_engine(config: RunConfig) -> bool:
    """Whether norm and clipping are ours: DeepSpeed wraps no optimizer in fp32 without ZeRO and keeps no norm."""
    return config.parallel.zero_stage == 0 and config.training.precision == "fp32"


def _engine_clipping(config: RunConfig) -> float:
    return 0.0 if clips_outside_engine(config) else config.optimizer.clip_grad


def _optimizer(config: RunConfig) -> dict[str, Any]:
    settings = config.optimizer
    parameters: dict[str, Any] = {
        "lr": config.learning_rate.peak,
        "betas": list(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    implementation = settings.implementation
    if implementation == "auto":
        implementation = "deepspeed_cpu" if config.parallel.offload_optimizer == "cpu" else "torch"
    if implementation == "torch":
        parameters |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": parameters}


def _zero(config: RunConfig) -> dict[str, Any]:
    stage = config.parallel.zero_stage
    result: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return result
    # overlap_comm reduces while later gradients are still accumulated; DeepSpeed allows it with our own accumulation
    # boundary only where gradients are partitioned.
    result["overlap_comm"] = stage >= 2
    if config.parallel.offload_optimizer == "cpu":
        result["offload_optimizer"] = {"device": "cpu"}
    if config.parallel.offload_params == "cpu":
        result["offload_param"] = {"device": "cpu"}
    if stage == 3:
        # A fresh checkpoint must hold every rank's own part, not a gathered copy.
        result["stage3_gather_16bit_weights_on_model_save"] = False
    return result


def _precision(config: RunConfig) -> dict[str, Any]:
    precision = config.training.precision
    if precision == "fp32":
        return {}
    result: dict[str, Any] = {precision: {"enabled": True}}
    if precision == "fp16":
        result["fp16"] |= {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    if config.parallel.zero_stage > 0:
        # Sums over many micro-batches lose bits in half precision. Without ZeRO DeepSpeed has no such option.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
