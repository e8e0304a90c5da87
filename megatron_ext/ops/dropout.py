"""Dropout whose mask is a function of a seed and an element's index, so that it is drawn again instead of kept.

The mask is that of csrc/common/abi.h, bit for bit: element i is kept where word i % 4 of Philox4x32-10 (Salmon et al.,
SC 2011) with key = (low, high) of the seed and counter (low, high of i / 4, 0, 0) is at least floor(p * 2^32). Kernels
draw it where they need it; here it is written in torch's integer operations.
"""

import ctypes

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
# Blocks of four elements whose words exist at the same time on a CPU: so few that they stay in its cache.
_TOGETHER = 2**14


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed int64 [1] on ``device``, from the generator that torch's own dropout there would draw from.

    So random streams, their forks and their replay in recomputation rule this dropout as they rule torch's, and the
    host waits for nothing.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_for(dropout: float, device: torch.device) -> torch.Tensor | None:
    """A seed where there is something to drop."""
    return draw_seed(device) if dropout > 0.0 else None


def kept(shape: tuple[int, ...] | torch.Size, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """Mask bool of ``shape`` on the seed's device: True where the element is kept."""
    count = 1
    for size in shape:
        count *= size
    threshold = int(_single(dropout) * 2**32)
    blocks = torch.arange(-(-count // 4), device=seed.device)
    pieces = torch.split(blocks, _TOGETHER) if seed.device.type == "cpu" else (blocks,)
    return torch.cat([philox(piece, seed).ge_(threshold).bool() for piece in pieces]).flatten()[:count].view(shape)


def dropped(x: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    """``x`` with elements dropped and the others multiplied by 1 / (1 - dropout); ``x`` itself where dropout is 0."""
    if dropout == 0.0:
        return x
    assert seed is not None, "dropout needs a seed"
    # In this order: the mask is exact in every dtype, and torch multiplies with a Python number in float32 or better.
    return x * kept(x.shape, dropout, seed) * (1.0 / (1.0 - _single(dropout)))


def philox(blocks: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Words int64 [n, 4], each below 2^32, of the blocks int64 [n] of noise of a seed int64 [1].

    Products of two 32-bit numbers wrap in int64; their bits are right all the same.
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    counter = [blocks & _LOW, (blocks >> 32) & _LOW, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    for _ in range(_ROUNDS):
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> 32).bitwise_and_(_LOW).bitwise_xor_(counter[1]).bitwise_xor_(key[0]),
            second.bitwise_and_(_LOW),
            (first >> 32).bitwise_and_(_LOW).bitwise_xor_(counter[3]).bitwise_xor_(key[1]),
            first.bitwise_and_(_LOW),
        ]
        key = [(word + weyl) & _LOW for word, weyl in zip(key, _WEYL, strict=True)]
    return torch.stack(counter, dim=-1)


def _single(value: float) -> float:
    """The float32 that kernels are given."""
    return ctypes.c_float(value).value
