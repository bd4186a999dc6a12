"""Names and shapes of imagebind_w3D.pth load strictly, and what is wrong is reported by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_imagebind import inputs_of, randomise, tiny_config

from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.model.encoders.imagebind.opening import find_modalities, open_imagebind


def released_shapes():
    """Return {name: shape} of the released file, at the sizes of the tiny encoder; read off the original's modules."""
    shapes = {}

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(name, inner, outer, bias=True):
        shapes.update({f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {}))

    def trunk(name, width, depth, bias_kv):
        for index in range(depth):
            block = f"modality_trunks.{name}.blocks.{index}"
            norm(f"{block}.norm_1", width)
            norm(f"{block}.norm_2", width)
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            if bias_kv:
                shapes[f"{block}.attn.bias_k"] = shapes[f"{block}.attn.bias_v"] = (1, 1, width)
            linear(f"{block}.attn.out_proj", width, width)
            linear(f"{block}.mlp.fc1", width, 4 * width)
            linear(f"{block}.mlp.fc2", 4 * width, width)

    vision = "modality_preprocessors.vision"
    shapes[f"{vision}.cls_token"] = (1, 1, 32)
    shapes[f"{vision}.rgbt_stem.proj.1.weight"] = (32, 3, 2, 8, 8)
    shapes[f"{vision}.pos_embedding_helper.pos_embed"] = (1, 17, 32)
    norm("modality_trunks.vision.pre_transformer_layer.0", 32)
    trunk("vision", 32, 2, bias_kv=False)
    norm("modality_heads.vision.0", 32)
    linear("modality_heads.vision.2", 32, 20, bias=False)

    shapes["modality_preprocessors.text.pos_embed"] = (1, 12, 24)
    shapes["modality_preprocessors.text.mask"] = (12, 12)
    shapes["modality_preprocessors.text.token_embedding.weight"] = (50, 24)
    trunk("text", 24, 2, bias_kv=False)
    norm("modality_heads.text.proj.0", 24)
    linear("modality_heads.text.proj.1", 24, 20, bias=False)
    shapes["modality_postprocessors.text.1.log_logit_scale"] = ()

    for name, stem, patch, tokens, width, depth in (
        # (16 - 8) / 4 + 1 = 3 by (28 - 8) / 4 + 1 = 6 patches.
        ("audio", "rgbt_stem", 8, 1 + 3 * 6, 16, 2),
        ("depth", "depth_stem", 16, 1 + 4, 12, 1),
        ("thermal", "rgbt_stem", 16, 1 + 4, 8, 1),
    ):
        tokenizer = f"modality_preprocessors.{name}"
        shapes[f"{tokenizer}.cls_token"] = (1, 1, width)
        shapes[f"{tokenizer}.{stem}.proj.weight"] = (width, 1, patch, patch)
        norm(f"{tokenizer}.{stem}.norm_layer", width)
        shapes[f"{tokenizer}.pos_embedding_helper.pos_embed"] = (1, tokens, width)
        trunk(name, width, depth, bias_kv=True)
        norm(f"modality_heads.{name}.0", width)
        linear(f"modality_heads.{name}.2", width, 20, bias=False)
        shapes[f"modality_postprocessors.{name}.1.log_logit_scale"] = ()

    shapes["modality_preprocessors.imu.pos_embed"] = (1, 6, 16)
    shapes["modality_preprocessors.imu.cls_token"] = (1, 1, 16)
    linear("modality_preprocessors.imu.imu_stem.proj", 48, 16, bias=False)
    norm("modality_preprocessors.imu.imu_stem.norm_layer", 16)
    trunk("imu", 16, 1, bias_kv=True)
    norm("modality_heads.imu.0", 16)
    linear("modality_heads.imu.3", 16, 20, bias=False)
    shapes["modality_postprocessors.imu.1.log_logit_scale"] = ()

    point = "point_trunk.point_encoder"
    shapes["point_trunk.pc_projection"] = (24, 14)
    shapes[f"{point}.cls_token"] = shapes[f"{point}.cls_pos"] = (1, 1, 12)
    for conv, widths in (("first_conv", (3, 4, 8)), ("second_conv", (16, 16, 10))):
        for index, inner, outer in ((0, *widths[:2]), (3, *widths[1:])):
            shapes[f"{point}.encoder.{conv}.{index}.weight"] = (outer, inner, 1)
            shapes[f"{point}.encoder.{conv}.{index}.bias"] = (outer,)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{point}.encoder.{conv}.1.{part}"] = (widths[1],)
        shapes[f"{point}.encoder.{conv}.1.num_batches_tracked"] = ()
    linear(f"{point}.reduce_dim", 10, 12)
    linear(f"{point}.pos_embed.0", 3, 7)
    linear(f"{point}.pos_embed.2", 7, 12)
    for index in range(2):
        block = f"{point}.blocks.blocks.{index}"
        norm(f"{block}.norm1", 12)
        norm(f"{block}.norm2", 12)
        linear(f"{block}.attn.qkv", 12, 36, bias=False)
        linear(f"{block}.attn.proj", 12, 12)
        linear(f"{block}.mlp.fc1", 12, 48)
        linear(f"{block}.mlp.fc2", 48, 12)
    norm(f"{point}.norm", 12)
    norm("modality_heads.point.0", 14)
    linear("modality_heads.point.2", 14, 20, bias=False)
    shapes["modality_postprocessors.point.1.log_logit_scale"] = ()
    return shapes


