"""The help page of all flags of a training run: first ours, then those of transformers."""

import argparse
import dataclasses

from transformers import HfArgumentParser


class FlagHelp(argparse.HelpFormatter):
    """One spelling of every flag; its default only where there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action):
        # Every flag has a spelling with dashes too; the page would be twice as long.
        names = [name for name in action.option_strings if not name.startswith("--") or "-" not in name[2:]]
        takes = "" if action.nargs == 0 else f" {self._format_args(action, metavar(action))}"
        return f"{', '.join(names or action.option_strings)}{takes}"

    def _get_help_string(self, action):
        text = action.help or ""
        silent = (None, argparse.SUPPRESS, "", [])
        return text if "%(default)" in text or action.default in silent else f"{text} (default: %(default)s)"


def metavar(action):
    """Return the placeholder for the value of a flag: its choices, or the kind of value."""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = getattr(action.type, "__name__", "")
    return {"int": "N", "float": "X", "string_to_bool": "True|False"}.get(kind, "...")


class FlagParser(HfArgumentParser):
    """Reads dataclasses from flags, as transformers does; its help has a section for each, inherited fields last."""

    def error(self, message):
        """Raise ValueError, as for everything that is wrong with flags."""
        raise ValueError(f"{message.rstrip('.')}. `llava-lite train --help all` lists every flag.")

    def format_help(self):
        """Return the page."""
        page = FlagHelp(self.prog)
        page.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        page.add_text(self.description)
        # The first of those that set the same field: --flag, not the --no_flag that transformers adds.
        actions = {action.dest: action for action in reversed(self._actions) if action.help is not argparse.SUPPRESS}
        for title, names in sections(self.dataclass_types):
            page.start_section(title)
            page.add_arguments([actions[name] for name in names if name in actions])
            page.end_section()
        return page.format_help()


def sections(dataclass_types):
    """Return [(title, names of flags)]: the fields of each dataclass, then the inherited ones."""
    own, inherited = [], []
    for cls in dataclass_types:
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        # Its own, and those of a dataclass of ours that it extends.
        ours = [base for base in cls.__mro__ if base.__module__.startswith("llava_lite.")]
        stated = {name for base in ours for name in vars(base).get("__annotations__", ())}
        own.append((cls.__name__.removesuffix("Arguments").lower(), [name for name in names if name in stated]))
        inherited += [name for name in names if name not in stated]
    return [*own, ("the Trainer of transformers", sorted(inherited))]
