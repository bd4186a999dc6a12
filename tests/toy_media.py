"""Small files of every kind that ImageBind reads, records that name them, and a tower that reads them."""

import json
import math
import wave

import numpy as np
import torch
from conftest import draw_image
from PIL import Image
from toy_imagebind import randomise, tiny_config

from llava_lite.model.encoders.imagebind.model import ImageBindModel

# Without video, which needs PyAV.
KINDS = ["image", "audio", "point", "depth", "thermal", "imu"]


def write_sound(path, pitch_hz=440, duration_s=0.5):
    """Write a tone."""
    num_samples = int(16000 * duration_s)
    tone = [int(12000 * math.sin(2 * math.pi * pitch_hz * i / 16000)) for i in range(num_samples)]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.array(tone, "<i2").tobytes())


def write_media(directory, imu_len=40):
    """Write a file of each kind; return {kind: its name}."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    draw_image(3).save(directory / "bird.png")
    write_sound(directory / "bird.wav")
    np.save(directory / "cloud.npy", random.normal(size=(20, 3)).astype(np.float32))
    Image.fromarray(random.integers(500, 4000, (40, 50)).astype(np.uint16)).save(directory / "depth.png")
    draw_image(4).save(directory / "heat.png")
    np.save(directory / "walk.npy", random.normal(size=(6, imu_len)).astype(np.float32))
    names = ("bird.png", "bird.wav", "cloud.npy", "depth.png", "heat.png", "walk.npy")
    return dict(zip(KINDS, names, strict=True))


def write_imagebind(directory, modalities=KINDS):
    """Save a tiny ImageBind; return its directory."""
    torch.manual_seed(0)
    randomise(ImageBindModel(tiny_config(modalities=list(modalities)))).save_pretrained(directory)
    return str(directory)


def media_record(record_id, question="What is it?", answer="A bird.", **keys):
    """Return a record with an image placeholder, unless it has no media."""
    asked = f"<image>\n{question}" if keys else question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": record_id, **keys, "conversations": turns}


def write_records(path, records):
    """Write records to a JSON file; return its path as a text."""
    path.write_text(json.dumps(records))
    return str(path)
