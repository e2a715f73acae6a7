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
    made = Environment(loader=FileSystemLoader([*folders, TEMPLATES]), **settings)  # noqa: S701 - escapes by default
    made.globals["duration"] = duration
    return made


def duration(seconds: float) -> str:
    """A number of seconds in words, such as 2 h 5 min or 41 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
