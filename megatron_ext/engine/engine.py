"""One optimizer step over a list of micro-batches, on DeepSpeed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from megatron_ext.config.run import RunConfig
from megatron_ext.engine.deepspeed_config import clips_outside_engine, deepspeed_config
from megatron_ext.engine.finite import weights_finite
from megatron_ext.engine.gradient_norm import GradientNorm
from megatron_ext.engine.micro_batches import MicroBatch
from megatron_ext.engine.second_moments import SecondMoment, own_second_moments
from megatron_ext.engine.update_gate import Judge, UpdateGate, invalid_to_nan
from megatron_ext.errors import UserError
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.parallel.groups import Layout, Mpu
from megatron_ext.runtime.device import Device


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors are 0-d and still on the device, so that the step waits for nothing."""

    loss: torch.Tensor
    """Mean over all tokens of the global batch."""

    grad_norm: torch.Tensor | float
    """Global gradient norm before clipping; inf where the step was skipped."""

    skipped: bool
    """Whether the weights were left alone: the gradient was not finite, or a judge refused the update."""

    prefix_loss: torch.Tensor | None = None
    """Mean over the first ``prefix`` tokens of every sequence of the global batch; None where it is not measured."""

    adam_variance: torch.Tensor | None = None
    """What ``AdamVariance.measure`` returned after the step, where it did."""


