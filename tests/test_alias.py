"""Other names of the package: `llava` and `moellava` are its modules themselves, however they were asked for."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import llava_lite

PACKAGE = Path(llava_lite.__file__).resolve().parent

SAME = """
import sys
import llava.conversation, llava.templates as theirs
from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.records import parse_record
import llava_lite, llava_lite.conversation, llava_lite.templates as ours, llava_lite.data.records
assert llava.conversation is llava_lite.conversation and theirs is ours
assert parse_record is llava_lite.data.records.parse_record
names = [name for name in sys.modules if name.split(".")[0] == "llava"]
assert len(names) >= 6
for name in names:
    own = sys.modules["llava_lite" + name[len("llava"):]]
    assert sys.modules[name] is own, name
    assert own.__name__ == own.__spec__.name == "llava_lite" + name[len("llava"):], name
print("same")
"""


def run(code, *arguments, path=(), isolated=False, cwd=PACKAGE.parent):
    """Run code, or a program if `arguments` are given, in a process of its own and return what it printed.

    path: folders that come first on the path. isolated: without what is installed, so without llava_lite.
    """
    path = [str(folder) for folder in path]
    if isolated:
        code = f"import sys; sys.path[:] = {path} + [p for p in sys.path if 'site-packages' not in p and p]\n{code}"
    command = [sys.executable, *(["-S"] if isolated else []), *(arguments or ["-c", code])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def link(tmp_path):
    """A folder that holds `llava`, a link to the package, and nothing else."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "llava").symlink_to(PACKAGE, target_is_directory=True)
    return folder


def test_entry_in_sys_modules_opens_the_same_modules():
    assert run(f"import sys, llava_lite\nsys.modules['llava'] = llava_lite\n{SAME}") == "same\n"


def test_install_opens_the_same_modules():
    assert run(f"import llava_lite.alias\nllava_lite.alias.install('llava')\n{SAME}") == "same\n"


def test_link_to_the_folder_opens_the_same_modules(link, tmp_path):
    assert run(SAME, path=[link], cwd=tmp_path) == "same\n"


def test_link_opens_the_package_that_is_imported_already(link, tmp_path):
    assert run(f"import llava_lite.templates\n{SAME}", path=[link], cwd=tmp_path) == "same\n"


