"""Each branch against an independent statement: transformers' CLIP, or the formula written out with torch."""

import pytest
import torch
from conftest import float_error
from torch.nn import functional as F
from toy_imagebind import inputs_of, randomise, tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from llava_lite.imagebind_config import BRANCHES, ImageBindConfig
from llava_lite.model.encoders.imagebind.model import ImageBindModel

# Two orders of the same float32 sums; embeddings are at most 20 times a unit vector.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def imagebind():
    return randomise(ImageBindModel(tiny_config()))


def layer_names(state, trunk):
    """Yield (name in CLIP, tensor) for the transformer of a branch."""
    for name, tensor in state.items():
        if not name.startswith(f"{trunk}.blocks."):
            continue
        index, rest = name.removeprefix(f"{trunk}.blocks.").split(".", 1)
        prefix = f"encoder.layers.{index}"
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}.self_attn.{part}_proj.{kind}", value
        else:
            rest = rest.replace("attn.", "self_attn.").replace("norm_", "layer_norm")
            yield f"{prefix}.{rest}", tensor


def test_image_branch_is_clips_vision_model_with_projection(imagebind):
    config, state = imagebind.config, imagebind.state_dict()
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=4 * config.vision_width,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.vision_num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            projection_dim=config.hidden_size,
        )
    ).eval()
    tokens, trunk, head = "modality_preprocessors.vision", "modality_trunks.vision", "modality_heads.vision"
    weights = {
        "embeddings.class_embedding": state[f"{tokens}.cls_token"][0, 0],
        # An image is repeated over the frames, so the taps of the frames add up.
        "embeddings.patch_embedding.weight": state[f"{tokens}.rgbt_stem.proj.1.weight"].sum(dim=2),
        "embeddings.position_embedding.weight": state[f"{tokens}.pos_embedding_helper.pos_embed"][0],
        "pre_layrnorm.weight": state[f"{trunk}.pre_transformer_layer.0.weight"],
        "pre_layrnorm.bias": state[f"{trunk}.pre_transformer_layer.0.bias"],
        "post_layernorm.weight": state[f"{head}.0.weight"],
        "post_layernorm.bias": state[f"{head}.0.bias"],
        **dict(layer_names(state, trunk)),
    }
    clip.load_state_dict(
        {f"vision_model.{name}": tensor for name, tensor in weights.items()}
        | {"visual_projection.weight": state[f"{head}.2.weight"]}
    )
    images = inputs_of("image", config)
    with torch.no_grad():
        expected = F.normalize(clip(images).image_embeds, dim=-1)
        assert torch.allclose(imagebind(images), expected, **TOLERANCE)
        assert torch.allclose(imagebind.encode("image", images), expected, **TOLERANCE)
        # Twice the same frame is the image.
        frames = images[:, :, None].repeat(1, 1, 2, 1, 1)
        assert torch.allclose(imagebind.encode("video", frames), expected, **TOLERANCE)


def test_text_branch_is_clips_text_model_with_projection(imagebind):
    config, state = imagebind.config, imagebind.state_dict()
    clip = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_num_layers,
            num_attention_heads=config.text_num_heads,
            max_position_embeddings=config.text_len,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            projection_dim=config.hidden_size,
            # CLIP's own choice of the largest id.
            eos_token_id=2,
        )
    ).eval()
    tokens, head = "modality_preprocessors.text", "modality_heads.text.proj"
    weights = {
        "embeddings.token_embedding.weight": state[f"{tokens}.token_embedding.weight"],
        "embeddings.position_embedding.weight": state[f"{tokens}.pos_embed"][0],
        "final_layer_norm.weight": state[f"{head}.0.weight"],
        "final_layer_norm.bias": state[f"{head}.0.bias"],
        **dict(layer_names(state, "modality_trunks.text")),
    }
    clip.load_state_dict(
        {f"text_model.{name}": tensor for name, tensor in weights.items()}
        | {"text_projection.weight": state[f"{head}.1.weight"]}
    )
    ids = inputs_of("text", config)
    scale = state["modality_postprocessors.text.1.log_logit_scale"].exp()
    with torch.no_grad():
        expected = scale * F.normalize(clip(ids).text_embeds, dim=-1)
        assert torch.allclose(imagebind.encode("text", ids), expected, **TOLERANCE)
        # Nothing is read after the end token, so padding may be left out.
        assert torch.allclose(imagebind.encode("text", ids[:1, :7]), expected[:1], **TOLERANCE)


