"""Turn a command line into options; a wrong flag is answered in one sentence, without a page of usage."""

import argparse
import re
import sys

from llava_lite.constants import NO, YES
from llava_lite.train.arguments.words import unknown_flags, words_left

# A keyword of Python in a message: local_files_only=True, model_base=..., base='user/base'.
_KEYWORD = re.compile(r"\b([a-z][a-z0-9_]*)=(True\b|'[^']*'|\.\.\.)?")


class CommandParser(argparse.ArgumentParser):
    """Reads the flags of one command.

    command: its key in words.OURS. prog: None for that verb of `llava-lite`. holds_flags: a flag whose value may look
    like one, as it is a text of another program's flags. A flag is known by its full name only, `--model` is never
    `--model-path`; dashes and underscores in a name are the same. Wrong flags end the process with status 2, as
    argparse does.
    """

    def __init__(self, *, command: str, prog: str | None = None, holds_flags: str | None = None, **kwargs):
        self.command, self.holds_flags, self.flags = command, holds_flags, {}
        super().__init__(prog=prog or f"llava-lite {command}", allow_abbrev=False, **kwargs)

    def add_argument(self, *args, **kwargs):
        """Declare a flag or a positional argument, and remember how it is spelled."""
        action = super().add_argument(*args, **kwargs)
        self.flags |= {flag.replace("_", "-"): flag for flag in action.option_strings}
        return action

    def parse_args(self, args=None, namespace=None):
        """Return the options; unknown flags are reported before whatever is missing because of them."""
        words = [self.as_declared(word) for word in (sys.argv[1:] if args is None else args)]
        if self.holds_flags in words[:-1]:
            at = words.index(self.holds_flags)
            if not self.is_known(words[at + 1]):
                words[at : at + 2] = ["=".join(words[at : at + 2])]
        unknown = [word for word in words if self.looks_unknown(word)]
        if unknown:
            self.error(unknown_flags(self.command, unknown, self.flags.values()))
        options, left = self.parse_known_args(words, namespace)
        if left:
            self.error(words_left(self.command, left))
        return options

    def as_declared(self, word: str) -> str:
        """Return an argument with the name of its flag spelled as it was declared."""
        name, equals, value = word.partition("=")
        return f"{self.flags[name.replace('_', '-')]}{equals}{value}" if self.is_known(word) else word

    def is_known(self, word: str) -> bool:
        """Return whether an argument names a flag of this command."""
        return word.partition("=")[0].replace("_", "-") in self.flags

    def looks_unknown(self, word: str) -> bool:
        """Return whether an argument looks like a flag and is none: a dash and a letter, and no spaces."""
        return re.match(r"--?[A-Za-z][\w-]*(=|$)", word) is not None and not self.is_known(word)

    def add_checked_output(self):
        """Declare the flags of a command that writes a model and opens it again."""
        self.add_argument(
            "--tolerance", type=float, default=1e-3, help="largest logit difference in float32 (default: 1e-3)"
        )
        self.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
        self.add_argument(
            "--push-to-hub", metavar="USER/NAME", help="upload the directory once it has passed the check"
        )

    def error(self, message):
        """End the process with one sentence and where to read on."""
        ended = message if message.endswith((".", "?")) else f"{message}."
        self.exit(2, f"{self.prog}: {ended} `{self.prog} --help` lists the flags.\n")


def yes_or_no(text: str) -> bool:
    """Read the value of a flag as training flags are read."""
    if text.lower() not in YES + NO:
        raise argparse.ArgumentTypeError(f"{text!r}: True or False")
    return text.lower() in YES


def in_flags(message: str, parser: CommandParser | None) -> str:
    """Return a message with the Python keywords that it names written as the flags of a command, where it has them."""
    if parser is None:
        return message

    def as_flag(found):
        flag = parser.flags.get(f"--{found[1].replace('_', '-')}")
        if flag is None:
            return found[0]
        return flag if found[2] in (None, "True") else f"{flag} {found[2].strip(chr(39))}"

    return _KEYWORD.sub(as_flag, message)
