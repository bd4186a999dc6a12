"""Turn images and sounds of one digit into a small ImageBind: one space for both, bound by images.

The order is ImageBind's (Girdhar et al. 2023, https://arxiv.org/abs/2305.05665, section 3): images are first aligned
with captions, whose side is thrown away here; then sounds with the frozen images. Of a sound only the digit is known.
Letters: `N` images or sounds, `C` width of an embedding.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from llava_lite.imagebind_config import ImageBindConfig
from llava_lite.media.audio import waveform_clips
from llava_lite.model.encoders.imagebind.model import ImageBindModel

from .sound import RATE_HZ, draw_sound
from .tower import PATCH, contrastive_loss, get_pixels, image_processor
from .world import CANVAS, COLOURS, draw, sample_scenes

BATCH = 128
NUM_SOUNDS = 3000
TEMPERATURE = 0.07
SIZES = {
    "modalities": ["image", "audio"],
    "hidden_size": 64,
    "image_size": CANVAS,
    "patch_size": PATCH,
    "vision_width": 96,
    "num_hidden_layers": 3,
    "vision_num_heads": 3,
    "audio_num_mel_bins": 64,
    "audio_num_frames": 96,
    "audio_stride": 16,
    "audio_width": 64,
    "audio_num_layers": 2,
    "audio_num_heads": 2,
    "audio_drop_path": 0.0,
}


def one_digit_scenes(num, tiles, rng):
    """Return `num` scenes of one digit, and their digits and colours [num]."""
    scenes = sample_scenes(num, tiles, rng, counts=(1,))
    return scenes, scenes.digit.max(axis=1), scenes.colour.max(axis=1)


class Captions(nn.Module):
    """The other side of images: a vector for each caption, the sum of those of its digit and its colour."""

    def __init__(self, width):
        super().__init__()
        self.digits = nn.Embedding(10, width)
        self.colours = nn.Embedding(len(COLOURS), width)

    def forward(self):
        """Return the embeddings [10 * colours, C] of all captions, digit by digit, of length 1."""
        return F.normalize((self.digits.weight[:, None] + self.colours.weight).flatten(0, 1), dim=-1)


def make_update(parameters, num_steps, learning_rate):
    """Return a function that takes one step of AdamW from a loss."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.05)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return update


def train_images(model, tiles, num_steps, rng):
    """Align images of one digit with their captions."""
    captions, processor = Captions(model.config.hidden_size), image_processor()
    vision = [weight for name, weight in model.named_parameters() if ".vision." in name]
    update = make_update([*vision, *captions.parameters()], num_steps, 1.5e-3)
    for _ in tqdm(range(num_steps), desc="images to captions", unit="step", mininterval=2):
        scenes, digit, colour = one_digit_scenes(BATCH, tiles, rng)
        embeddings = model(get_pixels(draw(scenes, tiles, rng), processor))
        target = torch.from_numpy(digit * len(COLOURS) + colour)
        update(F.cross_entropy(embeddings @ captions().T / TEMPERATURE, target))


@torch.no_grad()
def embed_images(model, tiles, rng, num):
    """Return the embeddings [num, C] of images of one digit, and their digits [num]."""
    scenes, digit, _ = one_digit_scenes(num, tiles, rng)
    pixels = get_pixels(draw(scenes, tiles, rng), image_processor())
    return torch.cat([model(part) for part in pixels.split(256)]), digit


def spectrograms(digits, rng, config):
    """Return a sound [N, 1, M, T] of each digit, as ImageBind reads it."""
    sizes = config.media_options("audio")
    sounds = (torch.from_numpy(draw_sound(digit, rng)) for digit in tqdm(digits, desc="sounds", mininterval=2))
    return torch.stack([waveform_clips(sound, RATE_HZ, num_clips=1, **sizes)[0] for sound in sounds])


def train_sounds(model, tiles, num_steps, rng):
    """Align sounds with frozen images of the same digit."""
    images, image_digit = embed_images(model, tiles, rng, 4000)
    sound_digit = rng.integers(0, 10, NUM_SOUNDS)
    sounds = spectrograms(sound_digit, rng, model.config)
    audio = [weight for name, weight in model.named_parameters() if ".audio." in name]
    of_digit = [np.flatnonzero(image_digit == digit) for digit in range(10)]
    update = make_update(audio, num_steps, 1e-3)
    for _ in tqdm(range(num_steps), desc="sounds to images", unit="step", mininterval=2):
        chosen = rng.integers(0, NUM_SOUNDS, BATCH)
        partners = [rng.choice(of_digit[digit]) for digit in sound_digit[chosen]]
        embeddings = F.normalize(model.encode("audio", sounds[chosen]), dim=-1)
        logits = embeddings @ images[partners].T / TEMPERATURE
        update(contrastive_loss(logits, list(sound_digit[chosen])))


def train_imagebind(tiles, num_image_steps, num_sound_steps, seed):
    """Return an ImageBindModel of images and sounds, in eval mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = ImageBindModel(ImageBindConfig(**SIZES))
    train_images(model, tiles, num_image_steps, rng)
    train_sounds(model, tiles, num_sound_steps, rng)
    return model.eval()


@torch.no_grad()
def nearest_digit(model, tiles, unseen_tiles, seed, num=1000):
    """Return how often the images nearest to an unseen one, and to a new sound, show its digit, each 0 to 1."""
    rng = np.random.default_rng(seed)
    images, image_digit = embed_images(model, tiles, rng, 4000)
    centres = torch.stack([images[torch.from_numpy(image_digit == digit)].mean(0) for digit in range(10)])
    unseen, unseen_digit = embed_images(model, unseen_tiles, rng, num)
    sound_digit = rng.integers(0, 10, num // 4)
    heard = model.encode("audio", spectrograms(sound_digit, rng, model.config))
    pairs = ((unseen, unseen_digit), (heard, sound_digit))
    return [((found @ centres.T).argmax(-1).numpy() == digit).mean() for found, digit in pairs]
