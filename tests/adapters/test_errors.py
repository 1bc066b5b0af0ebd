"""The exception tree: it is the tree drawn at the top of the file, and every error survives the process boundary."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from loramux_adapters import errors
from loramux_adapters.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    Fault,
    InvalidAdapter,
    LoramuxError,
    Overloaded,
    RequestError,
    UnknownAdapter,
)


def all_errors() -> list[type[LoramuxError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, LoramuxError) and value.__module__ == errors.__name__
    ]


def example(cls: type[LoramuxError]) -> LoramuxError:
    if issubclass(cls, InvalidAdapter):
        return cls([Fault("r", "must be positive"), Fault("q_proj", "is missing")], name="acme")
    return cls("the field is wrong; write another", param="field", code="special")


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """Parents are read from the drawing by indentation."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^( +[│├└─ ]*)([A-Z]\w+)\b", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < indent]
        drawn[name] = above[-1][1] if above else ""
        above.append((indent, name))
    real = {cls.__name__: cls.__mro__[1].__name__ for cls in all_errors()}
    real["LoramuxError"] = ""
    assert drawn == real


@pytest.mark.parametrize("cls", all_errors())
def test_pickle_and_copy_keep_everything(cls: type[LoramuxError]) -> None:
    error = example(cls)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(again) is cls
        assert str(again) == str(error) == error.message
        assert vars(again) == vars(error)
        assert again.code == error.code


def test_codes_are_stable_and_the_class_is_not_changed_by_an_instance() -> None:
    assert LoramuxError("x", code="other").code == "other"
    assert LoramuxError("x").code == "loramux_error"
    codes = {cls: cls.code for cls in all_errors()}
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes.values())
    assert codes[UnknownAdapter] == "model_not_found"  # what OpenAI's clients look for
    assert len(set(codes.values())) == len(codes)


def test_invalid_adapter_tells_every_fault_at_once() -> None:
    several = InvalidAdapter([Fault("r", "must be positive"), Fault("q_proj", "is missing")], name="acme")
    assert str(several) == "adapter 'acme' is refused: r: must be positive; q_proj: is missing"
    assert several.param is None
    single = InvalidAdapter([Fault("r", "must be positive")])
    assert str(single) == "the adapter is refused: r: must be positive"
    assert single.param == "r"


def test_what_callers_catch() -> None:
    assert issubclass(InvalidAdapter, AdapterError)
    assert issubclass(InvalidAdapter, ValueError)
    assert issubclass(UnknownAdapter, LookupError)
    assert issubclass(RequestError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(Overloaded, EngineError)
