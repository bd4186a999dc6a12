"""Name the numbers and the image placeholders that LLaVA's clients, data and checkpoints agree on."""

# Cross entropy leaves these labels out.
IGNORE_INDEX = -100
# Stands in the token ids where an image goes; no vocabulary has it.
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

# What becomes of an image that is not square, and how the features of its crops are joined.
ASPECT_RATIOS = ("square", "pad", "anyres", "random_crop")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
# How flags are switched on and off, as transformers' parser reads them.
YES, NO = ("true", "yes", "1", "t", "y"), ("false", "no", "0", "f", "n")

# Keys of files that earlier versions wrote -> today's names of the same; read, and never written.
RENAMED_KEYS = {
    "chat_end_mark": "chat_end_token",
    "lanes a rank (--dataloader_num_workers)": "streams a rank (--dataloader_num_workers)",
}

# MoE-LLaVA's, for videos; a record or a question has at most so many images and videos.
DEFAULT_VIDEO_TOKEN = "<video>"
DEFAULT_VIDEO_PATCH_TOKEN = "<im_patch>"
DEFAULT_VID_START_TOKEN = "<vid_start>"
DEFAULT_VID_END_TOKEN = "<vid_end>"
VIDEO_PLACEHOLDER = "<video-placeholder>"
MAX_IMAGE_LENGTH = 16
MAX_VIDEO_LENGTH = 1
PAD_LENGTH = 620

# Serving: seconds between two heart beats of a worker, and after how many the controller gives it up.
WORKER_HEART_BEAT_INTERVAL = 15
CONTROLLER_HEART_BEAT_EXPIRATION = 30
LOGDIR = "."


def with_todays_keys(fields: dict) -> dict:
    """Return the fields of a config or manifest with the keys of earlier versions under today's names."""
    return {RENAMED_KEYS.get(key, key): value for key, value in fields.items()}
