"""The core needs none of the faster paths: its tests pass where `llava_lite.model.fast` cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
# Forward and backward, generation, loading, experts.
CORE = [
    "model/test_llava_arch.py",
    "model/test_lm_head.py",
    "model/test_loading.py",
    "model/moe/test_block.py",
]
PLUGIN = """
import sys

# What the import statement finds for a module that is not there.
sys.modules["llava_lite.model.fast"] = None


def pytest_sessionfinish(session):
    assert not any(name.startswith("llava_lite.model.fast.") for name in sys.modules)
"""


def test_the_core_passes_its_tests_without_the_faster_paths(tmp_path):
    (tmp_path / "without_fast.py").write_text(PLUGIN)
    paths = os.pathsep.join([str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "without_fast", "-p", "no:cacheprovider", *CORE],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
