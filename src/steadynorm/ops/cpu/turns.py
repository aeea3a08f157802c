"""One process compiles a kernel, the others wait and load it: ranks of one job all meet a new kernel at once."""

import os
import tempfile
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there each process compiles for itself
    fcntl = None

__all__ = ["turn"]

_PATIENCE = 60.0  # seconds; then whoever has the turn hangs, and one compiles as well
_PAUSE = 0.02


@contextmanager
def turn(name: str) -> Generator[None]:
    """Holds this user's turn to compile `name`, waiting until no other process does; never fails."""
    descriptor = None if fcntl is None else _opened()
    if descriptor is None:
        yield
        return
    try:
        _wait(descriptor, name)
        yield
    finally:
        os.close(descriptor)  # which ends the turn, as the death of the process would


def _opened() -> int | None:
    """A file that stands for all names, each a byte of it; a link that somebody else has laid is not followed."""
    path = Path(tempfile.gettempdir(), f"steadynorm-{os.getuid()}.lock")
    with suppress(OSError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return None


def _wait(descriptor: int, name: str) -> None:
    assert fcntl is not None  # noqa: S101 (nobody comes here without)
    place = zlib.crc32(name.encode())
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            time.sleep(_PAUSE)
        except OSError:  # a file system without locks
            return
        else:
            return
