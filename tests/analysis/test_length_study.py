"""Gradient variance by length on models whose gradients are known."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ext.analysis.length_study import LengthStatistics, StudySettings, check_settings, study_lengths
from megatron_ext.errors import UserError

CPU = torch.device("cpu")
FULL = 32


@dataclass(frozen=True)
class RandomSamples:
    """Independent ids, the same ones each time."""

    count: int
    vocabulary: int = 5
    seq_len: int = FULL

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def check_files(self) -> None:
        """There are none."""

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.int64]:
        ids = np.random.default_rng(index).integers(self.vocabulary, size=self.seq_len + 1)
        return ids[first : first + count]


class Linear(torch.nn.Module):
    """Loss of a token: weight[id] * label + position's weight * bias. Its gradient can be written down."""

    def __init__(self, *, by_position: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5))
        self.bias = torch.nn.Parameter(torch.tensor([1.0]))
        self.by_position = by_position

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]) * self.by_position
        return self.weight[tokens] * labels + self.bias * (positions * (tokens - 2))


def settings_of(lengths: tuple[int, ...], *, tokens: int = 64, batches: int = 6, held: int = FULL) -> StudySettings:
    return StudySettings(lengths=lengths, tokens=tokens, batches=batches, micro_batch_tokens=held)


def study(model: torch.nn.Module, settings: StudySettings) -> list[LengthStatistics]:
    return list(study_lengths(model, RandomSamples(settings.samples), settings, device=CPU))


@pytest.mark.parametrize("held", [FULL, 80])
def test_every_number_against_numpy(held: int) -> None:
    settings = settings_of((8, 32), held=held)
    data = RandomSamples(settings.samples)
    for found in study(Linear(by_position=0.25), settings):
        length, sequences = found.seq_len, settings.tokens // found.seq_len
        gradients, losses = [], []
        for batch in range(settings.batches):
            rows = np.stack([data.read(batch * sequences + j, 0, length + 1) for j in range(sequences)])
            tokens, labels = rows[:, :-1], rows[:, 1:]
            by_id = [(labels * (tokens == value)).sum() / settings.tokens for value in range(5)]
            by_position = (np.arange(length) * 0.25 * (tokens - 2)).sum() / settings.tokens
            gradients.append([*by_id, by_position])
            losses.append(by_position)
        table = np.array(gradients)
        std, mean = table.std(axis=0, ddof=1), table.mean(axis=0)
        signal = max(0.0, (mean**2).sum() - (std**2).sum() / settings.batches)
        assert (found.sequences, found.tokens, found.batches) == (sequences, 64, 6)
        assert found.loss == pytest.approx(np.mean(losses), abs=1e-6)
        assert found.grad_norm == pytest.approx(np.linalg.norm(table, axis=1).mean(), rel=1e-5)
        assert found.largest_grad_norm == pytest.approx(np.linalg.norm(table, axis=1).max(), rel=1e-5)
        assert found.largest_element == pytest.approx(np.abs(table).max(), rel=1e-5)
        assert found.std_l1 == pytest.approx(std.sum(), rel=1e-5)
        assert found.std_max == pytest.approx(std.max(), rel=1e-5)
        assert found.signal_to_noise == pytest.approx(math.sqrt(signal / (std**2).sum()), rel=1e-4)
        named = {"weight": std[:5].max(), "bias": std[5]}
        assert {item.parameter: item.std for item in found.outliers} == pytest.approx(named, rel=1e-5)
        assert found.outliers[0].std == pytest.approx(found.std_max)


def test_independent_tokens_vary_alike_at_every_length() -> None:
    """The standard deviation of a mean over T independent tokens is that of one over sqrt(T), cut as one likes."""

    class Count(Linear):
        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.weight[tokens] + 0 * labels

    value = math.sqrt(0.2 * 0.8 / 64)
    for found in study(Count(), settings_of((4, 32), batches=150)):
        assert found.std_max == pytest.approx(value, rel=0.25)
        assert found.std_l1 == pytest.approx(5 * value, rel=0.15)


def test_a_loss_that_grows_along_the_sequence_varies_more_at_length() -> None:
    """Position i weighs i: the variance of a batch's gradient is the mean of i**2 over the length, about L**2 / 3."""
    short, full = study(Linear(by_position=1.0), settings_of((8, 32), batches=150))
    expected = [math.sqrt(2 * np.mean(np.arange(length) ** 2) / 64) for length in (8, 32)]
    found = [{item.parameter: item.std for item in row.outliers}["bias"] for row in (short, full)]
    assert found == pytest.approx(expected, rel=0.2)


def test_without_noise_the_signal_is_infinite_and_gradients_are_cleared() -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.unused = torch.nn.Parameter(torch.ones(3))

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.weight.sum() * torch.ones_like(tokens + labels, dtype=torch.float32)

    model = Constant()
    (found,) = study(model, settings_of((16,)))
    assert (found.std_l1, found.std_max, found.signal_to_noise) == (0.0, 0.0, math.inf)
    assert found.grad_norm == pytest.approx(math.sqrt(2))
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of((8, 64)), "--lengths has 64; write lengths from 1 to training.seq_len, 32"),
        (settings_of((0,)), "--lengths has 0"),
        (settings_of((8, 24), tokens=64), "length 24 does not divide.*write 72 or another multiple of 24"),
        (settings_of((8,), tokens=4), "length 8 does not divide.*write 8 or another multiple of 8"),
        (settings_of((8,), batches=1), "--batches is 1: a variance takes at least 2"),
    ],
)
def test_settings_that_make_no_batches_are_refused(settings: StudySettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(settings, seq_len=FULL)
