"""A small valid config as a tree, for tests to change."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.config.merging import merge
from megatron_ext.config.run import RunConfig


def small_tree(**sections: Any) -> dict[str, Any]:
    """The tree of a small valid run, with ``sections`` merged over it."""
    base: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        "data": {"sources": [{"prefix": "corpus"}]},
        "training": {"seq_len": 128, "batch_size": 8, "duration": {"steps": 100}},
        "learning_rate": {"peak": 1e-3},
    }
    return merge(base, sections)


def small_config(**sections: Any) -> RunConfig:
    """The same, checked."""
    return RunConfig.model_validate_json(json.dumps(small_tree(**sections)))


def write(path: Path, tree: Any) -> Path:
    """``tree`` as a JSON file at ``path``; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path
