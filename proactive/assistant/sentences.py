"""Fixed templates for sentences on what the user did, in the style of the training data."""

from collections.abc import Sequence

MAX_NAMES = 5  # titles or files in one sentence


def working(app: str, titles: Sequence[str]) -> str:
    """Say that an application was in front.

    Args:
        app: Its name.
        titles: The different titles of its windows, in the order of their first appearance; empty ones are left out.
    """
    named = [title for title in titles if title and title != app]
    return f"The user works in '{app}'{f' with {_quoted(named)}' if named else ''}."


def browsing(app: str, titles: Sequence[str], address: str | None) -> str:
    """Say that a browser was in front.

    Args:
        app: The name of the browser.
        titles: The titles of the tabs that are known.
        address: Host and path of the newest of them.
    """
    named = [title for title in titles if title]
    if not named:
        return f"The user browses the web in '{app}'."
    last = f"{', last' if len(named) > 1 else ''} at {address}" if address else ""
    return f"The user reads {_quoted(named)} in '{app}'{last}."


def editing(project: str, files: Sequence[str]) -> str:
    """Say that files of a project were in an editor; the project may be empty."""
    place = f" in the project '{project}'" if project else ""
    return f"The user works on the {'files' if len(files) > 1 else 'file'} {_quoted(files)}{place}."


def returning(seconds: float) -> str:
    """Say that the user came back after some seconds."""
    minutes = max(round(seconds / 60), 1)
    hours = round(minutes / 60)
    number, unit = (minutes, "minute") if minutes < 90 else (hours, "hour")
    return f"The user returns after {number} {unit}{'s' if number > 1 else ''}."


def _quoted(names: Sequence[str]) -> str:
    *most, last = [f"'{name}'" for name in names[:MAX_NAMES]]
    if len(names) > MAX_NAMES:
        most, last = [*most, last], f"{len(names) - MAX_NAMES} more"
    return f"{', '.join(most)} and {last}" if most else last
