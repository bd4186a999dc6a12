"""Every bash block is bash, and every command of ours in it is one that the package's own parsers take."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pages import PAGES, ROOT, all_commands, blocks, name_of

from llava_lite.alias import SYSTEMS
from llava_lite.commands.verbs import PARSERS, VERBS
from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.arguments.tuning import TUNING_NAMES

# Flags that are not looked at here: what they name is not on this machine.
ON_THIS_MACHINE = ["--use_cpu", "True"]


def flags_of(words):
    """Return the names of the flags in the words of a command."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_bash_blocks_are_bash(page):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("command", all_commands("llava-lite"), ids=str)
def test_command_of_llava_lite_parses(command):
    _, verb, *arguments = command.words
    assert verb in VERBS
    if verb == "train":
        parse_train(arguments)
    elif verb == "data":
        assert arguments.pop(0) == "convert"
        import_module("llava_lite.commands.data").build_parser().parse_args(arguments)
    elif verb in ("check", "plan"):
        _, rest = import_module(PARSERS[verb]).build_parser().parse_known_args(without_missing_yaml(arguments))
        parse_train(rest)
    else:
        import_module(PARSERS[verb]).build_parser().parse_args(arguments)


def without_missing_yaml(arguments):
    """Return the arguments without a first YAML file that the reader writes."""
    is_missing = arguments[:1] and arguments[0].endswith(".yaml") and not os.path.exists(arguments[0])
    return arguments[1:] if is_missing else arguments


def parse_train(arguments):
    """Parse flags of a training run, or the help that they ask for."""
    if arguments[:1] in (["--help"], ["-h"]):
        assert arguments[1:] in ([], ["all"])
    else:
        parse_args([*arguments, *ON_THIS_MACHINE])


@pytest.mark.parametrize("command", all_commands("deepspeed"), ids=str)
def test_command_of_the_launcher_names_the_training_module_and_its_flags(command):
    at = command.words.index("--module")
    module, *arguments = command.words[at + 1 :]
    assert callable(import_module(module).main)
    parse_train(arguments)


@pytest.mark.parametrize("command", all_commands("torchrun"), ids=str)
def test_command_of_torchrun_names_the_command_line_and_its_flags(command):
    module, verb, *arguments = command.words[command.words.index("-m") + 1 :]
    assert module == "llava_lite.cli"
    import_module(PARSERS[verb]).build_parser().parse_args(arguments)


@pytest.mark.parametrize("command", all_commands("bash"), ids=str)
def test_script_exists_and_its_flags_are_known(command, tmp_path):
    _, script, *arguments = command.words
    assert (ROOT / script).is_file()
    if script.startswith("scripts/v1_5/eval/"):
        name = Path(script).stem
        import_module(PARSERS["eval"]).build_parser().parse_args([name, *arguments])
        assert "MODEL" in command.variables
    elif script == "scripts/flagperf.sh":
        import_module(PARSERS["flagperf"]).build_parser().parse_args(arguments)
    elif script.startswith("scripts/v1_5/"):
        parse_recipe(command, tmp_path)
    else:
        text = (ROOT / script).read_text(encoding="utf-8")
        assert [flag for flag in flags_of(arguments) if flag not in text] == []


def parse_recipe(command, directory):
    """Run a recipe with launchers that print their arguments, and parse the flags that training would get."""
    for name in ("deepspeed", "torchrun", "accelerate"):
        echo = directory / name
        echo.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
        echo.chmod(0o755)
    env = {**os.environ, **command.variables, "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command.words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    at = words.index("--deepspeed")
    assert (ROOT / words[at + 1]).is_file()
    if "--ep_size" in words:
        # It needs the ranks of a launcher, of which there are none here.
        first = words.index("--ep_size")
        del words[first : first + 2]
    tuning = parse_args([*words[at + 2 :], *ON_THIS_MACHINE])[2].tuning
    assert tuning in TUNING_NAMES


@pytest.mark.parametrize("command", all_commands("python", "-m"), ids=str)
def test_module_exists_and_its_flags_are_known(command):
    module, *arguments = command.words[2:]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if module == "llava_lite.alias":
        if arguments[0] == "--system":
            assert arguments[1] in SYSTEMS
            arguments = arguments[2:]
        assert arguments[0] == "-m" or arguments[0].endswith(".py"), "a program of LLaVA and its own flags"
    elif module.split(".")[0] in ("llava_lite", "playground", "benchmarks"):
        text = Path(spec.origin).read_text(encoding="utf-8")
        assert [flag for flag in flags_of(arguments) if f'"{flag}"' not in text] == []


# Servers that are not installed here: the words before the model, and those of their flags that the pages use.
SERVERS = {
    ("vllm", "serve"): {"--port", "--api-key"},
    ("python3", "-m", "sglang.launch_server", "--model-path"): {"--host", "--port"},
}


@pytest.mark.parametrize("server", SERVERS, ids=" ".join)
def test_other_servers_get_a_directory_that_the_page_has_converted(server):
    found = all_commands(*server)
    assert found
    for command in found:
        converted = [other.words[-1] for other in all_commands("llava-lite", "convert") if other.page == command.page]
        model, *arguments = command.words[len(server) :]
        assert model in converted, str(command)
        assert set(flags_of(arguments)) <= SERVERS[server], str(command)


def test_extras_and_constraints_of_pip_exist():
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has a reader, 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = all_commands("pip", "install")
    assert found
    for command in found:
        named = re.findall(r"\[([\w,-]+)\]", " ".join(command.words))
        assert set(",".join(named).split(",")) - {""} <= set(project["optional-dependencies"]), str(command)
        files = [word for word in command.words if word.endswith(".txt")]
        assert all((ROOT / name).is_file() for name in files), str(command)


def test_environment_and_slurm_commands_name_files_that_exist():
    assert [command.words[1] for command in all_commands("source")] == [".venv/bin/activate"] * 3
    for command in all_commands("sbatch"):
        script, recipe, *arguments = command.words[1:]
        assert (ROOT / script).is_file()
        assert (ROOT / f"scripts/v1_5/{recipe}.sh").is_file()
        assert set(flags_of(arguments)) <= {"--gradient_accumulation_steps"}
