"""Which machines run which tests in `make test`: all of them would take many minutes.

The emulator in forward order, the PTX of sm_90, the CPU and a device run everything. The emulator's other orders run
what a module names in ``EVERYWHERE``: for each of its tests, the values that parameters may have, so that every kernel
is run on every machine once. The rest, and all of the PTX of sm_80 and sm_100, is marked slow.
"""

from collections.abc import Collection, Mapping

import pytest

Everywhere = Mapping[str, Mapping[str, Collection[object]]]

SOME = frozenset({"emulator-reverse", "emulator-random"})
NONE = frozenset({"ptx-80", "ptx-100"})


def is_slow(everywhere: Everywhere, test: str, parameters: Mapping[str, object]) -> bool:
    """Whether a test with these parameters, ``backend`` among them, is left out of `make test`."""
    backend = parameters.get("backend")
    if backend in NONE:
        return True
    if backend not in SOME:
        return False
    chosen = everywhere.get(test)
    return chosen is None or any(parameters[name] not in values for name, values in chosen.items())


def mark_slow(items: Collection[pytest.Item]) -> None:
    """Marks what is left out, in modules that have ``EVERYWHERE``."""
    for item in items:
        everywhere = getattr(getattr(item, "module", None), "EVERYWHERE", None)
        callspec = getattr(item, "callspec", None)
        if everywhere is None or callspec is None:
            continue
        if is_slow(everywhere, getattr(item, "originalname", item.name), callspec.params):
            item.add_marker(pytest.mark.slow)
