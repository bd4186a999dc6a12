"""Turn a question about images into a printed answer: LLaVA's first example (names and flags of run_llava.py)."""

import io

from llava_lite.commands.run_llava import build_parser
from llava_lite.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava_lite.inference import load, reply
from llava_lite.media.image import fetch, open_image
from llava_lite.mm_utils import get_model_name_from_path

# Part of a model's name -> the template that LLaVA takes for it; the first match counts. "openchat" is MoE-LLaVA's;
# its other parts name decoders, which config.json does here.
TEMPLATE_OF_NAME = {
    "openchat": "openchat",
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
}


def eval_model(args):
    """Print the answer of a model to a question, and return nothing.

    args: any object with model_path, model_base, query, conv_mode, image_file (files and addresses, joined by sep),
    sep, temperature, top_p, num_beams and max_new_tokens. `<image-placeholder>` in the query says where an image
    goes; without one all stand before it. conv_mode: None for the template that the checkpoint was trained with; if it
    names none, that which its name means to LLaVA, else that of its decoder's recipe (LLaVA: `llava_v0`).
    """
    images = load_images(image_parser(args))
    model, processor = load(args.model_path, model_base=args.model_base)
    question = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    sampling = {} if args.top_p is None else {"top_p": args.top_p}
    answer = reply(
        model,
        processor,
        question,
        images=images,
        conv_template=args.conv_mode or get_template_for_name(model.config, args.model_path),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        num_beams=args.num_beams,
        **sampling,
    )
    print(answer)


def get_template_for_name(config, model_path):
    """Return the template that a path means to LLaVA, None if the config names one or the path means nothing."""
    if config.conv_template is not None:
        return None
    name = get_model_name_from_path(model_path).lower()
    return next((template for word, template in TEMPLATE_OF_NAME.items() if word in name), None)


def image_parser(args):
    """Return the list of files and addresses in `args.image_file`, which are joined by `args.sep`."""
    return args.image_file.split(args.sep)


def load_image(image_file):
    """Return the image of a file or of an http(s) URL, as RGB; ImageError if there is none."""
    is_url = image_file.startswith(("http://", "https://"))
    return open_image(io.BytesIO(fetch(image_file)) if is_url else image_file)


def load_images(image_files):
    """Return the images of files and addresses, in their order."""
    return [load_image(image_file) for image_file in image_files]


def main(argv=None):
    """Ask one question with the values of the flags."""
    eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
