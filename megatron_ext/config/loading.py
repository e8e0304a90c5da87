"""From JSON files and ``--set`` arguments to a checked RunConfig: strict JSON, ``extends``, presets, overrides."""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from megatron_ext.config.merging import ConfigLayer, Tree, dotted, merge_all
from megatron_ext.config.messages import explain, show
from megatron_ext.config.regular import read_regular
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError

_PRESET = "preset:"
_IGNORED_KEYS = ("$comment", "$schema")
_MAX_DEPTH = 64
"""Of objects and lists in each other; a run config has about five."""
_TOO_DEEP = "the JSON is nested too deeply to be a run config"
_MAX_FILES = 200
"""That may be extended, one by the other or by one file."""


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
        layers.append(ConfigLayer("--set", parse_overrides(overrides)))
    return parse_layers(layers)


def parse_layers(layers: Sequence[ConfigLayer]) -> RunConfig:
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


def _parse_override(text: str) -> Tree:
    """``"a.b=value"`` as a tree ``{"a": {"b": value}}``; the value is JSON where it parses as JSON, else a string.

    Raises:
        UserError: there is no ``=``, or a part of the key is empty.
    """
    key, separator, value = text.partition("=")
    parts = key.strip().split(".", _MAX_DEPTH)
    if not separator or not all(parts):
        raise UserError(f"--set {show(text)} is not of the form section.key=value; e.g. --set training.seq_len=512")
    if len(parts) > _MAX_DEPTH:
        raise UserError(f"--set {show(text)}: no key has more than {_MAX_DEPTH} parts")
    tree: Any = _parse_value(value)
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """All ``--set`` arguments as one tree, so that their order only matters where two of them name the same key."""
    return merge_all(_parse_override(text) for text in overrides)


def _parse_value(text: str) -> Any:
    try:
        value = json.loads(text)
        _check_tree(value, path=(), source="--set")
    except RecursionError:
        raise UserError(f"--set {show(text)}: {_TOO_DEEP}") from None
    except ValueError:
        return text
    return value


class _Repeated(dict[str, Any]):
    """An object in which a key was written twice; ``key`` is that key."""

    key: str | None = None


def preset_names() -> list[str]:
    """Names of the shipped model sizes, as ``preset:NAME`` takes them."""
    files = resources.files("megatron_ext.config").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_layers(path: Path) -> list[ConfigLayer]:
    """The file and everything it extends, first the most basic one; a later layer overrides an earlier one.

    Raises:
        UserError: a file is missing, unreadable or no strict JSON object, or ``extends`` is of the wrong type, names
            an unknown preset, or leads back to a file that is being read.
    """
    # From the last one to the first, so that of a file that is reached several times the last place is kept: there it
    # wins over what comes before, whatever that is.
    layers: dict[Path | str, ConfigLayer] = {}
    _read(path, chain=(), into=layers)
    return list(reversed(layers.values()))


def _read(path: Path, *, chain: tuple[Path, ...], into: dict[Path | str, ConfigLayer]) -> None:
    resolved = _resolve(path)
    if resolved in chain:
        loop = " -> ".join(str(item) for item in (*chain[chain.index(resolved) :], resolved))
        raise UserError(f'{chain[-1]}: "extends" goes round in a circle: {loop}; remove one of these links')
    if resolved in into:
        return
    if len(into) == _MAX_FILES:
        raise UserError(f'{chain[-1]}: "extends" leads to more than {_MAX_FILES} files; put some of them together')
    text = _read_text(path, named_by=chain[-1] if chain else None)
    tree = parse_json(text, source=str(path), quote=not chain)
    into[resolved] = ConfigLayer(str(path), {key: value for key, value in tree.items() if key != "extends"})
    for name in reversed(_extended(tree, source=str(path))):
        if not name.startswith(_PRESET):
            _read(path.parent / name, chain=(*chain, resolved), into=into)
        elif name not in into:
            into[name] = _preset(name.removeprefix(_PRESET), source=str(path))


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of symbolic links, or a name that no file can have.
        raise UserError(f"config file {str(path)!r} cannot be read: {error}") from None


