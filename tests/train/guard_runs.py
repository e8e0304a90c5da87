"""Whole runs of ``train`` on two ranks in which chosen samples spoil the loss. Nothing of this is in the program."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_ext import build
from megatron_ext.config.loading import load_config
from megatron_ext.curriculum.guards import GuardStop
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.data.loader import Batch, TrainLoader
from megatron_ext.model.gpt import build_gpt
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import Processes
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.trainer import train
from tests.engine.training import CPU
from tests.train.small_run import corpus_data, write_config

BATCH, STEPS, EVERY = 8, 16, 4


@dataclass(frozen=True)
class Planted:
    """What goes wrong in a run."""

    samples: tuple[int, ...] = ()
    """Dataset samples that spoil the batch of the rank that reads them."""

    steps: tuple[int, ...] = ()
    """0-based steps that are spoiled on the last rank, whatever they read."""

    times: int = 1000
    """How often one of ``steps`` is spoiled."""

    factor: float = float("nan")
    """What the losses of a spoiled batch are multiplied with."""

    weight_at: int | None = None
    """0-based step before which one weight of the last rank becomes ``factor``."""

    dies_at: tuple[int, int] | None = None
    """(step, time): the process ends before it reads this step for the time-th time."""


@dataclass
class _Spoiler:
    planted: Planted
    on: bool = False
    model: torch.nn.Module | None = None
    seen: dict[int, int] = field(default_factory=dict)

    def look(self, step: PlannedStep, batch: Batch, rank: int, ranks: int) -> None:
        self.seen[step.step] = self.seen.get(step.step, 0) + 1
        if self.planted.dies_at == (step.step, self.seen[step.step]):
            raise KilledError
        if step.step == self.planted.weight_at and rank == ranks - 1 and self.model is not None:
            next(self.model.parameters()).data.flatten()[0] = self.planted.factor
        own = range(rank * len(batch.tokens), (rank + 1) * len(batch.tokens))
        reads = any(int(batch.samples[place]) in self.planted.samples for place in own)
        hit = step.step in self.planted.steps and self.seen[step.step] <= self.planted.times
        self.on = reads or (hit and rank == ranks - 1)

    def hook(self, module: torch.nn.Module, _inputs: object, losses: torch.Tensor) -> torch.Tensor:
        return losses * self.planted.factor if self.on and module.training else losses


class KilledError(Exception):
    """Stands for the sudden end of a process."""


@contextmanager
def _planted(planted: Planted) -> Iterator[None]:
    spoiler = _Spoiler(planted)

    class Loader(TrainLoader):
        def batch(self, step: PlannedStep) -> Batch:
            found = super().batch(step)
            spoiler.look(step, found, dist.get_rank(), dist.get_world_size())
            return found

    def build_spoiled(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = build_gpt(*arguments, **options)
        model.register_forward_hook(spoiler.hook)
        spoiler.model = model
        return model

    with patch.object(build, "TrainLoader", Loader), patch.object(build, "build_gpt", build_spoiled):
        yield


def run_once(_rank: int, _world: int, runs: list[tuple[str, list[str], Planted]]) -> list[str]:
    """Train each (config file, overrides, what is planted); how each ended: "", a guard's message or "killed"."""
    group = dist.new_group(backend="gloo")
    ends = []
    for path, overrides, planted in runs:
        processes = Processes(info=rank_info(), host_group=group, store=dist.HashStore())  # type: ignore[attr-defined]
        with _planted(planted):
            try:
                train(load_config(Path(path), overrides), device=CPU, processes=processes, stop=StopRequest())
                ends.append("")
            except GuardStop as stop:
                ends.append(str(stop))
            except KilledError:
                ends.append("killed")
    return ends


def guarded(folder: Path, corpus: Path, guards: dict[str, Any], *, tail: str = "truncate", **sections: Any) -> Path:
    """Write the config of a run of 16 steps with a checkpoint every 4; ``sections`` replace whole ones."""
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "data": corpus_data(corpus) | {"tail": tail},
        "training": {"seq_len": 32, "batch_size": BATCH, "duration": {"steps": STEPS}},
        "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 10}},
        "checkpoint": {"every": {"steps": EVERY}, "keep_last": 2},
        "validation": {"every": {"steps": 7}, "samples": 8},
        "metrics": {"flush_every": 3, "keep_sample_ids": True, "tensorboard": False},
        "guards": guards,
    }
    return write_config(folder, **(values | sections))


def rolled_back(run: Path) -> list[dict[str, Any]]:
    """Train records of steps over which the run rolled back."""
    lines = [json.loads(line) for line in (run / "rolled_back.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """Events of a name in the order written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event" and line["name"] == name]
