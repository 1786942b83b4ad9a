"""YAML as it was written, JSON, and what is refused."""

import pytest
import yaml

from clove_hub.documents import LARGEST, LARGEST_OBJECT, Word, read_document, read_object, resolved
from clove_hub.training import recipe

RECIPES = sorted(recipe.SHIPPED.glob("*.yaml"))


def test_scalars_keep_their_text_until_a_type_is_asked_for():
    found = read_document("a: 2024-11-25\nb: '1'\nc: [010, yes, null, ~]\nd:\ne: !!str 5\nf: |\n  x\n  y\n", "d")
    assert found == {"a": "2024-11-25", "b": "1", "c": ["010", "yes", "null", "~"], "d": "", "e": "5", "f": "x\ny\n"}
    assert [type(found[key]) for key in "abdef"] == [Word, str, Word, str, str]
    assert resolved(found) == {
        "a": "2024-11-25",
        "b": "1",
        "c": [8, True, None, None],
        "d": None,
        "e": "5",
        "f": "x\ny\n",
    }


def test_a_power_of_ten_is_a_number_unless_it_is_quoted():
    found = resolved(read_document("{a: 1e-5, b: 1E30, c: '1e5', d: 1e, e: -2.5e3, f: .5e1}", "d"))
    assert found == {"a": 1e-5, "b": 1e30, "c": "1e5", "d": "1e", "e": -2500.0, "f": 5.0}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_shipped_recipe_is_what_yaml_makes_of_it(path):
    assert resolved(read_document(path.read_text(), "d")) == yaml.safe_load(path.read_text())


def test_anchors_and_merges_work():
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nlist: [*b, *b]"
    assert resolved(read_document(text, "d")) == yaml.safe_load(text)


LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "d, line 3: the key 'a' is given twice: remove one"),
        ("x:\n  a: 1\n  'a': 3\n", "d, line 3: the key 'a' is given twice"),
        (LAUGHS, r"d has 2\.\d+e\+10 characters with its aliases"),
        (
            "".join(f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 9) if i else ''}]}}\n" for i in range(12)),
            "d has 2",
        ),
        ("a: &a [*a]", "an alias .* inside what it stands for"),
        ("a: &a {b: *a}", "an alias .* inside what it stands for"),
        ("[" * 5000, "nested too deeply"),
        ("x" * (LARGEST + 1), f"d has {LARGEST + 1} characters"),
        ("a: [", r"^d is not valid YAML \(line 1, column \d+\): [^\n]+$"),
        ("a: 1\x00", "^d is not valid YAML: [^\n]+$"),
        ("a: b: c", "not valid YAML"),
        ("a: *b", "not valid YAML.*undefined alias"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        (
            "a: !!python/object/apply:os.system [ls]",
            r"d, line 1: the tag !!python/object/apply:os\.system is not supported",
        ),
        ("a: !!int '5'", "the tag !!int is not supported"),
        ("a: !x y", "the tag !x is not supported"),
        ("? [a]\n: b", "a key must be text"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_document(text, "d")


def test_a_recipe_file_keeps_the_text_of_its_values(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/baker")
    path = tmp_path / "own.yaml"
    path.write_text(
        "method: {name: clove}\n"
        "data: {path: 2024, split: 010, subset: null, column: yes}\n"
        "run: {output: 2024-11-25, init_from: ~/run, trackers: [1e3]}\n"
        "evaluate: [{protocol: dense-probe, data: ~/camvid, every: 5, settings: {train: 2024, levels: [-1], epochs: 3}}]\n"
    )
    loaded = recipe.load(str(path), ["data.workers=3", "data.workers=4"])
    assert (loaded.data.path, loaded.data.split, loaded.data.subset, loaded.data.column) == ("2024", "010", None, "yes")
    assert (loaded.run.output, loaded.run.init_from, loaded.run.trackers) == ("2024-11-25", "/home/baker/run", ("1e3",))
    assert loaded.data.workers == 4  # the last counts
    one = loaded.evaluate[0]
    assert (one.data, one.settings) == ("/home/baker/camvid", {"train": "2024", "levels": [-1], "epochs": 3})
    assert recipe.parse(recipe.as_sections(loaded)) == loaded
    assert recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.as_sections(loaded)))) == loaded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"method: {name: clove}\nmethod: {name: moco}\n", "line 2: the key 'method' is given twice: remove one"),
        (b"\xff\xfe", "cannot be read"),
        (b"data:\n", "a recipe is a mapping of sections"),
        (b"", "a recipe is a mapping of sections"),
        (
            b"method: {name: clove}\noptimizer: {learning_rate: .nan}\ndata: {path: x}",
            r"learning_rate=nan: must be a finite",
        ),
        (
            b"method: {name: clove}\noptimizer: {learning_rate: -1}\ndata: {path: x}",
            r"learning_rate=-1.0: must not be negative",
        ),
    ],
)
def test_a_broken_recipe_file_is_named(content, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        recipe.load(str(path), ["run.output=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON .the file is empty"),
        (b"[" * 100_000, "cannot be read as JSON .it is nested too deeply"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "has lists or objects nested more than 50 deep"),
        (b"[1]", r"holds list \[1\], expected an object"),
        (b'"' + b"x" * LARGEST_OBJECT + b'"', "has 16,777,218 bytes, expected at most 16,777,216"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_an_object_of_json_is_read_within_bounds(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ' * 49 + "1" + "}" * 49, encoding="utf-8-sig")
    assert read_object(tmp_path / "a.json").keys() == {"a"}
