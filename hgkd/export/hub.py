"""Exports on the Hugging Face hub: ``hgkd export --push user/name``, by huggingface_hub and the user's own login.

Nothing is sent unless it is asked for, and nothing before the proof has passed. The run cards stay at home: they hold the whole
config and paths of this machine; README.md is what the hub shows.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hgkd.errors import InvalidValueError, StoppedError, unknown_name_message
from hgkd.export.targets import TARGETS
from hgkd.weights.export_folder import CARD_FILE, CARD_PAGE


def check_push(repo: str, to: str) -> None:
    """Refuse what could not be pushed after an export; nothing is sent.

    Args:
        repo: ``user/name`` on the hub.
        to: the export's target.

    Raises:
        ValueError: a target without a layout on the hub, a malformed name, no login, or huggingface_hub is offline.
    """
    able = [name for name, target in TARGETS.items() if target.hub_library is not None]
    if to not in able:
        told = unknown_name_message("export target", to, TARGETS) if to not in TARGETS else f"--to {to} has no model card"
        raise InvalidValueError("push-target", f"--push {repo}: {told}; targets that the hub loads: {', '.join(able)}")
    try:
        validate_repo_id(repo)
        problem = None if repo.count("/") == 1 else "the user, or organisation, is missing"
    except HFValidationError as error:
        problem = str(error).partition(":")[0]
    if problem is not None:
        raise InvalidValueError("push-name", f"--push {repo!r} is no name on the hub ({problem}); give user/name")
    if constants.HF_HUB_OFFLINE:
        raise InvalidValueError("push-offline", f"--push {repo}: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if get_token() is None:
        raise InvalidValueError(
            "push-without-login", f"--push {repo} needs a login: run `hf auth login`, or set HF_TOKEN to a token that may write"
        )


def push_export(folder: Path, repo: str, private: bool = False) -> str:
    """Send an export to the hub; the repository is made where it is not there.

    Args:
        folder: of an export that :func:`check_push` has let pass.
        private: only its owner may see it.

    Returns:
        Its address.

    Raises:
        StoppedError: the hub refuses, cannot be reached, or has ``repo`` for everybody to see although it is to be private.
    """
    hub = HfApi()
    try:
        address = str(hub.create_repo(repo, private=private, exist_ok=True))
        visible = not hub.model_info(repo).private
        if not (private and visible):
            hub.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="hgkd export", ignore_patterns=[CARD_FILE, CARD_PAGE]
            )
    except Exception as error:  # of the hub's client, which has had several HTTP libraries
        raise StoppedError(
            "hub-refuses",
            f"{folder} is complete, but {hub.endpoint} does not take it as {repo}: {' '.join(str(error).split())}. Send it "
            f"later with `hf upload {repo} {folder}`",
        ) from error
    if private and visible:
        raise StoppedError(
            "hub-repository-public",
            f"{repo} is there already and everybody can see it, so --private cannot be kept and nothing was sent; {folder} is "
            "complete. Make it private on the hub, or give another name",
        )
    return address
