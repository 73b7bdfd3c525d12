"""What a user can get wrong, told in one sentence that names the thing and the remedy."""

import contextlib
import errno
import importlib
from collections.abc import Iterator
from types import ModuleType

__all__ = ["ConfigError", "DataError", "ModelError", "UserError", "full_disk_is_an_error", "require"]


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


@contextlib.contextmanager
def full_disk_is_an_error(folder: str) -> Iterator[None]:
    """Turn a full disk, met while writing to ``folder``, into a `UserError`.

    Each writer says it in its own way: Python with errno, safetensors in the text of its own error, torch.save by the
    failure of its archive writer alone.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
            raise UserError(
                f"the disk of {folder} is full; free some space and start again, and the run goes on from its last "
                "complete checkpoint."
            ) from error
        raise
