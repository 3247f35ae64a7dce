"""Configuration from YAML and flags: what is accepted, what is said of what is not, and the way back to YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.config import config_from_dict, config_to_dict, dump_config, load_config
from tether.errors import UserError
from tether.yaml_file import dump_yaml, parse_yaml, read_yaml


@dataclass(frozen=True)
class LearnerConfig:
    """How the policy learns."""

    learning_rate: float = 1e-5
    """Step size of Adam."""
    epochs: int = 4
    """Passes over the batch."""
    clip_range: float | None = 0.2
    """Width of the clip; null switches it off."""
    schedule: Literal["constant", "linear"] = "constant"
    """Course of the learning rate."""
    whiten: bool = True
    """Whiten the advantages."""
    fused: bool | None = None
    """Update all at once; null: where the device can."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decays."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}, expected at least 1")


@dataclass(frozen=True)
class BatchConfig:
    size: int = 8
    """Episodes of a batch."""
    minibatch: int = 4
    """Episodes of a minibatch."""

    def __post_init__(self) -> None:
        if self.size % self.minibatch:
            raise ValueError(f"minibatch {self.minibatch} does not divide size {self.size}")


@dataclass(frozen=True)
class Config:
    """A run."""

    model: str = ""
    """Folder of the model."""
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(epochs=2))
    """The learner's part."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    output: Path = Path("runs/ppo")
    """The run's folder."""
    options: dict[str, float] = field(default_factory=dict)
    """More numbers."""
    seed: int | str = 0
    """Seed of everything."""


@dataclass(frozen=True)
class Required:
    model: str
    """Folder of the model."""
    seed: int = 0
    """Seed of everything."""


def load(*args: str, cls: Any = Config) -> Any:
    return load_config(cls, args, "tether ppo", "Train a policy.")


def test_defaults_include_those_of_the_section_field() -> None:
    assert load() == Config()
    assert load().learner.epochs == 2


def test_flags_win_over_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nlearner:\n  learning_rate: 1e-4\n  epochs: 3\nstop: [a, b]\nbatch:\n")
    config = load("--learner.epochs", "7", "--config", str(file), "--learner.no-whiten", "--learner.clip-range", "None")
    learner = LearnerConfig(learning_rate=1e-4, epochs=7, whiten=False, clip_range=None)
    assert config == Config(model="m", learner=learner, stop=("a", "b"))
    assert load(f"--config={file}", "--stop", "x").stop == ("x",)
    assert load("--learner.learning_rate=3e-4").learner.learning_rate == 3e-4  # underscores too


def test_checks_see_file_and_flags_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch:\n  minibatch: 6\n")  # does not divide the default size
    assert load("--config", str(file), "--batch.size", "12").batch == BatchConfig(size=12, minibatch=6)
    with pytest.raises(UserError, match=r"run\.yaml: batch: minibatch 6 does not divide size 8"):
        load("--config", str(file))
    with pytest.raises(UserError, match=r"^batch: minibatch 5 does not divide size 8$"):
        load("--batch.minibatch", "5")


def test_help_shows_every_field_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        load("--help")
    assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Train a policy.",
        "--config FILE.yaml",
        "--learner.learning-rate FLOAT Step size of Adam. (default: 1e-05)",
        "--learner.epochs INT Passes over the batch. (default: 2)",
        "--learner.schedule {constant,linear} Course of the learning rate. (default: constant)",
        "--batch.size INT Episodes of a batch. (default: 8)",
        "--stop [STR [STR ...]] Strings that end a response.",
        "The learner's part.",
    ):
        assert part in text


