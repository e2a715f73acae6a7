"""Safe reading of YAML: configurations, prompts, and values of options.

The result consists of texts, numbers, booleans, null, lists and mappings. Dates stay texts. Tags, deep nesting, aliases
that multiply, NUL, and files that are too large or not regular are refused.
"""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _loaders_dumpers

from datamodules.escaping import error_text

MAX_BYTES = 2**18
MAX_LEVELS = 64  # nested lists and mappings
MAX_NODES = 2**17  # each alias counts as everything that it expands to
_Loader: Any = _loaders_dumpers.get_yaml_default_loader()  # reads 1e-3 as a number, and a date as text


class TextLoader(yaml.SafeLoader):
    """PyYAML's Python loader, which reads surrogate pairs as JSON does, with jsonargparse's number formats."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class CheckedLoader(_Loader):
    """The loader of jsonargparse for texts in configurations, with our checks. It has no setting for a loader."""

    def __init__(self, stream: Any) -> None:
        if isinstance(stream, str):
            _check_limits(stream)
        super().__init__(stream)


_loaders_dumpers.yaml_default_loader = CheckedLoader  # type: ignore[assignment]


class NotYamlError(yaml.YAMLError):
    """A text is not YAML, or is refused; the message says why in one line."""


def parse_yaml(text: str, limit: int = MAX_BYTES) -> Any:
    """Parse YAML of at most `limit` characters into plain types.

    Raises:
        NotYamlError: The text is not YAML, or is refused.
    """
    try:
        _check_limits(text, limit)
        return yaml.load(text, Loader=TextLoader)  # noqa: S506, it is a SafeLoader
    except NotYamlError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise NotYamlError(error_text(error, 300)) from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file into plain types.

    Raises:
        OSError: The file cannot be read.
        NotYamlError: It is not a regular file of YAML in UTF-8, or is refused.
    """
    if path.exists() and not path.is_file():
        raise NotYamlError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotYamlError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    return parse_yaml(text)


def _check_limits(text: str, limit: int = MAX_BYTES) -> None:
    """Raise a NotYamlError for a YAML text that is too large, or that has tags, deep nesting or too many values."""
    if len(text) > limit:
        raise NotYamlError(f"it has more than {limit:,} bytes")
    sizes: dict[str, int] = {}  # number of values of each anchor
    open_nodes: list[tuple[str | None, int]] = []  # the open lists and mappings: anchor, number of values before
    nodes = 0
    for event in yaml.parse(text, Loader=TextLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _problem("an alias without an anchor, or within its own anchor", event)
            nodes += sizes[event.anchor]
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            nodes += 1
            if event.tag is not None and event.tag != "!":
                raise _problem(f"the tag {event.tag}", event)
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
                if len(open_nodes) > MAX_LEVELS:
                    raise _problem(f"more than {MAX_LEVELS} nested lists and mappings", event)
            else:
                if "\0" in event.value or not _has_no_lone_surrogate(event.value):
                    raise _problem("NUL, or half a surrogate pair", event)
                if event.anchor:
                    sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > MAX_NODES:
            raise _problem(f"more than {MAX_NODES:,} values, aliases included", event)


def _has_no_lone_surrogate(text: str) -> bool:
    """Check that a text has no unpaired surrogates."""
    try:
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        return False
    return True


def _problem(what: str, event: yaml.Event) -> NotYamlError:
    return NotYamlError(f"it contains {what}, in line {event.start_mark.line + 1}")  # type: ignore[union-attr]
