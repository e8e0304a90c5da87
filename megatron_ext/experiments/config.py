"""An experiment: one base config, variants that each change a part of it, and seeds, as one JSON file says it.

    {
      "name": "comparison",
      "base": "base.json",
      "output_dir": "runs/comparison",
      "seeds": [1, 2, 3],
      "variants": {"baseline": {}, "slw": {"curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 200}}}}
    }

Every variant is merged into the base as a file that ``extends`` it would be (see merging.py), or is such a file. With a
``grid`` as well, every variant is trained at every point of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from megatron_ext.base import PositiveInt, Section, Seed
from megatron_ext.config.loading import parse_layers, read_layers
from megatron_ext.config.merging import ConfigLayer, Tree, merge
from megatron_ext.config.messages import ConfigError, explain
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_PLACES = frozenset({"variant", "seed", "experiment"})
_DECIDED = {"name": "run_name", "output_dir": "output_dir", "seed": "seeds"}
"""Keys of a run that the experiment decides -> its own key for that."""


class ExperimentConfig(Section):
    """The experiment's JSON file."""

    name: str
    """Name of the experiment, in reports."""

    base: str
    """Config that all variants change, relative to this file; a variant that is a file extends it."""

    output_dir: str
    """Where the run directories are made; relative paths start at the working directory."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1234,)
    """Every variant is trained once with each of these as its ``seed``."""

    variants: dict[str, dict[str, Any] | str] | None = None
    """Name of a variant -> sections of a run config that it changes (``{}`` is the base itself), or a file, relative to
    this one, that extends the base."""

    grid: dict[str, list[Any]] | None = None
    """``section.key`` -> values; every combination becomes a variant, or with ``variants`` one of each."""

    nproc: PositiveInt | None = None
    """Ranks on this machine; by default one per GPU, or one on a CPU."""

    run_name: str = "{variant}-seed{seed}"
    """Name of a run's directory; may hold ``{variant}``, ``{seed}`` and ``{experiment}``."""

    @model_validator(mode="after")
    def _checks(self) -> "ExperimentConfig":
        problems = list(_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


@dataclass(frozen=True)
class ExperimentRun:
    """One run of an experiment."""

    variant: str
    seed: int
    config: RunConfig


@dataclass(frozen=True)
class Experiment:
    """An experiment whose runs have all been checked."""

    config: ExperimentConfig
    source: Path
    """The file it was read from."""

    runs: tuple[ExperimentRun, ...]
    """Variant by variant in the file's order, all seeds of one next to one another."""


def load_experiment(path: Path) -> Experiment:
    """Read an experiment and the configs of all its runs.

    Raises:
        UserError: a file cannot be used at all.
        ConfigError: (a UserError) the experiment or any of its variants is wrong; the message lists all problems.
    """
    layers = read_layers(path)
    tree: Tree = {}
    for layer in layers:
        # Not merged deeply: a variant that a later file gives again is another variant.
        tree = tree | layer.tree
    try:
        config = ExperimentConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise explain(error, root=ExperimentConfig, tree=tree, layers=layers) from None
    return Experiment(config=config, source=path, runs=tuple(_runs(config, path)))


def _runs(config: ExperimentConfig, path: Path) -> list[ExperimentRun]:
    base = read_layers(path.parent / config.base)
    found: list[ExperimentRun] = []
    problems: list[str] = []
    for variant in variants_of(config):
        under = base if variant.file is None else _layers_of(variant, base, path)
        for seed in config.seeds:
            own = {"name": _run_name(config, variant.name, seed), "output_dir": config.output_dir, "seed": seed}
            layers = [*under, ConfigLayer(f"{path} (variant {variant.name})", variant.changes | own)]
            try:
                found.append(ExperimentRun(variant=variant.name, seed=seed, config=parse_layers(layers)))
            except ConfigError as error:
                problems.extend(error.problems)
                break  # the other seeds of the variant would say the same
    if problems:
        raise ConfigError(problems)
    return found


@dataclass(frozen=True)
class Variant:
    """What a variant changes: the base, or the base as ``file`` changes it."""

    name: str
    changes: Tree
    file: str | None = None


def _layers_of(variant: Variant, base: list[ConfigLayer], path: Path) -> list[ConfigLayer]:
    """The layers of a variant's file, which have to hold those of the base."""
    assert variant.file is not None, "the variant is a file"
    layers = read_layers(path.parent / variant.file)
    if base[-1].tree not in (layer.tree for layer in layers):
        raise UserError(
            f"{path}: variants.{variant.name} is {variant.file}, which does not extend {base[-1].source}: a comparison "
            "is of runs that change one base"
        )
    return layers


def variants_of(config: ExperimentConfig) -> list[Variant]:
    """All variants; the points of a grid are called after its keys' last parts and the values."""
    points = _points(config.grid or {})
    if config.variants is None:
        return [Variant(name, tree) for name, tree in points]
    found = []
    for name, given in config.variants.items():
        changes, file = ({}, given) if isinstance(given, str) else (given, None)
        # A point of the grid wins over the variant, as if it were given last.
        found += [Variant(f"{name}_{at}" if at else name, merge(changes, tree), file) for at, tree in points]
    return found


def _points(grid: Mapping[str, list[Any]]) -> list[tuple[str, Tree]]:
    """Name and tree of every combination of values; without keys, one that has no name and changes nothing."""
    keys = list(grid)
    short = [key.rpartition(".")[2] for key in keys]
    labels = short if len(set(short)) == len(short) else keys
    result = []
    for numbered in product(*(enumerate(values) for values in grid.values())):
        name = "_".join(f"{label}={_shown(value, at)}" for label, (at, value) in zip(labels, numbered, strict=True))
        tree: Tree = {}
        for key, (_, value) in zip(keys, numbered, strict=True):
            tree = _put(tree, key.split("."), value)
        result.append((name, tree))
    return result


def _put(tree: Tree, path: list[str], value: Any) -> Tree:
    """``tree`` with ``value`` at ``path``, which no other key of a grid goes through or ends on."""
    first, *rest = path
    return tree | {first: _put(tree.get(first, {}), rest, value) if rest else value}


def _shown(value: Any, position: int) -> str:
    """A value as part of a name: itself where it is simple, else its place in the list, counted from 1."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if re.fullmatch(r"[A-Za-z0-9.+-]{1,24}", text) else str(position + 1)


def _run_name(config: ExperimentConfig, variant: str, seed: int) -> str:
    return config.run_name.format(variant=variant, seed=seed, experiment=config.name)


def _problems(config: ExperimentConfig) -> Iterator[str]:
    if not _NAME.fullmatch(config.name):
        yield f"name is {json.dumps(config.name)}: {_allowed('a name')}"
    if len(set(config.seeds)) < len(config.seeds):
        yield f"seeds is {list(config.seeds)}: every seed once"
    if config.variants is None and config.grid is None:
        yield 'write variants, {"NAME": {sections}}, or grid, {"section.key": [values]}, or both'
        return
    if config.variants is not None:
        yield from _variant_problems(config.variants)
    if config.grid is not None:
        yield from _grid_problems(config.grid)
    yield from _run_name_problems(config)


def _allowed(what: str) -> str:
    return f"{what} takes letters, digits and . _ = + -, and begins with a letter or digit"


def _variant_problems(variants: Mapping[str, Tree | str]) -> Iterator[str]:
    if not variants:
        yield 'variants is {}: name at least one, for example "baseline": {}'
    for name, tree in variants.items():
        if not _NAME.fullmatch(name):
            yield f"variants has {json.dumps(name)}: {_allowed('the name of a variant')}"
        for key in sorted(_DECIDED.keys() & tree.keys()) if isinstance(tree, dict) else ():
            yield f"variants.{name}.{key}: the experiment decides it; use {_DECIDED[key]} of the experiment"


def _grid_problems(grid: Mapping[str, list[Any]]) -> Iterator[str]:
    if not grid:
        yield 'grid is {}: name at least one key, for example "learning_rate.peak": [0.001, 0.002]'
    for key, values in grid.items():
        path = key.split(".")
        if not all(path):
            yield f'grid has {json.dumps(key)}: write section.key, for example "learning_rate.peak"'
        elif path[0] in _DECIDED:
            yield f"grid.{key}: the experiment decides it; use {_DECIDED[path[0]]} of the experiment"
        below = [other for other in grid if other.startswith(f"{key}.")]
        if below:
            yield f"grid has {key} and {below[0]}, which is inside it: keep one of them"
        if not values:
            yield f"grid.{key} is []: give at least one value"
        texts = [json.dumps(value, sort_keys=True) for value in values]
        if len(set(texts)) < len(texts):
            yield f"grid.{key} is {values}: every value once"


def _run_name_problems(config: ExperimentConfig) -> Iterator[str]:
    template = config.run_name
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        yield f'run_name is {json.dumps(template)}: {error}; write for example "{{variant}}-seed{{seed}}"'
        return
    places = {name for _, name, _, _ in parts if name is not None}
    if unknown := sorted(places - _PLACES):
        yield f"run_name is {json.dumps(template)}: it may hold {{variant}}, {{seed}} and {{experiment}}, not {unknown}"
        return
    needed = {"variant"} if config.grid is not None or len(config.variants or ()) > 1 else set()
    needed |= {"seed"} if len(config.seeds) > 1 else set()
    if missing := sorted(needed - places):
        places_missing = " and ".join(f"{{{name}}}" for name in missing)
        yield f"run_name is {json.dumps(template)}: without {places_missing} several runs would share a directory"
    if any(literal and not re.fullmatch(r"[A-Za-z0-9._=+-]*", literal) for literal, *_ in parts):
        yield f"run_name is {json.dumps(template)}: {_allowed('a run name')}"