YAML_ERRORS = {
    "learner: [": ":1:11: not valid YAML: ",
    "learner:\n\tepochs: 3": ":2:1: not valid YAML: found character '\\t' that cannot start any token",
    "model: a\nmodel: b": ":2:1: not valid YAML: 'model' is given twice",
    "model: \x00": ":1: not valid YAML: character",
    "seed: " + "9" * 5000: ": not valid YAML: Exceeds the limit",
    "model: !!bool maybe": ": not valid YAML: 'maybe'",
    "- a\n- b": ": the top level is a list, expected a mapping of fields to values",
    "just words": ": the top level is text 'just words', expected a mapping of fields to values",
    "learner:\n  learning_rat: 1": ": learner.learning_rat: no such field; did you mean learning_rate?",
    "zzz: 1": ": zzz: no such field",
    "1: 2": ": 1: no such field",
    "learner: 3": ": learner: found 3, expected a mapping of fields to values",
    "learner:\n  epochs: four": ": learner.epochs: found text 'four', expected an integer",
    "learner:\n  epochs: 2.5": ": learner.epochs: found 2.5, expected an integer",
    "learner:\n  epochs: true": ": learner.epochs: found true, expected an integer",
    "learner:\n  epochs:": ": learner.epochs: found null, expected an integer",
    "learner:\n  learning_rate: fast": ": learner.learning_rate: found text 'fast', expected a number",
    "learner:\n  clip_range: [1]": ": learner.clip_range: found a list, expected a number or null",
    "learner:\n  schedule: cosine": ": learner.schedule: found text 'cosine', expected one of 'constant', 'linear'",
    "learner:\n  whiten: 2": ": learner.whiten: found 2, expected true or false",
    "learner:\n  whiten: maybe": ": learner.whiten: found text 'maybe', expected true or false",
    "learner:\n  fused: maybe": ": learner.fused: found text 'maybe', expected true or false or null",
    "learner:\n  betas: [0.9]": ": learner.betas: found 1 values, expected 2",
    "learner:\n  betas: [0.9, b]": ": learner.betas[1]: found text 'b', expected a number",
    "learner:\n  epochs: 0": ": learner: epochs is 0, expected at least 1",
    "model: 8": ": model: found 8, expected text; put it in quotes",
    "stop: a": ": stop: found text 'a', expected a list, each entry text",
    "options: 3": ": options: found 3, expected a mapping, each value a number",
    "options: {a: b}": ": options.a: found text 'b', expected a number",
    "learner:\n  learning_rate: " + "9" * 400: ": learner.learning_rate: found 999",
    "[" * 500: ": not valid YAML: nested too deeply",
    "seed: !!python/object/apply:os.getcwd []": ":1:7: not valid YAML: could not determine a constructor",
}


