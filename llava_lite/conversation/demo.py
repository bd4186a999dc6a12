"""Prepare the images of LLaVA's demo: (text, PIL image, mode) tuples in the messages of a conversation."""

import base64
import io

from llava_lite.constants import DEFAULT_IMAGE_TOKEN

MODES = ("Default", "Crop", "Pad", "Resize")


class DemoImages:
    """What LLaVA's demo asks of a conversation, which has `messages` and `offset`."""

    def process_image(
        self, image, image_process_mode, return_pil=False, image_format="PNG", max_len=1344, min_len=672
    ):
        """Return the image in its mode, with sides of at most `max_len`; as PIL, or as base64 text."""
        # Only the demo needs it, and it imports torch.
        from llava_lite.media.preprocess import expand2square

        if image_process_mode not in MODES:
            raise ValueError(f"unknown image_process_mode {image_process_mode!r}; known: {', '.join(MODES)}.")
        if image_process_mode == "Pad":
            image = expand2square(image, (122, 116, 104))
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        long, short = max(image.size), min(image.size)
        if long > max_len:
            ratio = long / short
            new_short = max(1, int(min(max_len / ratio, min_len, short)))
            new_long = int(new_short * ratio)
            image = image.resize((new_long, new_short) if image.width >= image.height else (new_short, new_long))
        return image if return_pil else _to_base64(image, image_format)

    def get_images(self, return_pil=False) -> list:
        """Return the images of the conversation in order, as PIL or as base64 text."""
        shown = [text for _, text in self.messages[self.offset :: 2] if isinstance(text, tuple)]
        return [self.process_image(image, mode, return_pil) for _, image, mode in shown]

    def to_gradio_chatbot(self) -> list[list]:
        """Return [question, answer] pairs; an image is an HTML tag before its question."""
        pairs = []
        for i, (_, text) in enumerate(self.messages[self.offset :]):
            if i % 2 == 1:
                pairs[-1][1] = text
            elif isinstance(text, tuple):
                data = self.process_image(text[1].convert("RGB"), "Default", image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
                pairs.append([tag + text[0].replace(DEFAULT_IMAGE_TOKEN, "").strip(), None])
            else:
                pairs.append([text, None])
        return pairs


def _to_base64(image, image_format) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()
