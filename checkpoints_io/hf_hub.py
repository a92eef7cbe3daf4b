"""Folders to the hub, by its own client. Its token is the client's to find, and stays with it."""

import re

from checkpoints_io.errors import BadInput, NoAccess, StorageError

ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def ready(repo: str, *, private: bool) -> None:
    """The repository is there when this returns, and may be written to.

    Raises:
      ValueError: it is called otherwise than owner/name, or open to all where it is to be private.
      PermissionError: the token may not write to it, or there is none.
      OSError: the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not re.fullmatch(ID, repo):
        raise BadInput(f"{repo!r} is not a repository of the hub: those look like 'owner/name'")
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        is_private = hub.repo_info(repo).private
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise NoAccess(
            f"the hub does not let you write to {repo}: log in with `hf auth login` or set "
            f"HF_TOKEN, with a token that may write there ({_first_line(error)})"
        ) from error
    except Exception as error:  # whatever the client makes of a network that is not there
        raise StorageError(
            f"the hub could not be reached to make {repo} ({_first_line(error)})"
        ) from error
    if private and not is_private:
        raise BadInput(f"{repo} is open to all, and it is to be private")


def push(folder: str, repo: str, message: str) -> None:
    """A commit of all files of the folder; what is there already is not sent again.

    `folder` is a path of this machine. Files of the repository that it has not are left.

    Raises:
      OSError: it could not be sent; what was sent need not be sent again.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message
        )
    except Exception as error:  # whatever the client makes of a network that goes away
        raise StorageError(
            f"{folder} could not be sent to {repo} ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