def _extended(tree: Tree, *, source: str) -> Sequence[str]:
    names = tree.get("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{source}: extends is {show(names)}: expected a file name, preset:NAME, or a list of these")
    return names


def _preset(name: str, *, source: str) -> ConfigLayer:
    names = preset_names()
    if name not in names:
        close = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean preset:{close[0]}? " if close else ""
        raise UserError(f"{source}: there is no preset {name!r}; {hint}The presets are {', '.join(names)}")
    file = resources.files("megatron_ext.config").joinpath("presets", f"{name}.json")
    return ConfigLayer(_PRESET + name, parse_json(file.read_text(encoding="utf-8"), source=_PRESET + name))


def _read_text(path: Path, *, named_by: Path | None) -> str:
    where = f' (named by "extends" in {named_by})' if named_by else ""
    try:
        return read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist{where}; check the path{_neighbors(path)}") from None
    except IsADirectoryError:
        raise UserError(f"config file {path} is a directory{where}; name the JSON file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text (byte {error.start}){where}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {path} cannot be read{where}: {error}") from None


def _neighbors(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.glob("*.json")]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def parse_json(text: str, *, source: str, quote: bool = True) -> Tree:
    """A strict JSON object: no repeated keys, no NaN; ``$comment`` and ``$schema`` keys are dropped.

    Args:
        text: the JSON.
        source: what a message calls it.
        quote: whether a message may show what stands where the syntax is wrong; never of what does not begin as an
            object does, since ``extends`` may name any file.

    Raises:
        UserError: naming ``source`` and, for a syntax error, line and column.
    """
    try:
        tree = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        _check_tree(tree, path=(), source=source)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}:{error.lineno}:{error.colno}: no valid JSON at line {error.lineno}, column {error.colno}: "
            f"{_syntax_hint(error, quote=quote and text.lstrip().startswith('{'))}"
        ) from None
    except RecursionError:
        raise UserError(f"{source}: {_TOO_DEEP}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: the file holds {_kind(tree)}: expected a JSON object, {{...}}")
    return tree


def _object(pairs: list[tuple[str, Any]]) -> Tree:
    tree = dict(pairs)
    for key in _IGNORED_KEYS:
        tree.pop(key, None)
    if len(tree) == len(pairs):
        return tree
    seen = _Repeated()
    for key, value in pairs:
        if key in _IGNORED_KEYS:
            continue
        if key in seen:
            seen.key = key
        seen[key] = value
    return dict(seen) if seen.key is None else seen


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON or a run config knows; write a finite number")


def _check_tree(value: Any, *, path: tuple[str | int, ...], source: str) -> None:
    """Raise UserError for a key that is written twice, RecursionError for what is deeper than what follows can take."""
    if len(path) > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, _Repeated) and value.key is not None:
        key = dotted((*path, value.key))
        raise UserError(f"{source}: {key} is written twice in the same object; keep one of the two")
    if not isinstance(value, dict | list):
        return
    items: Iterable[tuple[str | int, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for place, item in items:
        if isinstance(item, dict | list):
            _check_tree(item, path=(*path, place), source=source)


def _syntax_hint(error: json.JSONDecodeError, *, quote: bool) -> str:
    rest = error.doc[error.pos : error.pos + 30].lstrip()
    before = error.doc[: error.pos].rstrip()
    if not error.doc.strip():
        return "the file is empty; a run config is one JSON object"
    if rest.startswith(("#", "//", "/*")):
        return 'JSON has no comments; put the text under a "$comment" key'
    if before.endswith(",") and rest[:1] in {"}", "]"}:
        return f"remove the comma before {rest[0]!r}"
    if rest.startswith("'"):
        return "strings take double quotes"
    found = "the file ends too early; " if not rest else f"found {rest.splitlines()[0]!r}; " if quote else ""
    return f"{found}{error.msg[0].lower()}{error.msg[1:]}"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
