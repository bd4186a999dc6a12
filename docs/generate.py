"""Write the reference pages of flags, config keys and benchmarks from the code: `python docs/generate.py`.

The sentence of a flag is its help, that of a config key the comment above it. A test compares the pages with what this
program would write.
"""

import ast
import dataclasses
import enum
import inspect
import json
import os
import re
import shlex
import subprocess
import types
import typing
from pathlib import Path

import transformers

from llava_lite.configuration import LlavaConfigMixin
from llava_lite.eval.benchmarks import BENCHMARKS
from llava_lite.eval.published import ORDER, published
from llava_lite.model import BACKBONES
from llava_lite.model.moe.config import MoeConfig, read_moe_config
from llava_lite.train.arguments import legacy
from llava_lite.train.arguments.fields import DataArguments, ModelArguments, TrainingArguments
from llava_lite.train.arguments.injection import InjectionArguments
from llava_lite.train.arguments.short_help import MAIN_FLAGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path(__file__).resolve().parent / "reference"
NOTICE = "<!-- Written by docs/generate.py; change the code, then run it again. -->"
# Recipe of scripts/v1_5 -> what the pages call it.
RECIPES = {"pretrain": "1", "finetune": "2", "finetune_lora": "LoRA", "moe-finetune": "3"}
# What our command line adds to the type of a field of transformers.
TAKES = {"gradient_checkpointing": "`True`, `False`, `auto`"}
# Heading, class, what stands below the heading.
SECTIONS = (
    ("Model", ModelArguments, "What is built: language model, vision tower, connector, experts."),
    ("Images in the language model", InjectionArguments, "How an image enters, beside LLaVA's own way."),
    ("Data", DataArguments, "Which records are trained on, and how their images are prepared."),
    ("Training", TrainingArguments, "Which weights train and how."),
)


def main():
    """Write all pages."""
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


def pages():
    """Return {file name: text}."""
    return {"flags.md": flags_page(), "config.md": config_page(), "benchmarks.md": benchmarks_page()}


def table(header, rows):
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def flags_page():
    """Return the page of every flag of `llava-lite train`."""
    recipes = {name: recipe_flags(name) for name in RECIPES}
    parts = [
        NOTICE,
        "# Flags of `llava-lite train`",
        "Give flags on the command line or in a YAML file, `llava-lite train run.yaml --flag value`; a flag on the "
        "command line overrides the file. `llava-lite train --help` prints the most used flags, `--help all` prints "
        "every flag. An unknown flag is an error that names the nearest known one.",
        "The column *recipes* lists what the scripts in `scripts/v1_5` set: 1 is `pretrain.sh` (stage 1), 2 "
        "`finetune.sh` (stage 2), LoRA `finetune_lora.sh`, and 3 `moe-finetune.sh` (stage 3). *Path* stands for a "
        "file or a directory.",
    ]
    for title, cls, words in SECTIONS:
        rows = [flag_row(cls, field, recipes) for field in stated_fields(cls)]
        parts += [f"## {title}", words, table(FLAG_HEADER, rows)]
    used = {flag.split()[0].lstrip("-"): words for flags in MAIN_FLAGS.values() for flag, words in flags}
    set_by_recipes = {name for flags in recipes.values() for name in flags}
    inherited = [
        field for field in dataclasses.fields(TrainingArguments) if field not in stated_fields(TrainingArguments)
    ]
    inherited = sorted((field for field in inherited if field.init), key=lambda field: field.name)
    common = [field for field in inherited if field.name in used.keys() | set_by_recipes]
    others = [field for field in inherited if field not in common]
    parts += [
        "## Transformers' flags that most runs set",
        "Every field of `transformers.TrainingArguments` is a flag. These are the ones that the recipes and most runs "
        "need.",
        table(FLAG_HEADER, [flag_row(TrainingArguments, field, recipes, used.get(field.name)) for field in common]),
        "## Transformers' other flags",
        f"In the words of transformers {transformers.__version__}.",
        table(FLAG_HEADER[:4], [flag_row(TrainingArguments, field, {})[:4] for field in others]),
        "## Flags of LLaVA, MoE-LLaVA and transformers 4",
        "Scripts written for them run unchanged. These flags have another name now:",
        table(("flag", "read as"), [(code(f"--{old}"), code(f"--{new}")) for old, new in legacy.RENAMED.items()]),
        "These are translated: `--warmup_ratio` to `--warmup_steps`, `--group_by_length True` to "
        "`--train_sampling_strategy group_by_length`, `--logging_dir` to TensorBoard's directory; `--save_safetensors "
        "True` is what always happens.",
        "These are accepted and have no effect:",
        table(("flag", "because"), [(code(f"--{old}"), why) for old, why in legacy.WITHOUT_EFFECT.items()]),
        "These are errors:",
        table(("flag", "instead"), [(code(f"--{old}"), why) for old, why in legacy.REFUSED.items()]),
    ]
    return "\n\n".join(parts) + "\n"


