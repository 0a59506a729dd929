"""Completion of the command line in bash: names of commands and options, states, queues, tasks, consumers and jobs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping

from pqueue_tools.commands import Command, OneOf, Parameter, find

SCRIPT = """\
_{function}() {{
    local IFS=$'\\n'
    COMPREPLY=($("${{COMP_WORDS[0]}}" complete -- "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
}}
complete -o default -F _{function} {program}
"""
Lookup = Callable[[str], Iterable[str]]  # returns the known values of a metavar such as QUEUE


def script(program: str) -> str:
    """Return what makes bash complete the arguments of this program."""
    return SCRIPT.format(program=program, function=program.replace("-", "_"))


def complete(commands: Mapping[str, Command], words: list[str], lookup: Lookup) -> list[str]:
    """Return the completions, quoted for the shell, of the last word. Bash splits words at = and :, too."""
    *before, word = words or [""]
    before, word, prefix = _rejoined(before, word)
    if not before:
        found: Iterable[str] = [name for each in commands.values() for name in (each.name, *each.aliases)]
    elif (entry := find(commands, before[0])) is None:
        found = []
    else:
        found = _of_command(entry, before[1:], word, lookup)
    matching = sorted({each for each in found if each.startswith(word)})
    return [shlex.quote(each.removeprefix(prefix)) for each in matching]


def _rejoined(before: list[str], word: str) -> tuple[list[str], str, str]:
    """Join what bash has split. The third value is the part of the word that bash does not replace."""
    prefix = ""
    if word == "=":
        word = ""
    if word == ":" and before:
        word, before = before[-1] + ":", before[:-1]
        prefix = word
    elif len(before) >= 2 and before[-1] == ":":
        prefix = before[-2] + ":"
        before, word = before[:-2], prefix + word
    return [each for each in before if each != "="], word, prefix


def _of_command(entry: Command, before: list[str], word: str, lookup: Lookup) -> Iterable[str]:
    options = {name: each for each in entry.parameters if each.is_option for name in each.names}
    if before and before[-1] in options and not options[before[-1]].flag:
        return _values(options[before[-1]], lookup)
    if word.startswith("-"):
        return ["--help", *(name for name, each in options.items() if each.many or not set(each.names) & set(before))]
    taken = {at + 1 for at, each in enumerate(before) if each in options and not options[each].flag}
    given = sum(1 for at, each in enumerate(before) if each not in options and at not in taken)
    arguments = [each for each in entry.parameters if not each.is_option]
    arguments += [each for each in arguments[-1:] if each.many] * given
    return _values(arguments[given], lookup) if given < len(arguments) else []


def _values(parameter: Parameter, lookup: Lookup) -> Iterable[str]:
    return parameter.parse.names if isinstance(parameter.parse, OneOf) else lookup(parameter.metavar)
