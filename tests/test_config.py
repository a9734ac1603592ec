import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
import pytest

from ml.config import build, to_dict
from ml.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    name: str = "plain"


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner
    flag: bool = False
    kind: Literal["linear", "cosine"] = "linear"
    limit: int | None = None
    maybe: Inner | None = None
    sizes: tuple[int, ...] = ()
    parts: tuple[Inner, ...] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    either: int | str = 0
    anything: Any = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be positive")


MINIMAL = {"steps": 3, "inner": {"rate": 0.5}}


def _refused(extra, message):
    with pytest.raises(UserError) as caught:
        build(Outer, MINIMAL | extra)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_builds_nested_frozen_dataclasses():
    built = build(
        Outer,
        MINIMAL
        | {
            "flag": True,
            "kind": "cosine",
            "limit": 4,
            "maybe": {"rate": 1.5, "name": "x"},
            "sizes": [1, 2],
            "parts": [{"rate": 0.1}, {"rate": 0.2}],
            "weights": {"a": 1, "b": 0.5},
            "either": "text",
            "anything": [1, {"b": None}],
        },
    )
    assert built == Outer(
        steps=3,
        inner=Inner(0.5),
        flag=True,
        kind="cosine",
        limit=4,
        maybe=Inner(1.5, "x"),
        sizes=(1, 2),
        parts=(Inner(0.1), Inner(0.2)),
        weights={"a": 1.0, "b": 0.5},
        either="text",
        anything=[1, {"b": None}],
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.steps = 4


def test_defaults_fill_what_is_not_given():
    assert build(Outer, MINIMAL) == Outer(steps=3, inner=Inner(0.5))


def test_reads_config_dict_and_survives_json():
    config = ml_collections.ConfigDict(MINIMAL | {"sizes": (4, 5), "maybe": {"rate": 2.0}})
    built = build(Outer, config)
    assert built.sizes == (4, 5)
    assert build(Outer, json.loads(json.dumps(to_dict(built)))) == built


def test_takes_a_dataclass_that_is_already_built():
    assert build(Outer, {"steps": 1, "inner": Inner(0.25)}).inner == Inner(0.25)


def test_integers_become_floats_and_nothing_else_changes_type():
    built = build(Outer, MINIMAL | {"inner": {"rate": 2}})
    assert isinstance(built.inner.rate, float)
    _refused({"steps": 3.0}, "config.steps: expected int, got 3.0 (float)")
    _refused({"steps": "3"}, "config.steps: expected int, got '3' (str)")
    _refused({"inner": {"rate": "0.1"}}, "config.inner.rate: expected float")
    _refused({"inner": {"rate": 1.0, "name": 5}}, "config.inner.name: expected a string")
    _refused({"inner": {"rate": None}}, "config.inner.rate: expected float, got None")


def test_booleans_are_not_numbers_nor_numbers_booleans():
    _refused({"steps": True}, "config.steps: expected int, got True")
    _refused({"inner": {"rate": True}}, "config.inner.rate: expected float, got True")
    _refused({"flag": 1}, "config.flag: expected true or false, got 1")
    _refused({"limit": False}, "config.limit: expected int")
    _refused({"sizes": [1, True]}, "config.sizes[1]: expected int")


def test_unknown_key_names_the_nearest():
    _refused({"step": 3}, "config.step: no such key; did you mean 'steps'?")
    _refused({"inner": {"rate": 0.1, "nam": "x"}}, "config.inner.nam: no such key; did you mean 'name'?")
    _refused({"maybe": {"rat": 0.1}}, "config.maybe.rat: no such key; did you mean 'rate'?")
    _refused({"parts": [{"rate": 0.1}, {"rate": 0.1, "naem": 1}]}, "config.parts[1].naem: no such key")
    _refused({"zzzzzzzz": 1}, "valid: anything, either, flag")


def test_missing_key_is_named():
    with pytest.raises(UserError, match=r"^config\.steps: required"):
        build(Outer, {"inner": {"rate": 1.0}})
    with pytest.raises(UserError, match=r"^config\.inner\.rate: required"):
        build(Outer, {"steps": 1, "inner": {}})


def test_literal():
    _refused({"kind": "cosin"}, "'cosin' is not one of 'linear', 'cosine'; did you mean 'cosine'?")
    _refused({"kind": 3}, "config.kind: 3 is not one of")


def test_optional_and_unions():
    assert build(Outer, MINIMAL | {"limit": None, "maybe": None}).maybe is None
    _refused({"limit": "many"}, "config.limit: expected int, got 'many'")
    _refused({"either": 1.5}, "config.either: expected a string, got 1.5")
    _refused({"maybe": 3}, "config.maybe: expected a group of keys, got 3")


def test_sequences_and_mappings():
    _refused({"sizes": "12"}, "config.sizes: expected a list, got '12'")
    _refused({"sizes": 1}, "config.sizes: expected a list")
    _refused({"sizes": [1, "2"]}, "config.sizes[1]: expected int, got '2'")
    _refused({"weights": [1]}, "config.weights: expected a mapping")
    _refused({"weights": {"a": "b"}}, "config.weights.a: expected float")
    _refused({"inner": 3}, "config.inner: expected a group of keys")


def test_what_the_dataclass_itself_refuses_becomes_a_user_error():
    _refused({"steps": 0}, "config: steps=0 must be positive")


def test_path_names_the_place():
    with pytest.raises(UserError, match=r"^experiment\.json: model\.steps: expected int"):
        build(Outer, MINIMAL | {"steps": "x"}, "experiment.json: model")


@dataclasses.dataclass(frozen=True)
class Plain:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Round:
    radius: float = 1.0
    kind: Literal["round"] = "round"


@dataclasses.dataclass(frozen=True)
class Square:
    side: float = 1.0
    kind: Literal["square", "rhombus"] = "square"


@dataclasses.dataclass(frozen=True)
class Shapes:
    any: Plain | Round | Square = Plain()
    named: Round | Square | None = None


def test_a_union_is_told_apart_by_its_kind():
    built = build(Shapes, {"any": {"size": 2}, "named": {"kind": "rhombus", "side": 3}})
    assert built == Shapes(Plain(2), Square(3.0, "rhombus"))
    assert build(Shapes, to_dict(built)) == built
    assert build(Shapes, {"any": {"kind": "round"}}) == Shapes(Round())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"any": {"sise": 2}}, "config.any.sise: no such key; did you mean 'size'?"),
        ({"any": {"kind": "round", "radus": 2}}, "config.any.radus: no such key; did you mean 'radius'?"),
        ({"named": {"kind": "square", "side": "wide"}}, "config.named.side: expected float"),
        ({"any": {"kind": "rond"}}, "config.any.kind: 'rond' is not one of 'round', 'square', 'rhombus'; did you mean"),
        ({"named": {"side": 2}}, "config.named.kind: required, but not given; it is one of 'round'"),
    ],
)
def test_a_mistake_in_a_union_is_told_of_the_kind_that_was_meant(values, message):
    with pytest.raises(UserError) as caught:
        build(Shapes, values)
    assert message in str(caught.value)
