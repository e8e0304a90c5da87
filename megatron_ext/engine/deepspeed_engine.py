"""The engine on DeepSpeed: ZeRO 0 to 3, mixed precision and offloading under one accumulation boundary of our own."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist

from megatron_ext.engine.deepspeed_config import EngineSettings, clips_outside_engine, deepspeed_config, may_compile
from megatron_ext.engine.engine import MicroBatch, StepResult, UpdatePolicy
from megatron_ext.engine.second_moments import SecondMoment, own_second_moments
from megatron_ext.engine.update_gate import UpdateGate, invalid_to_nan, weights_finite
from megatron_ext.errors import UserError
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.parallel.groups import Layout, Mpu
from megatron_ext.runtime.device import Device

if TYPE_CHECKING:
    from megatron_ext.engine.gradient_norm import GradientNorm


class DeepSpeedEngine:
    """The model under DeepSpeed with our own accumulation boundary and loss normalization; an ``Engine``.

    The algebra. The step's loss is the mean over the N = batch_size * seq_len tokens of the global batch:

        loss = 1/N * sum over ranks r, micro-batches m, tokens i of l(r, m, i)

    Rank r calls backward on D/N * sum_i l(r, m, i) for each of its micro-batches; their gradients add up, and DeepSpeed
    averages over the D data-parallel ranks, which divides by D. What remains is the gradient of ``loss``, for
    micro-batches of any and unequal size. Tensor-parallel ranks hold the same tokens and are not averaged over.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: EngineSettings,
        *,
        layout: Layout,
        device: Device,
        prefix: int = 0,
    ) -> None:
        """Hand the model to DeepSpeed.

        Args:
            model: ``model(tokens, labels)`` gives per-token losses, float32 [sequences, seq_len].
            settings: Optimizer, precision, ZeRO and offloading.
            layout: This rank's place.
            device: This rank's device.
            prefix: First positions of a sequence whose mean loss is measured beside the loss; 0: not.

        Raises:
            UserError: the chosen optimizer kernel or precision cannot be had here.
        """
        _check_device(settings, device)
        # Built at start on a CPU otherwise: half a minute with g++ and ninja for what gloo does as well, and a build
        # that was killed leaves a lock on which every later process waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._layout = layout
        self._device = device
        self._prefix = prefix
        with _build_locks(settings):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(model.named_parameters(), settings.optimizer.weight_decay),
                mpu=Mpu(layout),
                config=deepspeed_config(settings, data_size=layout.data_size),
                dist_init_required=False,
            )
        self._norm = self._own_norm(settings.optimizer.clip_grad) if clips_outside_engine(settings) else None
        fused = isinstance(self._engine.basic_optimizer, torch.optim.AdamW)
        self._gate = UpdateGate(
            self._engine.basic_optimizer,
            own_norm=self._norm,
            grad_norm=self._grad_norm,
            # DeepSpeed's norm counts what tensor ranks hold as copies on the first of them.
            copies=self._copies if self._norm is None and layout.tensor_size > 1 else None,
            waits=not (device.is_gpu and fused),
        )
        self._scales_loss = settings.precision == "fp16"

    @property
    def module(self) -> torch.nn.Module:
        """The model, with DeepSpeed's dtype and partitioning."""
        module: torch.nn.Module = self._engine.module
        return module

    def step(
        self, micro_batches: Sequence[MicroBatch], *, global_tokens: int, lr: float, policy: UpdatePolicy | None = None
    ) -> StepResult:
        """Forward and backward over the micro-batches, then one update at ``lr``; see ``Engine.step``."""
        totals = torch.zeros(2, dtype=torch.float32, device=self._device.torch_device)  # loss, loss of the prefix
        scale = self._layout.data_size / global_tokens  # D/N of the algebra above
        for micro_batch in micro_batches:
            tokens, labels = self._to_device(micro_batch)  # both [sequences, seq_len]
            losses = self._engine(tokens, labels)  # float32 [sequences, seq_len]
            loss = losses.sum() * scale
            # Gradients only add up here: the boundary is our step() below, and 1/N is in the loss already.
            self._engine.backward(loss, scale_wrt_gas=False)
            totals[0] += loss.detach()
            if self._prefix:
                # mean of the prefix = D/(N * p/s) * sum over its p of s positions: fewer tokens, the same batch.
                first = losses.detach()[:, : self._prefix]  # [sequences, p]
                totals[1] += first.sum() * (scale * losses.shape[1] / first.shape[1])
        # The plan alone decides the rate; DeepSpeed has no scheduler here.
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # sum over ranks of D/N * sum(l), divided by D: the mean over the N tokens of the global batch.
        dist.all_reduce(totals, op=dist.ReduceOp.SUM, group=self._layout.data_group)
        totals /= self._layout.data_size
        # DeepSpeed reduces and clips inside its step; the gate stands between that and the optimizer's update.
        self._gate.open(policy, totals[0])
        self._engine.step()
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        skipped, grad_norm = self._gate.close(overflow=overflow, expected=self._scales_loss)
        return StepResult(
            loss=totals[0],
            grad_norm=grad_norm,
            skipped=skipped,
            prefix_loss=totals[1] if self._prefix else None,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[MicroBatch, torch.Tensor]]) -> torch.Tensor:
        """Mean loss over weighted sequences at each position, float64 [seq_len]; see ``Engine.evaluate``."""
        # [seq_len + 1]: each position's weighted losses, then the weights behind them. Broadcast from one zero, since
        # the length is known with the first batch.
        sums = torch.zeros(1, dtype=torch.float64, device=self._device.torch_device)
        with self._evaluating():
            for micro_batch, weights in batches:
                tokens, labels = self._to_device(micro_batch)
                weights_here = weights.to(self._device.torch_device, torch.float64)  # [sequences]
                losses = weights_here @ self._engine(tokens, labels).double()  # [sequences] @ [sequences, seq_len]
                sums = sums + torch.cat((losses, weights_here.sum().reshape(1)))
        # mean at position i = sum over ranks, sequences of w * l_i  /  sum over ranks, sequences of w
        dist.all_reduce(sums, group=self._layout.data_group)
        return (sums[:-1] / sums[-1]).cpu()

    def second_moments(self) -> list[SecondMoment]:
        """The elements of Adam's second moment that this rank counts; see ``own_second_moments``."""
        return own_second_moments(self._engine.optimizer, self.module.named_parameters(), self._layout)

    def save(self, directory: Path, tag: str) -> None:
        """Write weights, optimizer state and loss scale of every rank to ``directory/tag``."""
        self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)

    def load(self, directory: Path, tag: str) -> None:
        """Read what ``save`` wrote, on the same layout; see ``Engine.load``."""
        from megatron_ext.engine.state_files import read_state

        # DeepSpeed's own runs whatever a file says.
        self._engine.checkpoint_engine.load = read_state
        path, _ = self._engine.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise UserError(
                f"{directory / tag} holds no checkpoint of this layout; continue with the one that wrote it"
            )
        if hasattr(self._engine.basic_optimizer, "ds_opt_adam"):
            from megatron_ext.engine.cpu_adam import restore_bias_corrections

            restore_bias_corrections(self._engine.basic_optimizer)

    def weights_finite(self) -> bool:
        """Whether no weight on any rank is NaN or infinite; waits for the device."""
        return weights_finite(
            self.module.parameters(), data_rank=self._layout.data_rank, device=self._device.torch_device
        )

    def checksums(self) -> dict[tuple[str, str], int]:
        """(Parameter, which part of it) -> checksum of the bits of what this rank holds; waits for the device."""
        from megatron_ext.engine.copies import checksums

        return checksums(self.module.named_parameters(), self._layout)

    def _own_norm(self, clip: float) -> "GradientNorm":
        from megatron_ext.engine.gradient_norm import GradientNorm

        return GradientNorm(
            self.module.parameters(),
            clip=clip,
            tensor_rank=self._layout.tensor_rank,
            tensor_group=self._layout.tensor_group,
        )

    def _copies(self) -> list[torch.Tensor]:
        from megatron_ext.engine.copies import gradients_in_use

        return gradients_in_use(self._engine.optimizer) if self._layout.tensor_rank else []

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


def _build_locks(settings: EngineSettings) -> AbstractContextManager[None]:
    if not may_compile(settings):
        return nullcontext()
    from megatron_ext.ops.building.extensions import own_build_locks

    return own_build_locks()


def _check_device(settings: EngineSettings, device: Device) -> None:
    if settings.optimizer.implementation == "deepspeed_fused" and not device.is_gpu:
        raise UserError(
            'optimizer.implementation "deepspeed_fused" needs a GPU and this machine shows none; use "auto"'
        )
    if settings.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError('training.precision "fp16" is not supported by this device; use "bf16" or "fp32"')
