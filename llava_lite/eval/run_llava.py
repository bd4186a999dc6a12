"""Turn a question about pictures into a printed answer: LLaVA's first example (names and flags of run_llava.py)."""

import io
import urllib.request

from llava_lite.commands.parser import CommandParser
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_lite.inference import load, reply
from llava_lite.mm_utils import get_model_name_from_path, open_picture

# Words in a model's name and the template they mean to LLaVA, the first that is found; "openchat" to MoE-LLaVA, whose
# other words name decoders, as config.json does.
TEMPLATE_OF_NAME = {
    "openchat": "openchat",
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
}
TIMEOUT_S = 30


def eval_model(args):
    """Print the answer of a model to a question, and return nothing.

    args: any object with model_path, model_base, query, conv_mode, image_file (files and addresses, joined by sep),
    sep, temperature, top_p, num_beams and max_new_tokens. `<image-placeholder>` in the query says where a picture
    goes; without one all stand before it. conv_mode: None for the template that the checkpoint was trained with; if it
    names none, that which its name means to LLaVA, else that of its decoder's recipe (LLaVA: `llava_v0`).
    """
    pictures = load_images(image_parser(args))
    model, processor = load(args.model_path, model_base=args.model_base)
    question = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    sampling = {} if args.top_p is None else {"top_p": args.top_p}
    answer = reply(
        model,
        processor,
        question,
        images=pictures,
        conv_template=args.conv_mode or template_of_name(model.config, args.model_path),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        num_beams=args.num_beams,
        **sampling,
    )
    print(answer)


def template_of_name(config, model_path):
    """Return the template that a path means to LLaVA, None if the config names one or the path means nothing."""
    if config.conv_template is not None:
        return None
    name = get_model_name_from_path(model_path).lower()
    return next((template for word, template in TEMPLATE_OF_NAME.items() if word in name), None)


def image_parser(args):
    """Return the list of files and addresses in `args.image_file`, which are joined by `args.sep`."""
    return args.image_file.split(args.sep)


def load_image(image_file):
    """Return the picture of a file or of an http(s) address, as RGB; PictureError if there is none."""
    if not image_file.startswith(("http://", "https://")):
        return open_picture(image_file)
    with urllib.request.urlopen(image_file, timeout=TIMEOUT_S) as response:
        return open_picture(io.BytesIO(response.read()))


def load_images(image_files):
    """Return the pictures of files and addresses, in their order."""
    return [load_image(image_file) for image_file in image_files]


def build_parser():
    """Return the parser of `python -m llava_lite.eval.run_llava`, with LLaVA's flags and defaults."""
    parser = CommandParser(prog="python -m llava_lite.eval.run_llava", command="eval", description="Ask about images.")
    parser.add_argument("--model-path", required=True, help="folder or hub id of the model")
    parser.add_argument("--model-base", help="base of a folder that holds only what was trained")
    parser.add_argument("--image-file", required=True, help="pictures: files and addresses, joined by --sep")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--conv-mode", help="prompt format (default: the one that trained the model)")
    parser.add_argument("--sep", default=",", help="what joins the pictures (default: a comma)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for the likeliest answer (default: 0.2)")
    parser.add_argument("--top_p", type=float, help="share of the likeliest words that are drawn from")
    parser.add_argument("--num_beams", type=int, default=1, help="answers that are followed at once (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    return parser


def main(argv=None):
    """Ask once, as the flags say."""
    eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
