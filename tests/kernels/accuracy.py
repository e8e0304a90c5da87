"""How exact results of kernels have to be: against float64, by what torch itself achieves in the same dtype.

Errors are taken row by row (over the last dimension), relative to the largest value of the row: a row of small values
is not excused by a row of large ones.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

F32, F16, BF16 = FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of activations."""

# Times torch's own error, and on top of it units in the last place of the row's largest value: torch is exact on some
# inputs, and float32 results of a device come from exponentials and roots that are right to some units.
TIMES_TORCH = 2.0
LAST_PLACES = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in ordinary memory, whatever machine the tensor is on."""
    return tensor.detach().cpu().clone()


def check(
    name: str, got: torch.Tensor, exact: torch.Tensor, torchs: torch.Tensor, *, terms: torch.Tensor | None = None
) -> None:
    """Holds ``got`` against ``exact`` (float64), with ``torchs``, torch's result in that dtype, as the measure.

    ``terms`` is the size of what a result is the difference of, where it may be much smaller than that: units in the
    last place of float32 of it are allowed too. Where the exact result is not a finite number of the dtype, ``got``
    must be the same infinity or NaN.
    """
    got, exact, torchs = cpu(got), cpu(exact), cpu(torchs)
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} is not {tuple(exact.shape)}"
    rounded = exact.to(got.dtype)
    special = ~rounded.isfinite()
    same = torch.equal(got[special].double().nan_to_num(nan=0.5), rounded[special].double().nan_to_num(nan=0.5))
    assert same, f"{name}: {got[special][:8]} where {rounded[special][:8]} is right"
    wrong = got.double().sub(exact).abs().masked_fill(special, 0.0)
    allowance = torchs.double().sub(exact).abs().masked_fill(special, 0.0).nan_to_num(nan=0.0, posinf=0.0)
    scale = exact.abs().masked_fill(special, 0.0)
    if got.dim() > 0 and got.numel() > 0:
        allowance, scale = allowance.amax(-1, keepdim=True), scale.amax(-1, keepdim=True)
    unit = torch.finfo(got.dtype).eps
    tiny = torch.finfo(got.dtype).smallest_normal * unit
    limit = TIMES_TORCH * allowance + LAST_PLACES[got.dtype] * unit * scale + tiny
    if terms is not None:
        limit = limit + LAST_PLACES[torch.float32] * torch.finfo(torch.float32).eps * cpu(terms).double()
    bad = ~(wrong <= limit)
    if bad.any():
        place = tuple(int(index) for index in bad.nonzero()[0])
        raise AssertionError(
            f"{name}{list(place)} is {got[place].item()!r}, exactly {exact[place].item()!r}, torch has "
            f"{torchs[place].item()!r}; {int(bad.sum())} of {bad.numel()} are further off than allowed"
        )


def same_bits(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Holds that two tensors have the same bytes, NaN or not."""
    got, expected = cpu(got), cpu(expected)
    assert got.dtype == expected.dtype, name
    assert got.shape == expected.shape, name
    equal = got.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert bool(equal.all()), f"{name}: {int((~equal).sum())} bytes differ"


def normal(
    shape: Sequence[int], dtype: torch.dtype, *, seed: int, scale: float = 1.0, mean: float = 0.0
) -> torch.Tensor:
    """Normally distributed values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale + mean).to(dtype)


# ---- the noise of dropout, written a second time ---------------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Philox4x32-10 of counters [n, 4] under one key, from its definition: Salmon et al., SC 2011, section 4.3."""
    x = [counter[:, word].copy() for word in range(4)]
    for turn in range(10):
        keys = [np.uint64((part + turn * weyl) & _WORD) for part, weyl in zip(key, _WEYL, strict=True)]
        products = [x[0] * np.uint64(_MULTIPLIERS[0]), x[2] * np.uint64(_MULTIPLIERS[1])]
        high, low = [each >> np.uint64(32) for each in products], [each & np.uint64(_WORD) for each in products]
        x = [high[1] ^ x[1] ^ keys[0], low[1], high[0] ^ x[3] ^ keys[1], low[0]]
    return np.stack(x, axis=1)


def noise(seed: int, elements: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The word of noise of each element, as csrc/common/abi.h lays it out."""
    blocks = elements.astype(np.uint64) >> np.uint64(2)
    zero = np.zeros_like(blocks)
    counter = np.stack([blocks & np.uint64(_WORD), blocks >> np.uint64(32), zero, zero], axis=1)
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    return words[np.arange(len(elements)), elements % 4]


def dropout_factors(shape: Sequence[int], probability: float, seed: int) -> torch.Tensor:
    """What each element is multiplied by, float64: 0, or 1 / (1 - p) with the float32 that is passed as p."""
    p = float(np.float32(probability))
    count = int(np.prod(shape))
    kept = noise(seed, np.arange(count, dtype=np.int64)) >= np.uint64(int(p * 2**32))
    return torch.from_numpy(np.where(kept, 1.0 / (1.0 - p), 0.0)).reshape(tuple(shape))
