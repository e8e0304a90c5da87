"""Adam's second moment where DeepSpeed keeps it: which of its elements this rank counts, under every optimizer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from megatron_ext.model.parameters import split_dimension
from megatron_ext.parallel.groups import Layout

_KEY = "exp_avg_sq"


@dataclass(frozen=True)
class SecondMoment:
    """A part of one parameter's second moment v, as the optimizer holds it: not bias-corrected."""

    name: str
    """The parameter, by megatron-core's name."""

    values: torch.Tensor
    """Flat view [n], n >= 1, float32 as a rule, on the optimizer's device (the CPU where it is offloaded)."""


def own_second_moments(
    optimizer: Any, named: Iterable[tuple[str, torch.nn.Parameter]], layout: Layout
) -> list[SecondMoment]:
    """The elements of v that this rank counts, in the order of ``named``, at most one part of each parameter.

    Over all ranks every element is in exactly one part:

    - What tensor ranks hold as copies is counted on tensor rank 0.
    - What ZeRO partitions over data ranks is counted where it lies; what fills its flat partitions up is not counted.
    - What data ranks hold as copies (no ZeRO) is counted in equal shares.

    A parameter that was never updated has no state and so no part here: its v is 0.

    Args:
        optimizer: ``DeepSpeedEngine.optimizer``: one of DeepSpeed's wrappers, or torch's own optimizer.
        named: ``module.named_parameters()``.
        layout: This rank's place.
    """
    counted = [
        (name, parameter)
        for name, parameter in named
        if parameter.requires_grad and (layout.tensor_rank == 0 or split_dimension(name) is not None)
    ]
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        parts = _partitioned_parameters(optimizer, counted, layout)
    elif any(hasattr(parameter, "_hp_mapping") for _, parameter in counted):
        # ZeRO 1 and 2, and BF16_Optimizer, which is ZeRO 1 for bf16 with float32 accumulation.
        parts = _partitioned_state(optimizer, counted)
    else:
        parts = _copies(optimizer, counted, layout)
    return [SecondMoment(name, values) for name, values in parts if values.numel()]


def _partitioned_parameters(
    optimizer: Any, counted: list[tuple[str, torch.nn.Parameter]], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in counted:
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = _state(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat[group])
        if flat is not None:
            # All ranks hold parts of one size; the last of them are filled up.
            real = min(size, max(0, parameter.ds_numel - layout.data_rank * size))  # type: ignore[attr-defined]
            yield name, flat.narrow(0, start, real)


def _partitioned_state(
    optimizer: Any, counted: list[tuple[str, torch.nn.Parameter]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in counted:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue  # all of it lies on other ranks
        # Not the mapping's own view of the state: loading a checkpoint may put other tensors in its place.
        flat = _state(optimizer.optimizer, optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0])
        if flat is not None:
            address = mapping.get_hp_fragment_address()
            yield name, flat.narrow(0, address.start, address.numel)


def _copies(
    optimizer: Any, counted: list[tuple[str, torch.nn.Parameter]], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    whole = dict(_whole_states(optimizer))
    for name, parameter in counted:
        values = whole.get(id(parameter))
        if values is not None:
            yield name, values.tensor_split(layout.data_size)[layout.data_rank]


def _whole_states(optimizer: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Id of each parameter of the model -> all of its second moment, flat."""
    if isinstance(optimizer, FP16_Optimizer):
        for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            flat = _state(optimizer.optimizer, master)
            if flat is not None:
                sizes = [parameter.numel() for parameter in parameters]
                yield from zip(map(id, parameters), torch.split(flat, sizes), strict=True)
        return
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
        inner = optimizer.optimizer
    else:
        groups = [(group["params"], group["params"]) for group in optimizer.param_groups]
        inner = optimizer
    for parameters, masters in groups:
        for parameter, master in zip(parameters, masters, strict=True):
            values = _state(inner, master)
            if values is not None:
                yield id(parameter), values.flatten()


def _state(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> torch.Tensor | None:
    # .get: the state is a defaultdict, and asking it would make an entry that Adam takes for an initialized one.
    state = optimizer.state.get(master)
    return state.get(_KEY) if state else None
