"""The command `llava-lite`: what it lists exists, and it starts without torch."""

import io
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from llava_lite import __version__, cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_leads_to_a_main(verb):
    from importlib import import_module

    module, words = cli.VERBS[verb]
    assert find_spec(module) is not None
    assert callable(import_module(module).main)
    assert words


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_command_answers_without_torch(arguments):
    code = (
        "import sys\nfrom llava_lite.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    if arguments == ["--help"]:
        assert all(f"  {verb}" in done.stdout for verb in cli.VERBS)
    elif arguments == ["--version"]:
        assert done.stdout.splitlines()[0] == f"llava-lite {__version__}"
    else:
        assert "VERB" in done.stderr


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian", "Did you mean `llava-lite train`?"),
        ("finetune", "Did you mean `llava-lite train`?"),
        ("infer", "Did you mean `llava-lite chat`?"),
        ("export", "Did you mean `llava-lite convert`?"),
        ("upload", "Did you mean `llava-lite push`?"),
        ("evaluate", "Did you mean `llava-lite eval`?"),
        ("model_vqa", "Did you mean `llava-lite answer`?"),
        (
            "xyzzy",
            "Known: train, check, data, single-turn, plan, report, chat, serve, demo, eval, answer, flagperf, "
            "convert, push, merge, apply-delta, bank.",
        ),
    ],
)
def test_unknown_verb_is_answered_with_the_one_that_is_meant(word, answer, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([word])
    output = capsys.readouterr().err
    assert stopped.value.code == cli.EXIT_USAGE
    assert output.startswith(f"llava-lite: there is no verb '{word}'. ")
    assert answer in output


def test_other_words_for_a_verb_lead_to_verbs_that_exist():
    assert set(cli.OTHER_VERBS) <= set(cli.VERBS)


def test_help_is_a_verb_too(capsys):
    assert cli.main(["help", "train"]) == 0
    assert "--model_name_or_path MODEL" in capsys.readouterr().out
    assert cli.main(["help"]) == 0
    assert all(f"  {verb}" in capsys.readouterr().out for verb in list(cli.VERBS)[:1])


def test_flags_after_the_verb_are_the_verbs_own(capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "convert", "a.json", "b.json", "--version"])
    assert "--version" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.PARSERS)
def test_flags_are_read_before_torch_is_imported(verb):
    code = (
        "import sys\nfrom llava_lite.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    wrong = {"plan": "--bandwidth=no", "check": "--max_bad_fraction=no"}.get(verb, "--xyzzy")
    for word, status in (("--help", 0), (wrong, 2)):
        command = [sys.executable, "-c", code, verb, word]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "[]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--output_dir", "x"], "llava-lite plan: --model_name_or_path is needed"),
        (["plan", "--tuning", "lora", "--moe_enable", "True"], "llava-lite plan: --tuning lora and --moe_enable True"),
        (
            ["check", "--data_path", "a.json", "--model_name_or_path", "./nowhere"],
            "llava-lite check: --model_name_or_path './nowhere': there is no such directory.",
        ),
    ],
)
def test_what_is_wrong_is_reported_in_a_line(arguments, words, capsys):
    assert cli.main(arguments) == 1
    output = capsys.readouterr().err
    assert words in output
    assert "Traceback" not in output


def test_installed_command_is_this_one():
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.cli", "--version"], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == f"llava-lite {__version__}"


def test_a_character_that_standard_output_has_not_is_printed_as_its_escape(monkeypatch):
    printed = io.BytesIO()
    module = SimpleNamespace(main=lambda arguments: print("é \ud800"))
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    monkeypatch.setattr(cli, "PARSERS", {})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    cli.run("convert", [])
    sys.stdout.flush()
    assert printed.getvalue() == b"\\xe9 \\ud800\n"
