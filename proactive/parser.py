"""The parser of every command: errors of one line, bounded YAML, and no code in values.

jsonargparse imports what a `class_path` names. The user of a command may name classes this way, also in a file given
with --config; `proactive.fitting.foreign` restricts configurations that are read without being given. Functions as
arguments of a class are not allowed, because calling them could run any code.
"""

import re
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NoReturn, Protocol, Self, get_args, get_origin

from jsonargparse import ArgumentParser, set_parsing_settings

from datamodules.errors import UserError, did_you_mean
from datamodules.ranges import plain_message

# Values of parameters without a type are not instantiated. The denylist is jsonargparse's own: modules that run
# commands, read pickles, and similar.
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])

_OPTION = re.compile(r'Parser key "(?P<name>[^"]*)"(?: element \d+)?:\s*(?P<said>.*)', re.DOTALL)
_OF_PYDANTIC = re.compile(r"^\s*(?P<said>.*\S) \[type=\w+, input_value=", re.MULTILINE)
_GIVEN = re.compile(r"(?:.*\n\s*Given value|.*?\. Got value): (?P<given>.*)", re.DOTALL)
_CLASS = re.compile(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>")
_LITERAL = re.compile(r"Expected a typing\.Literal\[([^\]]*)\]")
_SUBCOMMAND = "argument subcommand: invalid choice: "
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<argument>[^\s=]+).*"
    r"|Group '(?P<group>[^']*)' does not accept option '(?P<inner>[^']*)'"
    r"|Option '(?P<option>[^']*)' is not accepted",
    re.DOTALL,
)
_NO_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)'")
_CHOICES = re.compile(r"(?:\(choose from |typing\.Literal\[|Input should be )([^][)]*)")


class OptionError(UserError):
    """A refused value; the message starts with the name of the option or of the class argument."""


class _Built(BaseException):
    """Passes a parser out of the command that built it."""


_taken_out = ContextVar("_taken_out", default=False)


class Parser(ArgumentParser):
    """A parser with errors of one line, which passes no functions to classes."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        if _taken_out.get():
            raise _Built(self)
        return super().parse_args(*args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if message.startswith(_SUBCOMMAND):
            # argparse takes the value of an unknown option for the subcommand.
            known = self._option_string_actions
            unknown = (one for one in self.args if one.startswith("--") and one.partition("=")[0] not in known)
            message = next((f"unrecognized arguments: {one}" for one in unknown), message)
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, OptionError) and (found := _OPTION.search(message)):
                inner = re.match(r"[\w.]+: ", cause.what)
                what = f"{found['name']}{'.' if inner else ': '}{cause.what}"
                raise OptionError(one_line(what), self._see_help) from ex
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise OptionError(_said(message) + self._meant(message), self._see_help) from ex

    @property
    def _see_help(self) -> str:
        return f"See {self.prog.replace(' [options]', '')} --help."

    def _meant(self, message: str) -> str:
        """Suggest an option, or a value of the option, for a misspelled one in an error."""
        if found := _UNKNOWN.fullmatch(message):
            if found["argument"]:
                return did_you_mean(found["argument"], self._option_string_actions)
            name = f"{found['group']}.{found['inner']}" if found["group"] else found["option"]
            return did_you_mean(name, [action.dest for action in self._actions])
        value = _NO_CHOICE.search(message) or _GIVEN.search(message)
        choices = re.findall(r"'([^']*)'", " ".join(_CHOICES.findall(message)))
        return did_you_mean(value["given"], choices) if value else ""

    def add_class_arguments(self, *args: Any, **options: Any) -> list[str]:
        # Where a class is expected, read no file of options, which could have the name of the value.
        names = super().add_class_arguments(*args, **{**options, "sub_configs": False})
        self._forget_code()
        return names

    def add_function_arguments(self, *args: Any, **options: Any) -> list[str]:
        names = super().add_function_arguments(*args, **options)
        self._forget_code()
        return names

    def with_output_options(self) -> Self:
        """Add the options of what a command prints."""
        self.add_argument("--quiet", action="store_true", help="Print only errors.")
        self.add_argument("--debug", action="store_true", help="Show tracebacks and messages of libraries.")
        return self

    def _forget_code(self) -> None:
        """Remove the arguments that expect functions, types or modules, because values could name them."""
        for action in [action for action in self._actions if takes_code(getattr(action, "_typehint", None))]:
            self._remove_action(action)
            for group in self._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
            for option in action.option_strings:
                self._option_string_actions.pop(option, None)


def parser_of(main: Callable[[list[str]], None], *arguments: str) -> Parser:
    """Return the parser that a command builds for these arguments, without parsing them."""
    before = _taken_out.set(True)
    try:
        main(list(arguments))
    except _Built as built:
        return built.args[0]
    finally:
        _taken_out.reset(before)
    raise TypeError(f"{main} parses nothing")


def takes_code(annotation: Any) -> bool:
    """Return whether an annotation, or a part of it, accepts a function, a type or a module."""
    origin = get_origin(annotation) or annotation
    if origin in (Callable, type, ModuleType):
        return True
    if isinstance(origin, type) and Protocol in origin.__mro__ and "__call__" in vars(origin):
        return True
    return any(map(takes_code, get_args(annotation)))


def one_line(text: str) -> str:
    """Return the first 400 characters of a text on one line."""
    return " ".join(text.split())[:400]


def best_reason(text: str) -> str:
    """Return the most informative of jsonargparse's messages about the types that it tried, in one line."""
    if choices := _LITERAL.findall(text):
        named = dict.fromkeys(choice.strip("'\"") for some in choices for choice in some.split(", "))
        return f"expected one of {', '.join(named)}" + (", or a list" if "<class 'list'>" in text else "")
    tried = re.split(r"\n\s*- ", "\n" + text.partition("Errors:")[2].partition("\n  Given value")[0])[1:]
    if not tried:
        return _CLASS.sub(lambda found: f"expected {_kind(found[1])}", one_line(text))
    others = ("Expected a <class", "Not a valid subclass", "a class path", "a dict ")
    if telling := [one for one in tried if not one.startswith(others)]:
        return one_line(telling[0])
    return f"expected {' or '.join(map(_kind, _CLASS.findall(' '.join(tried))))}"


def _kind(name: str) -> str:
    """What the values of a class are called in YAML."""
    return {"NoneType": "null", "Sequence": "list"}.get(name, name)


def _said(message: str) -> str:
    """Format a parser error as `option: reason, got value`; jsonargparse's own has many lines."""
    found = _OPTION.search(message)
    if not found:
        return one_line(message)
    said = found["said"]
    given, problem = _GIVEN.search(said), _OF_PYDANTIC.search(said)
    if problem and given:
        return one_line(f"{found['name']}: {plain_message(problem['said'].lstrip('- '), given['given'])}")
    what = best_reason(said[: given.start("given")]).removesuffix(". Got value:") if given else best_reason(said)
    return one_line(f"{found['name']}: {what}" + (f", got {given['given']}" if given else ""))
