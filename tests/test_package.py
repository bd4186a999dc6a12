"""The package: what it needs, what it opens, and which file may import which."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import llava_lite

ROOT = Path(llava_lite.__file__).resolve().parents[1]
FILES = sorted((ROOT / "llava_lite").rglob("*.py"))

# A file imports from lower floors or from its own directory. Every directory and every file at the top has its floor.
ORDER = [
    ["__init__", "constants", "errors", "without_cuda", "distributed"],
    ["hub", "imagebind_config", "output_file"],
    ["formats"],
    ["media"],
    ["conversation"],
    ["tower_config"],
    ["configuration"],
    ["checkpoints"],
    ["processing", "mm_utils", "utils"],
    ["data", "model"],
    ["media_inputs"],
    ["inference"],
    ["train", "eval", "serve", "export", "llama_adapter"],
    ["imagebind_llm", "accessory"],
    ["commands"],
    ["cli"],
    ["alias"],
]
# Programs of LLaVA that are started by their own names, and read their flags by a parser of commands/.
PROGRAMS = {"llava_lite.serve.cli", "llava_lite.eval.run_llava"}
FLOORS = {name: floor for floor, names in enumerate(ORDER) for name in names}
# Installed by an extra, or by nothing at all: imported only where it is needed, inside a function.
OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "flash_attn", "gradio", "matplotlib", "peft"}
# For serving alone.
OPTIONAL |= {"fastapi", "idna", "prometheus_client", "starlette", "uvicorn"}
OPTIONAL |= {"av", "faiss", "pyarrow", "liger_kernel", "sklearn", "tensorboard", "torchvision", "wandb"}
# For evaluation alone.
OPTIONAL |= {"easy_vqa", "lmms_eval", "openpyxl", "pycocoevalcap"}
# A file that a program imports by an entry point -> that program, which is therefore there.
IMPORTED_BY = {"llava_lite.eval.lmms": {"lmms_eval"}}
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
    """Return the file or directory of the package that holds a module: "model" for llava_lite.model.moe.block."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path):
    """Return the dotted name of a file of the package, that of the package itself for an __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES_HERE = {module_name(path) for path in FILES}


# They build names of modules from tables of their own: `llava_lite.` and an entry.
BUILD_NAMES = {"llava_lite", "llava_lite.commands.verbs", "llava_lite.train.train"}


def references(path):
    """Return [(module of this package, line)] that a file imports, by a statement or by a name in a string.

    A public name of the package (`from llava_lite import load`, `llava_lite.load`) stands for the file it lives in.
    Any string that is the name of a module counts, whatever function gets it.
    """
    own, package = module_name(path), [*path.relative_to(ROOT).parent.parts]
    opens = {name: f"llava_lite.{home}" for name, home in llava_lite._EXPORTS.items()}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for name in (alias.name for alias in node.names):
                full = opens.get(name, base) if base == "llava_lite" else base
                found.append((f"{base}.{name}" if f"{base}.{name}" in MODULES_HERE else full, node.lineno))
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "llava_lite":
            found.append((opens.get(node.attr, f"llava_lite.{node.attr}"), node.lineno))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dots = len(node.value) - len(node.value.lstrip("."))
            parents = package[: len(package) - dots + 1] if dots else []
            found.append((".".join([*parents, node.value[dots:]]), node.lineno))
            if own in BUILD_NAMES:
                found.append((f"llava_lite.{node.value}", node.lineno))
    return [(module, line) for module, line in found if module in MODULES_HERE and module != "llava_lite"]


def names_in(path):
    """Return the names and attributes that a file imports or reads, and its strings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    read = {node.id for node in nodes if isinstance(node, ast.Name)}
    read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return imported | read | {node.value for node in nodes if isinstance(node, ast.Constant)}


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
def test_imports_lead_to_lower_floors_or_to_the_own_directory(path):
    own = room(module_name(path))
    # The package's own file opens the public names, each when it is asked for.
    for module, line in references(path) if own != "__init__" else ():
        if room(module) != own:
            floors = FLOORS[room(module)], len(ORDER) if module_name(path) in PROGRAMS else FLOORS[own]
            assert floors[0] < floors[1], (
                f"line {line}: {own} (floor {floors[1]}) imports {module} (floor {floors[0]})"
            )


