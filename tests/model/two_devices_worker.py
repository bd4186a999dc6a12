"""Run a model whose parts lie on devices that do not exist, and print where its answers differ from the plain model's.

A tensor of such a device reports it, holds a tensor of the CPU, and raises where it meets a tensor of another device,
as CUDA does. `python two_devices_worker.py DIRECTORY` prints {name of a device map: {call: what went wrong}}.
"""

import copy
import json
import sys

import accelerate
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from llava_lite import reply
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.processing.processor import LlavaLiteProcessor

NAME = "far"


class FarDevices:
    """What torch and accelerate ask of the module of a kind of device."""

    device_count = staticmethod(lambda: 2)
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed_all = staticmethod(lambda number: None)
    empty_cache = staticmethod(lambda: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


class FarTensor(torch.Tensor):
    """A tensor of device far:0 or far:1."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near, number=0, requires_grad=False):
        # accelerate creates parameters again, by the class that they have.
        if isinstance(near, FarTensor):
            return near.detach().requires_grad_(requires_grad)
        if near.is_meta:
            return torch.nn.Parameter(near.detach(), requires_grad=requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            dtype=near.dtype,
            device=torch.device(NAME, number),
            requires_grad=requires_grad,
        )
        made.near, made.number = near, number
        return made

    def __init__(self, *args, **kwargs):
        pass

    def tolist(self):
        return self.near.tolist()

    def data_ptr(self):
        return self.near.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class FarMode(TorchDispatchMode):
    """Let tensors be made on a far device, which torch itself knows nothing of."""

    def __enter__(self):
        self.tensor, torch.tensor = torch.tensor, self.make
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    def make(self, *args, device=None, **kwargs):
        made = self.tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_far = any(isinstance(item, FarTensor) for item in pytree.tree_leaves((args, kwargs)))
        asked = kwargs.get("device")
        if is_far or (asked is not None and torch.device(asked).type == NAME):
            return run(operation, args, kwargs)
        return operation(*args, **kwargs)


def run(operation, args, kwargs):
    """Compute on the CPU what was asked of a far device; RuntimeError for tensors of several devices."""
    tensors = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    name, asked = str(operation), kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    # As on CUDA, numbers of the CPU mix, and so do a tensor's indices.
    near = [t for t in tensors if not isinstance(t, FarTensor) and t.dim() > 0 and not t.is_meta]
    indexes = name.startswith(("aten.index.", "aten.index_put")) and bool(far) and tensors[0] is far[0]
    is_copy = name.startswith(("aten._to_copy", "aten.copy_"))
    if not is_copy and (len({tensor.number for tensor in far}) > 1 or (far and near and not indexes)):
        raise RuntimeError(f"{name}: tensors of several devices: {[str(t.device) for t in tensors]}")
    plain, named = pytree.tree_map_only(FarTensor, lambda tensor: tensor.near, (args, kwargs))
    if asked is not None and asked.type == NAME:
        named["device"] = torch.device("cpu")
    made = operation(*plain, **named)
    written = [i for i, a in enumerate(operation._schema.arguments) if a.alias_info and a.alias_info.is_write]
    if written:
        first = operation._schema.arguments[written[0]].name
        return args[written[0]] if written[0] < len(args) else kwargs[first]
    if (asked is None and not far) or (asked is not None and asked.type != NAME):
        return made
    number = far[0].number if asked is None else asked.index or 0
    return pytree.tree_map_only(torch.Tensor, lambda tensor: FarTensor(tensor, number), made)


def device_maps():
    """Return device maps by name: each part elsewhere than the rest."""
    layers = [f"model.layers.{i}" for i in range(4)]
    parts = {
        "embeddings": ["model.embed_tokens"],
        "tower": ["model.vision_tower"],
        "connector": ["model.mm_projector"],
        "newline": ["model.image_newline"],
        "last layers": layers[2:],
        "head": ["model.norm", "lm_head"],
    }
    names = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
    names += ["model.vision_tower", "model.mm_projector", "model.image_newline"]
    maps = {}
    for part, moved in parts.items():
        maps[f"{part} on far:1, the rest on far:0"] = dict.fromkeys(names, "far:0") | dict.fromkeys(moved, "far:1")
    # accelerate computes on far:0 with what lies on the CPU.
    return maps | {
        "layers on far:0, the rest on the CPU": dict.fromkeys(names, "cpu") | dict.fromkeys(layers, "far:0")
    }


def calls(model, processor):
    """Return what is asked of a model, by name; every answer is plain Python."""
    image = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    inputs = processor(images=[[image], None], text=["USER: <image>\nWhat? ASSISTANT:", "USER: Hi ASSISTANT:"])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return {
        "logits": lambda: model(**inputs).logits.tolist(),
        "loss": lambda: model(**inputs, labels=labels).loss.tolist(),
        "generate": lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist(),
        "reply": lambda: reply(model, processor, ["What?", "Hi"], [image, None], max_new_tokens=3),
    }


def failures(model, processor, expected):
    """Return what went wrong, by the name of the call."""
    found = {}
    for name, call in calls(model, processor).items():
        try:
            if call() != expected[name]:
                found[name] = "another answer"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


@torch.no_grad()
def main(directory):
    """Print the failures of every device map."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=FarDevices)
    # In forward implementations that do the same on every kind of device.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = LlavaLlamaForCausalLM.from_pretrained(directory, **plain).eval()
    processor = LlavaLiteProcessor.from_pretrained(directory)
    expected = {name: call() for name, call in calls(model, processor).items()}
    found = {}
    for name, device_map in device_maps().items():
        with FarMode():
            spread = accelerate.dispatch_model(copy.deepcopy(model), device_map, force_hooks=True)
            found[name] = failures(spread, processor, expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
