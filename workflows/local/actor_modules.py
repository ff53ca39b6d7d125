"""Whether a node could load these actor modules: asked before anything is started, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from routing.errors import InvalidInput

IMPORT_S = 60.0  # a module that imports a machine-learning library takes tens of seconds on a slow disk

# Elsewhere, because what an imported module starts or changes must not stay in us. Its last line is the fault.
_LOAD = """
import os, sys
from routing.errors import FerryError
from routing.settings import variables
from runtime.actor import ActorClasses
from workflows.local.actor_modules import fault_of
os.environ.update(variables())  # as a node of `ferry up` has them
try:
    ActorClasses.load(sys.argv[1:])
except FerryError as error:
    sys.exit(str(error).removeprefix("--actors "))
except Exception as error:
    sys.exit(fault_of(error))
"""


def check_actor_modules(modules: Sequence[str]) -> None:
    """Raises InvalidInput, one line, when a node could not load them from the current folder."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _LOAD, *modules], capture_output=True, text=True, check=False, timeout=IMPORT_S
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidInput(f"FERRY_ACTORS={','.join(modules)}: not imported within {IMPORT_S:g} s") from error
    if ended.returncode:
        fault = (ended.stderr.strip().splitlines() or [f"its import ended with status {ended.returncode}"])[-1]
        raise InvalidInput(f"FERRY_ACTORS={','.join(modules)}: {fault}")


def fault_of(error: Exception) -> str:
    """What a module raised, whatever that was, as one line."""
    return f"{type(error).__name__} while it was imported: {' '.join(str(error).split())}"
