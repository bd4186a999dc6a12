"""Turn the flags of `llava-lite demo` into a web page of one model, or of several side by side."""

import argparse
from pathlib import Path

from llava_lite.commands.asking_flags import at_least_1
from llava_lite.commands.parser import CommandParser

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser():
    """Return the parser of `llava-lite demo`."""
    parser = CommandParser(
        command="demo",
        description="Chat with a model on a web page; two or more models are shown side by side.",
        epilog="The page has no password. On another host than 127.0.0.1 everyone who reaches the port can use it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directory or hub id of a model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--model-base", help="base of a directory that holds only what was trained; for one MODEL")
    parser.add_argument("--revision", help="branch, tag or commit of the repository (default: main); for one MODEL")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU where there is one)")
    parser.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (bitsandbytes)")
    parser.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (bitsandbytes)")
    parser.add_argument("--conv-mode", help="prompt format at the start (default: the model's own)")
    parser.add_argument("--temperature", type=float, default=0.2, help="at the start; 0 to 2 (default: 0.2)")
    parser.add_argument("--top-p", type=float, default=1.0, help="at the start; up to 1 (default: 1)")
    parser.add_argument("--max-new-tokens", type=at_least_1, default=512, help="at the start (default: 512)")
    parser.add_argument("--seed", type=int, help="at the start (default: another answer every time)")
    parser.add_argument(
        "--examples",
        metavar="FILE",
        help="questions to offer, as `llava-lite answer` reads them (default: examples.jsonl of a MODEL)",
    )
    return parser


def main(argv=None) -> int:
    """Load the models and serve the page until Ctrl-C; return 0."""
    flags = build_parser().parse_args(argv)
    names = name_models(flags.models)
    for flag in ("model_base", "revision"):
        if getattr(flags, flag) is not None and len(names) > 1:
            raise ValueError(f"--{flag.replace('_', '-')} is for one model, and {len(names)} are given.")
    if not 0 <= flags.temperature <= 2 or not 0.01 <= flags.top_p <= 1:
        raise ValueError(f"--temperature is 0 to 2 and --top-p 0.01 to 1; got {flags.temperature} and {flags.top_p}.")
    if flags.seed is not None and not 0 <= flags.seed < 2**63:
        raise ValueError(f"--seed {flags.seed}: a seed is a whole number from 0 to 2^63-1.")
    # Imported here: a wrong flag is answered without torch. What is wrong shows before minutes of loading.
    from llava_lite.conversation import get_template
    from llava_lite.model.placement import check_device
    from llava_lite.serve.demo import DemoPage, import_gradio, serve
    from llava_lite.serve.demo_examples import find_examples, read_examples
    from llava_lite.serve.demo_model import Settings
    from llava_lite.serve.listening import listen
    from llava_lite.serve.memory import check_memory

    import_gradio()
    # Closed at once: gradio makes its own socket.
    listen(flags.host, flags.port).close()
    check_device(flags.device)
    if flags.conv_mode is not None:
        get_template(flags.conv_mode)
    file = flags.examples or find_examples(flags.models)
    examples = [] if file is None else read_examples(file)
    check_memory(flags.models, flags)
    settings = Settings(flags.conv_mode, flags.temperature, flags.top_p, flags.max_new_tokens, flags.seed)
    page = DemoPage(load_models(names, flags), settings, examples)
    if flags.host not in LOOPBACK:
        print(f"The page has no password: everyone who reaches port {flags.port} of {flags.host} can use it.")
    serve(page.build(), flags.host, flags.port)
    return 0


def name_models(paths) -> dict[str, str]:
    """Return {name on the page: path}: the last part of each path, or all of it where two would be the same."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"a model is given twice: {', '.join(paths)}. Give each once.")
    short = [Path(path).name or path for path in paths]
    return dict(zip(short if len(set(short)) == len(short) else paths, paths, strict=True))


def load_models(names: dict[str, str], flags) -> dict:
    """Return {name: DemoModel} of {name: path}; one lock for all, which share a device."""
    from threading import Lock

    from llava_lite.eval.expert_routes import routes
    from llava_lite.inference import load
    from llava_lite.serve.demo_model import DemoModel

    lock, loaded = Lock(), {}
    hub = {} if flags.revision is None else {"revision": flags.revision}
    for name, path in names.items():
        model, processor = load(
            path,
            device=flags.device,
            model_base=flags.model_base,
            load_8bit=flags.load_8bit,
            load_4bit=flags.load_4bit,
            **hub,
        )
        loaded[name] = DemoModel(name, model, processor, lock, routes if model.moe_layers() else None)
    return loaded