def transformer_by_hand(state, trunk, tokens, num_heads):
    """Return the tokens after the blocks of a branch, by torch's own attention with an extra key and value."""
    width = tokens.shape[-1]
    num_layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"{trunk}.blocks."))
    for index in range(num_layers):
        block = {name: state[name] for name in state if name.startswith(f"{trunk}.blocks.{index}.")}
        get = lambda name, block=block, index=index: block[f"{trunk}.blocks.{index}.{name}"]  # noqa: E731
        x = F.layer_norm(tokens, (width,), get("norm_1.weight"), get("norm_1.bias"), 1e-6).transpose(0, 1)
        mixed, _ = F.multi_head_attention_forward(
            x,
            x,
            x,
            width,
            num_heads,
            get("attn.in_proj_weight"),
            get("attn.in_proj_bias"),
            get("attn.bias_k"),
            get("attn.bias_v"),
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=get("attn.out_proj.weight"),
            out_proj_bias=get("attn.out_proj.bias"),
            need_weights=False,
        )
        tokens = tokens + mixed.transpose(0, 1)
        x = F.layer_norm(tokens, (width,), get("norm_2.weight"), get("norm_2.bias"), 1e-6)
        hidden = F.gelu(F.linear(x, get("mlp.fc1.weight"), get("mlp.fc1.bias")))
        tokens = tokens + F.linear(hidden, get("mlp.fc2.weight"), get("mlp.fc2.bias"))
    return tokens


def head_by_hand(state, branch, feature, projection):
    """Return the scaled embeddings of a branch."""
    head = f"modality_heads.{branch}"
    normed = F.layer_norm(feature, feature.shape[-1:], state[f"{head}.0.weight"], state[f"{head}.0.bias"], 1e-6)
    embeddings = normed @ state[f"{head}.{projection}.weight"].T
    scale = state[f"modality_postprocessors.{branch}.1.log_logit_scale"].exp().clamp(max=100)
    return scale * embeddings / embeddings.norm(dim=-1, keepdim=True)


def patches_by_hand(image, weight, stride):
    """Return the products of a convolution's weights with every patch, [N, P, C], by loops over its places."""
    size, rows, columns = weight.shape[-1], image.shape[-2], image.shape[-1]
    return torch.stack(
        [
            torch.einsum("nchw,dchw->nd", image[:, :, y : y + size, x : x + size], weight)
            for y in range(0, rows - size + 1, stride)
            for x in range(0, columns - size + 1, stride)
        ],
        dim=1,
    )


@pytest.mark.parametrize(("kind", "stem"), [("audio", "rgbt_stem"), ("depth", "depth_stem"), ("thermal", "rgbt_stem")])
def test_branches_of_one_channel_are_their_formula(kind, stem, imagebind):
    config, state = imagebind.config, imagebind.state_dict()
    image, tokens = inputs_of(kind, config), f"modality_preprocessors.{kind}"
    stride = config.audio_stride if kind == "audio" else getattr(config, f"{kind}_patch_size")
    patches = patches_by_hand(image, state[f"{tokens}.{stem}.proj.weight"], stride)
    norm = f"{tokens}.{stem}.norm_layer"
    patches = F.layer_norm(patches, patches.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-5)
    cls = state[f"{tokens}.cls_token"].repeat(len(image), 1, 1)
    x = torch.cat([cls, patches], dim=1) + state[f"{tokens}.pos_embedding_helper.pos_embed"]
    x = transformer_by_hand(state, f"modality_trunks.{kind}", x, getattr(config, f"{kind}_num_heads"))
    with torch.no_grad():
        assert torch.allclose(imagebind.encode(kind, image), head_by_hand(state, kind, x[:, 0], 2), **TOLERANCE)


