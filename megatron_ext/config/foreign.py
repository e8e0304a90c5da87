"""What people coming from other frameworks write, and what to write here instead.

Names come from the arguments of Megatron-LM and Megatron-DeepSpeed, DeepSpeed's JSON, nanoGPT and transformers; only
those that another spelling check would miss. DeepSpeed's two curriculum blocks become our ``curriculum`` section; their
source is DeepSpeed's curriculum learning tutorial, sections 1.1 to 1.3 (``curriculum_learning``, removed from DeepSpeed
in 0.19.8), and its configuration page, "Data Efficiency" (``data_efficiency``).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from megatron_ext.config.deepspeed import PARTLY_PASSED, PASSED

_BY_KEY: Final[dict[str, str]] = {
    "model.num_layers": "n_layer num_hidden_layers",
    "model.hidden_size": "n_embd d_model",
    "model.num_attention_heads": "n_head",
    "model.ffn_hidden_size": "intermediate_size",
    "model.vocab_size": "padded_vocab_size",
    "model.vocab_multiple": "make_vocab_size_divisible_by",
    "model.max_position_embeddings": "n_positions",
    "model.hidden_dropout": "dropout resid_pdrop embd_pdrop",
    "model.attention_dropout": "attn_pdrop",
    "model.init_std": "init_method_std initializer_range",
    "model.attention": "attention_backend attn_implementation use_flash_attn",
    "training.seq_len": "seq_length block_size n_ctx",
    "training.batch_size": "global_batch_size train_batch_size",
    "training.duration": "train_tokens train_iters train_samples max_steps max_iters",
    "training.batch_size_warmup": "rampup_batch_size",
    "training.precision": "fp16 bf16 dtype",
    "curriculum": "curriculum_learning data_efficiency slw",
    "curriculum.pacing": "schedule_type curriculum_type",
    "curriculum.start": "min_difficulty",
    "curriculum.end": "max_difficulty",
    "curriculum.multiple": "difficulty_step",
    "curriculum.duration": "total_curriculum_step",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_eps adam_epsilon",
    "optimizer.clip_grad": "gradient_clipping grad_clip max_grad_norm",
    "learning_rate.peak": "lr max_lr",
    "learning_rate.min": "min_lr",
    "learning_rate.warmup": (
        "lr_warmup_iters lr_warmup_tokens lr_warmup_samples warmup_steps warmup_iters warmup_num_steps"
    ),
    "learning_rate.decay": "lr_decay_style lr_scheduler_type",
    "learning_rate.decay_duration": "lr_decay_tokens lr_decay_iters lr_decay_samples",
    "parallel.tensor": "tensor_model_parallel_size",
    "parallel.zero_stage": "zero_optimization stage",
    "parallel.offload_optimizer": "cpu_offload",
    "parallel.micro_batch_tokens": (
        "micro_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps per_device_train_batch_size"
    ),
    "parallel.activation_checkpointing": "checkpoint_activations gradient_checkpointing recompute_granularity",
    "data.sources": "data_path dataset",
    "data.train": "train_data_path",
    "data.valid": "valid_data_path",
    "data.tokenizer": "tokenizer_type vocab_file merge_file",
    "validation.every": "eval_interval eval_steps",
    "validation.samples": "eval_iters",
    "checkpoint.every": "save_interval save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.resume": "load resume_from_checkpoint",
    "metrics.log_every": "log_interval logging_steps steps_per_print",
    "output_dir": "out_dir save",
}

ALIASES: Final[dict[str, str]] = {alias: key for key, aliases in _BY_KEY.items() for alias in aliases.split()}
"""What another framework calls a key -> our dotted key."""

# What a value looks like, where it has another form than the foreign one.
_HINTS: Final[dict[str, str]] = {
    **dict.fromkeys(("training.duration", "curriculum.duration"), '{"steps": n} or {"tokens": n}'),
    **dict.fromkeys(("learning_rate.warmup", "learning_rate.decay_duration"), '{"steps": n} or {"tokens": n}'),
    **dict.fromkeys(("validation.every", "checkpoint.every"), '{"steps": n} or {"tokens": n}'),
    **dict.fromkeys(("data.sources", "data.train", "data.valid"), '[{"prefix": "PREFIX"}]'),
    "training.batch_size_warmup": '{"start": sequences, "increment": sequences, "duration": {"tokens": n}}',
    "training.precision": '"fp32", "bf16" or "fp16"',
    "curriculum": '{"pacing": "linear", "start": n, "duration": {"steps": T}}',
    "optimizer.betas": "[0.9, 0.95]",
    "learning_rate.decay": '"cosine", "linear", "constant" or "wsd"',
    "parallel.zero_stage": "0, 1, 2 or 3",
    "parallel.micro_batch_tokens": "tokens one rank may hold at once; micro-batches follow from it",
    "parallel.activation_checkpointing": '"none" or "full"',
    "validation.samples": "full-length sequences",
}

# Keys of DeepSpeed whose value another section takes as it is.
_SAME_VALUE: Final = {
    "train_batch_size": "training.batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "seed": "seed",
    "steps_per_print": "metrics.log_every",
    "zero_optimization.stage": "parallel.zero_stage",
}
_OFFLOAD: Final = {
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_params",
}
_ADVICE: Final = {
    "train_micro_batch_size_per_gpu": "write parallel.micro_batch_tokens, the tokens one rank may hold at once",
    "gradient_accumulation_steps": "micro-batches follow from parallel.micro_batch_tokens",
    "torch_autocast": 'write training.precision "bf16" or "fp16"',
    "activation_checkpointing": 'write parallel.activation_checkpointing "full"',
    "tensor_parallel": "write parallel.tensor",
    "checkpoint": "write checkpoint.every and checkpoint.keep_last",
    "pipeline": "pipeline parallelism is not supported; remove it",
    "autotuning": "DeepSpeed would choose batch sizes that training.batch_size decides; remove it",
    "compile": "its graphs assume DeepSpeed's own gradient accumulation; remove it",
    "amp": 'DeepSpeed no longer has it; write training.precision "bf16"',
    "elasticity": "DeepSpeed no longer has it; the run resumes on another number of ranks; remove it",
    "zero_optimization.cpu_offload": 'write parallel.offload_optimizer "cpu"',
    "zero_optimization.cpu_offload_param": 'write parallel.offload_params "cpu"',
    "zero_optimization.cpu_offload_params": 'write parallel.offload_params "cpu"',
}


def key_for(name: str) -> str | None:
    """The dotted key of ours for what another framework calls ``name``, or None."""
    return ALIASES.get(name.lower().replace("-", "_").lstrip("_"))


def hint_for(key: str) -> str:
    """`` (what a value of this key looks like)``, or nothing where the key says it all."""
    hint = _HINTS.get(key)
    return f" ({hint})" if hint else ""


def refused_setting(path: Sequence[str], value: Any) -> str:
    """What to write instead of a key that the ``deepspeed`` section does not take."""
    advice = replacement(path, value)
    if advice is not None:
        return advice
    if len(path) > 1:
        return "DeepSpeed no longer has it; remove it"
    known = sorted(PASSED | PARTLY_PASSED.keys())
    close = get_close_matches(path[0], known, n=1)
    found = f"did you mean deepspeed.{close[0]}?" if close else f"these are {', '.join(known)}"
    return f"it is not among the settings passed to DeepSpeed: {found}"


def replacement(path: Sequence[str], value: Any) -> str | None:
    """What to write instead of a key of a DeepSpeed config that other sections decide; None for other keys."""
    key = ".".join(path)
    if key in _SAME_VALUE:
        return f"write {_SAME_VALUE[key]} {json.dumps(value)}"
    if key in _OFFLOAD:
        device = json.dumps(value) if value in ("none", "cpu") else '"none" or "cpu"'
        return f"write {_OFFLOAD[key]} {device}"
    if key in {"fp16.enabled", "bf16.enabled"}:
        return f'write training.precision "{path[0]}"' if value is True else "remove it"
    translate = _TRANSLATED.get(key)
    return _ADVICE.get(key) if translate is None else str(translate(value))


def _parameters(value: Any) -> dict[str, Any]:
    """``params`` of DeepSpeed's optimizer or scheduler; empty where there are none to read."""
    parameters = value.get("params") if isinstance(value, dict) else None
    return parameters if isinstance(parameters, dict) else {}


