"""A tiny ImageBind with random weights, every branch of another size so that no two can be taken for each other."""

import torch

from llava_lite.imagebind_config import ImageBindConfig

TINY = {
    "hidden_size": 20,
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "num_hidden_layers": 2,
    "vision_num_heads": 4,
    "vocab_size": 50,
    "text_len": 12,
    "text_width": 24,
    "text_num_layers": 2,
    "text_num_heads": 3,
    "audio_num_mel_bins": 16,
    "audio_num_frames": 28,
    "audio_patch_size": 8,
    "audio_stride": 4,
    "audio_width": 16,
    "audio_num_layers": 2,
    "audio_num_heads": 2,
    "depth_patch_size": 16,
    "depth_width": 12,
    "depth_num_layers": 1,
    "depth_num_heads": 3,
    "thermal_patch_size": 16,
    "thermal_width": 8,
    "thermal_num_layers": 1,
    "thermal_num_heads": 2,
    "imu_len": 40,
    "imu_width": 16,
    "imu_num_layers": 1,
    "imu_num_heads": 4,
    "point_num_groups": 6,
    "point_group_size": 4,
    "point_conv_width": 4,
    "point_encoder_width": 10,
    "point_position_width": 7,
    "point_width": 12,
    "point_num_layers": 2,
    "point_num_heads": 3,
    "point_projection_width": 14,
}


def tiny_config(**options):
    return ImageBindConfig(**(TINY | options))


def randomise(model, seed=0):
    """Give every weight and buffer a random value of its own, norms and running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("mask"):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return model.eval()


def inputs_of(kind, config, num=2, seed=1):
    """Return two samples of a kind."""
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    shape = {
        "image": (3, side, side),
        "video": (3, config.num_frames, side, side),
        "audio": (1, config.audio_num_mel_bins, config.audio_num_frames),
        "depth": (1, side, side),
        "thermal": (1, side, side),
        "imu": (config.imu_num_channels, config.imu_len),
        "point": (15, 3),
    }
    if kind == "text":
        ids = torch.randint(1, 40, (num, config.text_len), generator=generator)
        # The end token has the largest id, and padding comes after it.
        ids[0, 5], ids[0, 6:], ids[1, -1] = 49, 0, 49
        return ids
    return torch.randn(num, *shape[kind], generator=generator)
