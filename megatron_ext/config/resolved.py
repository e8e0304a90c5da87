"""The resolved config of a run: checked once, and written as the one file from which every rank starts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.regular import read_regular
from megatron_ext.config.run import RunConfig


def resolved_json(config: RunConfig) -> str:
    """The text of a config file that says every value, so that nothing has to be looked up or filled in."""
    return json.dumps(config.model_dump(mode="json"), indent=1) + "\n"


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in ``path``; what is no resolved file takes the loader. Raises UserError as ``load_config``."""
    if not overrides:
        try:
            text = read_regular(path).decode()
            json.loads(text, object_pairs_hook=_without_repeated_keys)
            return RunConfig.model_validate_json(text)
        except (OSError, ValueError, RecursionError):
            pass  # the loader takes what is no resolved file, and says what is wrong with it
    from megatron_ext.config.loading import load_config

    return load_config(path, overrides)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is written twice")