def _renamed(parameters: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: parameters[name] for name, ours in names.items() if name in parameters}


def _optimizer(value: Any) -> str:
    parameters = _parameters(value)
    names = {"betas": "betas", "eps": "eps", "weight_decay": "weight_decay", "max_grad_norm": "clip_grad"}
    ours = _renamed(parameters, names)
    parts = [f'"optimizer": {json.dumps(ours)}'] if ours else []
    if "lr" in parameters:
        parts.append(f"learning_rate.peak {json.dumps(parameters['lr'])}")
    kind = value.get("type") if isinstance(value, dict) else None
    known = isinstance(kind, str) and kind.lower() in {"adam", "adamw"}
    remark = "" if known or kind is None else f" (the optimizer is AdamW; {json.dumps(kind)} is not supported)"
    return f"write {' and '.join(parts) or 'the optimizer section (AdamW)'}{remark}"


def _scheduler(value: Any) -> str:
    parameters = _parameters(value)
    ours = _renamed(parameters, {"warmup_max_lr": "peak"})
    steps = _renamed(parameters, {"warmup_num_steps": "warmup", "total_num_steps": "decay_duration"})
    ours |= {key: {"steps": count} for key, count in steps.items()}
    if not ours:
        return "write learning_rate.warmup and learning_rate.decay"
    return f'write "learning_rate": {json.dumps(ours)}'


