"""Turn lines typed in a terminal into a conversation with a model about images (flags of LLaVA's serve.cli)."""

import contextlib
import sys
from importlib import import_module

import torch

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.commands.chat import build_parser
from llava_lite.commands.parser import in_flags
from llava_lite.conversation import SeparatorStyle, get_template
from llava_lite.conversation.images import add_placeholders
from llava_lite.errors import get_sentence
from llava_lite.hub.errors import CONFIG
from llava_lite.hub.source import check_revision
from llava_lite.inference import load, stream
from llava_lite.media.image import upright_image
from llava_lite.model.fusion.image_cache import ImageFeatureCache
from llava_lite.model.placement import check_device
from llava_lite.serve.typed import Conversation, is_command, obey

INTRODUCTION = "Type a question; {images}/help lists the commands, an empty line ends the chat."


def where_in_hub(options):
    """Return the keywords of `load` that name a place of the Hub; the token is that of `hf auth login`."""
    named = {name: getattr(options, name) for name in ("revision", "subfolder", "cache_dir", "local_files_only")}
    return {name: value for name, value in named.items() if value}


def chat(model, processor, images, ask, say, conv_template=None, debug=False, **generation):
    """Hold a conversation until an empty line or /exit; return it as (question, answer) pairs.

    ask: takes the prompt string and returns the user's line. say: called with each piece of text to show. The
    images go with the first question, and those of /image with the next. Answers are kept without end tokens: the
    template writes them again each turn.
    """
    user, assistant = role_names(conv_template or processor.conv_template)
    conversation = Conversation(images=list(images))
    while (line := ask(f"{user}: ")).strip():
        if is_command(line):
            if not obey(line, conversation, say, processor.image_processor is not None):
                break
            continue
        try:
            question = add_placeholders(line.strip(), conversation.history, len(conversation.images))
            if debug:
                prompt = processor.render([*conversation.history, (question, None)], conv_template).text
                say(f"{prompt!r}\n")
            pieces = stream(
                model, processor, question, conversation.images, conv_template, conversation.history, **generation
            )
            say(f"{assistant}: ")
            answer = show_answer(pieces, say)
        except ValueError as error:
            say(f"{error}\n")
            if processor.ignores_placeholders and len(conversation.images) > 1:
                conversation.images.pop()
                say("The last image is left out; /clear starts a conversation about another one.\n")
            continue
        except torch.OutOfMemoryError:
            say("\nThe device has no memory left for this conversation; /clear starts a new one.\n")
            continue
        if answer:
            conversation.history.append((question, answer))
        if debug:
            say(f"{answer!r}\n")
    return conversation.history


def show_answer(pieces, say) -> str:
    """Show an answer piece by piece and return it; Ctrl-C ends it where it is."""
    shown, remark = [], None
    try:
        for piece in pieces:
            shown.append(piece)
            say(piece)
    except KeyboardInterrupt:
        remark = " [stopped]"
    # The conversation goes on without an empty answer, for which few formats have a place.
    say(f"{remark or ('' if shown else '[no answer]')}\n")
    return "".join(shown)


def load_image(image_file):
    """Return the image of a file or an address, upright and as RGB (LLaVA's name)."""
    return upright_image(image_file)


def role_names(conv_template):
    """Return the names of the two speakers: the template's roles where they are plain text."""
    template = get_template(conv_template)
    named = template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    return template.roles if named else ("user", "assistant")


def main(argv=None):
    """Load a model and chat; returns when the user is done.

    argv: the flags; or, as LLaVA calls it, an object with their values (a missing one is the default).
    """
    parser = build_parser()
    options = parser.parse_args(argv) if argv is None or isinstance(argv, list) else get_options(argv, parser)
    path = options.model or options.model_path
    if path is None or (options.model and options.model_path):
        parser.error("name one model: llava-lite chat MODEL, or --model-path MODEL.")
    if options.temperature < 0 or options.max_new_tokens < 1:
        parser.error("--temperature is 0 or more, --max-new-tokens at least 1.")
    try:
        model, processor, images = open_all(path, options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {in_flags(get_sentence(error), parser)}\n")
    sees = processor.image_processor is not None
    _say(INTRODUCTION.format(images="/image FILE shows an image, " if sees else "") + "\n")
    # Arrow keys and earlier lines, where Python was built with it.
    with contextlib.suppress(ImportError):
        import_module("readline")
    chat(
        model,
        processor,
        images,
        _ask,
        _say,
        conv_template=options.conv_mode,
        debug=options.debug,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        # Every turn reads the conversation from its beginning, images included.
        image_cache=ImageFeatureCache(),
    )


def open_all(path, options):
    """Return (model, processor, images) that the options name; what is wrong shows before minutes of loading."""
    hub = where_in_hub(options)
    check_revision(path, options.revision)
    check_device(options.device)
    if options.conv_mode is not None:
        get_template(options.conv_mode)
    images = [upright_image(file) for file in options.image_file]
    if images:
        check_has_tower(Checkpoint(path, base=options.model_base, **hub))
    model, processor = load(
        path,
        device=options.device,
        model_base=options.model_base,
        load_8bit=options.load_8bit,
        load_4bit=options.load_4bit,
        **hub,
    )
    return model, processor, images


def check_has_tower(checkpoint):
    """Raise ValueError if a model without a vision tower is to be shown images; only its config is read."""
    checkpoint.check()
    has_config = checkpoint.has(CONFIG) or checkpoint.base is None
    config = checkpoint.config if has_config else checkpoint.base.config
    if not getattr(config, "has_vision_tower", False):
        raise ValueError(f"{checkpoint.path!r} has no vision tower: it reads text alone. Chat without --image-file.")


def get_options(args, parser):
    """Return the parser's options with the values that an object holds; one image may stand without a list."""
    options = parser.parse_args([])
    for name in vars(options):
        setattr(options, name, getattr(args, name, getattr(options, name)))
    if str(options.device).startswith("cuda") and not torch.cuda.is_available():
        # LLaVA's default, where the model goes to the CPU instead.
        options.device = None
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
