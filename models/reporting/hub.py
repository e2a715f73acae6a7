"""Pushing an export to a model hub."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx2

from datamodules.errors import UserError
from datamodules.escaping import error_text
from models.learning.checkpoint_paths import EXPORT_STATE
from models.learning.saved_models import export_state
from models.networks.adapter_files import ADAPTER_CONFIG
from models.reporting.model_card import HUB_ID

TOKEN_VARIABLE = "HF_TOKEN"  # noqa: S105 - the name of a variable
# Parts of JSON files whose texts may be paths of this machine.
MAY_NAME_PATHS = {EXPORT_STATE: ("model", "data.hyperparameters", "base", "backbone_config"), ADAPTER_CONFIG: ("",)}


def refuse_push(name: str) -> None:
    """Check what a push needs, before anything is loaded or written.

    Raises:
        UserError: The name is not that of a repository, or the environment has no token.
    """
    if "/" not in name or not HUB_ID.fullmatch(name):
        raise UserError(f"--push: {name} is not the name of a repository", "Give ORGANIZATION/NAME or USER/NAME.")
    if not os.environ.get(TOKEN_VARIABLE):
        raise UserError(
            f"--push: the environment variable {TOKEN_VARIABLE} is not set", "Set it to a token that may write."
        )


def push(folder: Path, name: str, public: bool) -> str:
    """Push the files of an export in one commit. Paths of this machine are replaced by their last part.

    Args:
        folder: The export. Files that a user added to it are not pushed.
        name: The repository, ORGANIZATION/NAME. It is created if it does not exist.
        public: Whether a new repository is public.

    Returns:
        The address of the repository.

    Raises:
        UserError: The hub cannot be reached, or it refuses the push.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi(os.environ.get("HF_ENDPOINT"), os.environ[TOKEN_VARIABLE], library_name="proactive")
    written = [*export_state(folder)["files"], EXPORT_STATE]
    files = [CommitOperationAdd(path, _content(folder / path)) for path in sorted(set(written))]
    try:
        place = hub.create_repo(name, private=not public, exist_ok=True)
        hub.create_commit(name, files, commit_message="Export of a run")
    except (httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"--push: {name} was not pushed: {error_text(error, 300)}",
            f"Check the network, HF_ENDPOINT, and that the token may write; the export is in {folder}.",
        ) from error
    return str(place)


def _content(path: Path) -> Path | bytes:
    """A file to push: its path, or its content without paths of this machine."""
    if path.name not in MAY_NAME_PATHS:
        return path
    content = json.loads(path.read_text(encoding="utf-8"))
    for where in MAY_NAME_PATHS[path.name]:
        content = _changed(content, where.split(".") if where else [])
    return json.dumps(content, indent=1).encode()


def _changed(content: Any, where: list[str]) -> Any:
    if not where:
        return _without_paths(content)
    if not isinstance(content, dict) or where[0] not in content:
        return content
    return {**content, where[0]: _changed(content[where[0]], where[1:])}


def _without_paths(value: Any) -> Any:
    """Replace each path in a value by its last part. Names of a hub, ORGANIZATION/NAME, stay."""
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, str) and "/" in value and (Path(value).exists() or not HUB_ID.fullmatch(value)):
        return Path(value).name
    return value
