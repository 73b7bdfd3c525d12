"""What a user can get wrong, told in one sentence that names the thing and the remedy."""

import importlib
from types import ModuleType

__all__ = ["ConfigError", "DataError", "ModelError", "UserError", "require"]


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
