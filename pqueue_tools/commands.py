"""Define the commands of a command line once, for argparse and, if it is installed, Typer."""

from __future__ import annotations

import argparse
import inspect
import json
import keyword
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from pqueue_tools.masking import restored
from pqueue_tools.process import OneLineParser, not_blank, whole_number
from pqueue_values import MAX_NUMBER, short
from pqueue_values import seconds_in as duration


class UsageError(Exception):
    """The command line is invalid."""


@dataclass(frozen=True)
class Parameter:
    """An option (--name) or an argument (name) of a command; `parse` raises ValueError with what was expected."""

    name: str
    help: str
    parse: Callable[[str], Any] = str
    default: str | None = None
    metavar: str = ""
    short: str = ""  # the short name of an option, such as -o
    flag: bool = False
    many: bool = False
    optional: bool = False

    @property
    def is_option(self) -> bool:
        return self.name.startswith("--")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.short) if self.short else (self.name,)

    @property
    def key(self) -> str:
        key = self.name.lstrip("-").replace("-", "_")
        return f"{key}_" if keyword.iskeyword(key) else key

    def value(self, raw: Any) -> Any:
        """Return the parsed value of what the front end passed. Raises UsageError."""
        if self.flag:
            return bool(raw)
        if self.many:
            return [self._parsed(each) for each in raw or ()]
        return None if raw is None else self._parsed(raw)

    def _parsed(self, text: str) -> Any:
        try:
            return self.parse(text)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Command:
    """A command. If `opens`, its function is called with an open queue."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    group: str  # the heading of the overview under which it is listed
    opens: bool = True
    aliases: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()  # without the name of the program

    @property
    def help(self) -> str:
        return " ".join((self.function.__doc__ or "").split())

    def options(self, raw: dict[str, Any]) -> argparse.Namespace:
        """Return the parsed value of what the front end passed. Raises UsageError."""
        return argparse.Namespace(**{each.key: each.value(raw.get(each.key)) for each in self.parameters})


Run = Callable[[Command, argparse.Namespace], int]  # returns the exit code


# Values ###############################################################################################################


def up_to_a_day(text: str) -> float:
    if 0.1 <= (seconds := duration(text)) <= 86400:
        return seconds
    raise ValueError(f"expected a duration from 0.1s to 1d, got {short(text)}")


class Ago(float):
    """A time given as the number of seconds before now."""


def moment(text: str) -> float:
    """Parse a duration before now into an `Ago`, or an ISO 8601 time (local unless it has a zone) into Unix seconds."""
    with suppress(ValueError):
        return Ago(duration(text))
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"expected a duration such as 15m, or a time such as 2026-11-24T12:00, got {short(text)}"
        ) from None


def path(text: str) -> Path:
    return Path(not_blank(text))


def json_value(text: str, stored: Any = None) -> Any:
    """Parse a payload; values that it hides are those of the stored one, which it replaces."""
    expected = f"expected JSON, got {text[:60]!r}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}: {error}") from None
    try:
        return restored(value, stored)
    except RecursionError as error:
        raise ValueError(f"{expected}: {error}") from None


def rate(text: str) -> tuple[int, float]:
    """Parse 10/1s into a number of jobs and seconds."""
    jobs, slash, seconds = text.partition("/")
    if not slash:
        raise ValueError(f"expected JOBS/DURATION, such as 10/1s, got {short(text)}")
    return whole_number(1, MAX_NUMBER)(jobs), duration(seconds)


def or_word(word: str, value: Any, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function that parses this word as the value, and any other text by `parse`."""

    def parse_either(text: str) -> Any:
        try:
            return value if text == word else parse(text)
        except ValueError as error:
            raise ValueError(str(error).replace(", got ", f", or {word}, got ", 1)) from None

    return parse_either


def test_file(text: str) -> Path:
    """Return the path of a file in which test programs find tests."""
    if re.fullmatch(r"test_\w+\.py", Path(text).name):
        return Path(text)
    raise ValueError(f"expected a file such as test_job.py, got {short(text)}")


