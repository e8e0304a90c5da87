"""A training loop like nanoGPT's in plain PyTorch; the lines between the SLW marks add Sequence Length Warmup.

    python examples/plain_pytorch.py

Without those lines this is the baseline: the same budget of tokens, every step at the full length.
"""

import math

import torch
from torch import Tensor, nn

# SLW begin
from megatron_ext.curriculum import Duration, LinearPacing, RunSpec, TrainingPlan

# SLW end

SEQ_LEN, BATCH, WIDTH, HEADS = 64, 16, 64, 4
TOKENS, WARMUP_STEPS, PEAK = 60_000, 20, 3e-3
TEXT = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(100) for b in range(100))
CHARS = sorted(set(TEXT))


class Block(nn.Module):
    """One layer of a GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> the same."""
        # [B, T, 3W] -> three of [B, heads, T, W / heads]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Two layers over characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(CHARS), WIDTH), nn.Embedding(SEQ_LEN, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, time] -> logits [batch, time, characters]; any time up to SEQ_LEN."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.blocks(x) @ self.tokens.weight.T  # type: ignore[no-any-return]


def learning_rate(step: int, tokens: int) -> float:
    """Warmup by steps, then cosine decay by consumed tokens: what suits steps of any length."""
    if step < WARMUP_STEPS:
        return PEAK * (step + 1) / WARMUP_STEPS
    return PEAK * 0.5 * (1 + math.cos(math.pi * min(tokens / TOKENS, 1)))


def main() -> None:
    """Train."""
    torch.manual_seed(0)
    data = torch.tensor([CHARS.index(char) for char in TEXT])
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    # SLW begin
    run = RunSpec(seq_len=SEQ_LEN, batch_size=BATCH, duration=Duration(tokens=TOKENS))
    plan = TrainingPlan.build(LinearPacing(start=8, duration=Duration(steps=60)), run)
    # SLW end
    step = tokens = 0
    while tokens < TOKENS:
        seq_len = SEQ_LEN
        # SLW begin
        seq_len = plan[step].seq_len
        # SLW end
        starts = torch.randint(len(data) - SEQ_LEN, (BATCH, 1))
        rows = data[starts + torch.arange(seq_len + 1)]  # [B, T + 1]: inputs and, one later, their targets
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, tokens)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += rows[:, 1:].numel()
        print(f"step {step} length {seq_len} tokens {tokens} loss {loss.item():.4f}")
        step += 1


if __name__ == "__main__":
    main()
