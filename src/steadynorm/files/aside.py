"""Files that are there whole or not at all."""

import secrets
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_aside"]


def write_aside(contents: Mapping[Path, bytes]) -> None:
    """Writes each file beside its place, and when all are written, renames them.

    A reader never meets half of one, and after an error what was there before is there still. They are opened by name
    and not by `mkstemp`, so that others may read them as far as the umask lets them.

    Args:
        contents: By path; the folders are there.

    Raises:
        OSError: One of them cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_aside({path: b"whole"})
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    aside = {path: path.with_name(f".{path.name}.{secrets.token_hex(8)}") for path in contents}
    try:
        for path, content in contents.items():
            aside[path].write_bytes(content)
        for path, part in aside.items():
            part.replace(path)
    finally:
        for part in aside.values():
            part.unlink(missing_ok=True)
