"""Turn drawn scenes and their captions into a small CLIP: contrastive pre-training of the vision tower.

The objective is CLIP's (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.3); the batches are ours:
groups of near-identical scenes, so that only reading the digits tells them apart.
Letters: `N` images, `P` patches, `C` tower width.
"""

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from .world import CANVAS, COLOURS, EMPTY, Scenes, caption, draw, pick_tiles, sample_scenes

PATCH = 14
GROUP = 16
BATCH = 128
VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": CANVAS,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def image_processor():
    """Return the processor that goes with the tower: CLIP's, at CANVAS pixels."""
    size = {"height": CANVAS, "width": CANVAS}
    return CLIPImageProcessor(size={"shortest_edge": CANVAS}, crop_size=size)


def get_pixels(images, processor):
    """Return images [N, H, W, 3] uint8, of the processor's size, as the processor would: [N, 3, H, W] float32."""
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def near_duplicates(num, tiles, rng):
    """Return `num` scenes in groups of GROUP: other scans each, and one digit or a few that differ."""
    base = sample_scenes(num // GROUP, tiles, rng)
    digit, colour = base.digit.repeat(GROUP, axis=0), base.colour.repeat(GROUP, axis=0)
    filled = digit != EMPTY
    order = np.where(filled, rng.random(digit.shape), 2).argsort(axis=1).argsort(axis=1)  # [N, 4] 0: always redrawn
    redraw = filled & ((order == 0) | (rng.random(digit.shape) < 0.25))
    digit = np.where(redraw, rng.integers(0, 10, digit.shape), digit)
    colour = np.where(filled & (rng.random(digit.shape) < 0.15), rng.integers(0, len(COLOURS), digit.shape), colour)
    return Scenes(digit, colour, pick_tiles(digit, tiles, rng))


def contrastive_loss(logits, captions):
    """Return CLIP's symmetric loss of logits [N, N]; a pair with equal captions is no negative."""
    same = torch.tensor([[a == b for b in captions] for a in captions])
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def caption_ids(captions, tokenizer):
    """Return input_ids and attention_mask of captions, each closed by the end token len(tokenizer)."""
    ids = [[*row, len(tokenizer)] for row in tokenizer(captions).input_ids]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def make_clip(tokenizer, vision):
    """Return a CLIPModel without training; vision: the sizes of its tower."""
    # The text side reads its sentence at an end token of its own, the largest id, as CLIP's does.
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": len(tokenizer)}
    text = {**TEXT, **ends, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def fit(model, tokenizer, draw_batch, num_steps, learning_rate=1.5e-3):
    """Return the CLIPModel after `num_steps` batches of pixels and captions from `draw_batch()`; in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.05)
    bar = tqdm(range(num_steps), desc="tower", unit="step", mininterval=2)
    for _ in bar:
        pixels, captions = draw_batch()
        out = model(pixel_values=pixels, **caption_ids(captions, tokenizer))
        loss = contrastive_loss(out.logits_per_image, captions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def train_tower(tokenizer, tiles, num_steps, seed, learning_rate=1.5e-3):
    """Return a CLIPModel trained on `num_steps` batches of fresh scenes, and its image processor."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor = image_processor()

    def draw_batch():
        scenes = near_duplicates(BATCH, tiles, rng)
        captions = [caption(*row) for row in zip(scenes.digit, scenes.colour, strict=True)]
        return get_pixels(draw(scenes, tiles, rng), processor), captions

    model = make_clip(tokenizer, VISION)
    return fit(model, tokenizer, draw_batch, num_steps, learning_rate), processor


@torch.no_grad()
def place_features(vision_model, processor, scenes, tiles, rng):
    """Return the patches of layer -2, by place: [N, 4, P / 4 * C]."""
    pixels = get_pixels(draw(scenes, tiles, rng), processor)
    features = vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # [N, P, C]
    half = CANVAS // PATCH // 2
    features = features.reshape(len(features), 2, half, 2, half, -1).permute(0, 1, 3, 2, 4, 5)
    return features.reshape(len(features), 4, -1)


def probe_accuracy(vision_model, processor, tiles, unseen_tiles, seed, num_scenes=3000):
    """Return how often a linear reading of the frozen patches names a digit of an unseen scan, 0 to 1."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    found = []
    for source in tqdm((tiles, unseen_tiles), desc="features to probe", unit="set"):
        scenes = sample_scenes(num_scenes, source, rng)
        filled = scenes.digit != EMPTY
        features = place_features(vision_model, processor, scenes, source, rng)[torch.from_numpy(filled)]
        found.append((features.numpy(), scenes.digit[filled]))
    mean, std = found[0][0].mean(0), found[0][0].std(0) + 1e-6
    probe = LogisticRegression(C=0.05, max_iter=200).fit((found[0][0] - mean) / std, found[0][1])
    return probe.score((found[1][0] - mean) / std, found[1][1])
