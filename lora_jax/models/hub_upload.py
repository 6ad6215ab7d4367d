"""Uploads a directory to the Hugging Face Hub, into the repository of a model.

The token is the one that ``hf auth login`` has stored, or that of ``HF_TOKEN``; ``HF_ENDPOINT``
names another server than the Hub.
"""

import re
from pathlib import Path

from lora_jax.extras import require

require(__name__, "models", "huggingface_hub")

import huggingface_hub  # noqa: E402
from huggingface_hub import errors, utils  # noqa: E402

_NETWORK = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # of the Hub's client, by version
_LOGIN = 'log in with `hf auth login`, or set HF_TOKEN (a token with the role "write")'


def check(repo: str) -> None:
    """Checks what can be checked of an upload before there is anything to upload.

    Raises:
      ValueError: this is no name of a repository, or there is no token.

    >>> check("my-adapter")
    Traceback (most recent call last):
    ValueError: my-adapter is no repository of the Hub: give USER/NAME.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo):
        raise ValueError(f"{repo} is no repository of the Hub: give USER/NAME.")
    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise ValueError(f"{repo} is no repository of the Hub: {_join(error)}") from error
    if huggingface_hub.get_token() is None:
        raise ValueError(f"There is no token for {repo}: {_LOGIN}.")


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = "",
    message: str = "Upload with lora_jax",
    endpoint: str | None = None,
) -> str:
    """Uploads the files of a directory as a commit; the repository is made if there is none.

    Files of the repository that the directory lacks stay in it.

    Args:
      directory: directory to upload.
      repo: name of the repository, USER/NAME.
      private: whether the repository is to be private.
      revision: branch for the commit, which is made if there is none; "" for the main one.
      message: message of the commit.
      endpoint: address of the server; by default that of the Hub, or of ``HF_ENDPOINT``.

    Returns:
      The address of the commit.

    Raises:
      ValueError: the server refuses, or a repository that exists is public where a private one is
        wanted; the message says what to do.
      ConnectionError: the server can't be reached.
    """
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        _prepare(api, repo, private=private, revision=revision)
        commit = api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message=message, revision=revision or None
        )
    except Exception as error:  # each version of the client has errors of another library
        if known := _translate(error, api.endpoint, repo):
            raise known from error
        raise
    return str(commit.commit_url)


def _prepare(api: huggingface_hub.HfApi, repo: str, *, private: bool, revision: str) -> None:
    """Makes the repository and the branch, unless they are there."""
    if not api.repo_exists(repo):
        api.create_repo(repo, private=private)
    elif private and not api.model_info(repo).private:
        raise ValueError(
            f"--private: {repo} exists, and is public. Make it private in its settings, or give "
            "another name."
        )
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _translate(error: BaseException, endpoint: str, repo: str) -> Exception | None:
    """Returns an error of one line for one of the client's; None for what can't be foreseen."""
    if isinstance(error, RuntimeError) and error.__cause__:  # of one file among several
        return _translate(error.__cause__, endpoint, repo)
    if isinstance(error, errors.HfHubHTTPError):
        return ValueError(_explain(error, endpoint, repo))
    if isinstance(error, ValueError):
        return ValueError(_join(error))
    if isinstance(error, ConnectionError) or _library(error) in _NETWORK:
        advice = "try again with a connection"
        return ConnectionError(f"{endpoint} can't be reached ({_join(error)}): {advice}.")
    return None


def _explain(error: errors.HfHubHTTPError, endpoint: str, repo: str) -> str:
    status = error.response.status_code
    advice = {
        401: f"the token is not valid: {_LOGIN}",
        403: f"the token may not write to {repo}: USER must be yours or an organization of yours, "
        'and the token must have the role "write"',
        404: f"there is no {repo}, or the token may not see it: check USER and NAME",
        409: f"{repo} can't be made now, or exists already",
        429: "too many requests: try again later",
    }.get(status, "try again later" if status >= 500 else "")
    says = f" ({_join(error.server_message)})" if error.server_message else ""
    return f"{endpoint} answered {status}{says}{': ' if advice else ''}{advice}."


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _join(text: object) -> str:
    """Returns a text in one line."""
    return " ".join(str(text).split())
