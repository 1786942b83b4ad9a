"""Typed settings: what is read becomes what a field asks for, or is refused by name."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from clove_hub.settings import build, convert, differences, flat, nearest, plain, read_override


@dataclass(frozen=True)
class Bread:
    flour: Literal["rye", "wheat"]
    minutes: int = 40
    salt: float | None = None
    sizes: tuple[int, ...] = (1,)
    oven: str | tuple[str, ...] = "stone"
    range: tuple[float, float] = (0.5, 2.0)
    notes: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("salt", "1e-5", 1e-5),  # YAML reads it as a string
        ("salt", 1, 1.0),
        ("salt", None, None),
        ("sizes", [3, 4], (3, 4)),
        ("sizes", 3, (3,)),
        ("oven", "gas", "gas"),
        ("oven", ["gas", "stone"], ("gas", "stone")),
        ("range", [1, "1e1"], (1.0, 10.0)),
        ("notes", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_become_what_a_field_asks_for(key, value, expected):
    found = getattr(build(Bread, {"flour": "rye", key: value}, "bread"), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"bread\.flour is not set: give it, as in bread\.flour=\.\.\."),
        (
            {"flower": "rye", "flour": "rye"},
            r"unknown key bread\.flower \(did you mean 'flour'\?\); today bread has flour, ",
        ),
        ({"flour": "oat"}, r"bread\.flour='oat': choose one of rye, wheat"),
        ({"minutes": True}, r"bread\.minutes=True is a bool, expected int$"),
        ({"minutes": 1.5}, r"bread\.minutes=1\.5 is a float, expected int$"),
        ({"salt": "much"}, r"bread\.salt='much' is a str, expected float or null"),
        ({"salt": False}, r"bread\.salt=False is a bool"),
        ({"sizes": [1, "a"]}, r"bread\.sizes\[1\]='a' is a str, expected int"),
        ({"range": 1.0}, "expected tuple"),
        ({"range": [1.0, 2.0, 3.0]}, "expected tuple"),
        ({"notes": [1]}, "expected dict"),
    ],
)
def test_what_a_field_does_not_take_is_named(values, message):
    given = values if not values or "flour" in values else {"flour": "rye"} | values
    with pytest.raises(ValueError, match=message):
        build(Bread, given, "bread", within="today ")


def test_plain_data_builds_the_same_settings_again():
    bread = Bread("rye", sizes=(1, 2), notes={"a": 1})
    assert plain(bread)["sizes"] == [1, 2]
    assert build(Bread, plain(bread), "bread") == bread


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("bread.salt=1e-5", ("bread", "salt", "1e-5")),
        ("bread.sizes=[1,2]", ("bread", "sizes", [1, 2])),
        ("bread.flour=", ("bread", "flour", "")),
        ("bread.note=a=b", ("bread", "note", "a=b")),
        ("guests=[{name: x}]", ("guests", "", [{"name": "x"}])),
    ],
)
def test_overrides_are_read(override, expected):
    assert read_override(override, lists=["guests"]) == expected


@pytest.mark.parametrize("override", ["bread", "bread.salt", "bread=1", "guests.0=1"])
def test_what_is_no_override_is_named(override):
    with pytest.raises(ValueError, match=r"does not read section\.key=value, as in .*, or guests=\[\.\.\.\]$"):
        read_override(override, lists=["guests"])
    with pytest.raises(ValueError, match="not valid YAML"):
        read_override("bread.salt=[")


def test_a_run_differs_in_what_is_not_free():
    old = {"task": "bake", "bread": {"salt": 1, "minutes": 40}, "guests": [1]}
    new = {"task": "fry", "bread": {"salt": 2, "minutes": 50, "oven": "gas"}}
    free = {"bread.minutes", "guests"}
    assert differences(old, old, free) == []
    assert differences(old, new, free) == ["bread.oven: None -> 'gas'", "bread.salt: 1 -> 2", "task: 'bake' -> 'fry'"]
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_nothing_near_is_no_hint():
    assert nearest("flower", ["flour", "salt"]) == " (did you mean 'flour'?)"
    assert nearest("xyz", ["flour", "salt"]) == ""
    with pytest.raises(ValueError, match="expected int or null"):
        convert("a", int | None, "n")
