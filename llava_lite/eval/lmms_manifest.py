"""Tell lmms-eval which classes answer for `--model llava_lite`; it imports this file at every start, whatever it runs.

Nothing of torch or transformers is imported here; the classes are, once the model is chosen.
"""

NAME = "llava_lite"


def manifest():
    """Return the entry of lmms-eval's registry: a class for chat requests, and one for --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        NAME,
        simple_class_path="llava_lite.eval.lmms.LlavaLiteSimple",
        chat_class_path="llava_lite.eval.lmms.LlavaLiteChat",
    )
