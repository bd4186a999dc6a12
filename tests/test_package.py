"""The package: what it needs, what it opens, and which file may import which."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import llava_lite

ROOT = Path(llava_lite.__file__).resolve().parents[1]
FILES = sorted((ROOT / "llava_lite").rglob("*.py"))

# A file imports from lower floors or from its own folder. What stands at the top and is not listed is on floor 1.
FLOORS = {
    "__init__": 0,
    "alias": 0,
    "commands": 0,
    # Below all: plain words and numbers.
    "constants": -1,
    "without_cuda": 0,
    "formats": 0,
    "data": 2,
    "model": 2,
    "inference": 3,
    "export": 4,
    "train": 4,
    "eval": 4,
    "serve": 4,
    "cli": 6,
}
# What a verb does, where that stands beside its flags.
VERBS_ABOVE = {"commands.check": 5, "commands.data": 5}
# Installed by an extra, or by nothing at all: imported only where it is needed, inside a function.
OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "flash_attn", "gradio", "matplotlib", "peft"}
OPTIONAL |= {"pyarrow", "liger_kernel", "simplejpeg", "sklearn", "tensorboard", "torchvision"}
# The names that pip and Python give the same thing, and what transformers itself depends on.
MODULES = {"pillow": "PIL", "protobuf": "google"}
WITH_TRANSFORMERS = {"filelock", "fsspec", "huggingface_hub", "packaging", "regex", "tqdm", "yaml"}


def imports(path):
    """Return [(module, inside a function)] of a file; relative imports are written out."""
    package = [*path.relative_to(ROOT).parent.parts]
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package[: len(package) - child.level + 1] if child.level else []
                found.append((".".join([*parents, *([child.module] if child.module else [])]), inside))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def room(module):
    """Return the file or folder of the package that a dotted name belongs to: "model" for llava_lite.model.moe."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def requirements():
    """Return {extra or "": [Requirement]} of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has a reader, 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def pins(name):
    """Return {package: version} of a constraints file, for the running Python."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        pin.name.lower().replace("_", "-"): Version(next(iter(pin.specifier)).version)
        for pin in pinned
        if pin.marker is None or pin.marker.evaluate()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_to_lower_floors_or_to_the_own_folder(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    name = ".".join(path.relative_to(ROOT / "llava_lite").with_suffix("").parts)
    own_floor = VERBS_ABOVE.get(name, FLOORS.get(own, 1))
    at_top = path.parent == ROOT / "llava_lite"
    for module, _ in imports(path):
        if module.split(".")[0] != "llava_lite" or room(module) == own:
            continue
        floor = FLOORS.get(room(module), 1)
        neighbour = at_top and floor == own_floor and (ROOT / "llava_lite" / f"{room(module)}.py").exists()
        assert floor < own_floor or neighbour, f"{own} (floor {own_floor}) imports {module} (floor {floor})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_import_at_the_top_only_what_is_always_installed(path):
    needed = {MODULES.get(requirement.name, requirement.name) for requirement in requirements()[""]}
    allowed = needed | WITH_TRANSFORMERS | set(sys.stdlib_module_names) | {"llava_lite"}
    tops = {module.split(".")[0] for module, inside in imports(path) if not inside}
    assert tops <= allowed
    everywhere = {module.split(".")[0] for module, _ in imports(path)}
    assert everywhere <= allowed | OPTIONAL


def test_loading_needs_nine_packages_and_training_three_more():
    names = {extra: {requirement.name for requirement in lines} for extra, lines in requirements().items()}
    reads_vocabularies = {"tokenizers", "sentencepiece", "protobuf"}
    assert names[""] == {"torch", "transformers", "safetensors", "pillow", "einops", "numpy"} | reads_vocabularies
    assert {"accelerate", "deepspeed", "datasets"} <= names["train"]
    assert {"train", "peft", "quant", "serve", "flash", "llava", "dev"} <= set(names)


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-5.17.txt"])
def test_constraints_fit_the_bounds(constraints):
    pinned = pins(constraints)
    installed_by_scripts = [line for extra in ("", "train", "peft", "quant", "dev") for line in requirements()[extra]]
    for requirement in installed_by_scripts:
        assert requirement.specifier.contains(pinned[requirement.name.replace("_", "-")]), requirement
        assert any(bound.operator == ">=" for bound in requirement.specifier), f"{requirement}: no lower bound"
    if constraints == "constraints-5.17.txt":
        assert pinned["transformers"] == Version("5.17.0")
        assert pinned["huggingface-hub"] < Version("2")


def test_import_costs_no_torch():
    heavy = sorted({"torch", "transformers", "numpy", "PIL"} | OPTIONAL)
    code = f"import sys, llava_lite; dir(llava_lite); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_costs_no_torch():
    heavy = sorted({"torch", "transformers", "numpy", "PIL"} | OPTIONAL)
    code = (
        "import sys, contextlib\nfrom llava_lite.cli import main\nwith contextlib.suppress(SystemExit):\n"
        f"    main(['--help'])\nprint([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "verbs:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_training_loads_no_optional_library_that_the_trainer_of_transformers_does_not():
    optional = sorted(OPTIONAL | {"pandas", "scipy", "pyarrow", "bitsandbytes", "liger_kernel", "simplejpeg"})
    code = (
        "import sys, torch\nfrom transformers import Trainer, LlavaForConditionalGeneration\n"
        "before = set(sys.modules)\nimport llava_lite.train.train, llava_lite.train.llava_trainer\n"
        "import llava_lite.train.final, llava_lite.train.card, llava_lite.data.dataset, llava_lite.data.collator\n"
        "import llava_lite.model.builder, llava_lite.processing\n"
        f"print([name for name in {optional} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize("name", llava_lite.__all__)
def test_public_name_opens(name):
    value = getattr(llava_lite, name)
    assert name in dir(llava_lite)
    if name != "__version__":
        home = importlib.import_module(f"llava_lite.{llava_lite._EXPORTS[name]}")
        assert value is getattr(home, name)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'LlavaLama'; known: .*LlavaLlamaForCausalLM"):
        llava_lite.LlavaLama  # noqa: B018
