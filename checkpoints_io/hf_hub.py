"""Uploads folders to the hub with its own client, which alone finds and keeps the token."""

import pathlib
import re

from checkpoints_io.errors import BadInput, NoAccess, StorageError

ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
# What makes a folder the model or the adapters that it is: beside another's it would be read.
OF_A_MODEL = (
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|trained_on\.json|"
    r"(adapter_|generation_)?config\.json"
)


def ready(repo: str, *, private: bool) -> None:
    """Makes sure that the repository exists and may be written to.

    Raises:
      ValueError: its name is not owner/name, or it is public and should be private.
      PermissionError: there is no token, or it may not write to the repository.
      OSError: the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not re.fullmatch(ID, repo):
        raise BadInput(f"{repo!r} is not a hub repository: those look like 'owner/name'")
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        is_private = hub.repo_info(repo).private
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise NoAccess(
            f"the hub does not let you write to {repo}: log in with `hf auth login` or set "
            f"HF_TOKEN, with a token that may write there ({_first_line(error)})"
        ) from error
    except Exception as error:  # whatever the client raises when there is no network
        raise StorageError(
            f"the hub could not be reached to create {repo} ({_first_line(error)})"
        ) from error
    if private and not is_private:
        raise BadInput(f"{repo} is public, but should be private")


def push(folder: str, repo: str, message: str) -> None:
    """Commits all files of the folder; content that the hub already has is not sent again.

    `folder` is a path on this machine. Files of an earlier export that it lacks are removed: its
    weights (adapters or merged, in one file or several) would be loaded in place of these. All
    other files of the repository stay.

    Raises:
      OSError: it could not all be sent; what was sent need not be sent again.
    """
    import huggingface_hub

    hub, here = huggingface_hub.HfApi(), {path.name for path in pathlib.Path(folder).iterdir()}
    try:
        there = [name for name in hub.list_repo_files(repo) if re.fullmatch(OF_A_MODEL, name)]
        hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message,
            delete_patterns=[name for name in there if name not in here] or None,
        )  # fmt: skip
    except Exception as error:  # whatever the client raises when the network goes away
        raise StorageError(
            f"{folder} could not be sent to {repo} ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