def released_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in released_shapes().items():
        state[name] = torch.rand(shape, generator=generator) + 0.1
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("mask"):
            state[name] = torch.full(shape, float("-inf")).triu(1)
    return state


@pytest.fixture
def released(tmp_path):
    path = tmp_path / "imagebind_w3D.pth"
    torch.save(released_state(), path)
    return path


def test_released_names_and_shapes_load_strictly(released):
    state = released_state()
    model = ImageBindModel(tiny_config())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == released_shapes()
    model.load_state_dict(state, strict=True)
    opened = open_imagebind(released, tiny_config())
    assert not opened.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())
    with torch.no_grad():
        for kind in opened.modalities:
            inputs = inputs_of(kind, opened.config)
            assert torch.equal(opened.encode(kind, inputs), model.eval().encode(kind, inputs))


def test_fewer_modalities_read_only_their_weights(released):
    for options in ({"config": tiny_config(modalities=["image", "audio"])}, {"modalities": ["image", "audio"]}):
        opened = open_imagebind(released, **({"config": tiny_config()} | options))
        assert opened.modalities == ["image", "audio"]
        assert {name.split(".")[1] for name in opened.state_dict()} == {"vision", "audio"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_weights_that_do_not_fit_are_reported_by_name(kind, tmp_path):
    state = released_state()
    del state["modality_heads.audio.2.weight"]
    state["modality_heads.smell.2.weight"] = torch.zeros(2)
    state["point_trunk.pc_projection"] = torch.zeros(24, 15)
    if kind == "file":
        path = tmp_path / "imagebind_w3D.pth"
        torch.save(state, path)
        config = tiny_config()
    else:
        path, config = tmp_path, None
        tiny_config().save_pretrained(path)
        save_file(state, path / "model.safetensors", {"format": "pt"})
    words = r"1 missing, such as \['modality_heads.audio.2.weight'\]; 1 unexpected, such as "
    words += r"\['modality_heads.smell.2.weight'\]; 1 of another size, such as \['point_trunk.pc_projection'\]"
    with pytest.raises(ValueError, match=words):
        open_imagebind(path, config)


def test_kinds_of_a_file_without_points_are_told_by_its_names():
    state = {name: tensor for name, tensor in released_state().items() if "point" not in name}
    kinds = find_modalities(state, "imagebind_huge.pth")
    assert kinds == ["image", "video", "text", "audio", "depth", "thermal", "imu"]


def test_file_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth' holds no ImageBind: no weight is named modality_trunks"):
        open_imagebind(tmp_path / "other.pth")
    torch.save(released_state(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"of another size, such as .*read at the published size"):
        open_imagebind(tmp_path / "tiny.pth")


def test_directory_of_another_model_is_refused(toy_tower_dir):
    with pytest.raises(ValueError, match=r"holds a model of model_type 'clip_vision_model', not ImageBind"):
        open_imagebind(toy_tower_dir("clip"))


def test_directory_opens_with_all_or_some_of_its_weights(tmp_path):
    model = randomise(ImageBindModel(tiny_config()))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(released_shapes())
    opened = open_imagebind(tmp_path)
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    part = open_imagebind(tmp_path, modalities=["audio"])
    assert {name.split(".")[1] for name in part.state_dict()} == {"audio"}
    inputs = inputs_of("audio", model.config)
    with torch.no_grad():
        assert torch.equal(part.encode("audio", inputs), model.encode("audio", inputs))
