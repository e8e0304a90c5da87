"""Every rank runs the same config with the same versions and settings, or the run does not start.

A variable that does not travel, or a second installation on one host, otherwise trains something else on that host and
shows nowhere but in the loss.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any

from megatron_ext import __version__
from megatron_ext.config.cluster import ALWAYS_FORWARDED
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import variables_like
from megatron_ext.runtime.forwarding import looks_secret
from megatron_ext.runtime.meeting import Meeting

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
# What may differ between hosts, or does because the launcher sets it.
_HOSTS_OWN = (
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_TOPO_FILE",
    "NCCL_HOSTID",
    "GLOO_SOCKET_IFNAME",
    "TORCH_NCCL_*",
)


def check_agreement(meeting: Meeting, config: RunConfig) -> None:
    """Compare config, versions and environment of all ranks.

    Raises:
        UserError: on every rank, the first difference: the key, the two values, and whose they are.
    """
    mine = statement_of(config)
    digests = meeting.gather("digest", hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    statements = meeting.gather("statement", mine)
    for rank, statement in enumerate(statements):
        for key in sorted(statement.keys() | statements[0].keys()):
            one, other = statement.get(key), statements[0].get(key)
            if one != other:
                raise UserError(
                    f"{meeting.members[rank].title} has {key} {_shown(one)}, {meeting.members[0].title} has "
                    f"{_shown(other)}; give every host the same (variables that are to travel are listed in "
                    "cluster.environment)"
                )


def statement_of(config: RunConfig) -> dict[str, str]:
    """What this rank runs: every value of the config, versions, variables; of secrets a hash alone."""
    statement = dict(_flat("config", config.model_dump(mode="json")))
    statement["Python"] = platform.python_version()
    statement["megatron-ext"] = __version__
    statement.update({name: _version(name) for name in _PACKAGES})
    patterns = (*ALWAYS_FORWARDED, *config.cluster.environment)
    for name, value in variables_like(patterns).items():
        if any(fnmatchcase(name, own) for own in _HOSTS_OWN):
            continue
        shown = f"(not shown, hash {hashlib.sha256(value.encode()).hexdigest()[:8]})" if looks_secret(name) else value
        statement[f"the environment variable {name}"] = shown
    return statement


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    else:
        yield prefix, json.dumps(value, sort_keys=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shown(value: str | None) -> str:
    return "unset" if value is None else value
