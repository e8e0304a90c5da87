"""The learning rate as a function of steps done and tokens consumed.

Progress is taken at the END of a step: step t (0-based) has done ``n = t + 1`` steps and consumed ``c`` tokens, its own
included. With the peak P, the minimum M, a warmup of W steps (or W tokens) and the decay from D0 to D1 tokens:

    warmup   lr = P * n / W          while n < W        (or P * c / W while c < W)
    then     p  = (c - D0) / (D1 - D0), clipped to [0, 1]
    cosine   lr = M + (P - M) * (1 + cos(pi * p)) / 2
    linear   lr = P - (P - M) * p
    constant lr = P

D0 is the number of tokens consumed when the warmup ends (after the first step with n >= W or c >= W), so that step has
p = 0 and exactly P: the rate is continuous, it is never 0 in the warmup, and without a warmup the first step is already
one step down the decay. D1 is where ``decay_duration`` ends, by default the run (``training.duration``); a number of
steps is converted to tokens by the plan's own segments. From D1 on the rate is exactly M. ``wsd`` is linear with
D0 = the beginning of the cooldown; between the warmup and D0 the clip keeps the rate at P.

Measuring the decay in tokens is what the paper asks for under a changing length (appendix A.2); Megatron-LM's scheduler
takes the same shapes by samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ext.base import Duration, NonNegativeFloat, PositiveFloat, Section
from megatron_ext.curriculum.segments import (
    Floats,
    Ints,
    Segment,
    amount,
    amounts,
    steps_of,
    steps_to_reach,
    tokens_after,
    too_long,
    total,
)
from megatron_ext.errors import UserError


class LearningRateConfig(Section):
    """Linear warmup, then decay by consumed tokens."""

    peak: PositiveFloat
    """Learning rate at the end of the warmup."""

    min: NonNegativeFloat = 0.0
    """Learning rate from the end of the decay on; at most ``peak``."""

    warmup: Duration | None = None
    """Linear warmup from 0; under SLW in steps (paper, A.2). null starts at the peak."""

    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay. wsd (warmup, stable, decay) stays at the peak and falls linearly over ``cooldown``."""

    decay_duration: Duration | None = None
    """When the decay ends, counted from the start of the run; by default with the run. Progress between the end of
    the warmup and this point is measured in consumed tokens (paper, A.2)."""

    cooldown: Duration | None = None
    """Last part of the decay in which wsd falls from ``peak`` to ``min``; needed with wsd and with nothing else."""

    def problems(self, duration: Duration) -> Iterator[str]:
        """One line per contradiction, in itself or with the run's ``duration``; between units only a plan can tell."""
        if self.min > self.peak:
            yield (
                f"learning_rate.min is {self.min:g}, more than learning_rate.peak {self.peak:g}: "
                f"write at most {self.peak:g}"
            )
        if self.decay == "wsd" and self.cooldown is None:
            yield (
                'learning_rate.decay is "wsd" without learning_rate.cooldown: write how long the rate falls at the '
                'end, {"tokens": n} or {"steps": n}'
            )
        if self.decay != "wsd" and self.cooldown is not None:
            yield (
                f'learning_rate.cooldown is {self.cooldown} with learning_rate.decay "{self.decay}", which has none: '
                'remove it (or set it to null), or write decay "wsd"'
            )
        yield from too_long("learning_rate.warmup", self.warmup, duration)
        end, end_key = self.decay_end(duration)
        found = amounts(end, duration)
        if found and found[0] > found[1]:
            yield (
                f"{end_key} is {end}, more than training.duration, {duration}: write at most {duration} or lengthen "
                "the run"
            )
        cooldown = self.cooldown if self.decay == "wsd" else None
        parts = {"learning_rate.warmup": self.warmup, "learning_rate.cooldown": cooldown}
        given = {key: part for key, part in parts.items() if part is not None}
        if self.decay_duration is None and cooldown is None:
            return  # what is left is the warmup against the run, checked above
        within = total(list(given.values())) if given else None
        found = amounts(within, end) if within else None
        if found and found[0] > found[1]:
            yield f"{' + '.join(given)} is {within}, more than {end_key}, {end}: shorten {' or '.join(given)}"

    def decay_end(self, duration: Duration) -> tuple[Duration, str]:
        """When the decay ends in a run of ``duration``, and the key that says so."""
        if self.decay_duration is not None:
            return self.decay_duration, "learning_rate.decay_duration"
        return duration, "training.duration"


