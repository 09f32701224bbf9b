"""A config is read as it is meant; what is wrong with it is told in a sentence that names field and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lory.config import Section, apply_overrides, build, dump_yaml, parse_yaml, read_yaml
from lory.runtime import UsageError
from lory.training.config import Config, list_bundled, read_config


class Source(Section):
    path: str
    sample: int | None = Field(None, ge=1)


class Data(Section):
    train: list[Source] = Field(min_length=1)
    eval: list[Source] | None = None
    max_tokens: int = 1024

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.max_tokens == 13:
            raise ValueError("13 brings bad luck.")
        return self


class Train(Section):
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    epochs: int = 3

    @field_validator("epochs")
    @classmethod
    def _check_epochs(cls, value: int) -> int:
        assert value != 13, "Thirteen is not taken."
        return value


class Whole(Section):
    data: Data
    train: Train = Field(default_factory=Train)
    targets: str | list[str] = "all"
    options: dict[str, str] = Field(default_factory=dict)
    name: str | None = None


DATA = {"data": {"train": [{"path": "a.json"}]}}


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        build(Whole, values, "c.yaml")
    assert caught.value.exit_code == 2
    assert "  " not in str(caught.value)
    assert ".." not in str(caught.value)
    return str(caught.value)


# Unknown and wrong values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"learning_rat": 1}}, "unknown key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
        (
            {"data": {"train": [{"path": "a"}, {"path": "b", "smaple": 3}]}},
            "unknown key 'data.train.1.smaple'; did you mean 'data.train.1.sample'?",
        ),
        (
            {"data": {"train": [{"path": "a"}], "eval": [{"pth": "b", "path": "b"}]}},
            "unknown key 'data.eval.0.pth'; did you mean 'data.eval.0.path'?",
        ),
        ({"learning_rate": 1}, "unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
        (
            {"data": {"train": [{"path": "a"}], "schedule": "linear"}},
            "unknown key 'data.schedule'; did you mean 'train.schedule'?",
        ),
        ({"train": {"zzz": 1}}, "unknown key 'train.zzz'; known here: learning_rate, schedule, epochs."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(values: dict[str, Any], expected: str) -> None:
    assert error_of(DATA | values) == f"c.yaml: {expected}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"train": {"epochs": "three"}},
            "'train.epochs' was given 'three': input should be a valid integer, unable to ",
        ),
        ({"train": {"epochs": 2.5}}, "'train.epochs' was given 2.5: input should be a valid integer, got a number "),
        ({"train": {"epochs": None}}, "'train.epochs' was given None: input should be a valid integer."),
        ({"train": {"epochs": 13}}, "'train.epochs' was given 13: thirteen is not taken."),
        ({"train": {"learning_rate": 0}}, "'train.learning_rate' was given 0: input should be greater than 0."),
        (
            {"train": {"schedule": "cosin"}},
            "'train.schedule' was given 'cosin': input should be 'cosine' or 'linear'.",
        ),
        ({"train": [1]}, "'train' was given a list: input should be a valid dictionary or instance of Train."),
        ({"data": {"train": []}}, "'data.train' was given a list: list should have at least 1 item "),
        ({"data": {"train": [{"path": "a", "sample": 0}]}}, "'data.train.0.sample' was given 0: input should be "),
        ({"data": {"train": [{}]}}, "'data.train.0.path' is missing and has no default; add it."),
        ({"data": {**DATA["data"], "max_tokens": 13}}, "'data' was given a dict: 13 brings bad luck."),
        ({"options": {"a": 1}}, "'options.a' was given 1: input should be a valid string."),
        ({1: "a"}, "'1' was given 1: keys should be strings."),
    ],
)
def test_a_wrong_value_is_named_with_what_was_given_and_expected(values: dict[str, Any], expected: str) -> None:
    assert error_of(DATA | values).startswith(f"c.yaml: {expected}")


def test_the_branches_of_a_union_are_not_the_users_names() -> None:
    for line in error_of(DATA | {"targets": 3}).splitlines():
        assert line.startswith("c.yaml: 'targets' was given 3: ")
    lines = error_of(DATA | {"targets": ["a", 3]}).splitlines()
    assert "c.yaml: 'targets.1' was given 3: input should be a valid string." in lines


def test_every_problem_is_told_at_once() -> None:
    lines = error_of({"train": {"epoch": 1, "learning_rate": -1}, "name": 3}).splitlines()
    assert [line.split("'")[1] for line in lines] == ["data", "train.learning_rate", "train.epoch", "name"]


def test_a_section_cannot_be_changed() -> None:
    whole = build(Whole, DATA, "c.yaml")
    with pytest.raises(ValidationError):
        whole.name = "x"


def test_bundled_slips_are_met_with_the_real_config() -> None:
    values = {"data": {"train": [{"path": "a.json", "forma": "alpaca"}]}, "train": {"max_tokens": 3}}
    with pytest.raises(UsageError) as caught:
        build(Config, values, "c.yaml")
    assert str(caught.value).splitlines() == [
        "c.yaml: unknown key 'data.train.0.forma'; did you mean 'data.train.0.format'?",
        "c.yaml: unknown key 'train.max_tokens'; did you mean 'data.max_tokens'?",
    ]


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.epochs=5", ("train", "epochs"), 5),
        ("train.learning_rate=2e-4", ("train", "learning_rate"), 2e-4),
        ("train.learning_rate=1E3", ("train", "learning_rate"), 1000.0),
        ("train.learning_rate=-1.5e+2", ("train", "learning_rate"), -150.0),
        ("train.learning_rate=.5", ("train", "learning_rate"), 0.5),
        ("name=null", ("name",), None),
        ("name=", ("name",), None),
        ("name='null'", ("name",), "null"),
        ("name=a=b=c", ("name",), "a=b=c"),
        ('name="a = b"', ("name",), "a = b"),
        ("name='say: \"hi\"'", ("name",), 'say: "hi"'),
        ("name=你好 🦜", ("name",), "你好 🦜"),
        ("name='2e-4'", ("name",), "2e-4"),
        ("name=true", ("name",), True),
        (" name =x", ("name",), "x"),
        ("data.train.0.path=b.json", ("data", "train", 0, "path"), "b.json"),
        ("data.train.1={path: c.json, sample: 3}", ("data", "train", 1), {"path": "c.json", "sample": 3}),
        ("data.train=[{path: x}, {path: y}]", ("data", "train"), [{"path": "x"}, {"path": "y"}]),
        ("targets=[q, v]", ("targets",), ["q", "v"]),
        ("new.deep.key=1", ("new", "deep", "key"), 1),
        ("empty.key=1", ("empty", "key"), 1),
    ],
)
def test_an_override_sets_one_value(override: str, path: tuple[Any, ...], expected: Any) -> None:
    values = {"data": {"train": [{"path": "a.json"}, {"path": "b.json"}]}, "train": {"epochs": 1}, "empty": None}
    before = yaml.safe_dump(values)

    value: Any = apply_overrides(values, [override])
    for part in path:
        value = value[part]

    assert value == expected
    assert type(value) is type(expected)
    assert yaml.safe_dump(values) == before  # the given values are not changed


def test_the_last_of_several_overrides_counts() -> None:
    result = apply_overrides({}, ["a.b=1", "a.c=2", "a.b=3"])
    assert result == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs", "'train.epochs' was given; an override is section.field=value, as in train.epochs=5."),
        ("=5", "'=5' was given; an override is section.field=value"),
        ("data.train.2.path=x", "'2' should be a position from 0 to 1 in that list."),
        ("data.train.x.path=x", "'x' should be a position from 0 to 1 in that list."),
        ("data.train.-1.path=x", "'-1' should be a position from 0 to 1 in that list."),
        ("data.train.²=x", "'²' should be a position from 0 to 1 in that list."),
        ("data.eval.0=x", "'data.eval.0' was given, but that list is empty; give it whole, as in [a, b]."),
        ("train.epochs.x=1", "'train.epochs.x' was given, but train.epochs is a single value and has no fields."),
        ("train.epochs.x.y=1", "what stands before '.x' is a single value and has no fields."),
        ("name=[1", "The value of name, line 1 is not valid YAML: "),
        ("name='a", "The value of name, line 1 is not valid YAML: "),
        ("name=!!python/name:os.system ''", "could not determine a constructor for the tag"),
    ],
)
def test_a_wrong_override_is_explained(override: str, expected: str) -> None:
    values = {"data": {"train": [{"path": "a"}, {"path": "b"}], "eval": []}, "train": {"epochs": 1}}
    with pytest.raises(UsageError, match=re.escape(expected)) as caught:
        apply_overrides(values, [override])
    assert ".." not in str(caught.value)


def test_an_override_is_checked_like_the_file() -> None:
    assert "did you mean 'train.epochs'?" in error_of(apply_overrides(DATA, ["train.epoch=5"]))
    assert build(Whole, apply_overrides(DATA, ["train.learning_rate=1e-5"]), "c").train.learning_rate == 1e-5


# YAML


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "null"])
def test_an_empty_file_is_an_empty_mapping(text: str, tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, text)) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", ", line 3 is not valid YAML: the key 'epochs' stands twice."),
        ("a: 1\nb: 2\na: {}\n", ", line 3 is not valid YAML: the key 'a' stands twice."),
        ("a: {b: 1, b: 1}", ", line 1 is not valid YAML: the key 'b' stands twice."),
        ("1: a\n1: b\n", ", line 2 is not valid YAML: the key '1' stands twice."),
        ("- a\n- b\n", " holds a list; a config is a mapping of sections."),
        ("just text", " holds a str; a config is a mapping of sections."),
        ("a: !!python/object/apply:os.system [touch pwned]", ", line 1 is not valid YAML: could not determine"),
        ("a: !!python/name:os.system ''", ", line 1 is not valid YAML: could not determine"),
        ("a: !ours x", ", line 1 is not valid YAML: could not determine"),
        ("a: [1\nb: 2", ", line 2 is not valid YAML: "),
        ("a: b: c", ", line 1 is not valid YAML: mapping values are not allowed here."),
        ("a:\n\tb: 1", ", line 2 is not valid YAML: found character '\\t' that cannot start any token."),
        ("a: *nowhere", ", line 1 is not valid YAML: found undefined alias 'nowhere'."),
        ("? [1]\n: 2", ", line 1 is not valid YAML: found unhashable key."),
        ("a: 2026-13-45", " is not valid YAML: month must be in 1..12."),
        ("a: b\x00", " is not valid YAML: unacceptable character #x0000"),
        ("[" * 2000, " is not valid YAML: "),
        (b"name: caf\xe9", " is not UTF-8 text, as a config has to be."),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_place(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}{expected}")
    assert not str(caught.value).endswith("..")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Could not read .*nowhere.yaml: No such file or directory\."):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2e-4", 2e-4),
        ("2E4", 2e4),
        ("-2.5e+3", -2500.0),
        ("+1e0", 1.0),
        ("1_0e-1", 1.0),
        ("2.0e-4", 2e-4),
        ("1e-4m", "1e-4m"),
        ("e5", "e5"),
        ("'1e5'", "1e5"),
        ("v1e5", "v1e5"),
        ("12", 12),
        ("007e", "007e"),
    ],
)
def test_numbers_are_what_they_look_like(text: str, expected: object) -> None:
    value = parse_yaml(text, "here")
    assert value == expected
    assert type(value) is type(expected)


def test_anchors_and_merges_are_known() -> None:
    text = "base: &b {x: 1, y: 2}\nnext: &n {<<: *b, y: 3}\nlast: {<<: *n, z: 4}\nsame: *b\n"
    assert parse_yaml(text, "here") == {
        "base": {"x": 1, "y": 2},
        "next": {"x": 1, "y": 3},
        "last": {"x": 1, "y": 3, "z": 4},
        "same": {"x": 1, "y": 2},
    }


# Round trips


@pytest.mark.parametrize("name", list_bundled())
def test_a_bundled_config_survives_being_written_and_read(name: str) -> None:
    config, run = read_config(name)
    assert run is None
    assert build(Config, parse_yaml(dump_yaml(config), "dump"), "dump") == config


@pytest.mark.parametrize("name", list_bundled())
def test_a_run_repeats_its_written_config(name: str, tmp_path: Path) -> None:
    config, _ = read_config(name, ["train.learning_rate=1e-5", "output='3e5'"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml")[0] == config


@pytest.mark.parametrize(
    "text",
    ["2e-4", "1_0e5", "12", "1.5", "no", "null", "~", "", " ", "12:30", "2026-01-02", "- x: y", "a\nb\n", "\ta", "#",
     "=", "&a", "*a", "!a", "%", "@", "`", "'", '"', "{a}", "你好 🦜", "a" * 300, "word " * 60, "\u2028", "\u200b"],
)  # fmt: skip
def test_any_text_survives_being_written_and_read(text: str) -> None:
    whole = Whole(data=Data(train=[Source(path=text)]), targets=[text], options={text: text}, name=text)
    assert build(Whole, parse_yaml(dump_yaml(whole), "dump"), "dump") == whole


@pytest.mark.parametrize("number", [2e-4, 1e-8, 1e22, 0.1 + 0.2, 5e-324])
def test_any_number_survives_being_written_and_read(number: float) -> None:
    whole = Whole(data=Data(train=[Source(path="a")]), train=Train(learning_rate=number))
    assert build(Whole, parse_yaml(dump_yaml(whole), "dump"), "dump") == whole


def test_unicode_is_written_as_it_is() -> None:
    assert "name: 你好" in dump_yaml(Whole(data=Data(train=[Source(path="a")]), name="你好"))
