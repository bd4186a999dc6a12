"""A model whose weights are offloaded or on several devices answers as the plain model does, however it got there."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import draw_image
from safetensors.torch import save_file

from llava_lite import load, reply, stream
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model import builder as builder_page
from llava_lite.model.assemble import load_connector
from llava_lite.model.builder import load_pretrained_model, placement
from llava_lite.model.placement import may_offload, present, spread

accelerate = pytest.importorskip("accelerate", reason="device maps need accelerate")

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2, "use_residual": True}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
KINDS = {
    "dense": {},
    "moe": {"moe": MOE},
    "anyres": ANYRES,
    "siglip": {"tower": "siglip"},
    "dinov2": {"tower": "dinov2"},
}
NAMES = ["model.embed_tokens", "model.norm", "model.rotary_emb", *(f"model.layers.{i}" for i in range(4)), "lm_head"]
NAMES += ["model.vision_tower", "model.mm_projector"]


@pytest.fixture
def directory_of(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """Return a function: arguments of toy_model -> directory of a full model."""

    def make(**arguments):
        directory = tmp_path / "full"
        if not directory.exists():
            toy_model(conv_template="v1", **arguments).save_pretrained(directory)
            toy_tokenizer.save_pretrained(directory)
            tower = toy_tower_dir(arguments.get("tower", "clip"))
            shutil.copy(tower / "preprocessor_config.json", directory)
        return directory

    return make


def answers(model, processor):
    """Return what a model makes of images and text in every way that it is asked."""
    images = [[draw_image(1)], None]
    inputs = processor(images=images, text=["USER: <image>\nWhat? ASSISTANT:", "USER: Hi ASSISTANT:"])
    alone = processor(images=[draw_image(2)], text="<image>\nHello!")
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    greedy = {"max_new_tokens": 4, "do_sample": False}
    short = torch.tensor([[1, -200, 300, 301]])
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        return {
            "logits": output.logits,
            "loss": output.loss,
            "text": model(torch.tensor([[1, 300, 301]])).logits,
            "generate": model.generate(**inputs, **greedy),
            "beams": model.generate(**inputs, **greedy, num_beams=2),
            "LLaVA's way": model.generate(
                short, images=alone["pixel_values"], image_sizes=alone.get("image_sizes"), **greedy
            ),
            "reply": reply(model, processor, ["What?", "Hi"], images, max_new_tokens=4),
            "stream": "".join(stream(model, processor, "What?", draw_image(2), max_new_tokens=4)),
        }


def assert_same(found, expected):
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)
        else:
            assert found[name] == value, name


def on_disk(names, model):
    places = {name: "disk" if name in names else "cpu" for name in NAMES}
    return places | ({"model.image_newline": "disk"} if model.config.has_newline else {})


# How a model that is in memory is offloaded; directory: where to.
OFFLOADS = {
    "cpu_offload": lambda model, directory: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, directory: accelerate.disk_offload(model, directory, execution_device="cpu"),
    "cpu_offload of the stack alone": lambda model, directory: (
        accelerate.cpu_offload(model.model, execution_device="cpu") and model
    ),
    "dispatch_model": lambda model, directory: accelerate.dispatch_model(
        model, {"model": "disk", "lm_head": "cpu"}, main_device="cpu", offload_dir=directory
    ),
    "spread": lambda model, directory: spread(model, {"": "disk"}, offload_folder=directory),
    "spread by size": lambda model, directory: spread(model, "auto", {"cpu": 150_000}, offload_folder=directory),
}


@pytest.mark.parametrize(
    ("kind", "offload"),
    [(kind, offload) for kind in ("dense", "moe", "anyres") for offload in OFFLOADS]
    + [(kind, "cpu_offload") for kind in ("siglip", "dinov2")],
)
def test_an_offloaded_model_answers_as_the_plain_one(directory_of, tmp_path, kind, offload):
    model, processor = load(directory_of(**KINDS[kind]), device="cpu")
    expected = answers(model, processor)
    away = OFFLOADS[offload](copy.deepcopy(model), tmp_path / "offload")
    assert any(weight.is_meta for weight in away.parameters())
    assert_same(answers(away, processor), expected)


# Keywords of load, of a model in memory.
DEVICE_MAPS = {
    "all on the disk": lambda model: {"device_map": on_disk(NAMES, model)},
    "the root on the disk": lambda model: {"device_map": {"": "disk"}},
    "the tower on the disk": lambda model: {"device_map": on_disk(["model.vision_tower"], model)},
    "the embeddings on the disk": lambda model: {"device_map": on_disk(["model.embed_tokens"], model)},
    "some layers on the disk": lambda model: {"device_map": on_disk(["model.layers.1", "model.norm"], model)},
    "auto with too little memory": lambda model: {"device_map": "auto", "max_memory": {"cpu": 150_000}},
    "sequential with too little memory": lambda model: {"device_map": "sequential", "max_memory": {"cpu": 150_000}},
}


@pytest.mark.parametrize(
    ("kind", "places"),
    [("anyres", places) for places in DEVICE_MAPS]
    + [(kind, places) for kind in ("dense", "moe") for places in ("all on the disk", "auto with too little memory")],
)
def test_a_directory_opens_with_a_device_map(directory_of, tmp_path, kind, places):
    directory = directory_of(**KINDS[kind])
    model, processor = load(directory, device="cpu")
    given = DEVICE_MAPS[places](model) | {"offload_folder": str(tmp_path / "offload")}
    away, processor = load(directory, device="cpu", **given)
    assert any(weight.is_meta for weight in away.parameters())
    assert_same(answers(away, processor), answers(model, processor))
    away.save_pretrained(tmp_path / "again")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def tower_elsewhere(directory, tower):
    """Lay a checkpoint out as LLaVA does: it names its tower, whose weights are in another directory."""
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | {"vision_config": None, "mm_vision_tower": str(tower)}
    path.write_text(json.dumps(fields))
    return directory


def part_on_base(directory, base, tower, model):
    """Write what stage 1 leaves: a connector, and the names of base and tower."""
    directory.mkdir()
    weights = {f"model.mm_projector.{k}": v + 0.5 for k, v in model.model.mm_projector.state_dict().items()}
    save_file(weights, directory / "trained.safetensors")
    fields = model.config.to_dict() | {"base_model_name_or_path": str(base)}
    (directory / "config.json").write_text(json.dumps(fields))
    return tower_elsewhere(directory, tower)


@pytest.mark.parametrize("layout", ["tower elsewhere", "part on its base", "LoRA"])
@pytest.mark.parametrize("places", ["all on the disk", "the tower on the disk", "auto with too little memory"])
def test_weights_of_several_directories_are_put_together_before_they_are_offloaded(
    directory_of, toy_llm_dir, toy_tower_dir, tmp_path, layout, places
):
    directory = directory_of()
    model, _ = load(directory, device="cpu")
    if layout == "tower elsewhere":
        directory = tower_elsewhere(directory, toy_tower_dir())
    elif layout == "LoRA":
        peft = pytest.importorskip("peft", reason="LoRA is put on with peft")
        config = peft.LoraConfig(r=4, target_modules=r"model\.layers\..*q_proj", init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "lora")
        path = tmp_path / "lora" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(directory)}))
        directory = tmp_path / "lora"
    else:
        shutil.copytree(toy_llm_dir("llama"), tmp_path / "base")
        directory = part_on_base(tmp_path / "part", tmp_path / "base", toy_tower_dir(), model)
    plain, processor = load(directory, device="cpu")
    given = DEVICE_MAPS[places](model) | {"offload_folder": str(tmp_path / "offload")}
    away, processor = load(directory, device="cpu", **given)
    assert any(weight.is_meta for weight in away.parameters())
    assert_same(answers(away, processor), answers(plain, processor))


def test_a_part_without_a_directory_to_offload_to_is_refused(directory_of, toy_tower_dir):
    directory = tower_elsewhere(directory_of(), toy_tower_dir())
    with pytest.raises(ValueError, match="give offload_folder="):
        load(directory, device="cpu", device_map={"model": "disk", "lm_head": "cpu"})


def test_weights_cannot_be_put_into_an_offloaded_model(toy_model, tmp_path):
    model = toy_model()
    torch.save({f"mm_projector.{k}": v for k, v in model.model.mm_projector.state_dict().items()}, tmp_path / "c.bin")
    away = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"0\.weight is offloaded \(on the meta device\)"):
        load_connector(away, str(tmp_path / "c.bin"))


def test_vocabulary_rows_cannot_be_added_to_an_offloaded_model(directory_of, tmp_path):
    directory = directory_of()
    fields = json.loads((directory / "config.json").read_text()) | {"mm_use_im_start_end": True}
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="rows, which cannot be added to offloaded weights"):
        load(directory, device="cpu", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload"))


def test_a_map_that_parts_the_experts_is_refused_and_not_answered_wrongly(toy_model, tmp_path):
    model = toy_model(moe=MOE | {"use_residual": False})
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to("meta"))
    with pytest.raises(ValueError, match=r"down_proj of the experts were not loaded.*no_split_module_classes"):
        model(torch.tensor([[1, 300, 301]]))


def test_a_model_built_on_the_meta_device_takes_the_weights_of_another(toy_model):
    model = toy_model(moe=MOE, **ANYRES)
    with torch.device("meta"):
        made = type(model)(model.config)
    assert all(weight.is_meta for weight in made.parameters())
    made.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in made.state_dict().items())


@pytest.mark.parametrize("kind", ["moe", "anyres"])
def test_accelerates_own_loader_fills_an_empty_model(directory_of, tmp_path, kind):
    directory = directory_of(**KINDS[kind])
    model, processor = load(directory, device="cpu")
    with accelerate.init_empty_weights():
        made = type(model)(model.config)
    filled = accelerate.load_checkpoint_and_dispatch(
        made,
        str(directory / "model.safetensors"),
        device_map="auto",
        max_memory={"cpu": 200_000},
        no_split_module_classes=list(model._no_split_modules),
        offload_folder=str(tmp_path / "offload"),
    )
    assert_same(answers(filled.eval(), processor), answers(model, processor))


def test_present_brings_a_weight_and_takes_it_away_again(toy_model):
    model = toy_model(**ANYRES)
    value = model.model.image_newline.detach().clone()
    # Two hooks on one module, as on the root of a model.
    accelerate.cpu_offload(model.model, execution_device="cpu")
    with present(model.model):
        assert torch.equal(model.model.image_newline, value)
    assert model.model.image_newline.is_meta


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        (None, False),
        ("cpu", False),
        ("auto", True),
        ("balanced_low_0", True),
        ({"": "cpu"}, False),
        ({"": "disk"}, True),
        ({"model": 0, "lm_head": 1}, False),
        ({"model": 0, "lm_head": "cpu"}, True),
    ],
)
def test_device_maps_that_may_offload(device_map, expected):
    assert may_offload(device_map) == expected


@pytest.mark.parametrize(
    ("device_map", "has_limits", "expected"),
    [
        ("auto", True, ("cpu", "auto")),
        ("auto", False, ("cpu", None)),
        ({"model": "cpu", "lm_head": "disk"}, False, ("cpu", {"model": "cpu", "lm_head": "disk"})),
        ({"": "disk"}, False, ("cpu", {"": "disk"})),
        ({"": "cpu"}, True, ("cpu", None)),
    ],
)
def test_limits_of_memory_keep_a_device_map_without_cuda(monkeypatch, device_map, has_limits, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement("cuda", device_map, has_limits=has_limits) == (torch.device(expected[0]), expected[1])


def test_a_misspelt_device_map_is_refused_on_any_machine(directory_of):
    with pytest.raises(ValueError, match=r"device_map is 'atuo'; known: auto, balanced, "):
        load(directory_of(), device_map="atuo")


def test_a_model_too_large_for_the_only_device_is_spread(directory_of, monkeypatch, caplog):
    """Without a GPU: the free memory is made up, and "auto" finds the CPU alone."""
    monkeypatch.setattr(builder_page, "is_too_large", lambda model, device: True)
    model = load_pretrained_model(directory_of(), device="cpu")[1]
    assert "more weights than cpu has free memory" in caplog.text
    assert set(model.hf_device_map.values()) == {"cpu"}


def has_far_devices():
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@pytest.mark.skipif(not has_far_devices(), reason="this version of torch has no devices that are written in Python")
def test_parts_on_several_devices_meet_on_one(directory_of):
    """On two devices that are made up, which refuse each other's tensors as two GPUs do."""
    directory = directory_of(**ANYRES, moe=MOE)
    worker = Path(__file__).with_name("two_devices_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(worker), str(directory)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7
    assert {name: failures for name, failures in found.items() if failures} == {}
