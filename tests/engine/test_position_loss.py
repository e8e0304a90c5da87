"""Loss by position: the same on every layout as from the plain formula, in training and in validation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ext.config.run import RunConfig
from megatron_ext.data.loader import ValidationLoader
from megatron_ext.engine.engine import MicroBatch
from megatron_ext.parallel.groups import destroy_parallel
from tests.engine.training import SEQ_LEN, VOCABULARY, Setup, run_steps, set_up, small_config
from tests.ranks import run_ranks, single_rank

PREFIX = 16
STEPS = 12
"""Lengths 8, 16 and 24 with the curriculum below: shorter than the prefix, equal and longer."""


@dataclass(frozen=True)
class Rows:
    """Validation samples that are known without files."""

    seq_len: int = SEQ_LEN
    vocab_size: int = VOCABULARY

    def check_files(self) -> None:
        """There are none."""

    def __len__(self) -> int:
        return 5  # does not divide by two ranks: one of them fills up with a sequence of weight 0

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(index).integers(VOCABULARY, size=SEQ_LEN + 1)[first : first + count]


@contextmanager
def one_rank() -> Iterator[None]:
    """A group of one in this process, with the variables that DeepSpeed asks of a launcher."""
    with pytest.MonkeyPatch.context() as environment, single_rank():
        for name in ("RANK", "LOCAL_RANK"):
            environment.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_SIZE"):
            environment.setenv(name, "1")
        yield


def config_of(**parallel: Any) -> RunConfig:
    return small_config(curriculum={"duration": {"steps": 16}}, parallel=parallel)


def position_losses(setup: Setup) -> npt.NDArray[np.float64]:
    place = {"data_rank": setup.layout.data_rank, "data_size": setup.layout.data_size}
    loader = ValidationLoader(Rows(), setup.config.micro_batch_tokens, **place)
    return setup.engine.evaluate((MicroBatch(b.tokens, b.labels), b.weights) for b in loader).numpy()


def measure_rank(_rank: int, _world_size: int, config_json: str) -> list[npt.NDArray[np.float64]]:
    """Prefix losses and losses of each step, then validation losses at each position."""
    setup = set_up(RunConfig.model_validate_json(config_json), prefix=PREFIX)
    try:
        curve = run_steps(setup, 0, STEPS)
        return [np.array(curve.prefix_losses, dtype=float), np.array(curve.losses), position_losses(setup)]
    finally:
        destroy_parallel()


@pytest.fixture(scope="module")
def reference() -> list[npt.NDArray[np.float64]]:
    with one_rank():
        return measure_rank(0, 1, config_of(micro_batch_tokens=32).model_dump_json())


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"zero_stage": 3, "micro_batch_tokens": 96}),
        (2, {"tensor": 2, "zero_stage": 1, "micro_batch_tokens": 64}),
    ],
)
def test_layouts_and_micro_batches_agree(
    ranks: int, parallel: dict[str, Any], reference: list[npt.NDArray[np.float64]]
) -> None:
    for result in run_ranks(measure_rank, ranks, config_of(**parallel).model_dump_json()):
        for values, expected in zip(result, reference, strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-4, rtol=0)


def test_training_prefix_is_the_mean_over_the_first_tokens() -> None:
    """Every forward's losses are kept as they leave the model; unequal micro-batches of 3, 3 and 2 sequences."""
    with one_rank():
        setup = set_up(config_of(micro_batch_tokens=96), prefix=PREFIX)
        seen: list[torch.Tensor] = []
        setup.engine.module.register_forward_hook(lambda _module, _input, losses: seen.append(losses.detach()))
        for step in (0, 8, 16):
            seen.clear()
            curve = run_steps(setup, step, step + 1)
            losses = torch.cat(seen).double()
            assert losses.shape == (8, curve.seq_lens[0])
            assert curve.losses[0] == pytest.approx(float(losses.mean()), rel=1e-6)
            assert curve.prefix_losses[0] == pytest.approx(float(losses[:, :PREFIX].mean()), rel=1e-6)
        assert len(seen) == 3
        assert curve.prefix_losses[0] != curve.losses[0], "the last step is longer than the prefix"


def test_without_a_prefix_nothing_is_measured() -> None:
    with one_rank():
        assert run_steps(set_up(config_of()), 0, 1).prefix_losses == [None]


def test_validation_losses_are_means_of_the_models_own() -> None:
    with one_rank():
        setup = set_up(config_of())
        rows = torch.from_numpy(np.stack([Rows().read(index, 0, SEQ_LEN + 1) for index in range(len(Rows()))]))
        with torch.no_grad():
            expected = setup.engine.module(rows[:, :-1], rows[:, 1:]).double().mean(dim=0)
        np.testing.assert_allclose(position_losses(setup), expected, rtol=1e-6)
