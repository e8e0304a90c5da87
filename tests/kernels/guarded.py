"""Memory that shows who touches more than his own: tensors between unreadable pages, and canaries up to them.

A tensor ends at the page behind it, or less than 16 bytes before, so that it begins at a multiple of 16 as every tensor
of torch does. What lies between is filled with NaN bytes and must not change.
"""

import ctypes
import mmap
import weakref
from dataclasses import dataclass

import torch

PAGE = mmap.PAGESIZE
POISON = 0xFF  # NaN in every float type, -1 in integers

_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Mapping(mmap.mmap):
    """A mapping that can be weakly referred to."""


class GuardedMemory:
    """Gives out tensors between guard pages, and knows them for as long as they live."""

    def __init__(self) -> None:
        self._mappings: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()
        self._sizes: dict[int, int] = {}

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """A tensor of NaN bytes. ``alignment`` of its start, in bytes: its element size lets it end at the page."""
        size = torch.Size(shape).numel() * dtype.itemsize
        pages = max(1, -(-(size + alignment - 1) // PAGE))
        mapping = _Mapping(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        mapping[PAGE : (pages + 1) * PAGE] = bytes([POISON]) * (pages * PAGE)
        for guard in (base, base + (pages + 1) * PAGE):
            if _LIBC.mprotect(guard, PAGE, _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = ((pages + 1) * PAGE - size) // alignment * alignment
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=start)
        address = flat.data_ptr()
        assert address == base + start
        self._mappings[address] = mapping
        self._sizes[address] = size
        return flat.view(shape)

    def copy(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        """A copy of ``value`` (on the CPU) in guarded memory."""
        return self.empty(*value.shape, dtype=value.dtype, alignment=alignment).copy_(value)

    def region(self, tensor: torch.Tensor) -> tuple[int, int, int, int]:
        """Addresses of a tensor's memory: mapping, data, end of data, end of mapping; a view is given its base's."""
        address = tensor.untyped_storage().data_ptr()
        mapping = self._mappings.get(address)
        if mapping is None:
            start = tensor.data_ptr()
            return start, start, start + tensor.nbytes, start + tensor.nbytes
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        return begin, address, address + self._sizes[address], begin + len(mapping)

    def damaged(self, tensor: torch.Tensor) -> bool:
        """True where bytes between the tensor and its guard pages were written."""
        begin, data, data_end, end = self.region(tensor)
        if begin == data:
            return False
        before = ctypes.string_at(begin + PAGE, data - begin - PAGE)
        behind = ctypes.string_at(data_end, end - PAGE - data_end)
        return before.count(POISON) != len(before) or behind.count(POISON) != len(behind)


@dataclass(frozen=True)
class Guarded:
    """What the backends share that work in this process's memory."""

    name: str
    memory: GuardedMemory

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        """A copy of ``value`` in guarded memory."""
        return self.memory.copy(value, alignment=alignment)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """The same, filled with NaN bytes."""
        return self.memory.empty(*shape, dtype=dtype, alignment=alignment)