@dataclass(frozen=True)
class LearningRate:
    """The algebra above with its numbers filled in."""

    peak: float
    minimum: float
    warmup: int  # W, in tokens if ``warmup_in_tokens``, otherwise in steps; 0 without a warmup
    warmup_in_tokens: bool
    shape: Literal["cosine", "linear", "constant"]
    decay_from: int  # D0, in tokens
    decay_until: int  # D1, in tokens; greater than ``decay_from``

    def at(self, steps_done: Ints, tokens_consumed: Ints) -> Floats:
        """Learning rates after as many steps and tokens (arrays of one shape, each step's own included)."""
        decayed = self._decay(tokens_consumed)
        if not self.warmup:
            return decayed
        done = tokens_consumed if self.warmup_in_tokens else steps_done
        return np.where(done < self.warmup, self.peak * (done / self.warmup), decayed)

    def _decay(self, tokens_consumed: Ints) -> Floats:
        if self.shape == "constant":
            return np.full(tokens_consumed.shape, self.peak)
        progress = np.clip((tokens_consumed - self.decay_from) / (self.decay_until - self.decay_from), 0.0, 1.0)
        left = 1.0 - progress if self.shape == "linear" else (1.0 + np.cos(np.pi * progress)) / 2.0
        # The weighted mean gives the peak and the minimum exactly at its two ends, which min + span * left does not.
        return np.clip(self.peak * left + self.minimum * (1.0 - left), self.minimum, self.peak)


def learning_rate(config: LearningRateConfig, segments: Sequence[Segment], duration: Duration) -> LearningRate:
    """The schedule of a run with these ``segments``, which ends with ``duration``.

    Raises UserError if the warmup or the cooldown does not fit between the start of the run and the end of the decay.
    """
    run_steps = segments[-1].end_step
    warmup_steps = steps_of(config.warmup, segments) if config.warmup else 0
    warmup_end = tokens_after(segments, warmup_steps)
    if warmup_steps > run_steps:
        raise UserError(
            f"learning_rate.warmup is {config.warmup}, which takes {warmup_steps:,} steps, but the run "
            f"(training.duration {duration}) has {run_steps:,} steps: shorten the warmup or lengthen the run"
        )
    decay_duration, decay_key = config.decay_end(duration)
    decay_end = _tokens(decay_duration, segments)
    if config.decay != "constant" and warmup_end >= decay_end:
        raise UserError(
            f"learning_rate.warmup is {config.warmup} and ends after {warmup_end:,} tokens ({warmup_steps:,} steps), "
            f"but the decay ends after {decay_end:,} tokens ({decay_key} {decay_duration}): shorten the warmup or "
            "decay longer"
        )
    warmup, in_tokens = amount(config.warmup) if config.warmup else (0, False)
    return LearningRate(
        peak=config.peak,
        minimum=config.min,
        warmup=warmup,
        warmup_in_tokens=in_tokens,
        shape="linear" if config.decay == "wsd" else config.decay,
        decay_from=_cooldown_start(config, segments, warmup_end, decay_end) if config.cooldown else warmup_end,
        decay_until=decay_end,
    )


def _cooldown_start(config: LearningRateConfig, segments: Sequence[Segment], warmup_end: int, decay_end: int) -> int:
    cooldown = config.cooldown
    assert cooldown is not None
    if cooldown.tokens is not None:
        start = decay_end - cooldown.tokens
    else:
        start = tokens_after(segments, max(0, steps_to_reach(segments, decay_end) - (cooldown.steps or 0)))
    if start < warmup_end or (cooldown.steps or 0) > steps_to_reach(segments, decay_end):
        raise UserError(
            f"learning_rate.cooldown is {cooldown} and would begin at {max(start, 0):,} tokens to end with the decay "
            f"at {decay_end:,} tokens, before the warmup (learning_rate.warmup {config.warmup}) ends at {warmup_end:,} "
            "tokens: shorten the cooldown or the warmup"
        )
    return start


def _tokens(duration: Duration, segments: Sequence[Segment]) -> int:
    return duration.tokens if duration.tokens is not None else tokens_after(segments, duration.steps or 0)
