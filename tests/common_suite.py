"""Open the model tests of transformers' own source distribution as a package.

The distribution holds `tests/test_*.py` and none of the directories beside them, so what those files import from there
stands here empty: nothing of it is run. `scripts/test.sh` fetches the files once, for the version that is installed.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import transformers

PACKAGE = "transformers_tests"
# Where scripts/test.sh puts them, and the variable that names another directory.
DIRECTORY = Path(os.environ.get("TRANSFORMERS_TESTS") or Path(sys.prefix) / PACKAGE / transformers.__version__)


class GenerationTesterMixin:
    """Stand-in for what the distribution lacks; test_generate.py and test_hf_llava.py ask `generate`."""


class ExportTesterMixin:
    """Stand-in for what the distribution lacks; nothing here is exported."""


ABSENT = {
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": {"return_dict": False, "output_hidden_states": True}},
}


def why_not():
    """Return what keeps the tests from being opened, None if nothing does."""
    if not (DIRECTORY / "test_modeling_common.py").is_file():
        return f"no tests of transformers {transformers.__version__} in {DIRECTORY}; scripts/test.sh fetches them"
    if importlib.util.find_spec("parameterized") is None:
        return "the tests of transformers need the package parameterized (pip install -e '.[dev]')"
    return None


def open_suite(name):
    """Return a module of the distribution's tests, such as "test_modeling_common"."""
    if PACKAGE not in sys.modules:
        add(PACKAGE, [str(DIRECTORY)])
        for absent, members in ABSENT.items():
            directory = absent.partition(".")[0]
            if not (DIRECTORY / f"{absent.replace('.', '/')}.py").is_file():
                add(f"{PACKAGE}.{directory}", [])
                add(f"{PACKAGE}.{absent}", None, **members)
    # A file looks for transformers two directories up from where it lies in the repository.
    with patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


def add(name, path, **members):
    """Make a module, a package if it has a path."""
    module = ModuleType(name)
    vars(module).update(members)
    if path is not None:
        module.__path__ = path
    sys.modules[name] = module
