"""Typed tasks: which signatures and annotations a task may have, and what becomes of calls and payloads."""

# ruff: noqa: UP006, UP007, UP035, UP045, E501 - annotations of each form, in tables

import asyncio
import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Dict, List, Literal, NewType, Optional, TypedDict, Union
from unittest import mock
from uuid import UUID

import pytest
from conftest import ROOT

import pqueue
from pqueue import DoNotRetry, Job, open_queue, run_task, task

BERLIN = timezone(timedelta(hours=2))
UserId = NewType("UserId", int)
AdminId = NewType("AdminId", UserId)


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Access(Flag):
    READ = 1
    WRITE = 2


class Shape(Enum):
    POINT = (0, 0)
    LINE = (1, 0)


class Text(str, Enum):
    A = "a"


@dataclass(frozen=True)
class Point:
    x: int
    y: "int" = 0


@dataclass
class Line:
    points: list[Point]
    drawn: datetime | None = None
    names: dict[str, Color] = field(default_factory=dict)


@dataclass
class Tree:
    value: int
    children: "list[Tree]" = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Options:
    path: Path
    price: Decimal | None = None


class Row(TypedDict):
    at: date
    tags: list[str]


class Partial(TypedDict, total=False):
    at: date


@dataclass
class Derived:
    x: int
    double: int = field(init=False, default=0)


@dataclass
class Photo:
    name: str
    data: bytes = b""


@dataclass
class Album:
    photos: list[Photo]


class Shown(TypedDict):
    photo: bytes


@pytest.fixture(autouse=True)
def no_tasks():
    with mock.patch.dict(pqueue.TASKS, clear=True):
        yield


@pytest.fixture
def queue(tmp_path):
    with open_queue(tmp_path / "queue.db") as queue:
        yield queue


@pytest.fixture
def passed(queue):
    """Return a function that enqueues a call of a task with one annotated parameter, and returns the payload's field
    and what the function receives."""

    def passed(annotation, value):
        def function(given):
            return [given]

        function.__annotations__["given"] = annotation
        entry = task("function")(function)
        job = queue.get(entry.on(queue).enqueue(value))
        received = run_task(queue, job)[0]
        pqueue.TASKS.clear()
        return job.payload["given"], received

    return passed


def run_payload(queue, entry, payload):
    """Run a job of this task with a payload of another program."""
    return run_task(queue, queue.get(queue.enqueue(entry.name, payload)))