@pytest.mark.parametrize("text", YAML_ERRORS)
def test_yaml_errors_are_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load("--config", str(file))
    assert str(error.value).startswith(str(file) + YAML_ERRORS[text])
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read: No such file or directory"):
        load("--config", str(tmp_path / "no.yaml"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"a\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml: byte 1 is not UTF-8"):
        load("--config", str(tmp_path / "binary.yaml"))


FLAG_ERRORS = {
    "--learner.learning-rat 3": "--learner.learning-rat: no such option; did you mean --learner.learning-rate?",
    "--epochs 3": "--epochs: no such option; did you mean --learner.epochs?",
    "--confg a.yaml": "--confg: no such option; did you mean --config?",
    "--zzzzzz": "--zzzzzz: no such option; --help lists them",
    "--learner.epochs x": "--learner.epochs: found 'x', expected an integer",
    "--learner.epochs=x": "--learner.epochs: found 'x', expected an integer",
    "--learner.epochs": "--learner.epochs: found no value, expected an integer",
    "--learner.clip_range wide": "--learner.clip-range: found 'wide', expected a number or null",
    "--learner.schedule lin": "--learner.schedule: found 'lin', expected one of 'constant', 'linear'",
    "--learner.betas 0.9": "--learner.betas: found '0.9', expected a list of 2: a number, a number",
    "--learner.whiten maybe": "--learner.whiten: found 'maybe', expected true or false "
    "(--learner.whiten alone is true, --learner.no-whiten false)",
    "--learner.fused maybe": "--learner.fused: found 'maybe', expected true or false or null",
    "--learner.epochs 0": "learner: epochs is 0, expected at least 1",
    "words": "'words': found after the command, expected an option that starts with --",
    "--config": "--config: found no value, expected a YAML file",
    "--config --model": "--config: found no value, expected a YAML file",
}


@pytest.mark.parametrize("line", FLAG_ERRORS)
def test_flag_errors_are_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        load(*line.split())
    assert str(error.value) == FLAG_ERRORS[line]
    assert capsys.readouterr() == ("", "")  # nothing of tyro's own


BOOLEANS = {True: ("true", "True", "TRUE", "yes", "On", "y", "1"), False: ("false", "False", "no", "OFF", "n", "0")}
WRITTEN = [(word, value) for value, words in BOOLEANS.items() for word in words]


@pytest.mark.parametrize("name", ["whiten", "fused"])
@pytest.mark.parametrize(("word", "value"), WRITTEN)
def test_booleans_are_taken_as_people_write_them(word: str, value: bool, name: str, tmp_path: Path) -> None:
    """As flags of two forms, followed by another flag or not, and in a file, bare or in quotes."""
    assert getattr(load(f"--learner.{name}", word, "--learner.epochs", "3").learner, name) is value
    assert getattr(load("--learner.epochs", "3", f"--learner.{name}={word}").learner, name) is value
    file = tmp_path / "run.yaml"
    for text in (word, f"'{word}'"):
        file.write_text(f"learner:\n  {name}: {text}\n")
        assert getattr(load("--config", str(file)).learner, name) is value


def test_an_optional_boolean_can_be_given_back_to_null() -> None:
    assert load("--learner.fused", "null").learner.fused is None
    assert load("--learner.fused=None").learner.fused is None


def test_a_boolean_flag_alone_is_true_and_with_no_before_its_name_false() -> None:
    assert load("--learner.whiten", "--model", "m").learner.whiten is True
    assert load("--learner.no-whiten", "--model", "m").learner.whiten is False


def test_required_fields() -> None:
    with pytest.raises(UserError, match=r"^--model: found no value, expected text$"):
        load("--seed", "3", cls=Required)
    with pytest.raises(UserError, match=r"^x\.yaml: model: missing, expected text$"):
        config_from_dict(Required, {}, "x.yaml")
    assert load("--model", "m", cls=Required) == Required("m")


def test_yaml_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    for text, number in {"1e-5": 1e-5, "3": 3.0, "-2E+3": -2000.0, ".inf": float("inf")}.items():
        file = tmp_path / "run.yaml"
        file.write_text(f"learner: {{learning_rate: {text}}}\n")
        found = load("--config", str(file)).learner.learning_rate
        assert found == number
        assert isinstance(found, float)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("None", None),
        ("nan", math.nan),
        ("NaN", math.nan),
        ("y", "y"),
        ("n", "n"),
        ("'None'", "None"),
        ("'nan'", "nan"),
    ],
)
def test_nothing_and_no_number_are_taken_as_people_write_them(word: str, value: Any) -> None:
    found = parse_yaml(f"{{a: {{b: [{word}]}}}}")["a"]["b"][0]
    again = parse_yaml(dump_yaml({"a": found}))["a"]
    assert [repr(found), repr(again)] == [repr(value)] * 2


def test_text_that_looks_like_a_number_stays_text_where_text_fits() -> None:
    assert config_from_dict(Config, {"seed": "1e5"}, "").seed == "1e5"
    assert config_from_dict(Config, {"seed": 15}, "").seed == 15


finite = st.floats(allow_nan=False)
words = st.text(max_size=20)
configs = st.builds(
    Config,
    model=words,
    learner=st.builds(
        LearnerConfig,
        learning_rate=finite,
        epochs=st.integers(1),
        clip_range=st.none() | finite,
        schedule=st.sampled_from(["constant", "linear"]),
        whiten=st.booleans(),
        betas=st.tuples(finite, finite),
    ),
    batch=st.integers(1, 5).map(lambda n: BatchConfig(size=3 * n, minibatch=n)),
    stop=st.lists(words, max_size=3).map(tuple),
    options=st.dictionaries(words, finite, max_size=3),
    seed=st.integers() | words,
)


@given(configs)
@settings(max_examples=200, deadline=None)
def test_dump_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "dump.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert config_from_dict(Config, read_yaml(file), str(file)) == config
    assert config_from_dict(Config, config_to_dict(config), "") == config


def test_dump_is_read_back_as_a_config_file(tmp_path: Path) -> None:
    config = Config(
        model="a\x85b\n", learner=LearnerConfig(learning_rate=1e-300, clip_range=None), stop=("", " ", "null")
    )
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load("--config", str(tmp_path / "run.yaml")) == config


def test_dump_keeps_the_order_of_the_fields() -> None:
    lines = dump_config(replace(Config(), stop=("a",))).splitlines()
    top = [line.split(":")[0] for line in lines if line[0].isalpha()]
    assert top == ["model", "learner", "batch", "stop", "output", "options", "seed"]
