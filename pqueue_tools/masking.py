"""Mask secrets in payloads, results, errors and log lines: values by the names of their keys, and passwords in URLs.
The command line, both dashboards and the log use it; a search finds only unmasked text (`shown`)."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from pqueue import Excerpt, Job
from pqueue_values import read_json, short

HIDDEN = "…"
# Anywhere in a name, or as its last word: "auth", "smtp_auth" and "smtpAuth", but not "author" or "auth_method".
SECRET = re.compile(
    "pass[-_ ]?(word|wd|wort|phrase|code|key)|kennwort|pwd|secret|token|credential|cookie|bearer|authori[sz]ation|"
    "(api|access|account|auth|encryption|private|signing|ssh)[-_. ]?key|connection[-_ ]?string|"
    "(?<![a-z])((db|user|smtp|imap|ftp|ldap|mail|root|admin|pg|my)?(pass|pw)|pin|dsn|jwt|otp|o?auth([-_ ]?headers?)?)"
    "[^a-z]*$"
)
WORD = re.compile("(?<=[a-z0-9])(?=[A-Z])")
# After "://": the user, and the password up to the last @ before the path, or, if that contains a /, to the next @.
IN_URL = re.compile(r"\A([^\s:/?#@\[]*):(?!\d{1,5}(?:[/?#\"',;)\]}>]|$))(?:[^\s/?#]*|[^\s@]*)@")
IN_CUT_URL = re.compile(r"\A([^\s:/?#@\[]*):(?!\d{1,5}[/?#\"',;)\]}>])[^\s@]*…$")
ASSIGNED = re.compile(
    r"((?:password|passwd|pwd|passphrase|secret|token|api[-_]?key|access[-_]?key)=)"
    r"""(?:'[^']*'?|"[^"]*"?|[^\s&;,'"]+)""",
    re.IGNORECASE,
)
TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+)', re.DOTALL)
UNENDED = re.compile(r'\s*("(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*)', re.DOTALL)


def is_secret(name: str) -> bool:
    """Return whether values with this name are masked."""
    return SECRET.search(WORD.sub("_", name).lower()) is not None


def masked(value: Any) -> Any:
    """Return a payload or result, or the part of it in an `Excerpt`, with secrets masked."""
    if isinstance(value, Excerpt):
        return masked(_value(value))
    if isinstance(value, dict):
        fields = {
            masked_text(name): HIDDEN if is_secret(name) and not isinstance(each, (bool, type(None))) else masked(each)
            for name, each in value.items()
        }
        return value if _is_same((*fields, *fields.values()), (*value, *value.values())) else fields
    if isinstance(value, list):
        items = [masked(each) for each in value]
        return value if _is_same(items, value) else items
    return masked_text(value) if isinstance(value, str) else value


def _is_same(masked: Sequence[Any], values: Sequence[Any]) -> bool:
    """Return whether nothing was masked, so that no copy of a large payload is kept."""
    return len(masked) == len(values) and all(map(operator.is_, masked, values))


def masked_text(text: str) -> str:
    """Return a text with passwords masked, in URLs and in the form password=…. A text that ends with … was cut, perhaps
    within a password."""
    if "://" in text:
        head, *rest = text.split("://")  # so that the time is linear in their number
        rest = [IN_URL.sub(rf"\1:{HIDDEN}@", part) for part in rest]
        text = "://".join([head, *rest[:-1], IN_CUT_URL.sub(rf"\1:{HIDDEN}", rest[-1])])
    return ASSIGNED.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def restored(edited: Any, stored: Any = None) -> Any:
    """Return a payload that was edited as `masked` shows it, with the hidden values that it had.

    Raises ValueError if it contains a hidden value in another place, where the value is not known.
    """
    if isinstance(edited, dict):
        names: dict[str, str] = {masked_text(name): name for name in stored} if isinstance(stored, dict) else {}
        fields: dict[str, Any] = {}
        for shown, each in edited.items():
            name = str(names.get(shown, shown))
            if each != HIDDEN or not is_secret(name):
                fields[name] = restored(each, stored[name] if shown in names else None)
            elif shown in names:
                fields[name] = stored[name]
            else:
                raise ValueError(f"expected the value of {short(name)}, got {HIDDEN}, which stands for a hidden one")
        return fields
    if isinstance(edited, list):
        items = stored if isinstance(stored, list) and len(stored) == len(edited) else [None] * len(edited)
        shown = [masked(item) for item in items]
        # Of several items with hidden values, one that was changed may have been moved, too
        is_one = sum(each is not item for each, item in zip(shown, items, strict=True)) < 2
        known = [
            item if is_one or each == seen else None for each, item, seen in zip(edited, items, shown, strict=True)
        ]
        return [restored(each, item) for each, item in zip(edited, known, strict=True)]
    if isinstance(edited, str) and HIDDEN in edited:
        if isinstance(stored, str) and edited == masked_text(stored):
            return stored
        if HIDDEN in masked_text(edited.replace(HIDDEN, "x")):
            raise ValueError(f"expected a text without {HIDDEN}, which stands for a hidden one, got {short(edited)}")
    return edited


def masked_job(job: Job) -> Job:
    """Return the job with secrets masked."""
    long = {"payload": masked(job.payload), "result": masked(job.result), "error": masked_error(job.error)}
    return job._replace(**long, meta=masked(job.meta))


def masked_error(error: str | None) -> str | None:
    return error and masked_text(error + HIDDEN if isinstance(error, Excerpt) else error)


def is_cut(job: Job) -> bool:
    """Return whether a part of the job was cut."""
    return any(isinstance(each, Excerpt) for each in (job.payload, job.result, job.error))


def _value(excerpt: Excerpt) -> Any:
    value = read_json(_closed(excerpt))
    return excerpt + HIDDEN if isinstance(value, Excerpt) else value


def _closed(text: str) -> str:
    """Return the longest start of the JSON text that can be completed, completed. A cut string ends with …"""
    closers: list[str] = []
    at = end = 0
    is_name = False  # whether a string here is the name of a value
    while found := TOKEN.match(text, at):
        mark = found[1]
        if mark not in ",:" and not is_name and mark[0] != '"' and found.end() == len(text) and mark not in "{}[]":
            break  # a number that may be incomplete
        at = found.end()
        if mark in "{[":
            closers.append("}" if mark == "{" else "]")
        elif mark in "}]" and closers:
            closers.pop()
        if mark in ",:" or (is_name and mark not in "{}[]"):
            is_name = mark == "," and closers[-1:] == ["}"]
        else:
            is_name, end = mark == "{", at
    if not is_name and (last := UNENDED.match(text, at)):
        return text[:at] + last[0] + f'{HIDDEN}"' + "".join(reversed(closers))
    return text[:end] + "".join(reversed(closers))