_FALLBACK = '{"pacing": "linear", "start": 8, "duration": {"steps": T}}'
_DEFAULT_MULTIPLE = 8
# DeepSpeed's data-efficiency metrics that are lengths, and what becomes of the rest of a sample.
_TAIL_OF_METRIC = {"seqlen_truncate": "truncate", "seqlen_reshape": "recycle"}


class _UntranslatableError(Exception):
    """The block says something that has no counterpart; the message is the reason."""


@dataclass(frozen=True)
class Translation:
    """A curriculum section, or None where there is none to write, and what else to know."""

    curriculum: dict[str, Any] | None
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.curriculum is None:
            return "; ".join(("remove it", *self.remarks))
        return "; ".join((f'write "curriculum": {json.dumps(self.curriculum)} instead', *self.remarks))


def translate_legacy(block: Any) -> Translation:
    """The ``curriculum_learning`` block of DeepSpeed up to 0.19.7 as our section."""
    return _attempt(_translate, block, "curriculum_learning")


def translate_data_efficiency(block: Any) -> Translation:
    """The curriculum in a ``data_efficiency`` block as our section."""
    return _attempt(_translate_metrics, block, "data_efficiency")


def _attempt(translate: Callable[[dict[str, Any]], Translation], block: Any, name: str) -> Translation:
    try:
        return translate(_object(block, name))
    except _UntranslatableError as reason:
        return Translation(None, (f"it cannot be translated because {reason}", f'write "curriculum": {_FALLBACK}'))


def _translate_metrics(block: dict[str, Any]) -> Translation:
    sampling = _object(block.get("data_sampling", {}), "data_sampling")
    learning = _object(sampling.get("curriculum_learning", {}), "curriculum_learning")
    metrics = _object(learning.get("curriculum_metrics", {}), "curriculum_metrics")
    off = any(part.get("enabled", False) is not True for part in (block, sampling, learning))
    if off or not metrics:
        return Translation(None, ("it turns on no curriculum",))
    lengths = {name: metric for name, metric in metrics.items() if name in _TAIL_OF_METRIC}
    if len(lengths) != 1 or len(metrics) != 1:
        raise _UntranslatableError(
            f"its metrics are {', '.join(metrics)}, and only the sequence length is a curriculum here"
        )
    [(name, metric)] = lengths.items()
    translated = _translate({"enabled": True, "curriculum_type": "seqlen", **_object(metric, name)})
    return Translation(translated.curriculum, (*translated.remarks, f'write "tail": "{_TAIL_OF_METRIC[name]}" in data'))


