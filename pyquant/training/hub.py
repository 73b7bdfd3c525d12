"""Uploading a run's result to the model hub."""

from pathlib import Path

from .errors import ConfigError, UserError

__all__ = ["check_hub", "upload"]


def check_hub(name: str) -> None:
    """Make the repository that a run will be uploaded to, before the run.

    Raises:
        ConfigError: ``name`` is not owner/name.
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError(f"training.push_to_hub is {name}; write owner/name.")
    try:
        HfApi().create_repo(name, exist_ok=True)
    except Exception as error:  # of the network, of authentication, of permission: each library raises its own
        raise UserError(
            f"{name} cannot be made on the hub: {_reason(error)}; log in with `hf auth login`, check the network, or "
            "set training.push_to_hub to null."
        ) from error


def upload(folder: Path, name: str) -> str:
    """Upload a folder, and return the address of the repository.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=str(folder), commit_message="Result of pyquant train")
    except Exception as error:
        raise UserError(
            f"{folder} could not be uploaded to {name}: {_reason(error)}; all results are in place, upload them with "
            f"`hf upload {name} {folder}`."
        ) from error
    return f"https://huggingface.co/{name}"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
