"""Sampling text from a model, one token at a time; the whole sequence runs through the model for each (no KV cache)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.model.gpt import Gpt


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    ``temperature`` divides the logits; 0 takes the most probable token. Then only the ``top_k`` most probable tokens
    stay, and of those the smallest set whose probability reaches ``top_p`` (nucleus sampling, arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; it must be above 0 and at most 1")

    def draw(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Token ids [b, 1] drawn from ``logits`` [b, vocab]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        values, ids = (logits.float() / self.temperature).sort(dim=-1, descending=True)
        if self.top_k is not None:
            values = values[:, : self.top_k]
        probabilities = values.softmax(dim=-1)
        if self.top_p is not None:
            # A token stays when the more probable ones do not reach top_p yet, so the first always does.
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: Gpt,
    tokens: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> torch.Tensor:
    """``tokens`` int64 [b, s] (s of 1 or more) with up to ``max_new_tokens`` more, [b, s + n].

    The model sees the last tokens that its position table has room for. With ``stop_token`` it ends early, once every
    sequence has produced that token; shorter ones are filled up with it. Under tensor parallelism all ranks of the
    group call this and get the tokens that their first rank drew. ``generator`` is on the model's device.
    """
    assert tokens.shape[1] > 0, "generation starts from at least one token"
    sampling = sampling or Sampling()
    layout, training = model.layout, model.training
    stopped = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # The last positions that fit into the table [b, <= positions]; of them the last one's logits [b, vocab].
            logits = model(tokens[:, -model.positions :], last_only=True)[:, -1]
            drawn = sampling.draw(logits, generator)
            # Ranks draw from generators of their own: the first one's tokens count.
            if layout.tensor_size > 1:
                dist.broadcast(drawn, group_src=0, group=layout.tensor_group)
            if stop_token is not None:
                drawn = drawn.masked_fill(stopped, stop_token)
                stopped = stopped | (drawn == stop_token)
            tokens = torch.cat([tokens, drawn], dim=1)
            if stop_token is not None and bool(stopped.all()):
                break
    finally:
        model.train(training)
    return tokens
