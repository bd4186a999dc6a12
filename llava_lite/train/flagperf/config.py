"""Read the config of a FlagPerf vendor from the assignments of a .py file, which is never run, or from YAML."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llava_lite.hub.yaml_files import parse_yaml


@dataclass(frozen=True)
class VendorConfig:
    """What FlagPerf's case reads of config_<hardware>x<nodes>x<processes>.py.

    theoryflops: dense peak of a chip in flops/s. The next four: records of a micro-batch, and micro-batches of a step,
    of each stage. output_dir_finetune, mmmu_data_path: below the data directory.
    """

    theoryflops: float
    pretrain_per_device_train_batch_size: int
    pretrain_gradient_accumulation_steps: int
    finetune_per_device_train_batch_size: int
    finetune_gradient_accumulation_steps: int
    output_dir_finetune: str
    mmmu_data_path: str


def read_config(path: Path) -> VendorConfig:
    """Return the config of a file; ValueError with the names that are missing or of another kind."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {str(path)!r}; FlagPerf's are training/VENDOR/CASE/config/*.py.")
    text = path.read_text(encoding="utf-8")
    found = read_yaml(path, text) if path.suffix in (".yaml", ".yml") else read_assignments(path, text)
    return to_config(path, found)


def read_yaml(path: Path, text: str) -> dict[str, Any]:
    """Return the mapping of a YAML file."""
    found = parse_yaml(text, path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {type(found).__name__}; expected names and values.")
    return found


def read_assignments(path: Path, text: str) -> dict[str, Any]:
    """Return {name: value} of the assignments of literals at the top of a Python file; other lines are not run."""
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno} is no Python: {error.msg}.") from error
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names, value = [target for target in node.targets if isinstance(target, ast.Name)], node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names, value = [node.target], node.value
        else:
            continue
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError):
            continue
        found |= {name.id: literal for name in names}
    return found


def to_config(path: Path, found: dict[str, Any]) -> VendorConfig:
    """Return the six names and theoryflops of what a file has; ValueError for what is missing or no such value."""
    names = {field.name: field.type for field in fields(VendorConfig)}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{path} assigns no plain value to {', '.join(missing)}. The file is read and not run: write numbers and "
            "texts, such as theoryflops = 312e12."
        )
    values = {}
    for name, kind in names.items():
        value = found[name]
        # YAML reads 312e12 as a text.
        if kind == "float" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        is_right = {
            "str": isinstance(value, str) and bool(value),
            "int": type(value) is int and value > 0,
            "float": type(value) in (int, float) and value > 0,
        }[kind]
        if not is_right:
            raise ValueError(f"{path}: {name} is {value!r}; expected {EXPECTED[kind]}.")
        values[name] = value
    return VendorConfig(**values)


EXPECTED = {"str": "a path below the data directory", "int": "a whole number above 0", "float": "a number above 0"}
