"""Checks of everything that changes along the run: lengths, batch size, learning rate, and how long each lasts.

Durations are compared here where they have the same unit; between steps and tokens only the plan can compare.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_ext.base import MAX_COUNT, Duration
from megatron_ext.config.curriculum import (
    AdaptivePacing,
    ConstantPacing,
    DiscretePacing,
    LinearPacing,
    MixedPacing,
    RootPacing,
)

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig


def schedule_problems(config: "RunConfig") -> Iterator[str]:
    """One line per contradiction in curriculum, batch-size warmup and learning rate."""
    curriculum = config.curriculum
    if isinstance(curriculum, LinearPacing | RootPacing):
        yield from _growing_problems(curriculum, full=config.training.seq_len)
        yield from _too_long("curriculum.duration", curriculum.duration, config=config)
    if isinstance(curriculum, AdaptivePacing):
        yield from _growing_problems(curriculum, full=config.training.seq_len)
        yield from _too_long("curriculum.slowest", curriculum.slowest, config=config)
    if isinstance(curriculum, DiscretePacing):
        yield from _discrete_problems(curriculum, full=config.training.seq_len)
        yield from _too_long("the sum of curriculum.stages", _total(curriculum), config=config)
    if isinstance(curriculum, MixedPacing):
        yield from _mixed_problems(curriculum, full=config.training.seq_len)
    yield from _uncountable(config)
    yield from _batch_size_problems(config)
    yield from _learning_rate_problems(config)


def _uncountable(config: "RunConfig") -> Iterator[str]:
    training = config.training
    tokens = (training.duration.steps or 1) * training.batch_size * training.seq_len
    if tokens > MAX_COUNT:
        yield (
            f"training.duration is {training.duration}, which at training.batch_size {training.batch_size:,} and "
            f"training.seq_len {training.seq_len:,} is {tokens:,} tokens: write values whose product is at most "
            f"{MAX_COUNT:,}"
        )


def nearest_multiples(value: int, multiple: int, *, most: int) -> list[int]:
    """The multiples of ``multiple`` next to ``value``, between ``multiple`` and ``most``; none if there are none."""
    below = value // multiple * multiple
    largest = most // multiple * multiple
    candidates = {min(max(candidate, multiple), largest) for candidate in (below, below + multiple)}
    return sorted(candidate for candidate in candidates if candidate >= multiple)


def _no_multiple(key: str, value: int, multiple: int, *, most: int) -> Iterator[str]:
    if value % multiple == 0:
        return
    nearest = nearest_multiples(value, multiple, most=most)
    if nearest:
        advice = f"write {' or '.join(map(str, nearest))}"
    else:
        advice = f"no length up to training.seq_len {most} is one; write a smaller curriculum.multiple"
    yield f"{key} is {value}, which is no multiple of curriculum.multiple {multiple}: {advice}"


def _growing_problems(curriculum: LinearPacing | RootPacing | AdaptivePacing, *, full: int) -> Iterator[str]:
    start, multiple = curriculum.start, curriculum.multiple
    end = full if curriculum.end is None else curriculum.end
    end_key = "training.seq_len (where the curriculum ends)" if curriculum.end is None else "curriculum.end"
    yield from _no_multiple("curriculum.start", start, multiple, most=full)
    yield from _no_multiple(end_key, end, multiple, most=full if curriculum.end is not None else 2 * full)
    if end > full:
        yield f"curriculum.end is {end}, more than training.seq_len {full}: write at most {full}"
    if start > end:
        yield f"curriculum.start is {start}, more than the end of the curriculum, {end}: write a start of at most {end}"


def _discrete_problems(curriculum: DiscretePacing, *, full: int) -> Iterator[str]:
    lengths = [stage.seq_len for stage in curriculum.stages]
    for index, length in enumerate(lengths):
        yield from _no_multiple(f"curriculum.stages[{index}].seq_len", length, curriculum.multiple, most=full)
    for index, (before, after) in enumerate(pairwise(lengths), start=1):
        if after <= before:
            yield (
                f"curriculum.stages[{index}].seq_len is {after} after a stage of {before}: lengths must rise from "
                "stage to stage; reorder or remove stages"
            )
    if lengths[-1] >= full:
        yield (
            f"curriculum.stages[{len(lengths) - 1}].seq_len is {lengths[-1]}, but training.seq_len {full} follows by "
            "itself after the last stage: write only stages below it"
        )


def _mixed_problems(curriculum: MixedPacing, *, full: int) -> Iterator[str]:
    lengths = curriculum.lengths
    for index, length in enumerate(lengths):
        yield from _no_multiple(f"curriculum.lengths[{index}]", length, curriculum.multiple, most=full)
    if any(after <= before for before, after in pairwise(lengths)):
        yield f"curriculum.lengths is {list(lengths)}: write each length once, rising"
    elif lengths[-1] != full:
        yield (
            f"curriculum.lengths ends with {lengths[-1]}, not with training.seq_len {full}, at which validation runs: "
            f"make {full} the last length"
        )


def _total(curriculum: DiscretePacing) -> Duration | None:
    """The stages' common duration, or None where they have different units."""
    return _sum([stage.duration for stage in curriculum.stages])


