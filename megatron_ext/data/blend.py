"""Samples of several corpora by weight, in the order of megatron-core's BlendedDataset."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers

from megatron_ext.data.index_cache import Arrays

if TYPE_CHECKING:
    from megatron_ext.data.datasets import Samples


def build_blend(weights: list[float], samples: int) -> Arrays:
    """Corpus of each sample and number of the sample in it [samples], with the shares ``weights``, whose sum is 1."""
    part_of, index_of = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(part_of, index_of, weights, len(weights), samples, False)
    return {"part_of": part_of, "index_of": index_of}


@dataclass(frozen=True)
class Blend:
    """The samples; ``build_blend`` makes the arrays."""

    parts: "tuple[Samples, ...]"
    """One per corpus."""

    part_of: npt.NDArray[np.int16]
    """Corpus of each sample [samples]."""

    index_of: npt.NDArray[np.int64]
    """Sample of that corpus [samples]."""

    @property
    def seq_len(self) -> int:
        """Tokens of a full sequence."""
        return self.parts[0].seq_len

    @property
    def vocab_size(self) -> int:
        """Every id has to be below it."""
        return self.parts[0].vocab_size

    def __len__(self) -> int:
        return len(self.part_of)

    def check_files(self) -> None:
        """Raise UserError where a file has become too short to read."""
        for part in self.parts:
            part.check_files()

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        """Token ids [first, first + count) of sample ``index``."""
        return self.parts[int(self.part_of[index])].read(int(self.index_of[index]), first, count)
