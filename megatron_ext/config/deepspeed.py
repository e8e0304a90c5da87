"""The ``deepspeed`` section: which of DeepSpeed's settings pass through to it.

DeepSpeed ignores top-level keys that it does not know, so what is not known to be harmless is refused. What to write
instead is said in foreign.py, which only the reading of people's files needs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from megatron_ext.config.merging import dotted
from megatron_ext.config.model import ParallelConfig

PASSED: Final = frozenset(
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
"""Keys that pass whatever their value."""

PARTLY_PASSED: Final[Mapping[str, frozenset[str]]] = {
    "fp16": frozenset({"enabled"}),
    "bf16": frozenset({"enabled"}),
    "zero_optimization": frozenset(
        {
            "stage",
            "cpu_offload",
            "cpu_offload_param",
            "cpu_offload_params",
            # Removed from DeepSpeed, which would say nothing.
            "mics_shard_size",
            "mics_hierarchical_params_gather",
            "zeropp_loco_param",
        }
    ),
}
"""Objects that pass -> keys in them that other sections decide."""

_OFFLOADS: Final = {"offload_optimizer": "parallel.offload_optimizer", "offload_param": "parallel.offload_params"}


def refused_keys(block: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths in the ``deepspeed`` section of what another section decides, or DeepSpeed does not know."""
    for key, value in block.items():
        if key not in PARTLY_PASSED and key not in PASSED:
            yield (key,)
        elif key in PARTLY_PASSED and isinstance(value, dict):
            yield from ((key, inner) for inner in value if inner in PARTLY_PASSED[key])
            offloads = [part for part in _OFFLOADS if key == "zero_optimization" and isinstance(value.get(part), dict)]
            yield from ((key, part, "device") for part in offloads if "device" in value[part])


def refusal(path: Sequence[str]) -> str:
    """What is said of a refused key where nobody asks what to write instead."""
    return f"{dotted(('deepspeed', *path))} may not be set here"


def deepspeed_problems(block: Mapping[str, Any], *, precision: str, parallel: ParallelConfig) -> Iterator[str]:
    """One line per refused key, and per setting that contradicts ``training.precision`` or ``parallel``."""
    yield from map(refusal, refused_keys(block))
    for key, value in block.items():
        if key not in PARTLY_PASSED:
            continue
        if not isinstance(value, dict):
            yield f"deepspeed.{key} is {json.dumps(value)}: expected an object, {{...}}"
        elif key == "zero_optimization":
            yield from _zero_problems(value, parallel)
        elif precision != key and "enabled" not in value:
            yield (
                f'deepspeed.{key} is given with training.precision "{precision}", which has no use for it: remove it '
                f'or write training.precision "{key}"'
            )


def _zero_problems(value: Mapping[str, Any], parallel: ParallelConfig) -> Iterator[str]:
    if value.get("overlap_comm") is True and parallel.zero_stage < 2:
        yield (
            f"deepspeed.zero_optimization.overlap_comm is true with parallel.zero_stage {parallel.zero_stage}: "
            "micro-batches of unequal size allow it only with stage 2 or 3; write false or parallel.zero_stage 2"
        )
    devices = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_params}
    for part, section_key in _OFFLOADS.items():
        given = value.get(part, {})
        name = f"deepspeed.zero_optimization.{part}"
        if not isinstance(given, dict):
            yield f"{name} is {json.dumps(given)}: expected an object, {{...}}"
        elif given and "device" not in given and devices[part] == "none":
            yield f'{name} is given with {section_key} "none": remove it or write {section_key} "cpu"'
