"""The parser of every command: errors in one line, YAML that cannot run away, and no code that a value could name.

jsonargparse imports what a `class_path` names. A person who starts a command may name classes so, also in a file given
with --config; see `proactive.fitting.foreign` for a configuration that is read unasked. Nobody may name functions as
arguments of a class: what calls them would run anything.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NoReturn, Protocol, get_args, get_origin

from jsonargparse import ArgumentParser, set_parsing_settings

from datamodules.errors import UserError
from datamodules.ranges import worded

# Also where a parameter has no type: what lies in it stays what it is. The denylist is jsonargparse's own, of what runs
# commands, reads pickles, and the like.
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])

_OPTION = re.compile(r'Parser key "(?P<name>[^"]*)":\s*(?P<said>.*)', re.DOTALL)
_OF_PYDANTIC = re.compile(r"^\s*(?P<said>.*\S) \[type=\w+, input_value=", re.MULTILINE)
_GIVEN = re.compile(r"(?:.*\n\s*Given value|.*?\. Got value): (?P<given>.*)", re.DOTALL)
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<argument>[^\s=]+).*"
    r"|Group '(?P<group>[^']*)' does not accept option '(?P<inner>[^']*)'"
    r"|Option '(?P<option>[^']*)' is not accepted",
    re.DOTALL,
)
_NO_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)'")
_CHOICES = re.compile(r"(?:\(choose from |typing\.Literal\[|Input should be )([^][)]*)")


class OptionError(UserError):
    """A parser refuses a value; what it says begins with the name of the option, or of the argument of a class."""


class _Built(BaseException):
    """Takes a parser out of the command that has built it."""


_taken_out = ContextVar("_taken_out", default=False)


class Parser(ArgumentParser):
    """A parser whose errors take one line each, and that gives classes no functions."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        if _taken_out.get():
            raise _Built(self)
        return super().parse_args(*args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, OptionError) and (found := _OPTION.search(message)):
                inner = re.match(r"[\w.]+: ", cause.what)
                what = f"{found['name']}{'.' if inner else ': '}{cause.what}"
                raise OptionError(one_line(what), f"See {self.prog} --help.") from ex
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise OptionError(_said(message) + self._meant(message), f"See {self.prog} --help.") from ex

    def _meant(self, message: str) -> str:
        """Which option, or which value of the option, an error's may have been meant to be."""
        if found := _UNKNOWN.fullmatch(message):
            if found["argument"]:
                return did_you_mean(found["argument"], self._option_string_actions)
            name = f"{found['group']}.{found['inner']}" if found["group"] else found["option"]
            return did_you_mean(name, [action.dest for action in self._actions])
        value = _NO_CHOICE.search(message) or _GIVEN.search(message)
        choices = re.findall(r"'([^']*)'", " ".join(_CHOICES.findall(message)))
        return did_you_mean(value["given"], choices) if value else ""

    def add_class_arguments(self, *args: Any, **options: Any) -> list[str]:
        # Where a class can be given, no file of options is read in its place: it may lie there by the name of a value.
        names = super().add_class_arguments(*args, **{**options, "sub_configs": False})
        self._forget_code()
        return names

    def add_function_arguments(self, *args: Any, **options: Any) -> list[str]:
        names = super().add_function_arguments(*args, **options)
        self._forget_code()
        return names

    def _forget_code(self) -> None:
        """Take out the arguments that take functions, types or modules, which values would name."""
        for action in [action for action in self._actions if takes_code(getattr(action, "_typehint", None))]:
            self._remove_action(action)
            for group in self._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
            for option in action.option_strings:
                self._option_string_actions.pop(option, None)


def parser_of(main: Callable[[list[str]], None], *arguments: str) -> Parser:
    """The parser that a command builds for some arguments; nothing is parsed."""
    before = _taken_out.set(True)
    try:
        main(list(arguments))
    except _Built as built:
        return built.args[0]
    finally:
        _taken_out.reset(before)
    raise TypeError(f"{main} parses nothing")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """What to add to an error about a name that nothing has: the known name most like it, or nothing."""
    alike = difflib.get_close_matches(given, list(known), n=10, cutoff=0.7)
    last = given.rpartition(".")[2]  # that two options are of one group does not make them alike
    meant = next((name for name in alike if difflib.get_close_matches(last, [name.rpartition(".")[2]])), None)
    return f"; did you mean {meant}?" if meant else ""


def takes_code(annotation: Any) -> bool:
    """Whether a function, a type or a module could be given for an annotation, or for a part of it."""
    origin = get_origin(annotation) or annotation
    if origin in (Callable, type, ModuleType):
        return True
    if isinstance(origin, type) and Protocol in origin.__mro__ and "__call__" in vars(origin):
        return True
    return any(map(takes_code, get_args(annotation)))


def one_line(text: str) -> str:
    """The first 400 characters of a text, without line breaks."""
    return " ".join(text.split())[:400]


def best_reason(text: str) -> str:
    """Of what jsonargparse tells of each type that it tried: what tells most, in one line."""
    tried = re.split(r"\n\s*- ", "\n" + text.partition("Errors:")[2].partition("\n  Given value")[0])[1:]
    if not tried:
        return one_line(text)
    others = ("Expected a ", "Not a valid subclass", "a class path", "a dict ")
    if telling := [one for one in tried if not one.startswith(others)]:
        return one_line(telling[0])
    kinds = re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", "\n".join(tried))
    return f"expected {' or '.join(kinds).replace('NoneType', 'null')}"


def _said(message: str) -> str:
    """An error of the parser as `option: reason, got value`; jsonargparse's own takes many lines."""
    found = _OPTION.search(message)
    if not found:
        return one_line(message)
    said = found["said"]
    given, problem = _GIVEN.search(said), _OF_PYDANTIC.search(said)
    if problem and given:
        return one_line(f"{found['name']}: {worded(problem['said'].lstrip('- '), given['given'])}")
    what = best_reason(said[: given.start("given")]).removesuffix(". Got value:") if given else best_reason(said)
    return one_line(f"{found['name']}: {what}" + (f", got {given['given']}" if given else ""))
