"""The wheel alone is enough: it trains by the name of a DeepSpeed config and chats, with no clone on the path."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_offload_nvme")
PACKAGED = "llava_lite/train/deepspeed/configs"
# Files of the repository that are no part of the package.
ABSENT = re.compile(
    r"(?<![\w/])(?:scripts|playground|tests|docs|benchmarks)/\w|zero\d\w*\.json|constraints[\w.-]*\.txt"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return (wheel, sdist), built from a copy so that nothing of an earlier build is taken."""
    directory = tmp_path_factory.mktemp("built")
    source = directory / "source"
    shutil.copytree(ROOT / "llava_lite", source / "llava_lite", ignore=shutil.ignore_patterns("__pycache__"))
    # A part of them, of which setuptools takes some by itself.
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for build in ("build_wheel", "build_sdist"):
        code = f"from setuptools import build_meta; build_meta.{build}({str(directory)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_hold_the_configs_and_the_licence_and_no_tests(built):
    with zipfile.ZipFile(built[0]) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in CONFIGS:
        path = ROOT / f"{name}.json"
        path = path if path.is_file() else ROOT / "scripts" / f"{name}.json"
        assert files[f"{PACKAGED}/{name}.json"] == path.read_bytes()
        assert f"{PACKAGED}/{name}.json" in names
    (licence,) = [name for name in files if name.endswith("/LICENSE")]
    assert files[licence] == (ROOT / "LICENSE").read_bytes()
    assert "LICENSE" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llava_lite").rglob("*.py")}
    assert modules == {name for name in files if name.endswith(".py")}
    assert modules == {name for name in names if name.endswith(".py")}


@pytest.fixture
def environment(built, tmp_path):
    """Return a function that runs a command in an environment with the wheel; its libraries are this one's."""
    directory = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=120)
    python = directory / "bin" / "python"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}", "LLAVA_LITE_CACHE": str(tmp_path)}
    # Before the libraries are there, and without PYTHONPATH: pip would find the package there and install nothing.
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0]]
    done = subprocess.run(install, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Successfully installed" in done.stdout, done.stdout
    # A line of a .pth file is a directory, whose own .pth files, such as that of an editable install, are not read.
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))

    def run(*command, **more):
        command = [directory / "bin" / command[0], *map(str, command[1:])]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600, **more
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    (where,) = run("python", "-c", "import llava_lite; print(llava_lite.__file__)").stdout.split()
    assert Path(where).is_relative_to(site)
    # The libraries may lie in an environment inside the clone; the clone itself is not on the path.
    assert str(ROOT) not in run("python", "-c", "import sys; print(*sys.path, sep='\\n')").stdout.splitlines()
    return run


@pytest.mark.slow
def test_a_toy_trains_and_answers_from_the_wheel_alone(environment, tmp_path, toy_llm_dir, toy_tower_dir, toy_data):
    data, images = toy_data(tmp_path / "data", num_records=8)
    llm, tower = toy_llm_dir("llama"), toy_tower_dir("clip")
    help_page = environment("llava-lite", "train", "--help").stdout
    assert all(name in help_page for name in CONFIGS)
    trained = environment(
        *("llava-lite", "train", "--model_name_or_path", llm, "--vision_tower", tower),
        *("--mm_projector_type", "mlp2x_gelu", "--data_path", data, "--image_folder", images, "--use_cpu", "True"),
        *("--deepspeed", "zero2", "--max_steps", "2", "--save_steps", "2", "--output_dir", "out"),
    )
    assert "--deepspeed zero2: reading " in trained.stderr
    # DeepSpeed's own files of the optimizer, one a rank.
    assert list((tmp_path / "out" / "checkpoint-2").glob("global_step2/*zero_pp_rank_0_*optim_states.pt"))
    image = next(Path(images).iterdir())
    chat = environment(
        *("llava-lite", "chat", "out", "--image-file", image, "--max-new-tokens", "4"), input="What colour?\n"
    )
    assert "ASSISTANT: " in chat.stdout


def sentences(path):
    """Return the strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if id(node) not in prose]


def test_no_message_names_a_file_that_a_wheel_does_not_bring():
    files = sorted((ROOT / "llava_lite").rglob("*.py"))
    named = [(path.name, words) for path in files for words in sentences(path) if ABSENT.search(words)]
    assert named == []