def test_imu_branch_is_its_formula(imagebind):
    config, state = imagebind.config, imagebind.state_dict()
    series, tokens = inputs_of("imu", config), "modality_preprocessors.imu"
    # A patch is 8 samples of each of the 6 channels, channel by channel.
    pieces = torch.stack([series[:, :, start : start + 8].reshape(2, 48) for start in range(0, 40, 8)], dim=1)
    x = pieces @ state[f"{tokens}.imu_stem.proj.weight"].T
    norm = f"{tokens}.imu_stem.norm_layer"
    x = F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-5)
    x = torch.cat([state[f"{tokens}.cls_token"].repeat(2, 1, 1), x], dim=1) + state[f"{tokens}.pos_embed"]
    x = transformer_by_hand(state, "modality_trunks.imu", x, config.imu_num_heads)
    with torch.no_grad():
        assert torch.allclose(imagebind.encode("imu", series), head_by_hand(state, "imu", x[:, 0], 3), **TOLERANCE)


def groups_by_hand(cloud, num_groups, group_size):
    """Return groups [G, K, 3] and centres [G, 3] of one cloud, by loops."""
    chosen = [0]
    while len(chosen) < num_groups:
        nearest = torch.stack([(cloud - cloud[index]).square().sum(-1) for index in chosen]).amin(dim=0)
        chosen.append(int(nearest.argmax()))
    groups = []
    for index in chosen:
        order = (cloud - cloud[index]).square().sum(-1).argsort()[:group_size]
        groups.append(cloud[order] - cloud[index])
    return torch.stack(groups), cloud[chosen]