# In prose: a flag, with its value if that is one of the words that flags take, or a token.
CODE = re.compile(r"(?<!\w)--\w+(?: (?:auto|chat|lora|moe|projector|skip|tokens|True|\d+)\b)?|<[^<>\s]+>")
FLAG_HEADER = ("flag", "takes", "default", "meaning", "recipes")


def stated_fields(cls):
    """Return the fields that a class declares itself, in order; what it inherits is left out."""
    return [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__ and field.init]


def flag_row(cls, field, recipes, words=None):
    """Return the cells of one flag. words: a sentence in place of the field's own."""
    default = shown(field.default if field.default is not dataclasses.MISSING else field.default_factory())
    if words is None:
        words = field.metadata["help"]
    else:
        # A constant default has a column of its own.
        words = f"{words[0].upper()}{words[1:]}".removesuffix(f"; default: {default.strip('`')}") + "."
    return (
        code(f"--{field.name}"),
        TAKES.get(field.name) or takes(typing.get_type_hints(cls)[field.name], field.metadata.get("choices")),
        default,
        sentence(words.replace("%%", "%")),
        set_by(field.name, recipes),
    )


def sentence(words):
    """Return prose as a cell: flags and tokens in it as code, on one line."""
    parts = " ".join(words.split()).split("`")
    parts[::2] = [CODE.sub(lambda found: code(found[0]), part) for part in parts[::2]]
    return "`".join(parts)


def takes(hint, choices=None):
    """Return what a flag takes, from its type."""
    kinds = [kind for kind in union(hint) if kind is not type(None)]
    if choices or typing.get_origin(kinds[0]) is typing.Literal:
        return ", ".join(code(value) for value in choices or typing.get_args(kinds[0]))
    if isinstance(kinds[0], type) and issubclass(kinds[0], enum.Enum):
        return ", ".join(code(member.value) for member in kinds[0])
    if any(typing.get_origin(kind) is list or kind is list for kind in kinds):
        return "list"
    names = {bool: "`True`, `False`", int: "integer", float: "number", str: "text", dict: "JSON"}
    found = [names.get(typing.get_origin(kind) or kind) for kind in kinds]
    return " or ".join(dict.fromkeys(name for name in found if name)) or "JSON"


def union(hint):
    """Return the members of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def code(value):
    """Return a value as code."""
    return f"`{value}`"


def shown(default):
    """Return a default as a cell; nothing for none."""
    default = getattr(default, "value", default)
    return "" if default is None or default == [] or default == "" else code(default)


def set_by(name, recipes):
    """Return which recipes set a flag, and to what."""
    groups = {}
    for recipe, flags in recipes.items():
        if name in flags:
            groups.setdefault(flags[name], []).append(RECIPES[recipe])
    whose = {value: "all" if len(names) == len(RECIPES) else ", ".join(names) for value, names in groups.items()}
    return "; ".join(f"{names}: {value}" for value, names in whose.items())


def recipe_flags(name):
    """Return {flag: value as a cell} that a script of scripts/v1_5 gives to training; a later one wins."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "LAUNCHER_CMD": "launch"}
    script = ["bash", str(ROOT / f"scripts/v1_5/{name}.sh")]
    words = shlex.split(subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return {flag: cell(values) for flag, values in legacy.split_flags(words[2:])}


def cell(values):
    """Return the values of a flag as a cell; of a path only that it is one."""
    if values[0].startswith("./"):
        return "*path*"
    return code(" ".join(Path(value).name if value.startswith("/") else value for value in values))


def config_page():
    """Return the page of the keys of config.json."""
    example = {"moe_mode": "sparse", "num_experts": 4, "capacity_factor": 1.5}
    stored = ",\n".join(
        f'    "{key}": {json.dumps(value)}' for key, value in read_moe_config(example, 8).to_dict().items()
    )
    classes = [(code(name), code(cls.__name__), code(cls.config_class.__name__)) for name, cls in BACKBONES.items()]
    return (
        "\n\n".join(
            [
                NOTICE,
                "# Keys of `config.json`",
                "A checkpoint's `config.json` has the keys of its language model, as transformers documents them for "
                "the model type (`hidden_size`, `num_hidden_layers`, ...), and the keys below. They are LLaVA's, and "
                "checkpoints of LLaVA and MoE-LLaVA open as they are. A key that is absent has its default.",
                "## Image and text",
                table(CONFIG_HEADER, config_rows(LlavaConfigMixin)),
                "## Mixture of experts",
                "The keys of the dict `moe`. MoE-LLaVA's checkpoints have the same dict.",
                table(CONFIG_HEADER, config_rows(MoeConfig, hidden=("layers",))),
                "For 8 layers, `--tuning moe --moe_mode sparse --capacity_factor 1.5` stores:",
                f"```json\n{{\n{stored}\n}}\n```",
                "## Classes",
                "`model_type` in `config.json` is `llava_` and the language model's. `AutoConfig` and "
                "`AutoModelForCausalLM` open these after `import llava_lite.model`.",
                table(("language model", "model", "config"), classes),
            ]
        )
        + "\n"
    )


CONFIG_HEADER = ("key", "type", "default", "meaning")


def config_rows(cls, hidden=()):
    """Return a row for each field of a config class; its meaning is the comment above it."""
    meanings, hints = field_comments(cls), typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
    return [
        (code(field.name), kind(hints[field.name]), default_of(field), as_json(meanings[field.name]))
        for field in fields
        if field.name not in hidden
    ]


def as_json(words):
    """Return prose about Python values as a cell about those of JSON."""
    names = {"None": "`null`", "True": "`true`", "False": "`false`"}
    return re.sub(r"\b(None|True|False)\b", lambda found: names[found[0]], sentence(words))


def default_of(field):
    """Return a default as a cell, written as JSON; nothing for a key that must be there."""
    return "" if field.default is dataclasses.MISSING else code(json.dumps(field.default))


def kind(hint):
    """Return a type as JSON has it."""
    names = {bool: "boolean", int: "integer", float: "number", str: "text", dict: "dict", type(None): "null"}
    found = [
        names.get(one, "list" if typing.get_origin(one) in (list, tuple) or one is list else None)
        for one in union(hint)
    ]
    return " or ".join(dict.fromkeys(name for name in found if name))


def field_comments(cls):
    """Return {field: the comment above it} of a class."""
    lines = inspect.getsourcelines(cls)[0]
    meanings = {}
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.AnnAssign):
            above = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip().lstrip("# "))
            meanings[node.target.id] = " ".join(above)
    return meanings