STORED = [
    (int, 5, 5),
    (float, 1.5, 1.5),
    (float, 2, 2),
    (str, "a", "a"),
    (bool, True, True),
    (None, None, None),
    (Any, {"a": [1]}, {"a": [1]}),
    (object, [1], [1]),
    (datetime, datetime(2026, 11, 26, 9, 30, 1, 5, tzinfo=BERLIN), "2026-11-26T09:30:01.000005+02:00"),
    (datetime, datetime(2026, 11, 26), "2026-11-26T00:00:00"),
    (date, date(2026, 11, 26), "2026-11-26"),
    (Decimal, Decimal("1.10"), "1.10"),
    (UUID, UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (Path, Path("a/b"), "a/b"),
    (PurePosixPath, PurePosixPath("/a"), "/a"),
    (Color, Color.RED, "red"),
    (Level, Level.HIGH, 2),
    (Access, Access.READ | Access.WRITE, 3),
    (Shape, Shape.LINE, "LINE"),
    (Text, Text.A, "a"),
    (str, Text.A, "a"),
    (Literal["a", 1], 1, 1),
    (Literal["a", Color.RED, Level.HIGH], Color.RED, "red"),
    (Literal[Shape.LINE, None], Shape.LINE, "LINE"),
    (Literal[Text.A], Text.A, "a"),
    (UserId, 7, 7),
    (AdminId, 7, 7),
    (Annotated[date, "of birth"], date(1815, 12, 10), "1815-12-10"),
    (Point, Point(1), {"x": 1, "y": 0}),
    (
        Line,
        Line([Point(1, 2)], datetime(2026, 1, 1), {"a": Color.BLUE}),
        {"points": [{"x": 1, "y": 2}], "drawn": "2026-01-01T00:00:00", "names": {"a": "blue"}},
    ),
    (Tree, Tree(1, [Tree(2)]), {"value": 1, "children": [{"value": 2, "children": []}]}),
    (Options, Options(path=Path("a"), price=Decimal(3)), {"path": "a", "price": "3"}),
    (Row, {"at": date(2026, 1, 2), "tags": ["x"]}, {"at": "2026-01-02", "tags": ["x"]}),
    (Partial, {}, {}),
    (list, [1, "a"], [1, "a"]),
    (list[date], [date(2026, 1, 2)], ["2026-01-02"]),
    (List[int], [1], [1]),
    (Sequence[Path], [Path("a")], ["a"]),
    (tuple[int, str], (1, "a"), [1, "a"]),
    (tuple[date, ...], (date(2026, 1, 2),) * 2, ["2026-01-02"] * 2),
    (tuple[()], (), []),
    (tuple, (1, "a"), [1, "a"]),
    (set[int], {1}, [1]),
    (frozenset[Color], frozenset([Color.RED]), ["red"]),
    (dict, {"a": 1}, {"a": 1}),
    (dict[str, UUID], {"a": UUID(int=1)}, {"a": str(UUID(int=1))}),
    (Dict[str, Any], {"a": None}, {"a": None}),
    (Mapping[str, list[Point]], {"a": [Point(1)]}, {"a": [{"x": 1, "y": 0}]}),
    (Optional[date], None, None),
    (Optional[date], date(2026, 1, 2), "2026-01-02"),
    (int | None, 3, 3),
    (Union[int, date], date(2026, 1, 2), "2026-01-02"),
    (Union[int, str, None], "a", "a"),
    (Union[Point, Tree], Tree(1), {"value": 1, "children": []}),
    (list[Point | None], [None, Point(1)], [None, {"x": 1, "y": 0}]),
    (Union[str, Path], "a", "a"),
    ("date", date(2026, 1, 2), "2026-01-02"),
    ("Optional[list[Point]]", [Point(1)], [{"x": 1, "y": 0}]),
]


@pytest.mark.parametrize(("annotation", "value", "stored"), STORED, ids=lambda each: str(each)[:40])
def test_argument_is_stored_as_json_and_restored_as_annotated(passed, annotation, value, stored):
    field, received = passed(annotation, value)
    assert (field, received) == (stored, value)
    assert type(received) is (type(value) if annotation is not str else str)


REFUSED = [
    (int, True), (int, "5"), (int, 5.0), (int, None), (bool, 1), (str, 5), (str, b"a"), (float, "1"), (float, True),
    (datetime, date(2026, 1, 1)), (datetime, "2026-01-01"), (date, datetime(2026, 1, 1)), (Decimal, 1.5), (UUID, "5"),
    (Path, "a"), (Color, "red"), (Level, 1), (Literal["a", 1], True), (Literal["a", 1], "b"), (Point, {"x": 1}),
    (Literal[Text.A], "a"), (Literal[Color.RED], Color.BLUE),
    (Point, Point("1")), (Line, Line([{"x": 1}])), (list[int], [1, "a"]), (list[int], (1,)), (list, "ab"),
    (Sequence[str], "ab"), (tuple[int, str], (1,)), (tuple[int, str], ("a", 1)), (set[int], [1]), (dict[str, int], {1: 1}),
    (dict[str, int], {"a": "b"}), (Row, {"at": date(2026, 1, 1)}), (Row, {"at": 1, "tags": []}), (Optional[int], "a"),
    (Union[int, date], "2026-01-01"), (None, 0),
    (Union[str, Path], Path("a")), (Union[date, str, datetime], datetime(2026, 1, 1)),  # would be restored as a str
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "value"), REFUSED, ids=str)
def test_argument_of_another_type_is_refused_by_enqueue(passed, queue, annotation, value):
    with pytest.raises(TypeError, match=r"^cannot enqueue function\(given: .*\): expected given.*, got given"):
        passed(annotation, value)
    assert queue.count_jobs() == 0


