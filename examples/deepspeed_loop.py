"""A plain DeepSpeed loop; the lines between the SLW marks add Sequence Length Warmup.

    python examples/deepspeed_loop.py
    deepspeed --num_gpus 2 examples/deepspeed_loop.py

Without those lines this is the baseline: the same budget of tokens, every step at the full length. With them a step at
a short length is also cut into fewer micro-batches, since more of its sequences fit.
"""

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported

import deepspeed
import torch.distributed as dist
from torch import nn

# SLW begin
from megatron_ext.curriculum import Duration, LinearPacing, RunSpec, TrainingPlan, micro_batch_sizes

# SLW end

SEQ_LEN, BATCH, MICRO_BATCH, WIDTH, TOKENS = 64, 16, 4, 64, 60_000
TEXT = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(100) for b in range(100))
CHARS = sorted(set(TEXT))
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own bookkeeping: accumulation is done below
    "managed_gradient_accumulation": False,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
}


class Model(nn.Module):
    """A recurrent network over characters: what it computes does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(len(CHARS), WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[sequences, T + 1] -> the sum of the T * sequences token losses."""
        logits = self.rnn(self.tokens(rows[:, :-1]))[0] @ self.tokens.weight.T  # [sequences, T, characters]
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


def main() -> None:
    """Train as one rank."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:  # started without a launcher
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(backend, init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and is not needed
    deepspeed.init_distributed(backend)
    torch.manual_seed(0)
    model = Model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=SETTINGS)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = torch.tensor([CHARS.index(char) for char in TEXT], device=engine.device)
    # SLW begin
    run = RunSpec(seq_len=SEQ_LEN, batch_size=BATCH, duration=Duration(tokens=TOKENS))
    plan = TrainingPlan.build(LinearPacing(start=8, duration=Duration(steps=60)), run)
    # SLW end
    step = tokens = 0
    while tokens < TOKENS:
        seq_len, sizes = SEQ_LEN, [MICRO_BATCH] * (BATCH // ranks // MICRO_BATCH)
        # SLW begin
        seq_len = plan[step].seq_len
        sizes = [*micro_batch_sizes(BATCH // ranks, seq_len, MICRO_BATCH * SEQ_LEN)]
        # SLW end
        starts = torch.randint(len(data) - SEQ_LEN, (BATCH, 1)).to(engine.device)  # the same on every rank
        rows = data[starts + torch.arange(seq_len + 1, device=engine.device)][rank::ranks]
        total = torch.zeros((), device=engine.device)
        for micro_batch in torch.split(rows, sizes):
            # Divided by the tokens of the global batch, times ranks because DeepSpeed averages over them.
            loss = engine(micro_batch) * ranks / (BATCH * seq_len)
            engine.backward(loss, scale_wrt_gas=False)
            total += loss.detach() / ranks
        engine.step()
        dist.all_reduce(total)
        tokens += BATCH * seq_len
        if rank == 0:
            print(f"step {step} length {seq_len} tokens {tokens} loss {total.item():.4f} micro-batches {len(sizes)}")
        step += 1
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
