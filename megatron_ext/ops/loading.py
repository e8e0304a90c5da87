"""The libraries of this process: found or built, loaded, and made known to torch."""

import ctypes
import functools

import torch

from megatron_ext.ops import (
    adam_variance,
    add_layer_norm,
    bias_dropout_add,
    bias_gelu,
    cross_entropy,
    layer_norm,
    softmax,
)
from megatron_ext.ops.building.builder import Library, build_library, cached_library, fitting_library, prebuilt_library
from megatron_ext.ops.building.recipe import Backend, recipe_for
from megatron_ext.ops.building.toolchain import KernelsUnavailableError
from megatron_ext.runtime.device import compute_capabilities
from megatron_ext.runtime.environment import kernel_environment

# Each has FAKES: functions that tell torch the shapes of an operator's results.
_OPERATIONS = (layer_norm, add_layer_norm, softmax, bias_gelu, bias_dropout_add, cross_entropy, adam_variance)


def find_library(backend: Backend, *, build: bool = True) -> Library | None:
    """The library of ``backend``: compiled by the installation, in the cache, or built into it now.

    Without ``build``, None where it is nowhere. Raises KernelsUnavailableError if it is nowhere and cannot be built.
    """
    environment, devices = kernel_environment(), compute_capabilities() if backend == "cuda" else []
    ahead = prebuilt_library(backend, devices)
    if ahead is not None:
        return ahead
    try:
        recipe = recipe_for(backend, environment, devices)
    except KernelsUnavailableError:
        # A machine without compilers that shares the cache of one that has them.
        found = fitting_library(backend, environment.cache, devices)
        if found is None:
            raise
        return found
    cached = cached_library(recipe, environment.cache)
    if cached is not None or not build:
        return cached
    return build_library(recipe, environment.cache, jobs=environment.jobs)


@functools.cache
def load_operators(backend: Backend) -> Library:
    """Load the operators for a kind of device into this process, building them where they are not built.

    The operators' schemas are in the CPU library, which is loaded on every machine. Raises KernelsUnavailableError if
    there is no library and none can be built, or it does not load.
    """
    if backend != "cpu":
        load_operators("cpu")
    library = find_library(backend)
    assert library is not None, "a library was neither found nor built"
    try:
        # Its names stay its own: torch finds the operators because the library registers them.
        ctypes.CDLL(str(library.path))
    except OSError as error:
        raise KernelsUnavailableError(
            f"{library.path} does not load ({error}); run `megatron-ext kernels build --{backend} --force`"
        ) from error
    if backend == "cpu":
        for operation in _OPERATIONS:
            for name, fake in operation.FAKES.items():
                torch.library.register_fake(f"megatron_ext::{name}", fake)
    return library


def is_loaded(backend: Backend) -> bool:
    """Whether this process has operators for a kind of device."""
    key = "CUDA" if backend == "cuda" else "CPU"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("megatron_ext::layer_norm_forward", key))
