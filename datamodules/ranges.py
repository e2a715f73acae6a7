"""Ranges of numbers in options, checkpoints and exports, as annotations of parameters.

The parsers of the commands check them and show them in --help. `check_ranges` checks values that no parser has seen,
such as the options in a checkpoint.
"""

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import core_schema

from datamodules.errors import UserError


class Finite:
    """A finite number: not infinite, not NaN, not a boolean."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_refuse_not_finite, handler(source))

    def __repr__(self) -> str:
        return "finite"


def _refuse_not_finite(value: Any) -> Any:
    try:
        sound = not isinstance(value, bool) and math.isfinite(float(value))
    except (ValueError, TypeError, OverflowError):
        return value  # the message about its type is clearer
    if not sound:
        raise ValueError("Input should be a finite number")
    return value


class FolderNameRule:
    """A name of a folder: not hidden, and not a path."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(_refuse_path, handler(source))

    def __repr__(self) -> str:
        return "letters, digits and -_+=@,. or blanks within"


def _refuse_path(name: str) -> str:
    if not re.fullmatch(r"[\w+=@,-]([\w+=@,. -]*[\w+=@,.-])?", name):
        raise ValueError("Input should be the name of a folder")
    return name


FINITE = Finite()
NonNegativeFloat = Annotated[float, Ge(0), FINITE]
Positive = Annotated[float, Gt(0), FINITE]
Fraction = Annotated[float, Ge(0), Le(1), FINITE]
FractionBelowOne = Annotated[float, Ge(0), Lt(1), FINITE]
PositiveFraction = Annotated[float, Gt(0), Le(1), FINITE]
BelowHalf = Annotated[float, Ge(0), Lt(0.5), FINITE]
Count = Annotated[int, Ge(1), Le(2**31 - 1), FINITE]
NonNegativeInt = Annotated[int, Ge(0), Le(2**31 - 1), FINITE]  # 0 means none
Seed = Annotated[int, Ge(0), Le(2**32 - 1), FINITE]  # the range of NumPy
Folds = Annotated[int, Ge(3), Le(10_000), FINITE]  # at least one each to train, validate and test
Vocabulary = Annotated[int, Ge(259), Le(2**20), FINITE]  # at least every byte and three special tokens
Workers = Annotated[int, Ge(0), Le(256), FINITE]  # processes
Temperature = Annotated[float, Ge(0), Le(100), FINITE]  # for sampling
Port = Annotated[int, Ge(0), Le(65535), FINITE]  # 0 is any that is free
Tries = Annotated[int, Ge(1), Le(1000), FINITE]
FolderName = Annotated[str, MaxLen(60), FolderNameRule()]  # at most 240 bytes; file systems allow 255
_PLAIN = {  # pydantic's messages as regular expressions, and our words for them
    r"greater than or equal to (\S+)": r"\1 or more",
    r"less than or equal to (\S+)": r"\1 or less",
    r"greater than": "more than",
    r"a valid (integer|number), unable to .*": r"a valid \1",
}


def check_ranges(annotated: Any, values: Mapping[str, Any], group: str) -> None:
    """Check that values have the annotated types and ranges.

    Args:
        annotated: A class with annotated constructors, its own and those of its bases; or a mapping of names to types.
        values: Values by name of parameter; names without annotation are ignored.
        group: Group of the values on the command line; empty for none.

    Raises:
        UserError: A value does not fit; the message names the first one.
    """
    adapters = _adapters(annotated) if isinstance(annotated, type) else _adapters_of(annotated)
    for name, value in values.items():
        if name not in adapters:
            continue
        try:
            adapters[name].validate_python(value, strict=True)
        except ValidationError as error:
            option = f"{group}.{name}" if group else name
            raise UserError(f"{option}: {reason(error)}", "Give another value; see --help.") from error


def refuse_equal_samples(candidates: int, temperature: float) -> None:
    """Refuse several answers at temperature 0, which would be equal, and a temperature below 0.

    Raises:
        UserError: The options are one of these.
    """
    if candidates > 1 and temperature == 0:
        raise UserError(
            f"--candidates: {candidates} candidates at temperature 0 are equal", "Give a --temperature above 0."
        )
    if temperature < 0:
        raise UserError(f"--temperature: {temperature} is below 0", "Give 0 for greedy decoding, or more.")


def reason(error: ValidationError) -> str:
    """Return pydantic's reason for refusing a value, in a few words."""
    first = error.errors(include_url=False)[0]
    return plain_message(first["msg"], repr(first["input"]))


def plain_message(message: str, given: str) -> str:
    """Rewrite a message of pydantic so that it can follow the name of an option."""
    said = message.removeprefix("Value error, ").replace("Input should be ", "expected ", 1)
    for theirs, plain in _PLAIN.items():
        said = re.sub(theirs, plain, said)
    return f"{said}, got {given if len(given) <= 80 else given[:80] + '...'}"


@cache
def _adapters(annotated: type) -> dict[str, TypeAdapter]:
    types: dict[str, Any] = {}
    for base in reversed(annotated.__mro__):
        if "__init__" in vars(base) and base.__module__.partition(".")[0] in ("datamodules", "models"):
            types |= get_type_hints(base.__init__, include_extras=True)  # type: ignore[misc]
    return _adapters_of({name: kind for name, kind in types.items() if name not in ("return", "options")})


def _adapters_of(types: Mapping[str, Any]) -> dict[str, TypeAdapter]:
    return {name: TypeAdapter(kind) for name, kind in types.items()}
