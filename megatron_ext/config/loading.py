"""From a JSON file and ``--set`` arguments to a checked RunConfig."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from megatron_ext.config.explain import explain
from megatron_ext.config.files import Layer, read_layers
from megatron_ext.config.merging import merge_all, parse_overrides
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config in ``path``, with what it ``extends`` below it and ``overrides`` on top.

    Args:
        path: a JSON file. Its ``extends`` names one file or a list of them, relative to itself, or ``preset:NAME``;
            a later one wins over an earlier one and the file itself wins over all of them. Objects merge key by
            key; lists are replaced, and so are durations and a curriculum whose ``pacing`` changes.
        overrides: ``section.key=value`` strings; the value is JSON, or else a string.

    Raises:
        UserError: a file cannot be used at all.
        ConfigError: (a UserError) values are wrong: one message that lists all problems found, each with its key,
            the value found, what is expected, and the file.
    """
    layers = read_layers(Path(path))
    if overrides:
        layers.append(Layer("--set", parse_overrides(overrides)))
    return parse_layers(layers)


def parse_layers(layers: Sequence[Layer]) -> RunConfig:
    """The run config that ``layers`` describe together; see ``load_config``."""
    tree = merge_all(layer.tree for layer in layers)
    if "base" in tree and ("variants" in tree or "grid" in tree):
        raise UserError(
            f"{layers[0].source} describes an experiment, not one run; use `megatron-ext experiment run` with it"
        )
    try:
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise explain(error, root=RunConfig, tree=tree, layers=layers) from None
