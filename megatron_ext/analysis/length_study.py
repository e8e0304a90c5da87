"""How much the gradient varies from batch to batch at several sequence lengths, with the same number of tokens a batch.

The paper's reason for Sequence Length Warmup is that long sequences contribute most of the extreme gradient variance,
above all early in training (Li, Zhang, He, "The Stability-Efficiency Dilemma", NeurIPS 2022). Here the weights stand
still and only the batches differ, so that what varies is the data alone: the model is in evaluation mode, no optimizer
is involved, and a batch of twice the length has half as many sequences.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_ext.data.datasets import Samples, build_training
from megatron_ext.errors import UserError
from megatron_ext.runtime.device import select_device
from megatron_ext.runtime.environment import prepare_libraries, rank_info
from megatron_ext.runtime.log import configure_logging

_OUTLIERS = 3


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Batches of the study."""

    lengths: tuple[int, ...]
    tokens: int
    """Of each batch, at every length."""

    batches: int
    """At each length; at least 2."""

    micro_batch_tokens: int
    """Tokens that the device holds at once; at least the longest length."""

    @property
    def samples(self) -> int:
        """Dataset samples of the shortest length, which draws most; every sequence comes from another one."""
        return self.batches * (self.tokens // min(self.lengths))


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """The coordinate of a parameter that varies most."""

    parameter: str
    std: float


@dataclass(frozen=True, kw_only=True)
class LengthStatistics:
    """The gradient of the mean loss, over the batches of one length. Standard deviations are those of one batch."""

    seq_len: int
    sequences: int
    """Of a batch."""

    tokens: int
    """Of a batch."""

    batches: int
    loss: float
    """Mean loss, nats per token."""

    grad_norm: float
    """Mean l2 norm of a batch's gradient."""

    largest_grad_norm: float
    largest_element: float
    """Largest absolute element of a batch's gradient."""

    std_l1: float
    """Sum over all coordinates of the standard deviation between batches."""

    std_max: float
    """Largest standard deviation of a coordinate."""

    signal_to_noise: float
    """l2 norm of the expected gradient over that of the standard deviations. The square of the first is estimated
    without bias (the mean's own noise subtracted); 0 where that leaves nothing, infinite without noise."""

    outliers: tuple[Outlier, ...]
    """Parameters that hold the largest standard deviations, largest first."""


def doubling_lengths(full: int) -> tuple[int, ...]:
    """8, 16, 32, ... up to ``full``, which is the last one; only those that divide it."""
    return (*(8 << power for power in range(32) if 8 << power < full and full % (8 << power) == 0), full)


def check_settings(settings: StudySettings, *, seq_len: int) -> None:
    """Raise UserError where batches cannot be made of these lengths; ``seq_len`` is that of the dataset's samples."""
    for length in settings.lengths:
        if not 1 <= length <= seq_len:
            raise UserError(f"--lengths has {length}; write lengths from 1 to training.seq_len, {seq_len}")
        if settings.tokens % length:
            common = math.lcm(*settings.lengths)
            nearest = max(1, round(settings.tokens / common)) * common
            raise UserError(
                f"--tokens is {settings.tokens}, which length {length} does not divide, and all batches have "
                f"the same number of tokens: write {nearest} or another multiple of {common}"
            )
    if settings.batches < 2:
        raise UserError(f"--batches is {settings.batches}: a variance takes at least 2")


def study_checkpoint(
    path: Path, *, lengths: Sequence[int] | None, tokens: int | None, batches: int, seed: int
) -> list[LengthStatistics]:
    """Measure the weights of a checkpoint on the run's own training data.

    Args:
        path: A run directory or a checkpoint.
        lengths: By default 8, 16, 32, ... up to the run's full length.
        tokens: Of each batch; by default those of 4 full sequences.
        batches: At each length.
        seed: Of the order of samples.

    Raises:
        UserError: there is no checkpoint, no data, or batches cannot be made of these lengths.
    """
    configure_logging(0)
    device = select_device(0)
    prepare_libraries(rank_info(), device.accelerator)
    # Imports DeepSpeed (to read its files), which asks for the accelerator at once.
    from megatron_ext.checkpoint.weights import load_model

    with load_model(path, device) as loaded:
        config, full = loaded.config, loaded.config.training.seq_len
        settings = StudySettings(
            lengths=doubling_lengths(full) if lengths is None else tuple(lengths),
            tokens=4 * full if tokens is None else tokens,
            batches=batches,
            micro_batch_tokens=max(full, config.micro_batch_tokens),
        )
        check_settings(settings, seq_len=full)
        dataset = build_training(
            config.data, seq_len=full, vocab_size=config.model.vocab_size, samples=settings.samples, seed=seed
        )
        return list(study_lengths(loaded.model, dataset, settings, device=device.torch_device))


def study_lengths(
    model: torch.nn.Module, dataset: Samples, settings: StudySettings, *, device: torch.device
) -> Iterator[LengthStatistics]:
    """Measure one length after the other, in the order of ``settings.lengths``.

    Sequence j of batch b at any length begins with the first token of sample ``b * sequences + j``, as training at that
    length would have it with ``data.tail`` "truncate".

    Args:
        model: ``model(tokens, labels)`` gives the loss of each token, [sequences, seq_len]; its gradients are lost.
        dataset: At least ``settings.samples`` samples.
        settings: Checked ones.
        device: Where the model is.
    """
    assert len(dataset) >= settings.samples
    for length in settings.lengths:
        yield _statistics_at(length, model, dataset, settings, device=device)


def _statistics_at(
    length: int, model: torch.nn.Module, dataset: Samples, settings: StudySettings, *, device: torch.device
) -> LengthStatistics:
    spread = _Spread(model)
    sequences, held = settings.tokens // length, max(1, settings.micro_batch_tokens // length)
    losses, norms, largest = [], [], []
    for batch in range(settings.batches):
        model.zero_grad(set_to_none=True)
        total, end = 0.0, (batch + 1) * sequences
        for start in range(batch * sequences, end, held):
            rows = [dataset.read(index, 0, length + 1) for index in range(start, min(start + held, end))]
            ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # [micro-batch, length + 1]
            # Over the batch's tokens, not the micro-batch's: what adds up is the gradient of the batch's mean loss.
            loss = model(ids[:, :-1], ids[:, 1:]).sum() / settings.tokens
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        gradients = spread.add()
        norms.append(math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients)))
        largest.append(max(float(gradient.abs().max()) for gradient in gradients))
    model.zero_grad(set_to_none=True)
    return LengthStatistics(
        seq_len=length,
        sequences=sequences,
        tokens=settings.tokens,
        batches=settings.batches,
        loss=float(np.mean(losses)),
        grad_norm=float(np.mean(norms)),
        largest_grad_norm=max(norms),
        largest_element=max(largest),
        **spread.measures(),
        outliers=spread.outliers(),
    )


