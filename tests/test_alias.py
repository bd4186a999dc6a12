"""Other names of the package: `llava` and `moellava` are its modules themselves, however they were asked for."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import llava_lite.alias

PACKAGE = Path(llava_lite.__file__).resolve().parent

SAME = """
import sys
import llava.conversation, llava.conversation.templates as theirs
from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.records.record import parse_record
import llava_lite, llava_lite.conversation, llava_lite.conversation.templates as ours, llava_lite.data.records.record
assert llava.conversation is llava_lite.conversation and theirs is ours
assert parse_record is llava_lite.data.records.record.parse_record
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

    path: directories that come first on the path. isolated: without what is installed, so without llava_lite.
    """
    path = [str(directory) for directory in path]
    if isolated:
        code = f"import sys; sys.path[:] = {path} + [p for p in sys.path if 'site-packages' not in p and p]\n{code}"
    command = [sys.executable, *(["-S"] if isolated else []), *(arguments or ["-c", code])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def link(tmp_path):
    """A directory that holds `llava`, a link to the package, and nothing else."""
    directory = tmp_path / "linked"
    directory.mkdir()
    (directory / "llava").symlink_to(PACKAGE, target_is_directory=True)
    return directory


def test_importing_the_package_touches_neither_the_import_system_nor_the_warnings():
    code = (
        "import sys, warnings\nbefore = [list(sys.meta_path), list(sys.path_hooks), list(warnings.filters)]\n"
        "import llava_lite\n"
        "print(before == [sys.meta_path, sys.path_hooks, warnings.filters])"
    )
    assert run(code) == "True\n"


def test_a_link_of_another_name_is_refused_with_what_to_do(link, tmp_path):
    code = "try:\n    import llava.conversation\nexcept ImportError as error:\n    print(error)"
    assert "llava_lite.alias.install('llava')" in run(code, path=[link], cwd=tmp_path)


def test_install_opens_the_same_modules():
    assert run(f"import llava_lite.alias\nllava_lite.alias.install('llava')\n{SAME}") == "same\n"


def test_modules_that_do_not_exist_are_reported_by_the_name_they_were_imported_by():
    code = (
        "import llava_lite.alias\nllava_lite.alias.install()\n"
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


def test_unchanged_script_runs_with_its_own_arguments_and_directory(tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom beside import WORD\nfrom llava.constants import IMAGE_TOKEN_INDEX\n"
        "from moellava.constants import MAX_IMAGE_LENGTH\n"
        "if __name__ == '__main__':\n    print(WORD, IMAGE_TOKEN_INDEX, MAX_IMAGE_LENGTH, sys.argv[1:])\n",
        encoding="utf-8",
    )
    output = run(None, "-m", "llava_lite.alias", str(script), "-m", "--flag", "x")
    assert output == "beside -200 16 ['-m', '--flag', 'x']\n"


def test_module_runs_under_its_other_name():
    assert "--model-path" in run(None, "-m", "llava_lite.alias", "-m", "llava.serve.cli", "--help")


def test_missing_script_is_reported_in_a_line():
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


# What the demos of each system import and call, and what those names are here.
DEMOS = {
    "llama_adapter": """
import llama
from llama.llama_adapter import load
from llama.utils import format_prompt
from llama import available_models
import llava_lite.llama_adapter as ours
assert llama.load is load is ours.load
assert llama.format_prompt is format_prompt is ours.format_prompt
assert llama.llama_adapter is ours
print(llama.available_models()[0], llama.format_prompt("What is it?").endswith("### Response:"))
try:
    llama.load("BIAS-7B", "/path/to/LLaMA", llama_type="7B", device="cpu")
except ValueError as error:
    print("its file is not in" in str(error))
""",
    "imagebind_llm": """
import ImageBind.data as data
import llama
import llava_lite.imagebind_llm as ours
from ImageBind import data as again
assert llama.load is ours.load and data is again is ours.data
assert data.load_and_transform_vision_data(None, device="cpu") is None
print(data.__name__, llama.format_prompt("What is it?").endswith("### Response:"))
""",
    "accessory": """
