"""Turn `llava-lite VERB ...` into the program that does it; each is imported when it is called."""

import difflib
import sys
from importlib import import_module

from llava_lite.commands.parser import in_flags
from llava_lite.commands.verbs import OTHER_VERBS, PARSERS, VERBS, WITH_FLAGS_OF_TRAIN, build_parser
from llava_lite.errors import get_sentence
from llava_lite.train.arguments.short_help import asks_for_help, main_page

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(argv=None):
    """Run a verb with the rest of the command line; return its exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    verb, arguments = options.verb, options.arguments
    if verb == "help":
        verb, arguments = (arguments[0], ["--help", *arguments[1:]]) if arguments else (None, [])
        if verb is None:
            parser.print_help()
            return 0
    if verb is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if verb not in VERBS:
        parser.exit(EXIT_USAGE, f"llava-lite: {unknown_verb(verb)}\n")
    if verb == "train" and asks_for_help(arguments) == "main":
        print(main_page(), end="")
        return 0
    return run(verb, arguments)


def run(verb, arguments):
    """Import and call what does a verb; an error of it is one sentence."""
    _escape_what_cannot_be_printed()
    own_parser = import_module(PARSERS[verb]).build_parser() if verb in PARSERS else None
    if verb in WITH_FLAGS_OF_TRAIN:
        own_parser.parse_known_args(arguments)
    elif own_parser is not None:
        own_parser.parse_args(arguments)
    module = import_module(VERBS[verb][0])
    if verb == "train":
        # An error in the middle of a run is shown with its traceback.
        return module.main(arguments)
    try:
        return module.main(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"llava-lite {verb}: {in_flags(get_sentence(error), own_parser)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nllava-lite {verb}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _escape_what_cannot_be_printed() -> None:
    """Let standard output write the escape of a character that it has not, as standard error does, and not fail."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def unknown_verb(word) -> str:
    """Return the message for what is no verb."""
    meant = next((verb for verb, words in OTHER_VERBS.items() if word in words.split()), None)
    meant = meant or next(iter(difflib.get_close_matches(word, VERBS, n=1)), None)
    advice = f"Did you mean `llava-lite {meant}`?" if meant else f"Known: {', '.join(VERBS)}."
    return f"there is no verb {word!r}. {advice}"


if __name__ == "__main__":
    sys.exit(main())
