"""The Dockerfile parses, what it copies, installs and runs exists, and the page of GPU installation says the same."""

import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

dockerfile_parse = pytest.importorskip("dockerfile_parse", reason="reads the Dockerfile (pip install -e '.[dev]')")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpu_installation.md").read_text(encoding="utf-8")
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}


@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory):
    """The Dockerfile, parsed."""
    # The parser writes where it reads.
    path = tmp_path_factory.mktemp("image") / "Dockerfile"
    path.write_text((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return dockerfile_parse.DockerfileParser(str(path))


@pytest.fixture(scope="module")
def lines(dockerfile):
    """Return {instruction: its values, in order}."""
    found = {}
    for entry in dockerfile.structure:
        found.setdefault(entry["instruction"], []).append(entry["value"])
    return found


def arguments(lines):
    """Return {build argument: default}; of one that two stages declare, the first."""
    pairs = [value.partition("=") for value in lines["ARG"]]
    return {name: default for name, _, default in reversed(pairs)}


def test_instructions_are_known_and_the_device_names_a_stage(lines):
    assert set(lines) - {"COMMENT"} == INSTRUCTIONS
    stages = dict(reversed(value.split(" AS ")) for value in lines["FROM"] if " AS " in value)
    assert stages == {"cuda": "${CUDA_IMAGE}", "cpu": "${CPU_IMAGE}"}
    assert lines["FROM"][-1] == "${DEVICE}"
    assert arguments(lines)["DEVICE"] in stages


def test_every_variable_is_declared(lines):
    set_here = {word.partition("=")[0] for value in lines["ENV"] for word in shlex.split(value)}
    declared = set(arguments(lines)) | set_here | {"PATH"}
    used = {name for values in lines.values() for value in values for name in re.findall(r"\$\{?(\w+)", value)}
    assert used - {"PWD"} <= declared


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_shell_lines_are_well_formed(shell, lines):
    for command in lines["RUN"]:
        done = subprocess.run([shell, "-n", "-c", command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_what_it_copies_and_runs_is_there_and_what_it_installs_has_a_name(lines):
    for value in lines["COPY"]:
        assert (ROOT / value.split()[0]).exists()
    scripts = [word for command in lines["RUN"] for word in re.findall(r"\bscripts/[\w./]+", command)]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
    extras = set(re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(arguments(lines)["EXTRAS"].split(",")) <= extras
    # The layer of torch is the version that the tests ran with.
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_page_names_every_build_argument_with_its_default(lines):
    declared = arguments(lines)
    table = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)}
    assert set(table) == set(declared)
    for name in ("DEVICE", "CUDA_IMAGE", "CPU_IMAGE", "EXTRAS", "FLASH_ATTN", "MAX_JOBS"):
        assert table[name] == f"`{declared[name]}`"
    given = re.findall(r"--build-arg (\w+)=", PAGE)
    assert given
    assert set(given) <= set(declared)


def test_commands_of_the_page_name_files_that_exist():
    named = re.findall(r"\b((?:scripts|docs)/[\w./-]+\.\w+|constraints\.txt|Dockerfile)\b", PAGE)
    assert "scripts/lib/check_cuda.py" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("built_with", "nvcc", "status"),
    [("13.0", "release 13.2", 0), ("12.6", "release 13.0", 1), (None, "release 13.0", 0), ("13.0", "", 0)],
)
def test_a_compiler_of_another_cuda_is_reported(built_with, nvcc, status, capsys):
    spec = spec_from_file_location("check_cuda", ROOT / "scripts" / "lib" / "check_cuda.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.report(built_with, re.search(r"release (\d+\.\d+)", nvcc)) == status
    output = capsys.readouterr().out
    assert f"torch was built with CUDA {built_with}" in output
    assert ("cannot be built" in output) == bool(status)


def test_check_runs_on_this_machine():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "lib" / "check_cuda.py"], capture_output=True, text=True, timeout=120
    )
    assert "torch was built with CUDA" in done.stdout, done.stderr