from accessory.model.meta import MetaModel
import accessory.model.meta
import llava_lite.accessory as ours
assert MetaModel is ours.MetaModel is accessory.model.meta.MetaModel
from model.meta import MetaModel as inside
assert inside is MetaModel
print(accessory.model.meta.__name__, accessory.model.meta.__spec__.name)
""",
}
PRINTED = {
    "llama_adapter": "BIAS-7B True\nTrue\n",
    "imagebind_llm": "llava_lite.imagebind_llm.data True\n",
    "accessory": "llava_lite.accessory llava_lite.accessory\n",
}


@pytest.mark.parametrize("system", DEMOS)
def test_demo_of_another_system_runs_under_its_imports(system, tmp_path):
    (tmp_path / "demo.py").write_text(DEMOS[system], encoding="utf-8")
    done = start("--system", system, "demo.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, PRINTED[system]), done.stderr


@pytest.mark.parametrize("system", DEMOS)
def test_a_system_is_installed_in_a_notebook(system):
    assert run(f"import llava_lite.alias\nllava_lite.alias.install({system!r})\n{DEMOS[system]}") == PRINTED[system]


def test_what_only_the_other_system_has_comes_from_its_copy(tmp_path):
    files = {
        "accessory/__init__.py": "raise AssertionError('this is the other Accessory')",
        "accessory/model/meta.py": "raise AssertionError('this is the other model')",
        "accessory/model/parts.py": "from .meta import MetaModel\nimport util.misc\nNAME = MetaModel.__module__",
        "accessory/util/misc.py": "WORD = 'theirs'",
        "accessory/demos/ask.py": (
            "import sys, os\nsys.path.append(os.path.abspath(__file__).rsplit('/', 2)[0])\n"
            "from util.misc import WORD\nfrom model.meta import MetaModel\nfrom model.parts import NAME\n"
            "print(WORD, NAME, sys.argv[1:])"
        ),
        "llama/__init__.py": "raise AssertionError('this is the other llama')",
        "llama/tokenizer.py": "WORD = 'their tokenizer'",
        "ask.py": "import llama\nfrom llama.tokenizer import WORD\nprint(WORD, llama.load.__module__)",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    for words in (["accessory/demos/ask.py"], ["-m", "accessory.demos.ask"]):
        done = start("--system", "accessory", *words, "--x", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "theirs llava_lite.accessory ['--x']\n"), done.stderr
    done = start("--system", "llama_adapter", "ask.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "their tokenizer llava_lite.llama_adapter\n"), done.stderr


def test_module_of_another_system_that_nobody_has_is_reported_in_a_line(tmp_path):
    (tmp_path / "demo.py").write_text("from llama.tokenizer import Tokenizer\n", encoding="utf-8")
    done = start("--system", "llama_adapter", "demo.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "llava_lite.alias: the program imports 'llama.tokenizer', which llava_lite does not have; it has llama, "
        "llama.llama_adapter, llama.utils. Run the program from a copy of the system, which brings the rest."
    )
    (tmp_path / "sphinx.py").write_text("from SPHINX import SPHINXModel\n", encoding="utf-8")
    done = start("--system", "accessory", "sphinx.py", cwd=tmp_path)
    assert done.stderr.splitlines()[-1].endswith("imports 'SPHINX', whose mixtures of encoders are not supported.")
    # Without --system these are not our names.
    assert "No module named 'llama'" in start("demo.py", cwd=tmp_path).stderr


def test_unknown_system_is_refused_with_the_known_ones(tmp_path):
    done = start("--system", "llama", "demo.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown system 'llama'; known: llava, llama_adapter, imagebind_llm, accessory." in done.stderr
    with pytest.raises(ValueError, match="unknown name 'llama'; known: llava, moellava, llama_adapter, imagebind_llm"):
        llava_lite.alias.install("llama")


def test_one_process_takes_one_llama(tmp_path):
    code = (
        "from llava_lite.alias import install\ninstall('llama_adapter')\ninstall('llama_adapter')\n"
        "try:\n    install('imagebind_llm')\nexcept ImportError as error:\n    print(error)"
    )
    assert run(code).startswith(
        "'llama' is that of llava_lite.llama_adapter in this process, and imagebind_llm has one"
    )
    (tmp_path / "llama.py").write_text("", encoding="utf-8")
    code = (
        "import llama, llava_lite.alias\n"
        "try:\n    llava_lite.alias.install('llama_adapter')\nexcept ImportError as error:\n    print(error)"
    )
    found = run(code, path=[tmp_path, PACKAGE.parent], cwd=tmp_path)
    assert found.startswith(f"'llama' is imported already, from {tmp_path}")


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
def test_program_that_sends_tensors_to_cuda_runs_without_it_and_it_is_reported(words, checkout):
    done = start(*words, "--x", cwd=checkout)
    assert (done.returncode, done.stdout) == (0, "b 2.0 ['llava/eval/asks.py', '--x']\n"), done.stderr
    assert "no CUDA device here; what the program sends to one stays on the CPU." in done.stderr


def test_module_that_both_have_is_that_of_this_package_and_it_is_reported(checkout):
    done = start("-m", "llava.serve.cli", "--help", cwd=checkout)
    assert "usage: llava-lite chat" in done.stdout
    assert "llava.serve.cli is that of llava_lite; for the file, leave out -m: llava/serve/cli.py" in done.stderr
    assert start("llava/serve/cli.py", cwd=checkout).stdout == "their chat\n"


def test_module_that_nobody_has_is_reported_in_a_line(checkout):
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