class TrainEngine:
    """The model under DeepSpeed with our own accumulation boundary and loss normalization.

    The algebra. The step's loss is the mean over the N = batch_size * seq_len tokens of the global batch:

        loss = 1/N * sum over ranks r, micro-batches m, tokens i of l(r, m, i)

    Rank r calls backward on D/N * sum_i l(r, m, i) for each of its micro-batches; their gradients add up, and DeepSpeed
    averages over the D data-parallel ranks, which divides by D. What remains is the gradient of ``loss``, for
    micro-batches of any and unequal size. Tensor-parallel ranks hold the same tokens and are not averaged over.
    """

    def __init__(
        self, config: RunConfig, model: torch.nn.Module, *, layout: Layout, device: Device, prefix: int = 0
    ) -> None:
        """Hand the model to DeepSpeed.

        Args:
            config: The run.
            model: ``model(tokens, labels)`` gives per-token losses, float32 [sequences, seq_len].
            layout: This rank's place.
            device: This rank's device.
            prefix: First positions of a sequence whose mean loss is measured beside the loss; 0: not.

        Raises:
            UserError: the chosen optimizer kernel cannot run here.
        """
        if config.optimizer.implementation == "deepspeed_fused" and not device.is_gpu:
            raise UserError(
                'optimizer.implementation "deepspeed_fused" needs a GPU and this machine shows none; use "auto"'
            )
        if config.training.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise UserError('training.precision "fp16" is not supported by this device; use "bf16" or "fp32"')
        _skip_shared_memory_build()
        self._layout = layout
        self._device = device
        self._prefix = prefix
        settings = deepspeed_config(config, data_size=layout.data_size)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model.named_parameters(), config.optimizer.weight_decay),
            mpu=Mpu(layout),
            config=settings,
            dist_init_required=False,
        )
        self._norm = self._own_norm(config) if clips_outside_engine(config) else None
        self._gate = UpdateGate(self._engine.basic_optimizer, own_norm=self._norm, grad_norm=self._grad_norm)
        self._scales_loss = config.training.precision == "fp16"

    @property
    def module(self) -> torch.nn.Module:
        """The model, with DeepSpeed's dtype and partitioning."""
        module: torch.nn.Module = self._engine.module
        return module

    def step(
        self, micro_batches: Sequence[MicroBatch], *, global_tokens: int, lr: float, judge: Judge | None = None
    ) -> StepResult:
        """Forward and backward over the micro-batches, then one update at ``lr``.

        Args:
            micro_batches: This rank's sequences; as many micro-batches as every other rank has.
            global_tokens: N above, over all ranks.
            lr: Learning rate of this step.
            judge: Is asked before the update, which makes the host wait for the device; a refused one leaves weights
                and optimizer state as they were, though random streams have moved on.
        """
        totals = torch.zeros(2, dtype=torch.float32, device=self._device.torch_device)
        scale = self._layout.data_size / global_tokens
        for micro_batch in micro_batches:
            tokens, labels = self._to_device(micro_batch)
            losses = self._engine(tokens, labels)
            loss = losses.sum() * scale
            self._engine.backward(loss, scale_wrt_gas=False)
            totals[0] += loss.detach()
            if self._prefix:
                # The mean is over fewer tokens by the share of a sequence that the prefix is.
                first = losses.detach()[:, : self._prefix]
                totals[1] += first.sum() * (scale * losses.shape[1] / first.shape[1])
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        dist.all_reduce(totals, op=dist.ReduceOp.SUM, group=self._layout.data_group)
        totals /= self._layout.data_size
        self._gate.open(judge, totals[0])
        self._engine.step()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        return StepResult(
            loss=totals[0],
            grad_norm=self._grad_norm(),
            skipped=self._gate.close(overflow=overflow, expected=self._scales_loss),
            prefix_loss=totals[1] if self._prefix else None,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[MicroBatch, torch.Tensor]]) -> torch.Tensor:
        """Return the mean loss over weighted sequences at each position, the same on every rank.

        Args:
            batches: Micro-batches of one length, as many as on every other rank, each with float weights [sequences]
                (0: padding).

        Returns:
            float64 [seq_len] on the CPU; its mean is the mean loss over all tokens.
        """
        # Sums of each position's losses, and of the weights behind them.
        sums = torch.zeros(1, dtype=torch.float64, device=self._device.torch_device)
        with self._evaluating():
            for micro_batch, weights in batches:
                tokens, labels = self._to_device(micro_batch)
                weights_here = weights.to(self._device.torch_device, torch.float64)
                losses = weights_here @ self._engine(tokens, labels).double()
                sums = sums + torch.cat((losses, weights_here.sum().reshape(1)))
        dist.all_reduce(sums, group=self._layout.data_group)
        return (sums[:-1] / sums[-1]).cpu()

    def second_moments(self) -> list[SecondMoment]:
        """The elements of Adam's second moment that this rank counts; see ``own_second_moments``."""
        return own_second_moments(self._engine.optimizer, self.module.named_parameters(), self._layout)

    def save(self, directory: Path, tag: str) -> None:
        """Write weights, optimizer state and loss scale of every rank to ``directory/tag``. Called by all ranks."""
        self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)

    def load(self, directory: Path, tag: str) -> None:
        """Read what ``save`` wrote, on the same layout. Called by all ranks.

        Raises:
            UserError: the checkpoint does not hold this layout's files.
        """
        path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise UserError(
                f"{directory / tag} holds no checkpoint of this layout; continue with the one that wrote it"
            )

    def weights_finite(self) -> bool:
        """Whether no weight on any rank is NaN or infinite. Called by all ranks; waits for the device."""
        return weights_finite(
            self.module.parameters(), data_rank=self._layout.data_rank, device=self._device.torch_device
        )

    def _own_norm(self, config: RunConfig) -> GradientNorm:
        return GradientNorm(
            self.module.parameters(),
            clip=config.optimizer.clip_grad,
            tensor_rank=self._layout.tensor_rank,
            tensor_group=self._layout.tensor_group,
        )

    def _grad_norm(self) -> torch.Tensor | float:
        # DeepSpeed's engine copies its optimizer's norm after the update; the gate needs it before.
        norm = self._engine.optimizer._global_grad_norm if self._norm is None else self._norm.last
        assert norm is not None, "DeepSpeed computed no gradient norm"
        return invalid_to_nan(norm.detach()) if isinstance(norm, torch.Tensor) else float(norm)

    def _to_device(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._device.torch_device
        return micro_batch.tokens.to(device, non_blocking=True), micro_batch.labels.to(device, non_blocking=True)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()


def _skip_shared_memory_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective at start on a CPU.

    The build takes half a minute, needs g++ and ninja, and a build that was killed leaves a lock on which every later
    process waits for ever; gloo does the same work.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