MISFITS = [
    (int, "5"), (int, True), (int, 1.0), (bool, 1), (str, 1), (str, None), (float, "1"),
    (datetime, "tomorrow"), (datetime, 5), (date, "2026-01-01T00:00:00"), (date, "2026-02-30"), (Decimal, "1,5"), (Decimal, 1),
    (UUID, "5"), (Path, 5), (Color, "green"), (Color, "RED"), (Color, ["red"]), (Level, 3), (Level, True), (Level, 1.0),
    (Access, 64), (Shape, "CIRCLE"), (Shape, 1), (Literal["a", 1], 1.0), (Literal[Color.RED], "blue"), (Point, [1]), (Point, {}), (Point, {"x": "1"}),
    (Point, {"x": 1, "z": 1}), (Line, {"points": [{"x": 1}, {"x": None}]}), (Tree, {"value": 1, "children": [{}]}),
    (list[int], {"0": 1}), (list[int], "12"), (list[int], [1, None]), (tuple[int, str], [1]), (tuple[int, str], [1, 2]),
    (set[Any], [[1]]), (dict[str, int], [1]), (dict[str, int], {"a": None}), (dict, []), (list, {}),
    (Row, {"at": "2026-01-01"}), (Row, {"at": "x", "tags": []}), (Optional[int], "a"), (Union[Point, Tree], {"x": 1, "value": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "value"), MISFITS, ids=str)
def test_field_of_another_type_fails_the_job_and_says_what_was_expected(queue, annotation, value):
    def function(given):
        raise AssertionError("was called")

    function.__annotations__["given"] = annotation
    entry = task("function")(function)
    with pytest.raises(
        DoNotRetry, match=r"^the payload does not fit function\(given: .*\): expected given.*, got given"
    ):
        run_payload(queue, entry, {"given": value})


def test_errors_say_where_the_value_is(queue):
    @task
    def draw(lines: list[Line], password: int = 0): ...

    for payload, error in (
        ({}, "expected the fields 'lines', 'password' (optional), got {}"),
        ({"lines": [], "pasword": 1}, "expected the fields 'lines', 'password' (optional), got {'lines': …, 'pasword': …}"),
        ([1], "expected the fields 'lines', 'password' (optional), got [1]"),
        ("a", "expected the fields 'lines', 'password' (optional), got 'a'"),
        ({"lines": [], "password": "hunter2"}, "expected password: int, got password='hunter2'"),  # which logs mask
        ({"lines": [{"points": [{"x": 1}, {"x": "a"}]}]}, "expected lines[0].points[1].x: int, got lines[0].points[1].x='a'"),
        ({"lines": [{"points": [], "names": {"a": 1}}]}, "expected lines[0].names['a']: Color, got lines[0].names['a']=1"),
        ({"lines": [{"points": [{"z": 1}]}]}, "the fields 'x', 'y' (optional), got lines[0].points[0]={'z': …}"),
    ):  # fmt: skip
        with pytest.raises(DoNotRetry) as caught:
            run_payload(queue, draw, payload)
        assert str(caught.value).endswith(error)


def test_error_names_all_types_of_a_union(passed):
    with pytest.raises(TypeError, match=r"expected given: int \| date \| None, got given='a'"):
        passed(int | date | None, "a")


def test_error_says_that_a_tuple_may_be_of_any_length(passed):
    with pytest.raises(TypeError, match=r"expected given: tuple\[int, \.\.\.\], got given=\[1\]"):
        passed(tuple[int, ...], [1])


def test_payload_that_does_not_fit_fails_its_job_at_once_with_one_line(place):
    place.write(
        "typed.py", "from pqueue import task\n\n\n@task(max_attempts=5)\ndef resize(path: str, width: int = 200): ...\n"
    )
    queue = place.queue()
    wrong, right = queue.enqueue("resize", {"path": "a", "with": 5}), queue.enqueue("resize", {"path": "a", "width": 5})
    place.run("consumer.py", "--import", "typed", "--drain")
    job = queue.get(wrong)
    assert (job.state, job.attempts, queue.get(right).state) == ("failed", 1, "completed")
    first, *rest = job.error.splitlines()
    assert first == (
        "DoNotRetry: the payload does not fit resize(path: str, width: int = 200): "
        "expected the fields 'path', 'width' (optional), got {'path': …, 'with': …}"
    )
    assert not [line for line in rest if "pqueue_fields" in line]


def test_consumer_refuses_a_task_whose_annotation_cannot_be_used(place):
    place.write("typed.py", "from pqueue import task\n\n\n@task\ndef f(given: 'Later'): ...\n")
    done = place.run("consumer.py", "--import", "typed", "--drain")
    assert done.returncode == 2
    assert "cannot resolve 'Later', the annotation of given of task 'f'" in done.stderr
    assert "Traceback" not in done.stderr


# Signatures


def test_call_is_bound_like_an_ordinary_call(queue):
    @task
    def f(a, b, /, c, d=4, *, e, g=6):
        return [a, b, c, d, e, g]

    for args, kwargs in (((1, 2, 3), {"e": 5}), ((1, 2), {"e": 5, "c": 3}), ((1, 2, 3, 0), {"g": 7, "e": 5})):
        job = queue.get(f.on(queue).enqueue(*args, **kwargs))
        assert run_task(queue, job) == f(*args, **kwargs)
        assert queue.get(f.on(queue).enqueue(*args, **kwargs)).payload == job.payload  # bound before
    assert job.payload == {"a": 1, "b": 2, "c": 3, "d": 0, "g": 7, "e": 5}
    for args, kwargs in (
        ((), {}),
        ((1, 2), {"e": 5}),
        ((1, 2, 3), {}),
        ((1, 2, 3, 4, 5), {"e": 5}),
        ((1, 2, 3), {"e": 5, "c": 3}),
        ((1, 2, 3), {"e": 5, "x": 3}),
        ((1,), {"b": 2, "c": 3, "e": 5}),
    ):
        for _ in range(2):
            with pytest.raises(TypeError, match=r"^f\(\) "):
                f.on(queue).enqueue(*args, **kwargs)
        with pytest.raises(TypeError):
            f(*args, **kwargs)


def test_positional_only_field_that_another_program_left_out_has_its_default(queue):
    @task
    def f(a=1, b=2, /, c=3):
        return [a, b, c]

    assert run_payload(queue, f, {"b": 5}) == [1, 5, 3]
    assert run_payload(queue, f, {"c": 5}) == [1, 2, 5]
    assert run_payload(queue, f, None) == [1, 2, 3]


def test_default_is_not_stored(queue):
    @task
    def f(a: int = 1, at: date = None, plain=Color.RED): ...

    assert queue.get(f.on(queue).enqueue()).payload == {}
    assert queue.get(f.on(queue).enqueue(2, at=None)).payload == {"a": 2, "at": None}


def test_job_goes_to_the_parameter_that_is_annotated_or_named_so(queue):
    def functions():
        def first(job: Job, a: int):
            return job, a

        def last(a: int, current: Job):
            return current, a

        def named(a: int, job):
            return job, a

        def text(current: "Job", a: int):
            return current, a

        def dotted(current: "pqueue.Job", a: int):
            return current, a

        def optional(a: int, current: Optional[Job] = None):
            return current, a

        def new(a: int, current: "Job | None" = None):
            return current, a

        def keyword(a: int, *, job: Job):
            return job, a

        def positional(job: Job, /, a: int):
            return job, a

        return [first, last, named, text, dotted, optional, new, keyword, positional]  # fmt: skip

    for function in functions():
        entry = task(function)
        job = queue.get(entry.on(queue).enqueue(a=7))
        assert job.payload == {"a": 7}
        assert run_task(queue, job) == (job, 7), function.__name__
        assert entry.on(queue).enqueue(7)
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            entry.on(queue).enqueue(
                7, **{next(name for name in ("job", "current") if name in function.__code__.co_varnames): job}
            )


def test_job_is_known_by_its_name_where_only_a_checker_imports_it(tmp_path):
    (tmp_path / "checked.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom pqueue import task\n"
        "if TYPE_CHECKING:\n    from pqueue import Job\n\n"
        "@task\ndef f(current: Job, a: int): ...\n@task\ndef g(a: int, current: Job | None = None): ...\n"
        "print(f.parameters.payload((1,), {}), g.parameters.payload((1,), {}))\n"
    )
    done = subprocess.run(
        [sys.executable, "checked.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("{'a': 1} {'a': 1}\n", "")


def test_another_class_named_job_is_a_field(queue):
    @dataclass
    class Job:
        number: int

    def f(given):
        return given

    f.__annotations__["given"] = Job
    entry = task(f)
    assert run_task(queue, queue.get(entry.on(queue).enqueue(Job(5)))) == Job(5)


def test_task_that_takes_only_the_job_accepts_any_payload(queue):
    def functions():
        def old(job):
            return job

        def annotated(anything: Job):
            return anything

        def keyword(*, job):
            return job

        return [old, annotated, keyword]  # fmt: skip

    for function in functions():
        entry = task(function)
        for payload in (None, 5, [1], {"a": 1}):
            assert run_payload(queue, entry, payload).payload == payload
        assert queue.get(entry.on(queue).enqueue()).payload is None
        with pytest.raises(TypeError, match=r"\(\) too many positional arguments"):
            entry.on(queue).enqueue(5)


def test_task_without_parameters_accepts_no_payload(queue):
    @task
    def tick():
        return "tock"

    assert run_task(queue, queue.get(tick.on(queue).enqueue())) == "tock"
    assert run_payload(queue, tick, {}) == "tock"
    with pytest.raises(DoNotRetry, match=r"does not fit tick\(\): expected no fields, got {'a': …}"):
        run_payload(queue, tick, {"a": 1})


def test_callables_that_are_no_plain_functions_work_with_a_name(queue):
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, number: Decimal):
            return self.factor * number

        def method(self, number: Decimal):
            return self.factor * number

        @staticmethod
        def static(number: Decimal):
            return 3 * number

    def times(factor, number: Decimal):
        return factor * number

    @functools.wraps(times)
    def wrapper(*args, **kwargs):
        return times(*args, **kwargs)

    for function, args in (
        (Scale(3), ()),
        (Scale(3).method, ()),
        (Scale.static, ()),
        (functools.partial(times, 3), ()),
        (functools.partial(wrapper, 3), ()),
        (wrapper, (3,)),
    ):
        pqueue.TASKS.clear()
        entry = task("scale")(function)
        assert run_task(queue, queue.get(entry.on(queue).enqueue(*args, Decimal(2)))) == 6


def test_functions_whose_arguments_a_payload_cannot_name_are_refused():
    class A:
        def method(self, a): ...

        @classmethod
        def of(cls, a): ...

    def args(*numbers): ...
    def kwargs(a, **options): ...

    for function, error in (
        (args, r"parameters have names, got .*, with \*numbers"),
        (kwargs, r"parameters have names, got .*, with \*\*options"),
        (A.method, "a method without its object"),
        (A.__dict__["of"], "expected a function"),
        (print, "expected a"),
        (int, "expected a function"),
        (max, "expected a function with a signature"),
    ):
        with pytest.raises(ValueError, match=error):
            task("t")(function)
    assert pqueue.TASKS == {}


UNSUPPORTED = [bytes, complex, timedelta, type, Exception, Derived, dict[int, str], list[bytes], Optional[bytes], "Missing",
    Literal[b"a"], Point | bytes, set[bytes], functools.partial, "1 +", [int], Literal, tuple[bytes, ...], type[int]]  # fmt: skip


@pytest.mark.parametrize("annotation", UNSUPPORTED, ids=str)
def test_annotation_that_cannot_be_stored_is_named_when_it_is_first_used(queue, annotation):
    def function(given): ...

    function.__annotations__["given"] = annotation
    entry = task("function")(function)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"(parameter|annotation of) given of task 'function'|cannot store Derived"
        ) as caught:
            entry.on(queue).enqueue(Derived(1))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value", "where"),
    [
        (Photo, Photo("a"), "field data of Photo"),
        (Album, Album([Photo("a")]), "field data of Photo"),
        (Shown, {"photo": b""}, "field photo of Shown"),
    ],
    ids=str,
)
def test_field_that_cannot_be_stored_is_named(passed, annotation, value, where):
    with pytest.raises(TypeError, match=f"^{where}: cannot store bytes; expected"):
        passed(annotation, value)