def _translate(block: dict[str, Any]) -> Translation:
    if block.get("enabled", False) is not True:
        return Translation(None, ("it is not enabled",))
    kind = block.get("curriculum_type", "seqlen")
    if kind != "seqlen":
        raise _UntranslatableError(
            f"curriculum_type is {json.dumps(kind)}, and only the sequence length is a curriculum here"
        )
    schedule = _object(block.get("schedule_config", {}), "schedule_config")
    match block.get("schedule_type"):
        case "fixed_linear":
            return _growing(block, schedule, {"pacing": "linear"})
        case "fixed_root":
            return _growing(block, schedule, {"pacing": "root", "degree": _positive(schedule, "root_degree")})
        case "fixed_discrete":
            return _discrete(schedule)
        case other:
            raise _UntranslatableError(
                f"schedule_type is {json.dumps(other)}, not fixed_linear, fixed_root or fixed_discrete"
            )


def _growing(block: dict[str, Any], schedule: dict[str, Any], pacing: dict[str, Any]) -> Translation:
    lowest, highest = _positive(block, "min_difficulty"), _positive(block, "max_difficulty")
    multiple = _positive(schedule, "difficulty_step")
    start, end = -(-lowest // multiple) * multiple, highest // multiple * multiple
    if start > end:
        raise _UntranslatableError(f"there is no multiple of difficulty_step {multiple} between {lowest} and {highest}")
    remarks = [
        f"{key} {old} is no multiple of difficulty_step {multiple} and became {new}"
        for key, old, new in (("min_difficulty", lowest, start), ("max_difficulty", highest, end))
        if old != new
    ]
    duration = {"steps": _positive(schedule, "total_curriculum_step")}
    return Translation(
        {**pacing, "start": start, "end": end, "multiple": multiple, "duration": duration}, tuple(remarks)
    )


def _discrete(schedule: dict[str, Any]) -> Translation:
    lengths, switches = _numbers(schedule, "difficulty"), _numbers(schedule, "max_step")
    if len(lengths) != len(switches) + 1 or not switches:
        raise _UntranslatableError(
            f"difficulty has {len(lengths)} entries and max_step {len(switches)}, where max_step takes one less"
        )
    begins = [0, *switches[:-1]]
    durations = [end - begin for begin, end in zip(begins, switches, strict=True)]
    if min(durations) <= 0:
        raise _UntranslatableError(f"max_step {switches} does not rise")
    stages = [
        {"seq_len": length, "duration": {"steps": steps}} for length, steps in zip(lengths[:-1], durations, strict=True)
    ]
    multiple = math.gcd(*lengths[:-1], _DEFAULT_MULTIPLE)
    return Translation(
        {"pacing": "discrete", "stages": stages, "multiple": multiple},
        (f"the last length, {lengths[-1]}, is training.seq_len",),
    )


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UntranslatableError(f"{name} is {json.dumps(value)}, not an object")
    return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(block: dict[str, Any], key: str) -> int:
    value = block.get(key)
    if not _is_positive(value):
        raise _UntranslatableError(f"{key} is {json.dumps(value)}, not a positive whole number")
    assert isinstance(value, int)
    return value


def _numbers(block: dict[str, Any], key: str) -> list[int]:
    values = block.get(key)
    if not isinstance(values, list) or not all(_is_positive(value) for value in values):
        raise _UntranslatableError(f"{key} is {json.dumps(values)}, not a list of positive whole numbers")
    return values


_TRANSLATED: Final[dict[str, Callable[[Any], object]]] = {
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "curriculum_learning": translate_legacy,
    "data_efficiency": translate_data_efficiency,
}
