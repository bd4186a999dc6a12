"""Commands know their flags by full names in either spelling, and report what is wrong in one sentence."""

import pytest

from llava_lite.commands.eval import build_parser as eval_parser
from llava_lite.commands.parser import CommandParser, in_flags
from llava_lite.errors import get_sentence


@pytest.fixture
def parser():
    parser = CommandParser(prog="llava-lite chat", command="chat")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--model-path")
    parser.add_argument("--image-file", action="append", default=[])
    parser.add_argument("--max_new_tokens", type=int, default=5)
    parser.add_argument("--local-files-only", action="store_true")
    return parser


def refusal(parser, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(list(words))
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    assert output.endswith(" `llava-lite chat --help` lists the flags.\n")
    assert len(output.splitlines()) == 1
    return output.removeprefix("llava-lite chat: ").removesuffix(" `llava-lite chat --help` lists the flags.\n")


def test_dashes_and_underscores_are_the_same(parser):
    options = parser.parse_args(["m", "--image_file", "a_b-c.png", "--image-file=d_e.png", "--max-new-tokens", "3"])
    assert (options.image_file, options.max_new_tokens) == (["a_b-c.png", "d_e.png"], 3)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--model", "m"], "unknown flag --model: write the model as the first word, llava-lite chat MODEL."),
        (["m", "--image", "a.png"], "unknown flag --image: write --image-file."),
        (["m", "-i", "a.png"], "unknown flag -i."),
        (["m", "a.png"], "'a.png' belongs to no flag. Put quotes around a value with spaces."),
        (["m", "--max-new-tokens", "x"], "argument --max_new_tokens: invalid int value: 'x'."),
        (["m", "--max-new-tokens"], "argument --max_new_tokens: expected one argument."),
    ],
)
def test_what_is_wrong_is_one_sentence(words, answer, parser, capsys):
    assert refusal(parser, capsys, *words) == answer


def test_an_unknown_flag_is_reported_before_what_is_missing_because_of_it(capsys):
    parser = CommandParser(prog="llava-lite chat", command="check")
    parser.add_argument("--data_path", required=True)
    assert refusal(parser, capsys, "--data", "x.json") == "unknown flag --data: write --data_path."


def test_a_number_below_zero_is_a_value(parser):
    assert parser.parse_args(["m", "--max-new-tokens", "-3"]).max_new_tokens == -3


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--flags", "--max_steps=5"],
        ["m", "--flags=--max_steps=5"],
        ["--flags", "--max_steps=5", "m"],
        ["--json", "x", "m", "--flags", "--max_steps=5"],
    ],
)
def test_a_text_of_flags_is_a_value_however_it_is_written(words):
    parser = CommandParser(prog="llava-lite chat", command="chat", holds_flags="--flags")
    parser.add_argument("model")
    parser.add_argument("--flags")
    parser.add_argument("--json")
    assert parser.parse_args(words).flags == "--max_steps=5"
    for value in ("--max_steps 5 --bf16 True", "-x", "--bf16", ""):
        assert parser.parse_args(["m", "--flags", value]).flags == value


def test_a_flag_of_the_command_is_no_text_of_flags(capsys):
    parser = CommandParser(prog="llava-lite chat", command="chat", holds_flags="--flags")
    parser.add_argument("--flags")
    parser.add_argument("--json")
    for words in (["--flags", "--json", "x"], ["--flags"]):
        assert refusal(parser, capsys, *words) == "argument --flags: expected one argument."


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
@pytest.mark.parametrize("flag", ["--batch-size", "--num-beams", "--max-new-tokens", "--num-chunks", "--limit"])
def test_a_number_of_things_is_at_least_1(flag, value, capsys):
    with pytest.raises(SystemExit):
        eval_parser().parse_args(["pope", f"{flag}={value}"])
    assert f"argument {flag}: {value!r} is no whole number of at least 1." in capsys.readouterr().err
    assert vars(eval_parser().parse_args(["pope", flag, "3"]))[flag[2:].replace("-", "_")] == 3


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("open it with local_files_only=True.", "open it with --local-files-only."),
        ("give model_path=..., please", "give --model-path ..., please"),
        ("name it: model_path='user/base'.", "name it: --model-path user/base."),
        # What the command has no flag for stays as it is.
        ("give use_fast=True", "give use_fast=True"),
        ("x = 3", "x = 3"),
    ],
)
def test_keywords_of_python_are_shown_as_flags(message, shown, parser):
    assert in_flags(message, parser) == shown
    assert in_flags(message, None) == message


def test_an_error_of_a_file_names_it(tmp_path):
    with pytest.raises(OSError, match="No such file") as error:
        (tmp_path / "gone").read_text()
    assert get_sentence(error.value) == f"'{tmp_path}/gone': No such file or directory."
    assert get_sentence(ValueError("words")) == "words"
    assert get_sentence(ValueError()) == "ValueError"