def test_annotations_are_read_at_the_first_call(queue):
    @task
    def f(given: "Late"):
        return given

    global Late  # noqa: PLW0603
    Late = date
    assert run_task(queue, queue.get(f.on(queue).enqueue(date(2026, 1, 2)))) == date(2026, 1, 2)


def test_payload_is_readable_json(queue):
    @task
    def f(path: Path, sizes: list[Point]): ...

    job_id = f.on(queue).enqueue(Path("a"), [Point(1)])
    assert json.dumps(queue.get(job_id).payload) == '{"path": "a", "sizes": [{"x": 1, "y": 0}]}'


def returning(annotation, value, *, is_async=False):
    async def coroutine():
        return value

    def function():
        return value

    made = coroutine if is_async else function
    made.__annotations__["return"] = annotation
    return task("function")(made)


def done(queue, entry):
    """Run a job of this task; return its stored result and that of `result`."""
    job_id = entry.on(queue).enqueue()
    job = queue.dequeue("w")
    queue.complete(job, run_task(queue, job))
    return queue.get(job_id).result, job_id.result()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("annotation", "value", "stored"), STORED, ids=str)
def test_result_is_stored_as_json_and_restored_as_annotated(queue, annotation, value, stored, is_async):
    found, restored = done(queue, returning(annotation, value, is_async=is_async))
    assert (found, restored) == (stored, value)
    assert annotation is str or type(restored) is type(value)