class OneOf:
    """Parses one of these names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, text: str) -> str:
        if text in self.names:
            return text
        raise ValueError(f"expected one of {', '.join(self.names)}, got {short(text)}")


def choice(name: str, text: str, names: Sequence[str], default: str | None = None, short: str = "") -> Parameter:
    """Return an option that takes one of these names."""
    return Parameter(name, text, OneOf(*names), default, "|".join(names), short)


class SeveralOf(OneOf):
    """Parses a list of these names, with commas."""

    def __call__(self, text: str) -> Any:
        return [super(SeveralOf, self).__call__(each) for each in text.split(",")]


# The front ends #######################################################################################################


def dispatch(
    program: str, about: str, version: str, commands: Mapping[str, Command], run: Run, arguments: list[str]
) -> int:
    """Run the command that the arguments name; return the exit code. Raises UsageError."""
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        print(overview(program, about, commands))
        return 0 if name else 2
    if name == "--version":
        print(version)
        return 0
    entry = find(commands, name)
    if entry is None:
        raise UsageError(_unknown(program, commands, name))
    typer = None
    with suppress(ImportError):  # not `except`: what the command raises would have this error as its context
        typer = import_module("typer")
    is_usable = hasattr(typer, "TyperException")  # an older one, which something else needs, is not used
    return _with_typer(typer, program, entry, run, rest) if is_usable else _with_argparse(program, entry, run, rest)


def find(commands: Mapping[str, Command], name: str) -> Command | None:
    """Return the command with this name or alias."""
    return next((each for each in commands.values() if name in (each.name, *each.aliases)), None)


def _unknown(program: str, commands: Mapping[str, Command], name: str) -> str:
    names = [name for each in commands.values() for name in (each.name, *each.aliases)]
    near = [each for each in names if each.startswith(name)] or get_close_matches(name, names, cutoff=0.75)
    meant = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return f"expected a command, got {name[:40]!r}; {meant}{'See' if meant else 'see'} {program} --help"


def overview(program: str, about: str, commands: Mapping[str, Command]) -> str:
    """Return the help of the program: its commands by group, with the first sentence about each."""
    width = min(100, shutil.get_terminal_size().columns)
    column = max(len(_title(each)) for each in commands.values()) + 4
    lines = [f"usage: {program} COMMAND [OPTIONS]", "", *textwrap.wrap(about, width)]
    examples = []
    for group in dict.fromkeys(each.group for each in commands.values()):
        members = [each for each in commands.values() if each.group == group]
        examples += [f"  {program} {each.examples[0]}" for each in members if each.examples][:1]
        lines += ["", f"{group}:"]
        for each in members:
            first = re.split(r"(?<=\.)\s", each.help, maxsplit=1)[0]
            text = textwrap.wrap(first, max(20, width - column)) or [""]
            lines += [f"  {_title(each):{column - 2}}{text[0]}", *(" " * column + line for line in text[1:])]
    return "\n".join([*lines, "", "Examples:", *examples, "", f"{program} COMMAND --help: its options and examples"])


def _title(entry: Command) -> str:
    return ", ".join((entry.name, *entry.aliases))


def _examples(program: str, entry: Command) -> str:
    return "\n".join(["Examples:", *(f"  {program} {each}" for each in entry.examples)]) if entry.examples else ""


def _with_argparse(program: str, entry: Command, run: Run, arguments: list[str]) -> int:
    parser = OneLineParser(
        prog=f"{program} {entry.name}",
        description=textwrap.fill(entry.help, 78),
        epilog=_examples(program, entry),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for each in entry.parameters:
        _add_argument(parser, each)
    try:
        raw = vars(parser.parse_args(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    return run(entry, entry.options(raw))


def _add_argument(parser: argparse.ArgumentParser, each: Parameter) -> None:
    text = each.help.replace("%", "%%") + (f" (default: {each.default})" if each.default else "")
    if each.flag:
        parser.add_argument(each.name, action="store_true", help=text)
    elif each.is_option and each.many:
        parser.add_argument(each.name, dest=each.key, action="append", metavar=each.metavar, help=text)
    elif each.is_option:
        parser.add_argument(*each.names, default=each.default, metavar=each.metavar, help=text)
    else:
        parser.add_argument(
            each.key, nargs="*" if each.many else "?" if each.optional else None, metavar=each.metavar, help=text
        )


def _with_typer(typer: Any, program: str, entry: Command, run: Run, arguments: list[str]) -> int:
    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    examples = _examples(program, entry)
    app.command(entry.name, help=entry.help, epilog=f"\b\n{examples}" if examples else None)(_typed(typer, entry))
    program = f"{program} {entry.name}"
    try:
        given = typer.main.get_command(app).main(arguments, prog_name=program, standalone_mode=False)
    except SystemExit:  # Typer's answer if the reader of its help has gone
        raise BrokenPipeError from None
    except typer.TyperException as error:
        raise UsageError(f"{error.format_message().rstrip('.?')}; see {program} --help") from None
    return run(entry, given) if isinstance(given, argparse.Namespace) else int(given or 0)


def _typed(typer: Any, entry: Command) -> Callable[..., argparse.Namespace]:
    """Return a function with the signature that makes Typer ask for the command's parameters, as plain text."""
    signature = []
    for each in entry.parameters:
        make = typer.Option if each.is_option else typer.Argument
        names = each.names if each.is_option else ()
        kind: Any = bool if each.flag else list[str] if each.many else str
        absent: Any = False if each.flag else each.default
        required = not each.is_option and not each.many and not each.optional
        extra = {} if each.flag else {"metavar": each.metavar}
        default = make(... if required else absent, *names, help=each.help, show_default=bool(each.default), **extra)
        if not required and not each.flag:
            kind = kind | None
        signature.append(inspect.Parameter(each.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))

    def ask(**raw: Any) -> argparse.Namespace:
        return entry.options(raw)

    ask.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    ask.__annotations__ = {each.name: each.annotation for each in signature}
    return ask
