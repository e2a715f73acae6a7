"""The docs: the links, files, options and classes that they name exist, and every page is in the site."""

import contextlib
import io
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

import proactive
from proactive.commands import COMMANDS, HELP_IS_CACHED
from tests.helpers import ROOT

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

HELPS = {
    "fit": [["--task=reward"], ["--task=agent"], ["--task=preference"], ["--task=online"]],
    "plan": [["--task=reward"], ["--task=agent"], ["--task=preference"], ["--task=online"]],
    "evaluate": [["reward"], ["agent"]],
    "annotate": [["import"], ["serve"], ["export"], ["agreement"]],
    "live": [[], ["export"]],
    "gate": [["recalibrate"]],
    "simulate": [["scenes"], ["traces"], ["rows"]],
}
OPTION = r"(?<![\w-])--[a-z][\w.-]*\w"


def tokens(page: Path) -> Iterator[Token]:
    """All tokens of a page, those of lines of text included."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def anchors(page: Path) -> set[str]:
    """What GitHub and the site make of a page's headings."""
    found = list(tokens(page))
    headings = [after.content for before, after in pairwise(found) if before.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a page that lead to no file, or to no heading of it."""
    targets = [str(token.attrGet("href") or token.attrGet("src") or "") for token in tokens(page)]
    broken = []
    for target in targets:
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@each_page
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One heading\n[a](b.md) ![b](no.svg) [c](#one-heading) [d](#two) [e](a.md#two)\n")
    assert broken_links(tmp_path / "a.md") == ["b.md", "no.svg", "#two", "a.md#two"]


@each_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    code = [token.content for token in tokens(page) if token.type in ("code_inline", "fence")]
    folders = "proactive|callbacks|models|datamodules|configs|benchmarks|tests|docs"
    named = {path for text in code for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.(?:py|yaml|md)", text)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@cache
def known_options(command: str) -> frozenset[str]:
    """All options that a command and its subcommands have, for either task, as --help prints them."""
    main = import_module(f"proactive.{command}").main
    printed = io.StringIO()
    for arguments in HELPS.get(command, [[]]):
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            main([*arguments, "--help=all" if command in HELP_IS_CACHED else "--help"])
    return frozenset(re.findall(OPTION, printed.getvalue()))


def known(option: str, options: frozenset[str]) -> bool:
    """Whether an option is among them, or is a field of one, which --help does not print: model.adapter.rank."""
    return option in options or (option.count(".") > 1 and ".".join(option.split(".")[:2]) in options)


def unknown_options(text: str) -> list[str]:
    """Options that a text gives to a command that lacks them, and options with a dot that no command has."""
    commands = re.findall(rf"\bproactive[. ]({'|'.join(COMMANDS)})\b(.*)", text.replace("\\\n", " "))
    unknown = [
        f"{command} {option}"
        for command, arguments in commands
        for option in re.findall(OPTION, arguments)
        if not known(option, known_options(command))
    ]
    if not commands:
        everywhere = frozenset[str]().union(*(known_options(command) for command in COMMANDS))
        unknown += [option for option in re.findall(OPTION, text) if "." in option and not known(option, everywhere)]
    return unknown


@each_page
def test_options_that_a_page_names_exist(page: Path) -> None:
    code = [token.content for token in tokens(page) if token.type in ("code_inline", "fence")]
    assert [option for text in code for option in unknown_options(text)] == []


def test_unknown_options_are_found() -> None:
    assert unknown_options(
        "python -m proactive.plan \\\n  --device l4 --trainer.strategy.init_args.replicas 2 --cost-ratio 2"
    ) == ["plan --cost-ratio"]
    assert unknown_options("--run.name a, --data.nothing b, --only c") == ["--data.nothing"]


@each_page
def test_functions_and_classes_that_a_page_names_exist(page: Path) -> None:
    code = [token.content for token in tokens(page) if token.type == "code_inline"]
    code += re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M)  # on a reference page
    named = [
        name for name in code if re.fullmatch(r"(proactive|callbacks|models|datamodules)(\.\w+)+(?<!\.json)", name)
    ]
    assert [name for name in named if locate(name) is None] == []


def entries(navigation: list[dict[str, Any]]) -> Iterator[str]:
    for entry in navigation:
        for value in entry.values():
            yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(entries(site["nav"])) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


def test_changelog_has_the_headings_of_keep_a_changelog() -> None:
    found = list(tokens(ROOT / "CHANGELOG.md"))
    headings = [(before.tag, after.content) for before, after in pairwise(found) if before.nesting == 1]
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    groups: list[str] = []
    for tag, title in headings:
        if tag == "h2":
            assert title == "Unreleased" or re.fullmatch(r"\[?\d+\.\d+\.\d+\]? - \d{4}-\d{2}-\d{2}", title)
            groups = []
        elif tag == "h3":
            groups.append(title)
            assert groups == [group for group in order if group in groups]


def test_citation_has_version_and_license_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (proactive.__version__, project["license"])
