"""What a user can get wrong, told in one sentence that names the thing and the remedy."""

import contextlib
import errno
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

__all__ = [
    "ConfigError",
    "DataError",
    "FullDiskError",
    "ModelError",
    "UserError",
    "existing_folder",
    "full_disk_is_an_error",
    "require",
]

# The last is how a small archive fails, which is written when it is closed.
_ARCHIVE_WRITER = re.compile(
    r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos|basic_ios::clear: iostream error",
    re.DOTALL,
)


class UserError(Exception):
    """A mistake of the user's, not of the program's; the command line prints its message without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A configuration key or command-line value is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data file is missing, empty, or lacks what training needs."""


class ModelError(UserError):
    """A model or adapter is missing or cannot be used."""


def require(module: str, extra: str | None = "train") -> ModuleType:
    """Import an optional dependency.

    Raises:
        UserError: it is not installed; the message names the extra that brings it, or the package where there is none.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        package = module.split(".")[0]
        what = package if extra is None else f"'pyquant[{extra}]'"
        raise UserError(f"{package} is not installed; install it with: pip install {what}.") from error


class FullDiskError(UserError):
    """A disk is full; the message names a folder on it."""


@contextlib.contextmanager
def full_disk_is_an_error(*folders: str | Path) -> Iterator[None]:
    """Turn a full disk, met while writing to one of ``folders``, into a `FullDiskError`.

    The message names the file that could not be opened, where the error knows it, else the folder with the least room.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        found = _full_disk(error)
        if found is None:
            raise
        where = getattr(found, "filename", None) or min(folders, key=_room)
        raise FullDiskError(
            f"the disk of {where} is full; free some space and start again, and a run goes on from its last complete "
            "checkpoint."
        ) from error


def existing_folder(folder: str | Path) -> Path:
    """The folder, or the nearest existing path above it."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def _room(folder: str | Path) -> int:
    return shutil.disk_usage(existing_folder(folder)).free


def _full_disk(error: BaseException) -> BaseException | None:
    """The error of a full disk among an error and those that led to it.

    Each writer says it in its own way: Python with errno, safetensors in the text of its own error, torch.save by the
    failure of its archive writer alone, in the words of its version.
    """
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        text = str(step)
        if isinstance(step, OSError) and step.errno in (errno.ENOSPC, errno.EDQUOT):
            return step
        if "No space left on device" in text or "Disk quota exceeded" in text or _ARCHIVE_WRITER.search(text):
            return step
        step = step.__cause__ or step.__context__
    return None
