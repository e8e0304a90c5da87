"""Settings every test shares: the CPU accelerator unless the caller chose another, one thread, no deadlines."""

import inspect
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from megatron_ext.parallel.groups import Layout

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline for an example is a timed test: it fails where the machine is busy.
settings.register_profile("project", deadline=None)
settings.register_profile("fast", deadline=None, max_examples=20)  # make test-fast
settings.load_profile("project")


@pytest.fixture(scope="session")
def fused() -> None:
    """The fused kernels for the CPU, loaded into this process; compiled into the cache at the first use."""
    from megatron_ext.ops.building.toolchain import KernelsUnavailableError
    from megatron_ext.ops.loading import load_operators

    try:
        load_operators("cpu")
    except KernelsUnavailableError as error:
        pytest.skip(f"no fused kernels here: {error}")


@pytest.fixture(scope="module")
def layout() -> Iterator["Layout"]:
    """Groups of this process alone."""
    from megatron_ext.parallel.groups import single_rank_layout

    with single_rank_layout() as layout:
        yield layout


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with token files and tokenizer of the small run."""
    from tests.train.small_run import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a private cluster, the kernels or other processes: no file has to say so."""
    seen: dict[object, bool] = {}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if {"lab", "cluster"} & fixtures:
            item.add_marker(pytest.mark.cluster)
        if "fused" in fixtures or {"kernels", "building"} & set(item.path.parts):
            item.add_marker(pytest.mark.kernels)
        if any(_starts_processes(function, seen) for function in _functions(item)):
            item.add_marker(pytest.mark.processes)


def _functions(item: pytest.Item) -> Iterator[Callable[..., object]]:
    """A test's function and those of its fixtures."""
    if isinstance(item, pytest.Function):
        yield item.function
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            yield from (definition.func for definition in definitions)


def _starts_processes(value: object, seen: dict[object, bool]) -> bool:
    """Whether a function or class of the tests, or one that it names, names what starts processes."""
    if value is subprocess or value is multiprocessing or isinstance(value, BaseContext):
        return True
    value = getattr(getattr(value, "hypothesis", None), "inner_test", value)
    value = inspect.unwrap(value) if callable(value) else value  # past contextmanager and mock.patch
    if not isinstance(value, FunctionType | type) or not value.__module__.startswith("tests."):
        return False
    if value not in seen:
        seen[value] = False  # of a recursion the answer is that of the rest
        parts = vars(value).values() if isinstance(value, type) else _named(value)
        seen[value] = any(_starts_processes(part, seen) for part in parts)
    return seen[value]


def _named(function: FunctionType) -> list[object]:
    """What the global names in a function stand for, those in functions inside it too."""
    code, names = [function.__code__], set[str]()
    for each in code:
        names.update(each.co_names)
        code += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return [function.__globals__.get(name) for name in names]
