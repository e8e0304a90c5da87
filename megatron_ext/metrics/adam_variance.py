"""Gradient variance as Adam sees it: l1 norm and largest element of sqrt(v), v being the second moment.

Source: Li, Zhang, He, "The Stability-Efficiency Dilemma", section 3 (NeurIPS 2022). As there and in Megatron-DeepSpeed,
v is the optimizer's raw state, without the bias correction: v_0 = 0, so during the first 1 / (1 - beta2) steps both
values also grow because v fills up, the same way in every run with the same beta2.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.config.training import MetricsConfig
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.engine.engine import Engine
from megatron_ext.engine.second_moments import SecondMoment
from megatron_ext.model.parameters import parameter_kind
from megatron_ext.ops.adam_variance import adam_variance
from megatron_ext.ops.kernels import Kernels, is_fused

_PART = 2**20
"""Elements per reduction: so few that a part stays in a CPU's cache, enough to keep a GPU busy."""
_TOGETHER = 2**22
"""Elements of all parts whose roots exist at the same time: bounds the memory that a measurement takes."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class VarianceSummary:
    """One measurement, on the host. Pairs are (l1 norm, largest element) of sqrt(v)."""

    l1: float
    """Over all parameters."""

    largest: float
    """Over all parameters."""

    layers: dict[str, tuple[float, float]]
    """Index of a layer -> its pair. Embedding, positions, final norm and output layer are in none."""

    kinds: dict[str, tuple[float, float]]
    """Kind of parameter (``parameter_kind``) -> its pair; every parameter is in one."""

    def fields(self, *, detail: bool) -> dict[str, Any]:
        """The fields of a step's record; with ``detail`` those of layers and kinds too."""
        parts = {"adam_var": {"layers": self.layers, "kinds": self.kinds}} if detail else {}
        return {"adam_var_l1": self.l1, "adam_var_max": self.largest, **parts}


class AdamVariance:
    """Measures every so many steps, on the device.

    A measurement is a list of small reductions, of which the host waits for none, then one sum and one maximum over
    all ranks of a value for every parameter of the model. Layers and kinds are put together on the host, from values
    that came with the losses.
    """

    def __init__(
        self, engine: Engine, config: MetricsConfig, device: torch.device, *, kernels: Kernels = "reference"
    ) -> None:
        """Measure ``engine`` as ``config`` says; ``device`` is the one that collectives use."""
        self._kernels: Kernels = kernels
        self._engine = engine
        self._every = config.adam_variance_every
        self._names = [name for name, _ in engine.module.named_parameters()]
        self._device = device
        self._lengths: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._layers = _grouped((_layer_of(name), place) for place, name in enumerate(self._names))
        self._kinds = _grouped((parameter_kind(name), place) for place, name in enumerate(self._names))

    def measure_after(self, planned: PlannedStep) -> torch.Tensor | None:
        """What ``measure`` returns where it is due after a step, else None. Called by all ranks after every step.

        Due are the steps with which the number of finished ones is divisible by ``metrics.adam_variance_every``; a step
        that was skipped measures what the steps before it left.
        """
        return None if self._every == 0 or (planned.step + 1) % self._every else self.measure()

    @torch.no_grad()
    def measure(self) -> torch.Tensor:
        """Norms of sqrt(v) now; called by all ranks.

        Before the first update v is 0, and so is everything here. A NaN in v gives NaN in both values of its parameter.

        Returns:
            float64 [2 * parameters] on the device, the same on every rank: l1 norm of each parameter, then largest
            element of each.
        """
        sums, largest = self._own(self._engine.second_moments())
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        # The maximum over ranks need not pass on a NaN; their sum does.
        return torch.cat((sums, torch.where(sums.isnan(), sums, largest)))

    def summary(self, values: Sequence[float]) -> VarianceSummary:
        """The measurement whose values (as ``measure`` returns them) have been fetched."""
        count = len(self._names)
        assert len(values) == 2 * count, f"{len(values)} values for {count} parameters"
        pairs = list(zip(values[:count], values[count:], strict=True))
        l1, largest = _combined(pairs)
        return VarianceSummary(
            l1=l1,
            largest=largest,
            layers={layer: _combined([pairs[i] for i in places]) for layer, places in self._layers.items() if layer},
            kinds={kind: _combined([pairs[i] for i in places]) for kind, places in self._kinds.items()},
        )

    def _own(self, moments: Sequence[SecondMoment]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and maximum of this rank's elements of each parameter, 0 where it has none: both float64 [parameters]."""
        if not moments:
            zeros = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._device)
            return zeros[0], zeros[1]
        # The fused statistic takes a parameter of any size at once; a NaN in it shows in the sum.
        whole = all(is_fused(self._kernels, moment.values) for moment in moments)
        parts = [(m.values,) if whole else torch.split(m.values, _PART) for m in moments]
        counts = dict(zip((moment.name for moment in moments), map(len, parts), strict=True))
        flat = [part for pieces in parts for part in pieces]
        if whole:
            sums, largest = torch.stack([adam_variance(part, kernels="fused") for part in flat]).unbind(dim=1)
        else:
            sums, largest = _reduced(flat)
        lengths = self._lengths_of(tuple(counts.get(name, 0) for name in self._names))
        # unsafe: without it the lengths would be fetched, to be checked.
        return (
            torch.segment_reduce(sums.to(self._device), "sum", lengths=lengths, initial=0, unsafe=True),
            torch.segment_reduce(largest.to(self._device), "max", lengths=lengths, initial=0, unsafe=True),
        )

    def _lengths_of(self, counts: tuple[int, ...]) -> torch.Tensor:
        """The counts as a tensor, copied to the device once, since they hardly ever change."""
        if self._lengths is None or self._lengths[0] != counts:
            self._lengths = counts, torch.tensor(counts, device=self._device)
        return self._lengths[1]


def _reduced(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and maximum of the square roots of each part, both float64 [parts], on the device of the parts."""
    sums: list[torch.Tensor] = []
    largest: list[torch.Tensor] = []
    for start, end in batches([part.numel() for part in parts], _TOGETHER):
        roots = torch._foreach_sqrt([_full_precision(part) for part in parts[start:end]])
        # Not _foreach_norm: on a CPU it adds one by one in float32, which is off by percents for large tensors.
        sums += [root.sum() for root in roots]
        largest += torch._foreach_max(roots)
    return torch.stack(sums).double(), torch.stack(largest).double()


def batches(sizes: Sequence[int], together: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of consecutive sizes that sum to at most ``together``, or are one size that is larger."""
    start = total = 0
    for place, size in enumerate(sizes):
        if total + size > together and place > start:
            yield start, place
            start, total = place, 0
        total += size
    yield start, len(sizes)


def _full_precision(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _combined(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The pair of several parameters together."""
    l1, largest = sum(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    return l1, math.nan if math.isnan(l1) else largest


def _layer_of(name: str) -> str:
    """Index of the layer that the parameter belongs to, or nothing."""
    found = _LAYER.search(name)
    return found[1] if found else ""


def _grouped(places: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for key, place in places:
        groups.setdefault(key, []).append(place)
    return groups