def test_point_branch_is_point_bert(imagebind):
    config, state = imagebind.config, imagebind.state_dict()
    weights = {name.removeprefix("point_trunk.point_encoder."): tensor for name, tensor in state.items()}
    clouds, heads, width = inputs_of("point", config), config.point_num_heads, config.point_width

    def conv(x, name):
        return x @ weights[f"{name}.weight"][:, :, 0].T + weights[f"{name}.bias"]

    def batch_norm(x, name):
        x = (x - weights[f"{name}.running_mean"]) / (weights[f"{name}.running_var"] + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def attention(x, name):
        query, key, value = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        parts = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            parts.append((q @ k.T / (width / heads) ** 0.5).softmax(dim=-1) @ v)
        return linear(torch.cat(parts, dim=-1), f"{name}.proj")

    features = []
    for cloud in clouds:
        groups, centres = groups_by_hand(cloud, config.point_num_groups, config.point_group_size)
        x = conv(
            batch_norm(conv(groups, "encoder.first_conv.0"), "encoder.first_conv.1").relu(), "encoder.first_conv.3"
        )
        x = torch.cat([x.amax(dim=1, keepdim=True).expand_as(x), x], dim=-1)
        x = batch_norm(conv(x, "encoder.second_conv.0"), "encoder.second_conv.1").relu()
        x = linear(conv(x, "encoder.second_conv.3").amax(dim=1), "reduce_dim")
        x = torch.cat([weights["cls_token"][0], x])
        positions = linear(F.gelu(linear(centres, "pos_embed.0")), "pos_embed.2")
        positions = torch.cat([weights["cls_pos"][0], positions])
        for index in range(config.point_num_layers):
            block = f"blocks.blocks.{index}"
            x = x + positions
            x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = norm(x, "norm")
        features.append(torch.cat([x[0], x[1:].amax(dim=0)]))
    expected = head_by_hand(state, "point", torch.stack(features) @ state["point_trunk.pc_projection"], 2)
    with torch.no_grad():
        found = imagebind.encode("point", clouds)
        assert torch.allclose(found, expected, **TOLERANCE)
        assert torch.equal(found, imagebind.encode("point", clouds))


def test_clips_are_averaged_after_they_are_normalised_and_scaled(imagebind):
    clips = torch.stack([inputs_of("audio", imagebind.config, seed=seed) for seed in range(3)], dim=1)
    with torch.no_grad():
        each = torch.stack([imagebind.encode("audio", clips[:, index]) for index in range(3)])
        found = imagebind.encode("audio", clips)
    scale = imagebind.state_dict()["modality_postprocessors.audio.1.log_logit_scale"].exp()
    assert torch.allclose(each.norm(dim=-1), scale, rtol=1e-5)
    assert torch.allclose(found, each.mean(dim=0), atol=float_error(each, 16))
    assert (found.norm(dim=-1) < scale).all()


def test_scale_of_a_new_model_is_the_published_one_of_its_kind():
    model = ImageBindModel(tiny_config()).eval()
    lengths = {"image": 1, "text": 1 / 0.07, "audio": 20, "depth": 5, "thermal": 10, "imu": 5, "point": 1}
    for kind, length in lengths.items():
        with torch.no_grad():
            found = model.encode(kind, inputs_of(kind, model.config)).norm(dim=-1)
        assert found.tolist() == pytest.approx([length, length], rel=1e-5)


def test_scale_is_at_most_100(imagebind):
    model = ImageBindModel(tiny_config(modalities=["text"])).eval()
    model.modality_postprocessors["text"][1].log_logit_scale.data.fill_(9.0)
    with torch.no_grad():
        found = model.encode("text", inputs_of("text", model.config))
    assert found.norm(dim=-1).tolist() == pytest.approx([100, 100])


def test_a_kind_that_is_not_known_is_refused_with_the_known_ones():
    model = ImageBindModel(tiny_config(modalities=["image", "audio"]))
    with pytest.raises(ValueError, match=r"does not read 'point'; it knows image, audio"):
        model.encode("point", torch.zeros(1, 15, 3))
    with pytest.raises(ValueError, match=r"modalities are of image, video, .*got \['smell'\]"):
        tiny_config(modalities=["smell"])
    assert model.modalities == ["image", "audio"]
    assert not [name for name in model.state_dict() if "point" in name or "text" in name]


@pytest.mark.parametrize("kind", BRANCHES)
def test_another_shape_is_refused_with_the_one_that_is_read(kind, imagebind):
    with pytest.raises(ValueError, match=rf"{kind} of shape \(1, 1, 1, 1, 1, 1, 7\).*this encoder reads \[N, "):
        imagebind.encode(kind, torch.zeros(1, 1, 1, 1, 1, 1, 7))
    with pytest.raises(ValueError, match=rf"{kind} of shape \(7,\)"):
        imagebind.encode(kind, torch.zeros(7))


def test_a_cloud_of_too_few_points_is_refused(imagebind):
    with pytest.raises(ValueError, match=r"a point cloud of 3 points; the encoder groups 4 neighbours"):
        imagebind.encode("point", torch.zeros(1, 3, 3))


def test_a_new_model_trains_in_every_branch():
    torch.manual_seed(0)
    model = ImageBindModel(tiny_config(imu_drop_path=0.0)).train()
    for kind in BRANCHES:
        model.encode(kind, inputs_of(kind, model.config, num=4 if kind != "text" else 2)).sum().backward()
    without = [name for name, param in model.named_parameters() if param.grad is None]
    assert without == []
    assert all(torch.isfinite(param.grad).all() for param in model.parameters())


def test_auto_classes_open_a_saved_encoder(imagebind, tmp_path):
    imagebind.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ImageBindConfig)
    assert config.hidden_size == 20
    opened = AutoModel.from_pretrained(tmp_path)
    assert isinstance(opened, ImageBindModel)
    state = imagebind.state_dict()
    assert {name: torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items()} == dict.fromkeys(
        state, True
    )


def test_half_precision_gives_nearly_the_same_direction():
    torch.manual_seed(0)
    model = ImageBindModel(tiny_config()).eval()
    half = ImageBindModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    for kind in BRANCHES:
        inputs = inputs_of(kind, model.config)
        with torch.no_grad():
            cosine = F.cosine_similarity(model.encode(kind, inputs), half.encode(kind, inputs).float())
        assert (cosine > 0.99).all(), kind


def test_published_config_is_imagebind_huge():
    with torch.device("meta"):
        model = ImageBindModel(ImageBindConfig())
    sizes = {}
    for name, param in model.named_parameters():
        part = name.split(".")[1] if name.startswith("modality") else "point"
        sizes[part] = sizes.get(part, 0) + param.numel()
    # Model cards and papers: a ViT-H of 632 M, OpenCLIP's text tower of 302 M without embeddings, ViT-B and ViT-S.
    assert sizes["vision"] == pytest.approx(632e6, rel=0.01)
    assert sizes["text"] == pytest.approx(354e6, rel=0.01)
    assert sizes["audio"] == pytest.approx(86e6, rel=0.03)
    assert sizes["point"] == pytest.approx(23e6, rel=0.1)