def test_folder_of_one_line_opens_the_same_modules(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text(
        "import sys, llava_lite\nsys.modules[__name__] = llava_lite\n", encoding="utf-8"
    )
    assert run(SAME, path=[tmp_path], cwd=tmp_path) == "same\n"


def test_link_is_enough_where_nothing_else_is_on_the_path(link, tmp_path):
    """Without site-packages there is no torch, so only what needs none is opened."""
    code = (
        "from llava.constants import IGNORE_INDEX\n"
        "import llava, llava.alias, llava_lite, llava_lite.alias as own\n"
        "assert llava is llava_lite and llava.alias is own and own.__name__ == 'llava_lite.alias'\n"
        "print(llava.__name__, IGNORE_INDEX)"
    )
    assert run(code, path=[link], isolated=True, cwd=tmp_path) == "llava_lite -100\n"


def test_modules_that_do_not_exist_are_told_by_the_name_they_were_asked_for():
    code = (
        "import sys, llava_lite\nsys.modules['llava'] = llava_lite\n"
        "try:\n    import llava.model.nothing\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert run(code) == "No module named 'llava.model.nothing'\n"


def test_another_package_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "llava" / "constants.py").write_text("IGNORE_INDEX = 'theirs'\n", encoding="utf-8")
    code = (
        "import llava_lite.alias\nfrom llava.constants import IGNORE_INDEX\nprint(IGNORE_INDEX)\n"
        "try:\n    llava_lite.alias.install('llava')\nexcept ImportError as error:\n    print(error)"
    )
    first, second = run(code, path=[tmp_path], cwd=tmp_path).splitlines()
    assert first == "theirs"
    assert second.startswith(f"'llava' is imported already, from {tmp_path}")


def test_unchanged_script_runs_with_its_own_arguments_and_folder(tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom beside import WORD\nfrom llava.constants import IMAGE_TOKEN_INDEX\n"
        "from moellava.constants import MAX_IMAGE_LENGTH\n"
        "if __name__ == '__main__':\n    print(WORD, IMAGE_TOKEN_INDEX, MAX_IMAGE_LENGTH, sys.argv[1:])\n",
        encoding="utf-8",
    )
    said = run(None, "-m", "llava_lite.alias", str(script), "-m", "--flag", "x")
    assert said == "beside -200 16 ['-m', '--flag', 'x']\n"


def test_module_runs_under_its_other_name(link, tmp_path):
    assert "--model-path" in run(None, "-m", "llava_lite.alias", "-m", "llava.serve.cli", "--help")
    assert "--model-path" in run(None, "-m", "llava.serve.cli", "--help", path=[link], cwd=tmp_path)


def test_missing_script_is_said_in_a_line():
    command = [sys.executable, "-m", "llava_lite.alias", "nowhere.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 2
    assert "there is no file 'nowhere.py'." in done.stderr
    assert "RuntimeWarning" not in done.stderr


def start(*arguments, cwd, path=()):
    """Return the finished process of `python -m llava_lite.alias` in a directory."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *map(str, path)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava_lite.alias", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=env)


@pytest.fixture
def checkout(tmp_path):
    """A copy of LLaVA: a scorer with a helper of its own, an evaluator, and a file that this package has too."""
    files = {
        "llava/__init__.py": "raise AssertionError('this is the other LLaVA')",
        "llava/eval/helper.py": "from llava.constants import IGNORE_INDEX\nSCORE = IGNORE_INDEX",
        "llava/eval/scorer.py": "from llava.eval.helper import SCORE\nprint('score', SCORE)",
        "llava/eval/asks.py": (
            "import sys, torch\nfrom llava.mm_utils import get_model_name_from_path\n"
            "print(get_model_name_from_path('a/b'), torch.ones(2).half().cuda().sum().item(), sys.argv)"
        ),
        "llava/serve/cli.py": "print('their chat')",
        "llava/eval/needs.py": "import shortuuid_of_nobody",
        "llava/eval/wants.py": "import shortuuid",
        "llava/serve/controller.py": "import uvicorn",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", [["llava/eval/scorer.py"], ["-m", "llava.eval.scorer"]])
def test_scorer_of_llava_finds_the_modules_that_only_llava_has(words, checkout):
    done = start(*words, cwd=checkout)
    assert (done.returncode, done.stdout) == (0, "score -100\n"), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there .cuda() is what it says")
@pytest.mark.parametrize("words", [["llava/eval/asks.py"], ["-m", "llava.eval.asks"]])
def test_program_that_sends_tensors_to_cuda_runs_without_it_and_it_is_said(words, checkout):
    done = start(*words, "--x", cwd=checkout)
    assert (done.returncode, done.stdout) == (0, "b 2.0 ['llava/eval/asks.py', '--x']\n"), done.stderr
    assert "no CUDA device here; what the program sends to one stays on the CPU." in done.stderr


def test_module_that_both_have_is_that_of_this_package_and_it_is_said(checkout):
    done = start("-m", "llava.serve.cli", "--help", cwd=checkout)
    assert "usage: llava-lite chat" in done.stdout
    assert "llava.serve.cli is that of llava_lite; for the file, leave out -m: llava/serve/cli.py" in done.stderr
    assert start("llava/serve/cli.py", cwd=checkout).stdout == "their chat\n"


def test_module_that_nobody_has_is_said_in_a_line(checkout):
    done = start("-m", "llava.eval.nothing", cwd=checkout)
    assert done.returncode == 2
    assert "there is no module 'llava.eval.nothing', and no file 'llava/eval/nothing.py'." in done.stderr


@pytest.mark.parametrize(
    ("file", "package", "words"),
    [
        ("llava/eval/wants.py", "shortuuid", "imports 'shortuuid': pip install 'llava-lite[llava]'"),
        ("llava/serve/controller.py", "uvicorn", "imports 'uvicorn': pip install uvicorn"),
    ],
)
def test_package_that_llava_needs_is_named_with_what_brings_it(file, package, words, checkout):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    done = start(file, cwd=checkout)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"llava_lite.alias: the program {words}"
    assert "Traceback" in start("llava/eval/needs.py", cwd=checkout).stderr
