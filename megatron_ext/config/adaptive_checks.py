"""Checks of adaptive pacing: its bounds and thresholds, and what else in the run must not depend on the lengths."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ext.config.curriculum import AdaptivePacing

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig


def adaptive_problems(config: "RunConfig") -> Iterator[str]:
    """One line per contradiction that adaptive pacing has in itself or with the learning rate; none without it."""
    curriculum = config.curriculum
    if not isinstance(curriculum, AdaptivePacing):
        return
    yield from _bound_problems(curriculum)
    if curriculum.back_above < curriculum.hold_above:
        yield (
            f"curriculum.back_above is {curriculum.back_above:g}, less than curriculum.hold_above "
            f"{curriculum.hold_above:g}: write at least {curriculum.hold_above:g}"
        )
    if curriculum.smoothing > curriculum.interval:
        yield (
            f"curriculum.smoothing is {curriculum.smoothing}, more than the steps between decisions, "
            f"curriculum.interval {curriculum.interval}: write at most {curriculum.interval}"
        )
    if 0 < curriculum.variance_above <= 1:
        yield (
            f"curriculum.variance_above is {curriculum.variance_above:g}, which half of all measurements exceed: "
            "write more than 1, or 0 to turn it off"
        )
    if curriculum.variance_above and not config.metrics.adam_variance_every:
        yield (
            f"curriculum.variance_above is {curriculum.variance_above:g}, but metrics.adam_variance_every 0 measures "
            "no variance: write its interval in steps, or curriculum.variance_above 0"
        )
    if config.learning_rate.decay != "constant":
        yield from _decay_problems(config)


def _bound_problems(curriculum: AdaptivePacing) -> Iterator[str]:
    fastest, slowest = curriculum.fastest, curriculum.slowest
    if (fastest.tokens is None) != (slowest.tokens is None):
        yield (
            f"curriculum.fastest is {fastest} and curriculum.slowest is {slowest}: they bound the length at the same "
            "point of the run; write both in steps or both in tokens"
        )
    elif (fastest.tokens or fastest.steps or 0) > (slowest.tokens or slowest.steps or 0):
        yield (
            f"curriculum.fastest is {fastest}, longer than curriculum.slowest, {slowest}: a plan that takes longer is "
            "slower; exchange the two"
        )


def _decay_problems(config: "RunConfig") -> Iterator[str]:
    """The decay is placed on consumed tokens before it is known how many tokens a number of steps will consume."""
    rate, why = config.learning_rate, 'under curriculum.pacing "adaptive" steps have no known number of tokens'
    end = rate.decay_duration or config.training.duration
    end_key = "learning_rate.decay_duration" if rate.decay_duration else "training.duration"
    if end.tokens is None:
        yield (
            f"{end_key} is {end}, where the learning rate ends its decay, but {why}: "
            'write learning_rate.decay_duration {"tokens": n}, or learning_rate.decay "constant"'
        )
        return
    latest = end.tokens
    if rate.decay == "wsd" and rate.cooldown is not None:
        if rate.cooldown.tokens is None:
            yield f'learning_rate.cooldown is {rate.cooldown}, but {why}: write {{"tokens": n}}'
            return
        latest -= rate.cooldown.tokens
    batch = config.training.batch_size * config.training.seq_len
    if rate.warmup is not None and rate.warmup.tokens is not None and rate.warmup.tokens + batch > latest:
        yield (
            f"learning_rate.warmup is {rate.warmup} and may end up to a batch ({batch:,} tokens) later, which "
            f"leaves no decay before {latest:,} tokens: shorten the warmup"
        )
