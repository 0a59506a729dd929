"""The fields of a payload: values of annotated types, stored as JSON and restored as they are annotated."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict
from uuid import UUID

from pqueue_values import DoNotRetry, Job, short

Convert = Callable[[Any], Any]
JOB_TEXT = re.compile(r"(\w+\.)*Job|(\w+\.)*Optional\[(\w+\.)*Job\]|(\w+\.)*Job *\| *None|None *\| *(\w+\.)*Job")
SUPPORTED = "JSON types, datetime, date, Decimal, UUID, Path, Enum, dataclasses, and lists, dicts and unions of them"


class Misfit(Exception):
    """A value is not what its annotation says. `path` is where, from the field inwards: such as ".points", "[2]"."""

    def __init__(self, expected: str, got: str) -> None:
        self.expected, self.got, self.path = expected, got, ""

    def __str__(self) -> str:
        path = self.path.lstrip(".")
        name, value = (f"{path}: ", f"{path}=") if path else ("", "")  # what follows password= is masked
        return f"expected {name}{self.expected}, got {value}{self.got}"


class Codec(NamedTuple):
    """How to convert values of a type to JSON and back; both functions raise Misfit."""

    expected: str
    encode: Convert
    decode: Convert


def codec(hint: Any) -> Codec:
    """Return the conversions for an annotation. Raises TypeError if its values cannot be stored."""
    while hasattr(hint, "__supertype__"):  # of a NewType
        hint = hint.__supertype__
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, object, inspect.Parameter.empty):
        return ANYTHING
    if origin in (Union, UnionType):
        return _union(args)
    if origin is Literal:
        return _literal(args)
    kind = origin or hint
    found = _of_class(kind, args) if isinstance(kind, type) else None
    if found is None or (args and kind not in GENERIC):
        raise TypeError(f"cannot store {_name(hint)}; expected {SUPPORTED}")
    return found


def _of_class(kind: type, args: tuple[Any, ...]) -> Codec | None:
    if kind in SCALARS:
        return SCALARS[kind]
    if kind in LISTS:
        return _list(kind, args)
    if kind in (dict, Mapping):
        return _dict(codec(args[1] if args else Any)) if args[:1] in ((), (str,), (Any,)) else None
    if issubclass(kind, Enum):
        return _enum(kind)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _record(kind)
    return _text(kind, str, kind) if issubclass(kind, PurePath) else None


def _scalar(expected: str, *kinds: type, but: type | tuple[()] = ()) -> Codec:
    def check(value: Any) -> Any:
        if isinstance(value, kinds) and not isinstance(value, but):
            return value
        raise Misfit(expected, short(value))

    return Codec(expected, check, check)


def _text(kind: type, encode: Convert, decode: Convert, but: type | tuple[()] = ()) -> Codec:
    def to_text(value: Any) -> str:
        if isinstance(value, kind) and not isinstance(value, but):
            return str(encode(value))
        raise Misfit(kind.__name__, short(value))

    def from_text(text: Any) -> Any:
        if not isinstance(text, str):
            raise Misfit(kind.__name__, short(text))
        return _built(kind, decode, text)

    return Codec(kind.__name__, to_text, from_text)


def _built(kind: type, build: Convert, value: Any) -> Any:
    try:
        return build(value)
    except (ValueError, TypeError, ArithmeticError):
        raise Misfit(kind.__name__, short(value)) from None


SCALARS = {
    NoneType: _scalar("None", NoneType),
    bool: _scalar("bool", bool),
    int: _scalar("int", int, but=bool),
    float: _scalar("float", float, int, but=bool),
    str: _scalar("str", str),
    # Python 3.10 knows no Z.
    datetime: _text(datetime, datetime.isoformat, lambda text: datetime.fromisoformat(re.sub("Z$", "+00:00", text))),
    date: _text(date, date.isoformat, date.fromisoformat, but=datetime),
    Decimal: _text(Decimal, str, Decimal),
    UUID: _text(UUID, str, UUID),
}


def _enum(kind: type[Enum]) -> Codec:
    """Store the values of the members if they are text or whole numbers, else their names."""
    by_value = all(type(member.value) in (str, int) for member in kind)

    def encode(member: Any) -> Any:
        if isinstance(member, kind):
            return member.value if by_value else member.name
        raise Misfit(kind.__name__, short(member))

    def decode(value: Any) -> Any:
        if type(value) in (str, int):
            with suppress(KeyError, ValueError, TypeError):
                return kind(value) if by_value else kind[value]
        raise Misfit(kind.__name__, short(value))

    return Codec(kind.__name__, encode, decode)


def _literal(values: tuple[Any, ...]) -> Codec:
    expected = " | ".join(map(repr, values))
    encoded = [(each, codec(type(each)).encode(each)) for each in values]

    def converter(pairs: list[tuple[Any, Any]]) -> Convert:
        def convert(value: Any) -> Any:
            for before, after in pairs:
                if value == before and type(value) is type(before):
                    return after
            raise Misfit(expected, short(value))

        return convert

    return Codec(expected, converter(encoded), converter([(after, before) for before, after in encoded]))


def _union(args: tuple[Any, ...]) -> Codec:
    if len(args) > 2 or NoneType not in args:
        return _one_of([codec(each) for each in args])
    one = codec(args[0] if args[1] is NoneType else args[1])
    return Codec(
        f"{one.expected} | None",
        lambda value: None if value is None else one.encode(value),
        lambda value: None if value is None else one.decode(value),
    )


def _one_of(members: list[Codec]) -> Codec:
    """Store a value as the first of the types that takes it, and restore it as the first that takes the JSON."""
    expected = " | ".join(each.expected for each in members)

    def first(convert: Callable[[Codec], Any], value: Any) -> tuple[Codec, Any]:
        for each in members:
            try:
                return each, convert(each)
            except Misfit:
                pass
        raise Misfit(expected, short(value))

    def encode(value: Any) -> Any:
        member, encoded = first(lambda each: each.encode(value), value)
        restored, _ = first(lambda each: each.decode(encoded), encoded)
        # guard: a value of a union is restored as the type that it has
        if restored is not member:
            raise Misfit(f"{expected} that JSON can tell apart", f"{short(value)}, which would become a {restored[0]}")
        return encoded

    return Codec(expected, encode, lambda value: first(lambda each: each.decode(value), value)[1])


ANYTHING = Codec("anything", lambda value: value, lambda value: value)
LISTS: dict[Any, Any] = {list: list, tuple: tuple, set: set, frozenset: frozenset, Sequence: list}
GENERIC = (*LISTS, dict, Mapping)


def _list(kind: Any, args: tuple[Any, ...]) -> Codec:
    if kind is list and args in ((), (Any,)):
        return _scalar("list", list)
    if kind is tuple and args and args[-1] is not Ellipsis:
        members = [codec(each) for each in args]
        expected, repeats = f"tuple[{', '.join(each.expected for each in members)}]", False
    else:
        members = [codec(args[0] if args else Any)]
        of = f"{members[0].expected}, ..." if kind is tuple else members[0].expected
        expected, repeats = f"{kind.__name__}[{of}]", True

    def convert(values: Any, which: str) -> list[Any]:
        if not repeats and len(values) != len(members):
            raise Misfit(expected, short(values))
        each = [getattr(member, which) for member in members] * (len(values) if repeats else 1)
        return [_at("[{}]", index, each[index], value) for index, value in enumerate(values)]

    def encode(values: Any) -> list[Any]:
        if not isinstance(values, kind) or isinstance(values, (str, bytes)):
            raise Misfit(expected, short(values))
        return convert(values, "encode")

    def decode(values: Any) -> Any:
        if not isinstance(values, list):
            raise Misfit(expected, short(values))
        return _built(kind, LISTS[kind], convert(values, "decode"))

    return Codec(expected, encode, decode)


def _dict(values: Codec) -> Codec:
    if values is ANYTHING:
        return _scalar("dict", dict)
    expected = f"dict[str, {values.expected}]"

    def converter(convert: Convert) -> Convert:
        def each(found: Any) -> dict[str, Any]:
            if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
                raise Misfit(expected, short(found))
            return {key: _at("[{!r}]", key, convert, value) for key, value in found.items()}

        return each

    return Codec(expected, converter(values.encode), converter(values.decode))


def _at(path: str, key: str | int, convert: Convert, value: Any) -> Any:
    """Convert a value; in the error, say at which key."""
    try:
        return convert(value)
    except Misfit as misfit:
        misfit.path = path.format(key) + misfit.path
        raise


def _record(kind: type) -> Codec:
    """Store a dataclass or a TypedDict as an object."""
    is_dict = is_typeddict(kind)

    def encode(value: Any) -> dict[str, Any]:
        fields = _fields_of(kind)
        if is_dict and isinstance(value, dict):
            return fields.encode(fields.verified(value))
        if type(value) is not kind:  # of a subclass, fields would be lost
            raise Misfit(kind.__name__, short(value))
        return fields.encode({name: getattr(value, name) for name in fields.codecs})

    def decode(value: Any) -> Any:
        values = _fields_of(kind).decode(value)
        return values if is_dict else _built(kind, lambda found: kind(**found), values)

    return Codec(kind.__name__, encode, decode)


@functools.cache
def _fields_of(kind: Any) -> Fields:
    """Return the fields of a dataclass or a TypedDict; only when first used, as a class may contain itself."""
    try:
        hints = get_type_hints(kind)
    except Exception as error:
        raise TypeError(f"cannot store {kind.__name__}: {error}") from None
    if is_typeddict(kind):
        return Fields(_codecs("field", kind.__name__, hints), kind.__required_keys__)
    parameters = inspect.signature(kind).parameters
    if set(parameters) != {each.name for each in dataclasses.fields(kind)}:
        raise TypeError(f"cannot store {kind.__name__}: the parameters of its constructor are not its fields")
    codecs = _codecs("field", kind.__name__, {name: hints[name] for name in parameters})
    return Fields(codecs, _required(parameters.values()))


def _required(parameters: Iterable[inspect.Parameter]) -> Iterable[str]:
    return (each.name for each in parameters if each.default is each.empty)


class Fields:
    """Named values of a JSON object."""

    def __init__(self, codecs: dict[str, Codec], required: Iterable[str]) -> None:
        self.codecs, self.required = codecs, frozenset(required)

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _at(".{}", name, self.codecs[name].encode, value) for name, value in values.items()}

    def decode(self, values: Any) -> dict[str, Any]:
        found = self.verified(values)
        return {name: _at(".{}", name, self.codecs[name].decode, value) for name, value in found.items()}

    def verified(self, values: Any) -> dict[str, Any]:
        """Return the values if they have all required fields, and no unknown ones."""
        if not isinstance(values, dict):
            raise Misfit(self._listed(), short(values))
        # guard: a payload has all required fields and no others
        if not self.required <= values.keys() or not values.keys() <= self.codecs.keys():
            raise Misfit(self._listed(), f"{{{', '.join(f'{short(name)}: …' for name in values)}}}")
        return values

    def _listed(self) -> str:
        names = [repr(name) if name in self.required else f"{name!r} (optional)" for name in self.codecs]
        return f"the fields {', '.join(names)}" if names else "no fields"


class Parameters(Fields):
    """The parameters of a task's function: makes a payload of the arguments of a call, and a call of a payload.

    A parameter annotated `Job`, or named job without an annotation, receives the job. The others are the fields of the
    payload. Raises TypeError if one cannot be stored.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function
        parameters = [_resolved(name, each, _namespace(function)) for each in signature(function).parameters.values()]
        self._jobs = [each for each in parameters if each.annotation is Job]
        fields = [each for each in parameters if each.annotation is not Job]
        codecs = _codecs("parameter", f"task {name!r}", {each.name: each.annotation for each in fields})
        super().__init__(codecs, _required(fields))
        self._signature = inspect.Signature(fields)
        self._positional = [each.name for each in fields if each.kind is not each.KEYWORD_ONLY]
        self._without_names = [each for each in parameters if each.kind is each.POSITIONAL_ONLY]
        self._shapes: dict[tuple[Any, ...], list[str]] = {}
        self._result = _codec_of_result(function)

    def payload(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload for a call. Raises TypeError if the function cannot be called so."""
        shape = (len(args), *kwargs)
        names = self._shapes.get(shape) or self._names(shape, args, kwargs)
        try:
            return self.encode(dict(zip(names, (*args, *kwargs.values()), strict=True))) if self.codecs else None
        except Misfit as misfit:
            raise TypeError(f"cannot enqueue {self.name}{self._signature}: {misfit}") from None

    def _names(self, shape: tuple[Any, ...], args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
        """Return the names of a call's arguments; cache them by the shape of the call."""
        try:
            # guard: a call fits the signature
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}() {error}") from None
        names = self._shapes[shape] = [*self._positional[: len(args)], *kwargs]
        return names

    def runner(self) -> Callable[[Job], Any]:
        """Return a function that runs a job. It raises DoNotRetry if the payload does not fit."""
        takes_job = not self.codecs and len(self._jobs) == 1
        takes_job = takes_job and self._jobs[0].kind is not inspect.Parameter.KEYWORD_ONLY
        run = self._function if takes_job else self._run
        if self._result is ANYTHING:
            return run
        if is_async(self._function):

            async def run_async(job: Job) -> Any:
                return self._stored(await run(job))

            return run_async
        return lambda job: self._stored(run(job))

    def _stored(self, result: Any) -> Any:
        """Return what is stored for a result; the result itself if it is not of the type that is annotated, or cannot
        be stored: the task has done its work, and must not fail."""
        with suppress(Exception):
            return self._result.encode(result)
        return result

    def restored(self, result: Any) -> Any:
        """Return a stored result as the type that the function is annotated to return, if it fits."""
        with suppress(Exception):
            return self._result.decode(result)
        return result

    def _run(self, job: Job) -> Any:
        try:
            # A task without fields that takes the job accepts any payload.
            values = self.decode({} if job.payload is None else job.payload) if self.codecs or not self._jobs else {}
        except Misfit as misfit:
            raise DoNotRetry(f"the payload does not fit {self.name}{self._signature}: {misfit}") from None
        values.update((each.name, job) for each in self._jobs)
        args = [values.pop(each.name, each.default) for each in self._without_names]
        return self._function(*args, **values)


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine."""
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


def read_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature. In Python 3.14, annotations may name what is defined later: they are text then."""
    try:
        return inspect.signature(function)
    except NameError:
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            return inspect.signature(function, annotation_format=Format.STRING)
        raise


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a task's function. Raises ValueError if a payload cannot hold its arguments."""
    try:
        found = read_signature(function)
    except (ValueError, TypeError):
        raise ValueError(f"expected a function with a signature as a task, got {short(function)}") from None
    names = list(found.parameters)
    for each in found.parameters.values():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            raise ValueError(f"expected a task whose parameters have names, got {short(function)}, with {each}")
    if names[:1] in (["self"], ["cls"]):
        raise ValueError(f"expected a function as a task, got {short(function)}, a method without its object")
    return found