class _Spread:
    """Mean and variance of each coordinate of the gradient, batch by batch (Welford's recurrence)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._count = 0
        self._mean = [torch.zeros_like(parameter) for _, parameter in self._named]
        self._squares = [torch.zeros_like(parameter) for _, parameter in self._named]

    @torch.no_grad()
    def add(self) -> list[torch.Tensor]:
        """Count the gradient that the parameters hold, and return it."""
        self._count += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._named]
        before = torch._foreach_sub(gradients, self._mean)
        torch._foreach_add_(self._mean, torch._foreach_div(before, self._count))
        after = torch._foreach_sub(gradients, self._mean)
        torch._foreach_addcmul_(self._squares, before, after)
        return gradients

    def measures(self) -> dict[str, float]:
        """The numbers of LengthStatistics that are about variance."""
        stds = self._stds()
        noise = sum(float(std.double().square().sum()) for std in stds)
        mean = sum(float(mean.double().square().sum()) for mean in self._mean)
        signal = max(0.0, mean - noise / self._count)
        return {
            "std_l1": sum(float(std.double().sum()) for std in stds),
            "std_max": max(float(std.max()) for std in stds),
            "signal_to_noise": math.sqrt(signal / noise) if noise else math.inf,
        }

    def outliers(self) -> tuple[Outlier, ...]:
        """The parameters with the largest standard deviations."""
        found = [
            Outlier(parameter=name, std=float(std.max()))
            for (name, _), std in zip(self._named, self._stds(), strict=True)
        ]
        return tuple(sorted(found, key=lambda outlier: -outlier.std)[:_OUTLIERS])

    def _stds(self) -> list[torch.Tensor]:
        return [(squares / (self._count - 1)).clamp(min=0).sqrt() for squares in self._squares]
