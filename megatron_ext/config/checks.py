"""Checks between sections of a run config. Each names the keys, the values, and what to write instead."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ext.config.deepspeed_passthrough import passthrough_problems
from megatron_ext.curriculum.plan import plan_problems

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig


def check_run(config: "RunConfig") -> None:
    """Raise ValueError, one line per contradiction between sections of ``config``, if there is any."""
    problems = [
        *_model_problems(config),
        *_parallel_problems(config),
        *_data_problems(config),
        *plan_problems(config.curriculum, config.spec),
        *_variance_problems(config),
        *config.guards.problems(checkpoint_every=config.checkpoint.every, keep_last=config.checkpoint.keep_last),
        *passthrough_problems(config.deepspeed, config),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _model_problems(config: "RunConfig") -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    width, heads = model.hidden_size, model.num_attention_heads
    if width % heads:
        below = width // heads * heads
        values = f"{below} or {below + heads}" if below else str(heads)
        yield (
            f"model.hidden_size is {width}, which model.num_attention_heads {heads} does not divide: "
            f"write model.hidden_size {values}"
        )
    if heads % tensor:
        yield (
            f"parallel.tensor is {tensor}, which does not divide model.num_attention_heads {heads}: "
            f"write parallel.tensor {_divisors(heads)}"
        )
    if model.ffn_size % tensor:
        key = "model.ffn_hidden_size" if model.ffn_hidden_size else "4 * model.hidden_size"
        yield (
            f"parallel.tensor is {tensor}, which does not divide {key} = {model.ffn_size}: "
            f"write model.ffn_hidden_size {-(-model.ffn_size // tensor) * tensor}"
        )
    if model.padded_vocab_size % tensor:
        yield (
            f"parallel.tensor is {tensor}, which does not divide the {model.padded_vocab_size} rows of the embedding "
            f"(model.vocab_size {model.vocab_size} padded to model.vocab_multiple {model.vocab_multiple}): "
            f"write model.vocab_multiple {math.lcm(model.vocab_multiple, tensor)}"
        )
    if (config.metrics.prefix or 0) > config.training.seq_len:
        yield (
            f"metrics.prefix is {config.metrics.prefix}, more than training.seq_len {config.training.seq_len}: "
            f"write at most {config.training.seq_len}, or null for the first length of the run"
        )
    if config.training.seq_len > config.max_positions:
        yield (
            f"training.seq_len is {config.training.seq_len}, more than model.max_position_embeddings "
            f"{config.max_positions}: write at most {config.max_positions}, or raise the positions"
        )


def _divisors(number: int) -> str:
    divisors = [str(value) for value in range(1, number + 1) if number % value == 0]
    return f"{', '.join(divisors[:-1])} or {divisors[-1]}" if len(divisors) > 1 else divisors[0]


def _parallel_problems(config: "RunConfig") -> Iterator[str]:
    parallel, implementation = config.parallel, config.optimizer.implementation
    if parallel.micro_batch_tokens is not None and parallel.micro_batch_tokens < config.training.seq_len:
        yield (
            f"parallel.micro_batch_tokens is {parallel.micro_batch_tokens}, less than one sequence of training.seq_len "
            f"{config.training.seq_len}: write at least {config.training.seq_len}"
        )
    if parallel.offload_optimizer == "cpu" and parallel.zero_stage == 0:
        yield (
            'parallel.offload_optimizer is "cpu" with parallel.zero_stage 0: only ZeRO offloads; '
            "write parallel.zero_stage 1, 2 or 3"
        )
    if parallel.offload_params == "cpu" and parallel.zero_stage != 3:
        yield (
            f'parallel.offload_params is "cpu" with parallel.zero_stage {parallel.zero_stage}: only ZeRO 3 partitions '
            'parameters; write parallel.zero_stage 3 or parallel.offload_params "none"'
        )
    if parallel.offload_optimizer == "cpu" and implementation not in {"auto", "deepspeed_cpu"}:
        yield (
            f'optimizer.implementation is "{implementation}" with parallel.offload_optimizer "cpu": an offloaded '
            'optimizer steps on the CPU; write "auto" or "deepspeed_cpu"'
        )


def _variance_problems(config: "RunConfig") -> Iterator[str]:
    limit = config.curriculum.variance_limit
    if limit and not config.metrics.adam_variance_every:
        yield (
            f"curriculum.variance_above is {limit:g}, but metrics.adam_variance_every 0 measures no variance: write "
            "its interval in steps, or curriculum.variance_above 0"
        )


def _data_problems(config: "RunConfig") -> Iterator[str]:
    data = config.data
    apart = [name for name in ("train", "valid") if getattr(data, name) is not None]
    if data.sources is None and not apart:
        yield (
            'data names no token files: write data.sources [{"prefix": "PREFIX"}], to be split by data.split, or '
            "data.train and data.valid"
        )
    if data.sources is not None and apart:
        keys = " and ".join(f"data.{name}" for name in apart)
        yield f"data.sources and {keys} are both given: remove data.sources (or set it to null), or remove {keys}"
    if data.sources is None and len(apart) == 1:
        missing = "valid" if apart == ["train"] else "train"
        yield f"data.{apart[0]} is given without data.{missing}: write data.{missing} too, or data.sources instead"
    if data.sources is None:
        return
    for share, name in zip(data.split[:2], ("training", "validation"), strict=True):
        if share == 0:
            shares = list(data.split)
            yield f"data.split is {shares}, which leaves nothing for {name}: write for example [949, 50, 1]"