def test_result_is_json_where_the_task_is_unknown(queue):
    job_id = returning(date, date(2026, 1, 2)).on(queue).enqueue()
    job = queue.dequeue("w")
    queue.complete(job, run_task(queue, job))
    pqueue.TASKS.clear()
    assert job_id.result() == "2026-01-02"


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (date, "soon"),
        (list[Point], [1]),
        ("Missing", 5),
        (bytes, "b"),
        (Color, None),
        (UUID, 7),
        (int, "5"),
        (Photo, {}),
    ],
    ids=str,
)
def test_result_that_is_not_as_annotated_is_stored_as_it_is(queue, annotation, value):
    assert done(queue, returning(annotation, value)) == (value, value)


def test_consumer_does_not_repeat_a_task_whose_result_cannot_be_stored(place):
    place.write(
        "typed.py",
        """from dataclasses import dataclass

from pqueue import task


@dataclass
class Photo:
    data: bytes


@task
def load() -> Photo:
    return Photo(b"")
""",
    )
    queue = place.queue()
    job_id = queue.enqueue("load")
    place.run("consumer.py", "--import", "typed", "--drain")
    job = queue.get(job_id)
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error.startswith("expected a result that JSON can hold, got Photo")


def test_result_without_annotation_is_not_converted(queue):
    entry = task("function")(lambda: Point(1))
    with pytest.raises(ValueError, match="expected a result that JSON can hold, got Point"):
        done(queue, entry)


def test_coroutine_awaits_a_result_as_annotated(queue):
    job_id = returning(Point, Point(1)).on(queue).enqueue()
    job = queue.dequeue("w")
    queue.complete(job, run_task(queue, job))
    assert asyncio.run(job_id.aresult()) == Point(1)
