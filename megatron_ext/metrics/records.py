"""The lines of metrics.jsonl as typed values.

One JSON object a line, told apart by ``kind``: ``train``, ``eval`` or ``event``. ``step`` is the number of finished
optimizer steps (1 after the first), ``tokens`` and ``samples`` are what was consumed up to and including that step.

JSON has no NaN and no infinity, and Python's spelling of them breaks parsers of other languages. A value that is not
finite is therefore written as null, with its name and spelling in an object ``non_finite``::

    {"kind": "train", "step": 7, "loss": null, ..., "non_finite": {"loss": "nan"}}

(spellings: "nan", "inf", "-inf"; item i of a list is named "position_loss[i]", an item deeper inside
"adam_var[layers][0][1]"), so that tables read it as a missing number and this module reads back the value.
A null without an entry there means "not known" (``mfu`` without a known peak rate, ``grad_norm`` of a skipped step).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from itertools import chain, takewhile
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.text import put_back, take_out

FILE_NAME = "metrics.jsonl"
"""Name of the file in a run's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecord:
    """One optimizer step."""

    kind: ClassVar[str] = "train"

    step: int
    """Finished steps, this one included."""
    tokens: int
    """Tokens consumed, this step's included."""
    samples: int
    """Dataset samples consumed, this step's included."""
    seq_len: int
    """Tokens of each sequence of this step."""
    batch_size: int
    """Sequences of the global batch."""
    micro_batch_size: int
    """Sequences of the largest micro-batch of one rank."""
    micro_batches: int
    """Micro-batches of one rank."""
    lr: float
    """Learning rate of this step."""
    loss: float
    """Mean loss over the tokens of the global batch, nats per token."""
    loss_ratio: float
    """Loss over the lowest loss of any earlier step."""
    grad_norm: float | None
    """Global l2 norm of the gradient before clipping; None where it is not known."""
    step_time_s: float
    """Seconds of the step; validation and checkpoints are not in it."""
    tokens_per_s: float
    """Tokens of the global batch per second of step time."""
    mfu: float | None = None
    """Model FLOPs utilization, 0..1; None where the peak rate is not known."""
    skipped: bool = False
    """The optimizer was not stepped: the gradient overflowed, or a guard left the update out."""
    prefix_loss: float | None = None
    """Mean loss over the first ``metrics.prefix`` tokens of every sequence; None where the run does not measure it."""
    adam_var_l1: float | None = None
    """l1 norm of sqrt(Adam's second moment) over all parameters; None on steps where it was not measured."""
    adam_var_max: float | None = None
    """Largest element of sqrt(Adam's second moment); None on steps where it was not measured."""
    adam_var: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    """The same in detail, where the run records it: {"layers": {"0": [l1, max], ...}, "kinds": {"attention": ...}}."""
    peak_memory_bytes: int | None = None
    """Most memory that rank 0 held during the step: of its GPU, or of its process since the start on a CPU."""
    sample_ids: tuple[int, ...] | None = None
    """Dataset sample of each sequence of the global batch, where the run keeps them."""
    offsets: tuple[int, ...] | None = None
    """First token of each sequence inside its sample, where the run keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One validation at full length."""

    kind: ClassVar[str] = "eval"

    step: int
    """Finished steps; 0 for a validation before the first step."""
    tokens: int
    """Tokens consumed by training."""
    loss: float
    """Mean loss, nats per token."""
    perplexity: float
    """exp(loss)."""
    position_edges: tuple[int, ...] | None = None
    """Edges of position buckets [edges[i], edges[i + 1]); None where the run does not measure them."""
    position_loss: tuple[float, ...] | None = None
    """Mean loss in each of those buckets, nats per token."""

    @classmethod
    def from_positions(cls, losses: npt.NDArray[np.float64], *, step: int, tokens: int, buckets: bool) -> "EvalRecord":
        """The record of a validation whose mean losses at each position are ``losses`` ([seq_len], nats per token)."""
        record = cls.from_loss(step=step, tokens=tokens, loss=float(losses.mean()))
        if not buckets:
            return record
        edges = bucket_edges(len(losses))
        return replace(record, position_edges=edges, position_loss=bucket_means(losses, edges))

    @classmethod
    def from_loss(cls, *, step: int, tokens: int, loss: float) -> "EvalRecord":
        """The record of a validation loss (nats per token); a perplexity beyond the range of floats is infinite."""
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return cls(step=step, tokens=tokens, loss=loss, perplexity=perplexity)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened to the run: start, resume, checkpoint, preemption, rollback."""

    kind: ClassVar[str] = "event"

    name: str
    details: Mapping[str, object] = field(default_factory=dict)
    """Further JSON values of the line, beside ``kind`` and ``name``."""


Record = TrainRecord | EvalRecord | EventRecord

_NESTED = frozenset({"position_loss", "adam_var"})
"""Fields that hold numbers inside which may not be finite."""
_LISTS = frozenset({"sample_ids", "offsets", "position_edges", "position_loss"})
"""Fields that are lists in a line and tuples in a record."""
_OPTIONAL = _LISTS | {"prefix_loss", "adam_var_l1", "adam_var_max", "adam_var", "peak_memory_bytes"}
"""Fields that a line leaves out where they are None."""

_FIELDS: dict[type[TrainRecord] | type[EvalRecord], tuple[Field[object], ...]] = {
    TrainRecord: fields(TrainRecord),
    EvalRecord: fields(EvalRecord),
}
_NAMES = {cls: tuple(item.name for item in items) for cls, items in _FIELDS.items()}
_REQUIRED = {cls: frozenset(item.name for item in items if item.default is MISSING) for cls, items in _FIELDS.items()}
_CLASSES: dict[str, type[TrainRecord] | type[EvalRecord]] = {cls.kind: cls for cls in _FIELDS}


def required_fields(kind: str) -> frozenset[str]:
    """Fields without which a line of this kind ("train" or "eval") is no record."""
    return _REQUIRED[_CLASSES[kind]]


def encode(record: Record) -> str:
    """The record as one line of JSON, without the newline.

    Raises:
        TypeError: an event's detail is no JSON value.
        ValueError: an event's detail is called ``kind``, ``name`` or ``non_finite``.
    """
    line: dict[str, object] = {"kind": record.kind}
    if isinstance(record, EventRecord):
        taken = {"kind", "name", "non_finite"} & record.details.keys()
        if taken:
            raise ValueError(f"an event's detail cannot be called {', '.join(sorted(taken))}")
        line["name"] = record.name
        line.update(record.details)
    else:
        for name in _NAMES[type(record)]:
            value = getattr(record, name)
            if value is not None or name not in _OPTIONAL:
                line[name] = value
    non_finite = take_out(line, nested=_NESTED)
    if non_finite:
        line["non_finite"] = non_finite
    return json.dumps(line, allow_nan=False)


def decode(line: Mapping[str, object]) -> Record | None:
    """The record of a parsed line; None for a kind that this version does not know.

    Fields that this version does not know are left out, so that it can read what a later one wrote.

    Raises:
        UserError: the line has no kind, or a required field is missing, or ``non_finite`` spells no number.
    """
    values = dict(line)
    non_finite = values.pop("non_finite", None)
    if isinstance(non_finite, dict):
        try:
            values = put_back(values, non_finite)
        except (TypeError, ValueError):
            raise UserError(f'"non_finite" is {non_finite}, not names with "nan", "inf" or "-inf"') from None
    kind = values.pop("kind", None)
    if kind == EventRecord.kind:
        name = values.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f'"name" of an event is {name!r}, not a string')
        return EventRecord(name, values)
    if not isinstance(kind, str):
        raise UserError(f'"kind" is {kind!r}, not train, eval or event')
    cls = _CLASSES.get(kind)
    if cls is None:
        return None
    missing = _REQUIRED[cls] - values.keys()
    if missing:
        raise UserError(f"a record of kind {kind} lacks {', '.join(sorted(missing))}")
    known = {name: values[name] for name in _NAMES[cls] if name in values}
    for name in _LISTS:
        listed = known.get(name)
        if isinstance(listed, list):
            known[name] = tuple(listed)
    return cls(**known)  # type: ignore[arg-type]


_FIRST_EDGE = 8
"""End of the first bucket of positions; each further one is as long as all before it."""


def bucket_edges(seq_len: int) -> tuple[int, ...]:
    """Edges of the buckets [0, 8), [8, 16), [16, 32), ... that cover ``seq_len`` positions; the last may be short.

    A token late in a sequence has more context and is easier to predict, so the mean loss of short sequences is higher
    than that of long ones under the same weights. The mean over the same positions is not: by position, runs at
    different lengths compare.
    """
    doubled = takewhile(lambda edge: edge < seq_len, (_FIRST_EDGE << power for power in range(64)))
    return tuple(chain((0,), doubled, (seq_len,)))


def bucket_means(losses: npt.NDArray[np.float64], edges: tuple[int, ...]) -> tuple[float, ...]:
    """Mean of ``losses`` ([positions]) in each bucket [edges[i], edges[i + 1]).

    Weighted by the buckets' widths, the means average to the mean of all positions.
    """
    assert edges[0] == 0
    assert edges[-1] == len(losses)
    means = np.add.reduceat(losses, edges[:-1]) / np.diff(edges)
    return tuple(means.tolist())


def prefix_length(prefix: int | None, first_seq_len: int) -> int:
    """Positions over which the training loss is also averaged: ``metrics.prefix``, by default the first length."""
    return first_seq_len if prefix is None else prefix
