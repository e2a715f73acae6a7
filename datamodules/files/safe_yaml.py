"""The one way in which YAML is read: configurations, prompts, and values of options.

What could run away, or become something else than texts, numbers, booleans, null, lists and mappings, is refused: tags,
deep nesting, aliases that multiply, NUL, and files that are none or too large. Dates stay texts.
"""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _loaders_dumpers

MOST_BYTES = 2**18
MOST_LEVELS = 64  # of lists and mappings within each other
MOST_NODES = 2**17  # with each alias counted as all that it stands for
_Loader: Any = _loaders_dumpers.get_yaml_default_loader()  # to which 1e-3 is a number, and a date a text


class TextLoader(yaml.SafeLoader):
    """PyYAML's loader in Python, which reads surrogate pairs as JSON has them, with jsonargparse's idea of numbers."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class SoundLoader(_Loader):
    """The loader of jsonargparse, which also tries texts within configurations as YAML; it has no setting for that."""

    def __init__(self, stream: Any) -> None:
        if isinstance(stream, str):
            _refuse_unsound(stream)
        super().__init__(stream)


_loaders_dumpers.yaml_default_loader = SoundLoader  # type: ignore[assignment]


class NotYamlError(yaml.YAMLError):
    """A text is no YAML that is read here; the message says why, in one line."""


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in plain types.

    Raises:
        NotYamlError: It is no YAML, or more than is read.
    """
    try:
        _refuse_unsound(text)
        return yaml.load(text, Loader=TextLoader)  # noqa: S506, it is a SafeLoader
    except NotYamlError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise NotYamlError(" ".join(str(error).split())[:300]) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says, in plain types.

    Raises:
        OSError: It cannot be read.
        NotYamlError: It is no file of YAML in UTF-8, or more than is read.
    """
    if path.exists() and not path.is_file():
        raise NotYamlError("it is no file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotYamlError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    return parse_yaml(text)


def _refuse_unsound(text: str) -> None:
    if len(text) > MOST_BYTES:
        raise NotYamlError(f"it has more than {MOST_BYTES:,} bytes")
    sizes: dict[str, int] = {}  # of what an anchor names
    open_nodes: list[tuple[str | None, int]] = []  # the lists and mappings around, and what came before each
    nodes = 0
    for event in yaml.parse(text, Loader=TextLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _problem("an alias of nothing, or of what it lies in", event)
            nodes += sizes[event.anchor]
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            nodes += 1
            if event.tag is not None and event.tag != "!":
                raise _problem(f"the tag {event.tag}", event)
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
                if len(open_nodes) > MOST_LEVELS:
                    raise _problem(f"more than {MOST_LEVELS} lists and mappings within each other", event)
            else:
                if "\0" in event.value or not _whole(event.value):
                    raise _problem("NUL, or half a surrogate pair", event)
                if event.anchor:
                    sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > MOST_NODES:
            raise _problem(f"more than {MOST_NODES:,} values, aliases included", event)


def _whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        return False
    return True


def _problem(what: str, event: yaml.Event) -> NotYamlError:
    return NotYamlError(f"it holds {what}, in line {event.start_mark.line + 1}")  # type: ignore[union-attr]
