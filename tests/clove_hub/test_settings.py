"""Typed settings: what is read becomes what a field asks for, or is refused by name."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from clove_hub.documents import read_document
from clove_hub.settings import (
    Given,
    PathText,
    build,
    convert,
    described,
    differences,
    flat,
    nearest,
    plain,
    read_override,
    settle,
    shown,
)


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
        ("bread.sizes=[1,2]", ("bread", "sizes", "[1,2]")),
        ("bread.flour=", ("bread", "flour", "")),
        ("bread.note=a=b", ("bread", "note", "a=b")),
        ("guests=[{name: x}]", ("guests", "", "[{name: x}]")),
    ],
)
def test_overrides_are_read(override, expected):
    assert read_override(override, lists=["guests"]) == expected


@pytest.mark.parametrize("override", ["bread", "bread.salt", "bread=1", "guests.0=1"])
def test_what_is_no_override_is_named(override):
    with pytest.raises(ValueError, match=r"is not of the form section\.key=value, as in .*, or guests=\[\.\.\.\]$"):
        read_override(override, lists=["guests"])
    with pytest.raises(ValueError, match=r"bread\.salt='\[' is not valid YAML"):
        build(Bread, {"flour": "rye", "salt": Given("[")}, "bread")


# ---- what follows `key=` -------------------------------------------------------------------------------------------

TEXTS = [
    "2024",
    "photos #1",
    "2024-11-25",
    "a: b",
    "yes",
    "1e3",
    "010",
    "1:30",
    "'quoted'",
    "- x",
    "{a}",
    "*star",
    "&x",
    "%y",
    "!z",
    "ü",
    "a b",
]


@pytest.mark.parametrize("text", [*TEXTS, "null", "~x", "[a", "", " "])
def test_a_field_of_text_takes_the_text_as_it_stands(text):
    assert convert(Given(text), str, "n") == text
    assert type(convert(Given(text), str, "n")) is str


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_may_be_null_or_a_list_is_text_where_it_is_neither(text):
    assert convert(Given(text), str | None, "n") == text
    assert convert(Given(text), str | tuple[str, ...], "n") == text
    assert convert(Given(text), tuple[str, ...], "n") == (text,)


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("null", str | None, None),
        ("[a, 2024, 2024-11-25, yes, 'c, d']", tuple[str, ...], ("a", "2024", "2024-11-25", "yes", "c, d")),
        ("[a, b]", str | tuple[str, ...], ("a", "b")),
        ("[1, 1e1]", tuple[float, float], (1.0, 10.0)),
        ("3", tuple[int, ...], (3,)),
        ("-1", int | None, -1),
        ("null", int | None, None),
        ("yes", bool, True),
        ("lars", Literal["lars", "sgd"], "lars"),
        ("2", Literal[1, 2], 2),
        ("{a: 1, b: 2024-11-25, c: [x, 1e3]}", dict[str, Any], {"a": 1, "b": "2024-11-25", "c": ["x", 1e3]}),
    ],
)
def test_other_fields_read_yaml(text, kind, expected):
    found = convert(Given(text), kind, "n")
    assert found == expected
    assert type(found) is type(expected)


def test_the_home_folder_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/baker")
    assert convert(Given("~/x"), PathText, "n") == "/home/baker/x"
    assert convert(Given("[~/x, y]"), PathText | tuple[PathText, ...], "n") == ("/home/baker/x", "y")
    assert convert("~/x", str, "n") == "~/x"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", ".nan", ".inf", "1e999", "9" * 400])
def test_a_number_is_finite(text):
    with pytest.raises(ValueError, match=r"^n=.{1,210} must be a finite number$"):
        convert(Given(text), float, "n")
    with pytest.raises(ValueError, match=r"n\[1\].* must be a finite number"):
        convert(Given(f"[0, {text}]"), tuple[float, float], "n")


def test_a_value_in_a_message_is_cut():
    with pytest.raises(ValueError, match="expected int") as error:
        convert(["x" * 1000] * 1000, int, "n")
    assert len(str(error.value)) < 400
    assert shown("short") == "'short'"


def test_settings_that_are_built_later_keep_their_text():
    given = read_document("{flour: 1e3, oven: 2024-11-25, minutes: 4, unknown: 010}", "d")
    assert settle(given, Bread) == {"flour": 1e3, "oven": "2024-11-25", "minutes": 4, "unknown": 8}


def test_help_says_key_value_type_and_note():
    @dataclass(frozen=True)
    class Oven(Bread):
        heat: float = 220.0
        """Degrees; see
        the label."""
        where: PathText = "here"

    said = described(Oven, "oven", {"sizes": [3]})
    assert "  oven.flour=...  (rye | wheat; required)\n" in said
    assert "  oven.sizes=[3]  ([int, ...])\n" in said
    assert "  oven.salt=null  (float or null)\n" in said
    assert "  oven.heat=220.0  (float)\n      Degrees; see the label.\n" in said
    assert "  oven.where=here  (path)" in said


def test_a_run_differs_in_what_is_not_free():
    old = {"task": "bake", "bread": {"salt": 1, "minutes": 40}, "guests": [1]}
    new = {"task": "fry", "bread": {"salt": 2, "minutes": 50, "oven": "gas"}}
    free = {"bread.minutes", "guests"}
    assert differences(old, old, free) == []
    assert differences(old, new, free) == ["bread.oven: null -> gas", "bread.salt: 1 -> 2", "task: bake -> fry"]
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_nothing_near_is_no_hint():
    assert nearest("flower", ["flour", "salt"]) == " (did you mean 'flour'?)"
    assert nearest("xyz", ["flour", "salt"]) == ""
    with pytest.raises(ValueError, match="expected int or null"):
        convert("a", int | None, "n")
