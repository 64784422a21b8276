from dataclasses import FrozenInstanceError, fields

import pytest

from vox_serve.cli import CommandParser, one_line, run_command
from vox_serve.config import (
    GROUPS,
    Config,
    ConfigError,
    base_type,
    markdown_table,
    parse_value,
    setting_of,
)
from vox_serve.sampling import SamplingParams

FIELDS = {item.name: item for item in fields(Config)}
BOUNDED = [name for name, item in FIELDS.items() if setting_of(item).high is not None]


@pytest.fixture
def parse():
    """Config from flags."""

    def parse_flags(*argv: str) -> Config:
        parser = CommandParser("prog", "what it does", "prog [flags]")
        parser.add_settings(list(GROUPS))
        return parser.parse(argv)[1]

    return parse_flags


def _other_value(name: str) -> object:
    """A valid value that is not the default."""
    item, about = FIELDS[name], setting_of(FIELDS[name])
    if len(about.choices) > 1:
        return next(choice for choice in about.choices if choice != item.default)
    if about.choices:
        return item.default
    if base_type(item) is bool:
        return not item.default
    if base_type(item) is str:
        return "something/else"
    if about.above is not None:
        return 0.5
    return base_type(item)(about.low + 1 if about.low + 1 != item.default else about.high)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("spell", [lambda name: name, lambda name: name.replace("_", "-")])
def test_every_setting_is_a_flag_in_both_spellings(name, spell, parse):
    value = _other_value(name)
    flag = f"--{spell(name)}"
    config = parse(flag) if value is True else parse(flag, str(value))
    assert config == Config(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_variable_that_its_flag_overrides(name, parse, monkeypatch):
    value, default = _other_value(name), FIELDS[name].default
    monkeypatch.setenv(f"VOX_SERVE_{name.upper()}", str(value))
    assert getattr(parse(), name) == value
    if isinstance(default, bool):
        assert getattr(parse(f"--no-{name}"), name) is False
    elif default is not None:
        assert getattr(parse(f"--{name}", str(default)), name) == default


def test_the_documented_line(parse):
    line = "--model DIR --port 8123 --temperature 0.7 --top_p 0.9 --repetition_penalty 1.1"
    config = parse(*line.split())
    assert config == Config(
        model="DIR", port=8123, temperature=0.7, top_p=0.9, repetition_penalty=1.1
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_hold_for_flags_variables_and_code(name, parse, monkeypatch, capsys):
    about, kind = setting_of(FIELDS[name]), base_type(FIELDS[name])
    step = 1 if kind is int else 0.001
    low = about.low - step if about.above is None else about.above
    outside = [kind(low), kind(about.high + step)]
    inside = [kind(about.low if about.above is None else about.above + step), kind(about.high)]
    for value in inside:
        assert getattr(parse(f"--{name}={value}"), name) == value
    for value in outside + ([float("nan"), float("inf")] if kind is float else []):
        with pytest.raises(ConfigError, match=name):
            Config(**{name: value})
        with pytest.raises(SystemExit) as stop:
            parse(f"--{name}={value}")
        assert stop.value.code == 2
        monkeypatch.setenv(f"VOX_SERVE_{name.upper()}", str(value))
        with pytest.raises(SystemExit):
            parse()
        monkeypatch.delenv(f"VOX_SERVE_{name.upper()}")
        flag_error, variable_error = capsys.readouterr().err.splitlines()
        assert f"--{name}" in flag_error
        assert f"VOX_SERVE_{name.upper()}" in variable_error


def test_the_documented_defaults():
    assert (
        vars(SamplingParams())
        == Config().sampling
        == {
            "temperature": 0.9,
            "top_k": 50,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "repetition_window": 16,
            "seed": None,
        }
    )
    assert Config().max_frames == 1125


@pytest.mark.parametrize("name", sorted(set(Config().sampling)))
def test_sampling_settings_are_the_engines(name):
    about, kind = setting_of(FIELDS[name]), base_type(FIELDS[name])
    step = 1 if kind is int else 0.001
    for value in (about.low, about.high):
        if value is not None:
            SamplingParams(**{name: kind(value)})
    for value in (about.above if about.low is None else about.low - step, about.high + step):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: kind(value)})
    if kind is float:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: float("nan")})
    if name != "seed":
        with pytest.raises(TypeError):
            SamplingParams(**{name: None})


def test_sampling_names_every_sampling_parameter():
    assert list(Config().sampling) == [item.name for item in fields(SamplingParams)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--port", "eighty"], "--port: expected a whole number, got 'eighty'"),
        (["--temperature", "hot"], "--temperature: expected a number, got 'hot'"),
        (["--device", "tpu"], "--device: must be one of auto, cpu, cuda, got tpu"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
    ],
)
def test_a_wrong_flag_is_one_line(wrong, said, parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*wrong)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prog: error: ")
    assert said in line


def test_code_cannot_set_a_wrong_type_or_change_a_setting():
    for wrong in ({"port": "8000"}, {"port": 80.0}, {"allow_pickle": 1}, {"model": None}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)
    assert type(Config(temperature=0).temperature) is float
    with pytest.raises(FrozenInstanceError):
        Config().port = 1


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("false", False)])
def test_booleans_in_variables(text, value):
    assert parse_value(FIELDS["allow_pickle"], text) is value


def test_the_table_and_the_help_name_every_setting(capsys):
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"--{name}" for name in FIELDS]
    parser = CommandParser("prog", "what it does", "prog [flags]")
    parser.add_settings(list(GROUPS))
    text = parser.format_help()
    for name in FIELDS:
        assert f"  --{name}" in text
        assert "_" not in name or f"--{name.replace('_', '-')}" not in text


def test_run_command_reports_one_line(capsys, monkeypatch):
    def fails(error: BaseException):
        def command() -> int:
            raise error

        return command

    assert run_command("prog", lambda: 0) == 0
    assert run_command("prog", fails(ValueError("a\nb"))) == 1
    assert run_command("prog", fails(ZeroDivisionError("why"))) == 1
    assert run_command("prog", fails(KeyboardInterrupt())) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["prog: error: a b", "prog: error: ZeroDivisionError: why"]
    monkeypatch.setenv("VOX_SERVE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run_command("prog", fails(ZeroDivisionError("why")))


def test_one_line_is_printable_and_short():
    assert one_line("a\n\t b\ud800") == "a b\\ud800"
    assert one_line("x " * 1000).endswith("x ...")
    assert len(one_line("x " * 1000)) <= 500