def test_no_files_import_each_other_in_a_circle():
    edges = {module_name(path): {module for module, _ in references(path)} for path in FILES}
    del edges["llava_lite"]
    # Take away, again and again, what imports nothing that is left and what nothing that is left imports.
    while True:
        imported = {target for module, targets in edges.items() for target in targets - {module}}
        done = {name for name, targets in edges.items() if not targets & edges.keys() - {name} or name not in imported}
        if not done:
            break
        edges = {module: targets for module, targets in edges.items() if module not in done}
    assert sorted(edges) == []


def test_names_of_modules_are_built_in_known_places_only():
    building = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            begins = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else None
            if isinstance(begins, ast.Constant) and begins.value.startswith("llava_lite."):
                building.add(module_name(path))
    assert building == BUILD_NAMES


@pytest.mark.parametrize(
    "lines",
    [
        "from importlib import import_module as load\nload('llava_lite.train.train')",
        "import importlib\nimportlib.import_module('..train.train', __package__)",
        "__import__('llava_lite.train.train')",
        "NAMES = {'train': 'llava_lite.train.train'}",
        "import llava_lite\nllava_lite.load('x')",
        "def f():\n    from llava_lite import load",
        "def f():\n    from ..train import train",
    ],
)
def test_an_import_that_leads_up_is_found_however_it_is_written(lines, tmp_path, monkeypatch):
    (tmp_path / "llava_lite" / "media").mkdir(parents=True)
    path = tmp_path / "llava_lite" / "media" / "upwards.py"
    path.write_text(lines)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert any(FLOORS[room(module)] > FLOORS["media"] for module, _ in references(path))


def test_argparse_stands_with_the_flags_alone():
    parsing = {"argparse", "HfArgumentParser", "add_argument"}
    using = {module_name(path) for path in FILES if parsing & names_in(path)}
    assert not {name for name in using if not name.startswith(("llava_lite.commands.", "llava_lite.train.arguments."))}


def test_every_directory_and_file_at_the_top_has_a_floor():
    assert {room(module_name(path)) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_import_at_the_top_only_what_is_always_installed(path):
    needed = {MODULES.get(requirement.name, requirement.name) for requirement in requirements()[""]}
    allowed = needed | WITH_TRANSFORMERS | set(sys.stdlib_module_names) | {"llava_lite"}
    tops = {module.split(".")[0] for module, inside in imports(path) if not inside}
    assert tops <= allowed | IMPORTED_BY.get(module_name(path), set())
    everywhere = {module.split(".")[0] for module, _ in imports(path)}
    assert everywhere <= allowed | OPTIONAL


def test_loading_needs_ten_packages_and_training_three_more():
    names = {extra: {requirement.name for requirement in lines} for extra, lines in requirements().items()}
    others = {"jinja2", "tokenizers", "sentencepiece", "protobuf"}
    assert names[""] == {"torch", "transformers", "safetensors", "pillow", "einops", "numpy"} | others
    assert {"accelerate", "deepspeed", "datasets"} <= names["train"]
    assert {"train", "peft", "quant", "flash", "llava", "dev", "docs"} <= set(names)


def test_extras_that_messages_name_exist():
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    named = {
        name for text in texts for group in re.findall(r"llava-lite\[([a-z,]+)\]", text) for name in group.split(",")
    }
    assert named
    assert named <= set(requirements())


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-5.17.txt"])
def test_constraints_fit_the_bounds(constraints):
    pinned = pins(constraints)
    installed_by_scripts = [
        line for extra in ("", "train", "peft", "quant", "serve", "dev", "docs") for line in requirements()[extra]
    ]
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
    optional = sorted(OPTIONAL | {"pandas", "scipy", "pyarrow", "bitsandbytes", "liger_kernel"})
    code = (
        "import sys, torch\nfrom transformers import Trainer, LlavaForConditionalGeneration\n"
        "before = set(sys.modules)\nimport llava_lite.train.train, llava_lite.train.llava_trainer\n"
        "import llava_lite.train.saving.final, llava_lite.train.publish.card\n"
        "import llava_lite.data.dataset, llava_lite.data.collator\n"
        "import llava_lite.model.builder, llava_lite.processing.processor\n"
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
