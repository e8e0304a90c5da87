"""The tests' own Philox against the numbers its authors publish, and what masks made of it are like."""

import numpy as np
import pytest

from tests.kernels.accuracy import dropout_factors, noise, philox

_ONES = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_ONES,) * 4, (_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    assert philox(np.array([counter], dtype=np.uint64), key).tolist() == [list(result)]


def test_elements_take_the_words_of_a_block_in_order() -> None:
    assert noise(0, np.arange(4)).tolist() == list(KNOWN[0][2])


def test_the_index_has_64_bits() -> None:
    far = np.array([2**34, 2**34 + 1])
    assert noise(0, far).tolist() != noise(0, np.array([0, 1])).tolist()


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_share_of_kept(probability: float) -> None:
    factors = dropout_factors((400, 500), probability, 3)
    share = (factors != 0).double().mean().item()
    assert abs(share - (1 - probability)) < 5 * (probability * (1 - probability) / factors.numel()) ** 0.5 + 1e-12
    assert abs(factors.mean().item() - 1) < 0.02
