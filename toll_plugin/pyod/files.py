"""Files that are complete or not there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when the block ends well.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If ``path`` is a folder.
    """
    path = path.resolve()  # a link keeps pointing to what is replaced
    if path.is_dir():
        msg = f"path must be a file, but {str(path)!r} is a folder"
        raise IsADirectoryError(msg)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part.touch(exist_ok=False)  # with the permissions that the process gives to new files
    try:
        if path.exists():
            part.chmod(path.stat().st_mode & 0o777)
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
