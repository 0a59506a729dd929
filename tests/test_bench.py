"""`python -m bench` as a user runs it, at a hundredth of its work; what it finds is not judged."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

PACKAGES = ("huey", "litequeue", "persistqueue", "localqueue", "matplotlib", "redis", "psycopg")


@pytest.fixture
def bench(place):
    """Run it where none of the packages that it can use are installed."""
    place.write("hidden/sitecustomize.py", f"import sys; sys.modules.update(dict.fromkeys({PACKAGES!r}))")

    def run(*arguments):
        return place.run("-m", "bench", *arguments, PYTHONPATH=f"{place.folder / 'hidden'}:{ROOT}", BENCH_SCALE="0.01")

    return run


def test_bench_measures_a_column_and_names_the_omitted_ones(bench, place):
    done = bench("--quick", "--only", "put", "--json", "found.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "litequeue is left out: pip install litequeue" in done.stdout.splitlines()
    assert "persist-queue is left out: pip install persist-queue" in done.stdout.splitlines()

    found = json.loads((place.folder / "found.json").read_text())
    assert found["machine"]["fdatasync"].endswith("(medians)")
    turns = [(row["column"], row["contestant"], row["durability"]) for row in found["results"]]
    assert turns == [("put", name, mode) for name in ("limit", "pqueue") for mode in ("full", "normal")]
    assert all(row["figures"]["jobs/s"][0] > 0 for row in found["results"])

    table = [line.split() for line in done.stdout.splitlines() if line.startswith("put ")]
    assert [line[1:4] for line in table] == [[name, mode, "jobs/s"] for _, name, mode in turns]
    ours, limit = (found["results"][at]["figures"]["jobs/s"][0] for at in (2, 0))
    assert table[2][-1] == f"{ours / limit:.2f}"  # the last column is the ratio to the limit
    assert "  huey           lost: it is deleted before it runs" in done.stdout.splitlines()


def test_bench_times_puts_while_workers_run_and_counts_failed_ones(bench, place):
    done = bench("--quick", "--only", "put under load", "--json", "found.json")
    assert (done.returncode, done.stderr) == (0, "")
    for row in json.loads((place.folder / "found.json").read_text())["results"]:
        figures = {name: values[0] for name, values in row["figures"].items()}
        assert 0 < figures["p50 ms"] <= figures["p99 ms"] <= figures["max ms"]
        assert row["contestant"] == "limit" or figures["errors"] == 0


def test_bench_times_puts_alongside_plain_loops_and_how_the_loops_share(bench, place):
    done = bench("--quick", "--only", "put alongside 4 loops", "--json", "found.json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((place.folder / "found.json").read_text())["results"]
    assert [row["contestant"] for row in results] == ["limit", "limit", "pqueue", "pqueue"]
    for row in results:
        figures = {name: values[0] for name, values in row["figures"].items()}
        assert 0 < figures["p50 ms"] <= figures["p99 ms"] <= figures["max ms"]
        assert figures["jobs/s"] > 0 and 0 <= figures["fewest/most"] <= 1
        assert row["contestant"] == "limit" or figures["errors"] == 0


def test_bench_wakes_a_worker_of_each_for_a_job(bench, place):
    done = bench("--quick", "--only", "pickup", "--json", "found.json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((place.folder / "found.json").read_text())["results"]
    assert [row["contestant"] for row in results] == ["limit", "limit", "pqueue", "pqueue"]
    assert all(row["figures"]["p50 ms"][0] > 0 for row in results)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--redis"], "bench: --redis needs redis-server (apt install redis-server) and pip install redis"),
        (["--plot", "x.png"], "bench: --plot needs matplotlib: pip install matplotlib"),
        (["--url", "postgresql://h/d"], "bench: --url needs SQLAlchemy and psycopg: pip install SQLAlchemy"),
        (["--json", "no/x.json"], "bench: cannot write 'no/x.json': expected a file in a folder that"),
    ],
)
def test_bench_reports_missing_requirements_before_it_measures(bench, arguments, said):
    done = bench("--quick", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(said)
    assert "put" not in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
        (["--rounds", "0"], "argument --rounds: expected"),
        (["--only", "connections"], "expected --url with prune over 0.5 ms, connections, got none"),
        (["--why", "--only", "put"], "expected no option but --rounds with --why and --redis, got another option"),
    ],
)
def test_bench_refuses_options_that_it_cannot_follow(bench, arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_bench_says_that_it_cannot_reach_the_server(place):
    arguments = ("--quick", "--only", "put", "--url", "postgresql://127.0.0.1:1/none")
    done = place.run("-m", "bench", *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("bench: cannot use the server of --url: ")


def test_bench_measures_the_columns_that_are_named(bench, place):
    done = bench("--quick", "--only", "30 queues, 4 workers", "prune", "--json", "found.json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((place.folder / "found.json").read_text())["results"]
    assert [row["column"] for row in results] == ["30 queues, 4 workers"] * 2 + ["prune"] * 2
    assert all(row["contestant"] == "pqueue" and row["figures"]["jobs/s"][0] > 0 for row in results)
