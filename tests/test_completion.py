"""Completion of the command line, asked as bash asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import PATIENCE_SECONDS, ROOT

import admin
import pqueue
from pqueue_tools import completion

BASH = shutil.which("bash")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PQUEUE_URL", raising=False)
    with pqueue.open_queue() as queue:
        queue.enqueue("send_mail", queue="newsletter")
        queue.enqueue("charge", queue="mail:eu")
        queue.enqueue("a; touch evil", queue="it's $(touch evil)")
        queue.dequeue("anna", queues=["newsletter"])
        yield queue


@pytest.fixture
def complete(capsys):
    def complete(*words):
        capsys.readouterr()
        assert admin.main(["complete", "--", *words]) == 0
        return capsys.readouterr().out.splitlines()

    return complete


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["li"], ["limit", "list-jobs"]),
        (["job"], ["jobs"]),
        (["jobs", "--status", "fa"], ["failed"]),
        (["jobs", "--status", "=", "p"], ["pending", "processing"]),
        (
            ["jobs", "--status", "="],
            ["cancelled", "completed", "failed", "pending", "processing", "scheduled", "waiting"],
        ),
        (["jobs", "--state", "s"], ["scheduled"]),
        (["jobs", "-o", ""], ["json", "table", "tsv", "wide"]),
        (["jobs", "--queue", "n"], ["newsletter"]),
        (["pause", "n"], ["newsletter"]),
        (["pause", "mail"], ["mail:eu"]),
        (["pause", "mail", ":", "e"], ["eu"]),
        (["pause", "mail", ":"], ["eu"]),
        (["pause", "newsletter", ""], []),
        (["failed", "--task", "s"], ["send_mail"]),
        (["jobs", "--consumer", ""], ["anna"]),
        (["assign-job", "1", ""], ["anna"]),
        (["assign-job", "--yes", "2", "a"], ["anna"]),
        (["cancel", ""], ["1", "2", "3"]),
        (["cancel", "1", "--queue", "newsletter", "2"], ["2"]),
        (["show", "1", ""], []),
        (["prune", "--st"], ["--state", "--status"]),
        (["prune", "--status", "failed", "--st"], []),
        (["enqueue", "ch"], ["charge"]),
        (["enqueue", "a"], ["'a; touch evil'"]),
        (["pause", "it"], ["'it'\"'\"'s $(touch evil)'"]),
        (["backup", ""], []),
        (["nosuch", ""], []),
        (["jobs", "--text", ""], []),
        (["torture", "--durability", ""], ["full", "normal"]),
    ],
)
def test_words_are_completed(queue, complete, words, found):
    assert complete(*words) == found


def test_options_are_completed_that_were_not_given(complete):
    assert "--status" in complete("jobs", "-")
    assert "--status" not in complete("jobs", "--state", "failed", "-")
    assert "--without" in complete("move", "--without", "t", "--")


@pytest.mark.parametrize("url", ["nosuch.db", "postgresql://127.0.0.1:1/none", "mysql://h"])
def test_completion_without_a_queue_creates_none_and_says_nothing(tmp_path, monkeypatch, complete, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PQUEUE_URL", url)
    assert complete("pause", "") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "last", "replies"),
    [
        ("pqueue jobs --status fa", "fa", ["failed"]),
        ("pqueue pause n", "n", ["newsletter"]),
        ("pqueue wh", "wh", ["why"]),
    ],
)
def test_bash_completes(queue, tmp_path, line, last, replies):
    command = tmp_path / "bin/pqueue"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "admin.py"} "$@"\n')
    command.chmod(0o755)
    words = line.split()
    script = (
        completion.script("pqueue")
        + f"""
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
_pqueue pqueue {last}
printf "%s\\n" "${{COMPREPLY[@]}}"
complete -p pqueue
"""
    )
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [BASH, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.splitlines() == [*replies, "complete -o default -F _pqueue pqueue"], done.stderr
