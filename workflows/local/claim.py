"""The right to run a server on a data folder: held by one process at a time, and freed by its death."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from routing.errors import InvalidInput
from workflows.local.process import process_exists

_FREED_WITHIN_S = 5.0  # servers of an owner killed with SIGKILL die with it, but not in the same instant
_LOOK_EVERY_S = 0.02


def make_data_folder(data_dir: Path) -> None:
    """Make it unless it is there. Raises InvalidInput when it cannot be one, a file for instance."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(data_dir, error) from error


class Claim:
    """An exclusive lock on `<data_dir>/<server>.lock`, a file that also names the owner's process id.

    The descriptor is meant to be inherited by the server: then the folder stays claimed until owner *and* server are
    gone, and two servers never write the same files, whoever was killed. The kernel frees it; nothing goes stale.
    """

    def __init__(self, data_dir: Path, server: str) -> None:
        """Take the lock. Raises InvalidInput when the folder cannot be used, or another live process has it."""
        make_data_folder(data_dir)
        self._path = data_dir / f"{server}.lock"
        try:
            self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unusable(data_dir, error) from error
        try:
            self._take(server)
        except BaseException:
            self.release()
            raise
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Give the lock up, as far as this process goes. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _take(self, server: str) -> None:
        deadline = time.monotonic() + _FREED_WITHIN_S
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                owner = int(self._path.read_text() or 0)
                if (owner and process_exists(owner)) or time.monotonic() > deadline:
                    raise InvalidInput(
                        f"data folder {self._path.parent} is in use: its {server} server belongs to process {owner}; "
                        "stop that, or choose another folder with FERRY_DATA_DIR"
                    ) from None
                time.sleep(_LOOK_EVERY_S)


def _unusable(data_dir: Path, error: OSError) -> InvalidInput:
    no_folder = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "it is no folder, or is not in one" if no_folder else error.strerror
    return InvalidInput(f"data folder {data_dir} cannot be used ({reason}): choose another one with FERRY_DATA_DIR")