def _resolved(task: str, parameter: inspect.Parameter, namespace: dict[str, Any]) -> inspect.Parameter:
    """Return the parameter with what its annotation means; `Job` if it receives the job."""
    hint = parameter.annotation
    if hint is parameter.empty:
        return parameter.replace(annotation=Job) if parameter.name == "job" else parameter
    try:
        hint = get_type_hints(SimpleNamespace(__annotations__={"hint": hint}), namespace)["hint"]
    except Exception as error:
        if not (isinstance(hint, str) and JOB_TEXT.fullmatch(hint.strip())):  # perhaps imported for checkers only
            raise TypeError(
                f"cannot resolve {hint!r}, the annotation of {parameter.name} of task {task!r}: {error}; "
                "define or import it at the top of the module"
            ) from None
        hint = Job
    if get_args(hint) in ((Job, NoneType), (NoneType, Job)):
        hint = Job
    elif hint is not Job and parameter.default is None:
        hint = Union[hint, None]  # noqa: UP007 - not every hint has |
    return parameter.replace(annotation=hint)


def _codec_of_result(function: Callable[..., Any]) -> Codec:
    """Return the conversions of a result; none for an annotation that is unknown or cannot be stored."""
    hint = signature(function).return_annotation
    with suppress(Exception):  # of names that are imported for type checkers only
        hint = get_type_hints(SimpleNamespace(__annotations__={"hint": hint}), _namespace(function))["hint"]
        return ANYTHING if _is_json(hint) else codec(hint)
    return ANYTHING


def _is_json(hint: Any) -> bool:
    """Return whether JSON holds values of this type as they are."""
    if get_origin(hint) in (list, dict, Union, UnionType):
        return all(map(_is_json, get_args(hint)))
    return hint in (Any, NoneType, bool, int, float, str, list, dict)


def _codecs(what: str, of: str, hints: dict[str, Any]) -> dict[str, Codec]:
    codecs = {}
    for name, hint in hints.items():
        try:
            codecs[name] = codec(hint)
        except TypeError as error:
            raise TypeError(f"{what} {name} of {of}: {error}") from None
    return codecs


def _namespace(function: Any) -> dict[str, Any]:
    """Return the global names of a function, of what a partial calls, or of what makes an object callable."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__globals__"):
        function = type(function).__call__
    found: dict[str, Any] = getattr(function, "__globals__", {})
    return found


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
