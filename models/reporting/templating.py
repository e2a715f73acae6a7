"""The jinja2 environment of pages and model cards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


def template_environment(*folders: Path, **options: Any) -> "Environment":
    """A jinja2 environment. Its templates escape all values, and a missing value is an error.

    Args:
        folders: Folders of templates, searched before the shared ones.
        options: Other options of jinja2's Environment.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    settings: dict[str, Any] = {"undefined": StrictUndefined, "autoescape": True, **options}
    return Environment(loader=FileSystemLoader([*folders, TEMPLATES]), **settings)  # noqa: S701 - escapes by default
