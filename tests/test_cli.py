"""The command `llava-lite`: what it lists exists, and it starts without torch."""

import os
import subprocess
import sys
from importlib.util import find_spec

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


def test_unknown_verb_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve"])
    assert "train" in capsys.readouterr().err


def test_flags_after_the_verb_are_the_verbs_own(monkeypatch):
    got = []
    module = type(sys)("listener")
    module.main = got.extend
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    cli.main(["chat", "some/model", "--image-file", "a.jpg", "--help-me"])
    assert got == ["some/model", "--image-file", "a.jpg", "--help-me"]


def test_train_says_how_the_same_flags_run_on_all_devices(monkeypatch, capsys):
    module = type(sys)("training")
    module.main = lambda arguments: None
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    monkeypatch.delenv(cli.LAUNCHED, raising=False)
    cli.main(["train", "--output_dir", "my run", "--bf16", "True"])
    assert "deepspeed --module llava_lite.train.train --deepspeed zero2.json" in capsys.readouterr().err
    monkeypatch.setenv(cli.LAUNCHED, "2")
    cli.main(["train", "--output_dir", "x"])
    assert capsys.readouterr().err == ""
    assert "--output_dir 'my run'" in cli.launch_hint(["--output_dir", "my run"])
    assert cli.launch_hint(["run.yaml", "--seed", "1"]).endswith(" llava_lite.train.train run.yaml --seed 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--output_dir", "x"], "llava-lite plan: --model_name_or_path is needed"),
        (["plan", "--tuning", "lora", "--moe_enable", "True"], "llava-lite plan: --tuning lora and --moe_enable True"),
        (
            ["check", "--data_path", "a.json", "--model_name_or_path", "./nowhere"],
            "llava-lite check: --model_name_or_path './nowhere': there is no such folder.",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, words, capsys):
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_installed_command_is_this_one():
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.cli", "--version"], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == f"llava-lite {__version__}"
