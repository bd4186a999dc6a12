"""Turn lines typed in a terminal into a conversation with a model about a picture (flags of LLaVA's serve.cli)."""

import argparse
import sys

from llava_lite.conversation import SeparatorStyle, get_template
from llava_lite.inference import load, place_marks, stream
from llava_lite.messages import upright_picture
from llava_lite.model.image_cache import ImageFeatureCache

INTRODUCTION = "Ask about the picture, or anything; an empty line ends the chat."


def build_parser():
    """Return the parser of `llava-lite chat` and `python -m llava_lite.serve.cli`."""
    parser = argparse.ArgumentParser(prog="llava-lite chat", description="Talk to a model in the terminal.")
    parser.add_argument("model", nargs="?", help="folder or hub id of the model")
    parser.add_argument("--model-path", help="the same, as in LLaVA")
    parser.add_argument("--model-base", help="base of a folder that holds only what was trained")
    parser.add_argument("--image-file", action="append", default=[], help="picture to talk about; may be repeated")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for the likeliest answer (default: 0.2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (bitsandbytes)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main)")
    parser.add_argument("--subfolder", help="folder of the repository that holds the model")
    parser.add_argument("--cache-dir", help="where downloads are kept (default: the Hub client's own cache)")
    parser.add_argument("--local-files-only", action="store_true", help="open what is in the cache, ask no Hub")
    parser.add_argument("--debug", action="store_true", help="show the prompt and the answer as the model sees them")
    return parser


def where_in_hub(options):
    """Return the keywords of `load` that say where in the Hub to look; the token is that of `hf auth login`."""
    named = {name: getattr(options, name) for name in ("revision", "subfolder", "cache_dir", "local_files_only")}
    return {name: value for name, value in named.items() if value}


def chat(model, processor, pictures, ask, say, conv_template=None, debug=False, **generation):
    """Hold a conversation until an empty line; return it as (question, answer) pairs.

    ask: takes the prompt string and returns the user's line. say: takes a piece of text to show. The pictures go with
    the first question. Answers are kept without end marks: the format writes them anew each turn.
    """
    user, assistant = role_names(conv_template or processor.conv_template)
    history = []
    while question := ask(f"{user}: ").strip():
        try:
            question = place_marks(question, history, len(pictures))
        except ValueError as error:
            say(f"{error}\n")
            continue
        if debug:
            prompt = processor.render([*history, (question, None)], conv_template).text
            say(f"{prompt!r}\n")
        say(f"{assistant}: ")
        pieces = []
        for piece in stream(model, processor, question, pictures, conv_template, history, **generation):
            pieces.append(piece)
            say(piece)
        say("\n")
        history.append((question, "".join(pieces)))
        if debug:
            say(f"{history[-1][1]!r}\n")
    return history


def load_image(image_file):
    """Return the picture of a file or an address, upright and as RGB (LLaVA's name)."""
    return upright_picture(image_file)


def role_names(conv_template):
    """Return what to call the two speakers: the roles where they are words, else plain ones."""
    template = get_template(conv_template)
    named = template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    return template.roles if named else ("user", "assistant")


def main(argv=None):
    """Load a model and chat; returns when the user is done.

    argv: the flags; or, as LLaVA calls it, an object with their values (a missing one is the default).
    """
    parser = build_parser()
    options = parser.parse_args(argv) if argv is None or isinstance(argv, list) else options_of(argv, parser)
    path = options.model or options.model_path
    if path is None or (options.model and options.model_path):
        parser.error("name one model: llava-lite chat MODEL, or --model-path MODEL.")
    try:
        if options.conv_mode is not None:
            get_template(options.conv_mode)
        # Before the model: a wrong path shows at once, not after minutes of loading.
        pictures = [upright_picture(path) for path in options.image_file]
        model, processor = load(
            path,
            device=options.device,
            model_base=options.model_base,
            load_8bit=options.load_8bit,
            load_4bit=options.load_4bit,
            **where_in_hub(options),
        )
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    _say(f"{INTRODUCTION}\n")
    chat(
        model,
        processor,
        pictures,
        _ask,
        _say,
        conv_template=options.conv_mode,
        debug=options.debug,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        # Every turn reads the conversation from its beginning, images included.
        image_cache=ImageFeatureCache(),
    )


def options_of(args, parser):
    """Return the parser's options with the values that an object holds; one picture may stand without a list."""
    options = parser.parse_args([])
    for name in vars(options):
        setattr(options, name, getattr(args, name, getattr(options, name)))
    if not isinstance(options.image_file, list):
        options.image_file = [] if options.image_file is None else [options.image_file]
    return options


def _ask(prompt):
    """Read a line; the end of the input and Ctrl-C end the chat as an empty line does."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        _say("\n")
        return ""


def _say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