# What stands above each table of the page of benchmarks.
BENCHMARKS_WORDS = (
    "`llava-lite eval NAME --model DIR --data DIR` scores a model on one of these. The first split and the first "
    "variant are the default; `--split` and `--variant` name another. [Evaluation](../evaluation.md) says how to go "
    "through one.",
    "Paths are below the directory that `--data` names, laid out as LLaVA's `playground/data/eval`. Rows with "
    "*others* are for the splits after the first. A benchmark also reads the tables (parquet) of its repository on "
    "Hugging Face, in place of its own files.",
    "What the authors report for their models, in the units of the first table. MME is perception; ScienceQA is the "
    "part with images. The sources: LLaVA's model zoo (LLaVA-1.5), the README of MoE-LLaVA, and FlagPerf (MMMU).",
)


def benchmarks_page():
    """Return the page of every benchmark: its name and score, its files, and what others report."""
    kinds = [
        (code(name), kind.title, kind.metric, codes(kind.splits), codes(kind.variants), code(kind.max_new_tokens))
        for name, kind in BENCHMARKS.items()
    ]
    files = {}
    for name, kind in BENCHMARKS.items():
        for needs, words in ((kind.needs, ""), (kind.test_needs, "*others*")):
            for need in needs:
                files.setdefault((name, need.source, words), []).append(f"{kind.directory}/{need.path}")
    reported = {}
    for name in (*ORDER, "mmmu"):
        for one in published(name):
            reported.setdefault(one.model, {})[name] = f"{one.score:,.1f}"
    columns = (*ORDER, "mmmu")
    figures = [(model, *(found.get(name, "") for name in columns)) for model, found in reported.items()]
    parts = [
        NOTICE,
        "# Benchmarks",
        BENCHMARKS_WORDS[0],
        table(("name", "benchmark", "score", "splits", "variants", "longest answer, tokens"), kinds),
        "## Files",
        BENCHMARKS_WORDS[1],
        table(
            ("name", "files and directories", "from", "splits"),
            [(code(name), codes(paths), link(source), words) for (name, source, words), paths in files.items()],
        ),
        "## Reported figures",
        BENCHMARKS_WORDS[2],
        table(("model", *map(code, columns)), figures),
    ]
    return "\n\n".join(parts) + "\n"


def codes(names):
    """Return names as a cell of code."""
    return ", ".join(map(code, names))


def link(source):
    """Return where a file is from as a cell: addresses as links."""
    return re.sub(r"https?://[^\s,()]+", lambda found: f"<{found[0]}>", source)


if __name__ == "__main__":
    main()
