"""The ``deepspeed`` section: what may pass through to DeepSpeed, and where everything else is written.

DeepSpeed ignores top-level keys that it does not know, so a key that is neither known as harmless nor as ours is
refused as well.
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from megatron_ext.config.deepspeed_curriculum import translate_data_efficiency, translate_legacy

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig

_PASSED: Final = frozenset(
    {
        "aio",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
_SPLIT: Final = frozenset({"zero_optimization", "fp16", "bf16"})

# Keys of DeepSpeed that another section decides, and that section's key.
_OURS: Final = {
    "train_batch_size": "training.batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "seed": "seed",
    "steps_per_print": "metrics.log_every",
}
# The same where the value has another form or meaning: what to do.
_ADVICE: Final = {
    "train_micro_batch_size_per_gpu": "write parallel.micro_batch_tokens, the tokens one rank may hold at once",
    "gradient_accumulation_steps": "micro-batches follow from parallel.micro_batch_tokens",
    "managed_gradient_accumulation": "the accumulation boundary is the training step's own; remove it",
    "gradient_allreduce_op": "the loss is divided by the step's tokens before gradients are averaged; remove it",
    "bfloat16": 'write training.precision "bf16"',
    "torch_autocast": 'write training.precision "bf16" or "fp16"',
    "activation_checkpointing": 'write parallel.activation_checkpointing "full"',
    "tensor_parallel": "write parallel.tensor",
    "checkpoint": "write checkpoint.every and checkpoint.keep_last",
    "dataloader_drop_last": "the data section decides what is loaded; remove it",
    "pipeline": "pipeline parallelism is not supported; remove it",
    "expert_parallel": "GPT-2 and GPT-3 have no experts; remove it",
    "sequence_parallel_size": "sequence parallelism is not supported; remove it",
    "hybrid_engine": "it is for generation between training steps; remove it",
    "autotuning": "DeepSpeed would choose batch sizes that training.batch_size decides; remove it",
    "compile": "its graphs assume DeepSpeed's own gradient accumulation; remove it",
    "amp": 'DeepSpeed no longer has it; write training.precision "bf16" or "fp16"',
    "elasticity": "DeepSpeed no longer has it; the run resumes on another number of ranks; remove it",
    "sparse_gradients": "DeepSpeed no longer has it; remove it",
    "sparse_attention": "DeepSpeed no longer has it; write model.attention",
    "progressive_layer_drop": "DeepSpeed no longer has it; remove it",
    "compression_training": "DeepSpeed no longer has it; remove it",
    "quantize_training": "DeepSpeed no longer has it; remove it",
    "eigenvalue": "DeepSpeed no longer has it; remove it",
    "nebula": "DeepSpeed no longer has it; write checkpoint.every",
    "graph_harvesting": "DeepSpeed no longer has it; remove it",
}
_ZERO_ADVICE: Final = {
    "stage": "write parallel.zero_stage",
    "cpu_offload": 'write parallel.offload_optimizer "cpu"',
    "cpu_offload_params": 'write parallel.offload_params "cpu"',
    "cpu_offload_param": 'write parallel.offload_params "cpu"',
    "mics_shard_size": "DeepSpeed no longer has it; remove it",
    "mics_hierarchical_params_gather": "DeepSpeed no longer has it; remove it",
    "zeropp_loco_param": "DeepSpeed no longer has it; remove it",
}


def passthrough_problems(block: Mapping[str, Any], config: "RunConfig") -> Iterator[str]:
    """One line per key of the ``deepspeed`` section that may not pass, with what to write instead."""
    for key, value in block.items():
        if key in _PASSED:
            continue
        advice = replacement(key, value)
        if advice is not None:
            yield f"deepspeed.{key} may not be set here: {advice}"
        elif key in _SPLIT:
            yield from _split_problems(key, value, config)
        else:
            yield f"deepspeed.{key} is not among the settings passed to DeepSpeed: {_nearest(key)}"


def replacement(key: str, value: Any) -> str | None:
    """What to write instead of a top-level key of a DeepSpeed config that other sections decide; None for others."""
    if key == "curriculum_learning":
        return str(translate_legacy(value))
    if key == "data_efficiency":
        return str(translate_data_efficiency(value))
    if key == "optimizer":
        return _optimizer(value)
    if key == "scheduler":
        return _scheduler(value)
    if key in _OURS:
        return f"write {_OURS[key]} {_show(value)}"
    return _ADVICE.get(key)


def _nearest(key: str) -> str:
    close = get_close_matches(key, _PASSED | _SPLIT, n=1)
    if close:
        return f"did you mean deepspeed.{close[0]}?"
    return f"these are {', '.join(sorted(_PASSED | _SPLIT))}"


def _split_problems(key: str, value: Any, config: "RunConfig") -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"deepspeed.{key} is {_show(value)}: expected an object, {{...}}"
    elif key == "zero_optimization":
        yield from _zero_problems(value, config)
    else:
        yield from _precision_problems(key, value, config)


def _precision_problems(key: str, value: Mapping[str, Any], config: "RunConfig") -> Iterator[str]:
    precision = config.training.precision
    if "enabled" in value:
        advice = f'write training.precision "{key}"' if value["enabled"] is True else "remove it"
        yield f"deepspeed.{key}.enabled may not be set here: {advice}"
    elif precision != key:
        yield (
            f'deepspeed.{key} is given with training.precision "{precision}", which has no use for it: remove it or '
            f'write training.precision "{key}"'
        )


def _zero_problems(value: Mapping[str, Any], config: "RunConfig") -> Iterator[str]:
    stage = config.parallel.zero_stage
    for key in value:
        if key in _ZERO_ADVICE:
            shown = f" {_show(value[key])}" if key == "stage" else ""
            yield f"deepspeed.zero_optimization.{key} may not be set here: {_ZERO_ADVICE[key]}{shown}"
    if value.get("overlap_comm") is True and stage < 2:
        yield (
            f"deepspeed.zero_optimization.overlap_comm is true with parallel.zero_stage {stage}: micro-batches of "
            "unequal size allow it only with stage 2 or 3; write false or parallel.zero_stage 2"
        )
    ours = {"offload_optimizer": config.parallel.offload_optimizer, "offload_param": config.parallel.offload_params}
    for key, device in ours.items():
        yield from _offload_problems(key, value.get(key, {}), device=device)


def _offload_problems(key: str, value: Any, *, device: str) -> Iterator[str]:
    name = f"deepspeed.zero_optimization.{key}"
    section_key = "parallel.offload_optimizer" if key == "offload_optimizer" else "parallel.offload_params"
    if not isinstance(value, dict):
        yield f"{name} is {_show(value)}: expected an object, {{...}}"
    elif "device" in value:
        known = value["device"] in ("none", "cpu")
        advice = f"write {section_key} {_show(value['device'])}" if known else f'write {section_key} "none" or "cpu"'
        yield f"{name}.device may not be set here: {advice}"
    elif value and device == "none":
        yield f'{name} is given with {section_key} "none": remove it or write {section_key} "cpu"'


def _optimizer(value: Any) -> str:
    parameters = value.get("params", {}) if isinstance(value, dict) else {}
    if not isinstance(parameters, dict):
        parameters = {}
    ours = {key: parameters[key] for key in ("betas", "eps", "weight_decay") if key in parameters}
    if "max_grad_norm" in parameters:
        ours["clip_grad"] = parameters["max_grad_norm"]
    parts = [f'"optimizer": {json.dumps(ours)}'] if ours else []
    if "lr" in parameters:
        parts.append(f"learning_rate.peak {_show(parameters['lr'])}")
    kind = value.get("type") if isinstance(value, dict) else None
    known = isinstance(kind, str) and kind.lower() in {"adam", "adamw"}
    remark = "" if known or kind is None else f" (the optimizer is AdamW; {_show(kind)} is not supported)"
    return f"write {' and '.join(parts) or 'the optimizer section (AdamW)'}{remark}"


def _scheduler(value: Any) -> str:
    parameters = value.get("params", {}) if isinstance(value, dict) else {}
    if not isinstance(parameters, dict):
        parameters = {}
    ours: dict[str, Any] = {}
    if "warmup_max_lr" in parameters:
        ours["peak"] = parameters["warmup_max_lr"]
    if "warmup_num_steps" in parameters:
        ours["warmup"] = {"steps": parameters["warmup_num_steps"]}
    if "total_num_steps" in parameters:
        ours["decay_duration"] = {"steps": parameters["total_num_steps"]}
    return (
        f'write "learning_rate": {json.dumps(ours)}' if ours else "write learning_rate.warmup and learning_rate.decay"
    )


def _show(value: Any) -> str:
    return json.dumps(value)
