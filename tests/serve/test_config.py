from pathlib import Path

import pytest
from pydantic import ValidationError

from vox_serve.cli import CommandParser, one_line, run_command
from vox_serve.config import (
    Config,
    ConfigError,
    ModelSettings,
    OutputSettings,
    ServerSettings,
    SpeechSettings,
    markdown_table,
    parse_value,
)
from vox_serve.sampling import SamplingParams
from vox_serve.setting import base_type, bound, choices

FIELDS = Config.model_fields
BOUNDED = [name for name, field in FIELDS.items() if bound(field, "le") is not None]


def edges(name: str) -> tuple[list, list]:
    """Values at the edges of a setting's bounds: inside, and just outside."""
    field = FIELDS[name]
    kind, low, above, high = base_type(field), *(bound(field, b) for b in ("ge", "gt", "le"))
    step = 1 if kind is int else 0.001
    inside = [low if above is None else above + step, high]
    outside = [low - step if above is None else above, high + step]
    return [kind(value) for value in inside], [kind(value) for value in outside]


@pytest.fixture
def parse():
    """Config from flags."""

    def parse_flags(*argv: str) -> Config:
        parser = CommandParser("prog", "what it does", "prog [flags]")
        parser.add_settings(ModelSettings, SpeechSettings, OutputSettings, ServerSettings)
        return parser.parse(argv)[1]

    return parse_flags


def _other_value(name: str) -> object:
    """A valid value that is not the default."""
    field = FIELDS[name]
    if choices(field):
        return next(choice for choice in choices(field) if choice != field.default)
    if base_type(field) is bool:
        return not field.default
    if base_type(field) is str:
        return "something/else"
    low, high = edges(name)[0]
    return low if low != field.default else high


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


def test_a_flag_hides_a_broken_variable_and_an_empty_one_is_none(parse, monkeypatch):
    monkeypatch.setenv("VOX_SERVE_PORT", "eighty")
    monkeypatch.setenv("VOX_SERVE_TOP_K", "")
    assert parse("--port", "80") == Config(port=80)
    with pytest.raises(ConfigError, match="environment variable VOX_SERVE_PORT: "):
        Config()


def test_the_documented_line(parse):
    line = "--model DIR --port 8123 --temperature 0.7 --top_p 0.9 --repetition_penalty 1.1"
    config = parse(*line.split())
    assert config == Config(
        model="DIR", port=8123, temperature=0.7, top_p=0.9, repetition_penalty=1.1
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_hold_for_flags_variables_and_code(name, parse, monkeypatch, capsys):
    kind = base_type(FIELDS[name])
    inside, outside = edges(name)
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
        == vars(Config().sampling)
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


@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_sampling_settings_are_the_engines(name):
    inside, outside = edges(name)
    for value in inside:
        assert getattr(SamplingParams(**{name: value}), name) == value
    wrong = [float("nan")] if base_type(FIELDS[name]) is float else []
    for value in outside + wrong + ([None] if name != "seed" else []):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


def test_a_request_overrides_the_settings_it_gives():
    config = Config(temperature=0.5, seed=7, port=1)
    speech = config.override(top_k=3, max_frames=9, seed=None)
    assert speech == SpeechSettings(temperature=0.5, seed=7, top_k=3, max_frames=9)
    assert speech.sampling == SamplingParams(temperature=0.5, seed=7, top_k=3)
    with pytest.raises(ConfigError, match="temprature is not a setting"):
        config.override(temprature=1.0)
    with pytest.raises(ConfigError, match="top_p must be above 0, at most 1, got 2"):
        config.override(top_p=2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--port", "eighty"], "--port: must be a whole number, got 'eighty'"),
        (["--temperature", "hot"], "--temperature: must be a number, got 'hot'"),
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
    for wrong in (
        {"port": "8000"},
        {"port": 80.0},
        {"port": True},
        {"allow_pickle": 1},
        {"model": None},
        {"temperature": "0.5"},
        {"no_such_setting": 1},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)
    assert type(Config(temperature=0).temperature) is float
    with pytest.raises(ValidationError, match="frozen"):
        Config().port = 1


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("false", False)])
def test_booleans_in_variables(text, value):
    assert parse_value("allow_pickle", text) is value


def test_the_table_and_the_help_name_every_setting(capsys):
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"--{name}" for name in FIELDS]
    parser = CommandParser("prog", "what it does", "prog [flags]")
    parser.add_settings(ModelSettings, SpeechSettings, OutputSettings, ServerSettings)
    text = parser.format_help()
    for name in FIELDS:
        assert f"  --{name}" in text
        assert "_" not in name or f"--{name.replace('_', '-')}" not in text


def test_the_documented_table_is_the_settings():
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    _, table = text.split("<!-- settings: begin -->\n")
    table, _ = table.split("<!-- settings: end -->")
    assert table.strip() == markdown_table(), "write the output of python -m vox_serve.config there"


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
