"""Random streams of a rank on any device, and recomputation that replays them.

megatron-core's tracker and checkpointing (tensor_parallel/random.py) know CUDA alone. Two streams are enough here:

- *replicated*: torch's default generator of the device. Equal on the tensor-parallel ranks of one model copy, different
  between copies. For dropout of activations that every tensor rank holds in full (embedding, residual).
- *partitioned*: different on every rank. For dropout of activations that the tensor ranks split between them
  (attention probabilities, split by heads).

Each seed is derived from (run seed, stream, data rank, tensor rank) with numpy's SeedSequence, so that no two streams
overlap, also where seeds of runs are neighbors.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import Layout

_REPLICATED, _PARTITIONED = 0, 1


@dataclass(frozen=True)
class RngSnapshot:
    """States of both streams at one moment."""

    replicated: torch.Tensor
    partitioned: torch.Tensor


class RngStreams:
    """The two streams of one rank.

    A device has one generator. It is at the replicated stream; the partitioned one is a saved state that is put into it
    inside ``fork``.
    """

    def __init__(self, generator: torch.Generator, partitioned: torch.Tensor) -> None:
        self._generator = generator
        self._partitioned = partitioned
        self._forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Draw from the partitioned stream inside the block; the replicated one continues after it untouched."""
        assert not self._forked, "the partitioned stream is in use already"
        replicated = self._generator.get_state()
        self._generator.set_state(self._partitioned)
        self._forked = True
        try:
            yield
        finally:
            self._forked = False
            self._partitioned = self._generator.get_state()
            self._generator.set_state(replicated)

    def snapshot(self) -> RngSnapshot:
        """The states now, for ``replay``."""
        assert not self._forked, "the partitioned stream is in use"
        return RngSnapshot(self._generator.get_state(), self._partitioned)

    @contextmanager
    def replay(self, snapshot: RngSnapshot) -> Iterator[None]:
        """Draw inside the block what was drawn after ``snapshot``; both streams continue after it where they were."""
        now = self.snapshot()
        self._restore(snapshot)
        try:
            yield
        finally:
            self._restore(now)

    def rng_state(self) -> dict[str, Any]:
        """Everything random in this process: both streams and the generators of torch (CPU), numpy and Python.

        Only tensors, numbers, strings and tuples, so that ``torch.load(weights_only=True)`` reads it back.
        """
        snapshot = self.snapshot()
        name, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "replicated": snapshot.replicated,
            "partitioned": snapshot.partitioned,
            "torch_cpu": torch.default_generator.get_state(),
            "numpy": (
                str(name),
                torch.from_numpy(np.asarray(keys, dtype=np.int64)),
                int(position),
                int(has_gauss),
                float(gauss),
            ),
            "python": random.getstate(),
        }

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Continue from what ``rng_state`` returned. Raises UserError if it is that of another kind of device."""
        if state["replicated"].shape != self._generator.get_state().shape:
            raise UserError(
                f"the random state saved is not one of a {self._generator.device.type} generator; "
                "continue the run on the kind of device that it was started on"
            )
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        random.setstate(state["python"])
        torch.default_generator.set_state(state["torch_cpu"])
        self._restore(RngSnapshot(state["replicated"], state["partitioned"]))

    def _restore(self, snapshot: RngSnapshot) -> None:
        assert not self._forked, "the partitioned stream is in use"
        self._generator.set_state(snapshot.replicated)
        self._partitioned = snapshot.partitioned


def seed_streams(seed: int, layout: Layout, device: torch.device) -> RngStreams:
    """Seed all generators of this process for the run's ``seed``; dropout on ``device`` then draws from the result."""
    # Differs on every rank. The generator is seeded for its state alone.
    generator = default_generator(device)
    generator.manual_seed(_derive(seed, _PARTITIONED, layout.data_rank, layout.tensor_rank))
    partitioned = generator.get_state()
    # Equal on the tensor ranks of a copy: tensor rank 0's words for all of them.
    replicated = _derive(seed, _REPLICATED, layout.data_rank, 0)
    random.seed(replicated)
    np.random.seed(replicated % 2**32)
    torch.default_generator.manual_seed(replicated)
    generator.manual_seed(replicated)
    return RngStreams(generator, partitioned)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that torch's random operations on ``device`` draw from."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    module.init()
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


def _derive(*words: int) -> int:
    # 63 bits: torch takes a signed 64-bit seed.
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[torch.Tensor], torch.Tensor], streams: RngStreams, hidden: torch.Tensor
    ) -> torch.Tensor:
        ctx.function, ctx.streams, ctx.snapshot = function, streams, streams.snapshot()
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return function(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None, torch.Tensor | None]:
        # A new leaf: the graph built below ends here, and its gradient is this function's input gradient.
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        # The same random numbers as in forward, so the same dropout masks.
        with torch.enable_grad(), ctx.streams.replay(ctx.snapshot):
            output = ctx.function(hidden)
        torch.autograd.backward(output, grad_outputs[0])
        return None, None, hidden.grad


def recompute(
    function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, *, streams: RngStreams
) -> torch.Tensor:
    """``function(hidden)`` that keeps ``hidden`` alone and runs again in backward, with the same random numbers.

    Activation checkpointing after Chen et al. (arXiv 1604.06174), reentrant like
    torch.utils.checkpoint(use_reentrant=True): the whole function runs inside backward, through its modules' hooks,
    which ZeRO 3 needs to gather the parameters. ``hidden`` must require a gradient. Backward needs
    ``loss.backward()``; torch.autograd.grad does not reach the parameters.
    """
    assert hidden.requires_grad, "recomputation starts from a tensor that requires a gradient"
    output: torch.Tensor = _Recompute.apply(function, streams, hidden)  # type: ignore[no-untyped-call]
    return output
