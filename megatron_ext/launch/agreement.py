"""Every rank runs the same config with the same versions and settings, or the run does not start.

A variable that does not travel, or a second installation on one host, otherwise trains something else on that host and
shows nowhere but in the loss.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any

from megatron_ext import __version__
from megatron_ext.base import differences
from megatron_ext.config.cluster import ALWAYS_FORWARDED
from megatron_ext.errors import UserError
from megatron_ext.launch.forwarding import looks_secret
from megatron_ext.runtime.environment import variables_like
from megatron_ext.runtime.rendezvous import Rendezvous

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


def check_agreement(rendezvous: Rendezvous, values: Mapping[str, Any], environment: Sequence[str]) -> None:
    """Compare config (``values``, as JSON), versions and environment of all ranks.

    ``environment`` holds names and globs of variables that are compared beside those that always travel. Raises
    UserError on every rank with the first difference: the key, the two values, and whose they are.
    """
    mine = statement_of(values, environment)
    digests = rendezvous.gather("digest", hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    statements = rendezvous.gather("statement", mine)
    for rank, statement in enumerate(statements):
        for key, one, other in differences(statement, statements[0]):
            raise UserError(
                f"{rendezvous.members[rank].title} has {key} {_shown(one)}, {rendezvous.members[0].title} has "
                f"{_shown(other)}; give every host the same (variables that are to travel are listed in "
                "cluster.environment)"
            )


def statement_of(values: Mapping[str, Any], environment: Sequence[str]) -> dict[str, Any]:
    """What this rank runs: every value of the config, versions, variables; of secrets a hash alone."""
    statement: dict[str, Any] = {"config": values, "Python": platform.python_version(), "megatron-ext": __version__}
    statement |= {name: _version(name) for name in _PACKAGES}
    for name, value in variables_like((*ALWAYS_FORWARDED, *environment)).items():
        if any(fnmatchcase(name, own) for own in _HOSTS_OWN):
            continue
        shown = f"(not shown, hash {hashlib.sha256(value.encode()).hexdigest()[:8]})" if looks_secret(name) else value
        statement[f"the environment variable {name}"] = shown
    return statement


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