def _sum(durations: Sequence[Duration]) -> Duration | None:
    if all(duration.steps is not None for duration in durations):
        return Duration(steps=sum(duration.steps or 0 for duration in durations))
    if all(duration.tokens is not None for duration in durations):
        return Duration(tokens=sum(duration.tokens or 0 for duration in durations))
    return None


def _amounts(first: Duration, second: Duration) -> tuple[int, int] | None:
    """Both durations as numbers of their common unit; None where the units differ."""
    if first.steps is not None and second.steps is not None:
        return first.steps, second.steps
    if first.tokens is not None and second.tokens is not None:
        return first.tokens, second.tokens
    return None


def _too_long(key: str, part: Duration | None, *, config: "RunConfig") -> Iterator[str]:
    whole = config.training.duration
    amounts = _amounts(part, whole) if part is not None else None
    if amounts and amounts[0] >= amounts[1]:
        yield f"{key} is {part}, not less than training.duration, {whole}: shorten it or lengthen the run"


def _batch_size_problems(config: "RunConfig") -> Iterator[str]:
    warmup, full = config.training.batch_size_warmup, config.training.batch_size
    if warmup is None:
        return
    key = "training.batch_size_warmup"
    if warmup.start > full:
        yield f"{key}.start is {warmup.start}, more than training.batch_size {full}: write at most {full}"
    elif (full - warmup.start) % warmup.increment:
        distance = full - warmup.start
        yield (
            f"{key}.increment is {warmup.increment}, which does not divide the {distance} sequences from {key}.start "
            f"{warmup.start} to training.batch_size {full}: write {_nearest_divisors(distance, warmup.increment)}"
        )
    if not isinstance(config.curriculum, ConstantPacing):
        yield (
            f'{key} and curriculum.pacing "{config.curriculum.pacing}" are both given, and both shrink the tokens of a '
            f'batch: set {key} to null, or write curriculum {{"pacing": "constant"}}'
        )
    if config.data.tail == "recycle":
        yield (
            f'{key} is given with data.tail "recycle", which needs the same number of sequences at every step: '
            'write data.tail "truncate"'
        )
    yield from _too_long(f"{key}.duration", warmup.duration, config=config)


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    below = max(value for value in divisors if value < wanted)
    above = min((value for value in divisors if value > wanted), default=None)
    return f"{below} or {above}" if above else str(below)


def _learning_rate_problems(config: "RunConfig") -> Iterator[str]:
    rate = config.learning_rate
    if rate.min > rate.peak:
        yield (
            f"learning_rate.min is {rate.min:g}, more than learning_rate.peak {rate.peak:g}: "
            f"write at most {rate.peak:g}"
        )
    if rate.decay == "wsd" and rate.cooldown is None:
        yield (
            'learning_rate.decay is "wsd" without learning_rate.cooldown: write how long the rate falls at the end, '
            '{"tokens": n} or {"steps": n}'
        )
    if rate.decay != "wsd" and rate.cooldown is not None:
        yield (
            f'learning_rate.cooldown is {rate.cooldown} with learning_rate.decay "{rate.decay}", which has none: '
            'remove it (or set it to null), or write decay "wsd"'
        )
    yield from _too_long("learning_rate.warmup", rate.warmup, config=config)
    yield from _decay_problems(config)


def _decay_problems(config: "RunConfig") -> Iterator[str]:
    rate, whole = config.learning_rate, config.training.duration
    end = rate.decay_duration or whole
    end_key = "learning_rate.decay_duration" if rate.decay_duration else "training.duration"
    amounts = _amounts(end, whole)
    if amounts and amounts[0] > amounts[1]:
        yield f"{end_key} is {end}, more than training.duration, {whole}: write at most {whole} or lengthen the run"
    cooldown = rate.cooldown if rate.decay == "wsd" else None
    parts = {"learning_rate.warmup": rate.warmup, "learning_rate.cooldown": cooldown}
    given = {key: part for key, part in parts.items() if part is not None}
    if rate.decay_duration is None:
        # Warmup against the run is checked above; what is left is the cooldown, alone or after the warmup.
        given = given if "learning_rate.cooldown" in given else {}
    total = _sum(list(given.values())) if given else None
    total_amounts = _amounts(total, end) if total else None
    if total_amounts and total_amounts[0] > total_amounts[1]:
        yield f"{' + '.join(given)} is {total}, more than {end_key}, {end}: shorten {' or '.join(given)}"
