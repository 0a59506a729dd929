"""Which tests are tried with a random mutant."""

from __future__ import annotations

import ast

import pytest
from random_mutants import Change, Record, terms

SOURCES = {
    "pqueue_a.py": """
def makes(text):
    return text


def runs():
    return 1


ONE, OTHER = makes("one"), makes("other")
""",
    "pqueue_b.py": """
import pqueue_a

REPLACED = {
    pqueue_a.ONE: "1",
    pqueue_a.OTHER: "2",
}


def translate(text):
    return REPLACED[text]


def uses():
    return pqueue_a.ONE
""",
}
RECORD = """import pqueue_a.py:10 pqueue_a.py:3
test tests/test_a.py::test_that_runs
pqueue_a.py:7
took 1 tests/test_a.py::test_that_runs
test tests/test_a.py::test_that_uses
import pqueue_a.py:10 pqueue_a.py:3
pqueue_b.py:15
took 1 tests/test_a.py::test_that_uses
test tests/test_a.py::test_that_translates
pqueue_b.py:11
took 1 tests/test_a.py::test_that_translates
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pqueue_a.py:7", {"test_that_runs"}),
        ("pqueue_a.py:3", {"test_that_uses"}),  # called at import
        ("pqueue_a.py:10", {"test_that_uses"}),
        ("pqueue_b.py:5", {"test_that_uses"}),
    ],
)
def test_mutant_is_tried_with_the_tests_that_run_what_it_changes_or_use_it(line, expected):
    trees = {name: ast.parse(text) for name, text in SOURCES.items()}
    record = Record(trees, [], RECORD.splitlines())
    module, _, number = line.partition(":")
    assert {test.rpartition("::")[2] for test in record.tests(Change(module, int(number), 0, 0, ""))} == expected


def test_term_that_contains_from_is_replaced_as_a_whole():
    text = "SELECT 1 FROM a WHERE b IS DISTINCT FROM c AND d = (SELECT 2 FROM e) ORDER BY 1"
    assert [text[slice(*each)] for each in terms(text)] == ["b IS DISTINCT FROM c", "d = (SELECT 2 FROM e)"]
