"""Turn the flags of `llava-lite bank` into a file of image embeddings."""

from llava_lite.commands.parser import CommandParser


def build_parser():
    """Return the parser of `llava-lite bank`."""
    parser = CommandParser(
        command="bank",
        description="Store the embeddings of images as a feature bank, towards which mixed media are pulled.",
    )
    parser.add_argument("source", metavar="IMAGES_OR_INDEX", help="directory of images, or the file of a faiss index")
    parser.add_argument("out", metavar="OUT.safetensors", help="file to write; it must not exist")
    parser.add_argument(
        "--vision_tower",
        metavar="IMAGEBIND",
        help="directory or hub id of an ImageBind encoder, or imagebind_w3D.pth; an index needs none",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at once (default: 32)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that open images (default: 0, none)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--bad_image",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with an image that cannot be opened (default: raise)",
    )
    return parser


def main(argv=None):
    """Make a bank with the values of the flags; `llava_lite.cli` prints an error in one line."""
    options = build_parser().parse_args(argv)
    from llava_lite.export.bank import make_bank

    make_bank(**vars(options))
    return 0
