"""Files that a kill or a full disk cannot leave half written."""

import os
from pathlib import Path

__all__ = ["write_text"]


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole: until that is done, ``file`` is what it was."""
    unfinished = file.with_name(file.name + ".tmp")  # in the same folder, since a rename cannot cross disks
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
