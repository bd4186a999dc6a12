"""transformers' own tests of a model, as they run over its own LLaVA, over each of our classes.

Its LLaVA skips three tests of gradient checkpointing; ours does not.
"""

import copy
import inspect
import unittest
from unittest.mock import patch

import pytest
import torch
from common_suite import GenerationTesterMixin, open_suite, why_not

from llava_lite.model import BACKBONES

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

common = open_suite("test_modeling_common")
configuration = open_suite("test_configuration_common")

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
IMAGE = 0


class Tester:
    """What the mixin asks for: sizes, a config and inputs; every sequence is an image of 16 features and 7 words."""

    is_training = True
    batch_size, seq_length, num_image_tokens = 3, 23, 16
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size = 2, 4, 32, 99
    image_size, num_channels = 8, 3

    def __init__(self, parent, model_class, moe):
        self.parent, self.model_class, self.moe = parent, model_class, moe

    def get_config(self):
        """Return a config of the class."""
        vision = {
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": 2,
            "hidden_size": 32,
            "intermediate_size": 37,
            "projection_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        return self.model_class.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            # A multiple of 16 bytes in half precision too, so that experts run grouped.
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            max_position_embeddings=512,
            pad_token_id=1,
            eos_token_id=2,
            bos_token_id=3,
            vision_config=vision,
            mm_projector_type="mlp2x_gelu",
            image_token_index=IMAGE,
            moe=self.moe,
        )

    def prepare_config_and_inputs_for_common(self):
        """Return a config and a batch of as many images as sequences."""
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        ids[:, : self.num_image_tokens] = IMAGE
        size = self.image_size
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": common.floats_tensor([self.batch_size, self.num_channels, size, size]),
        }


class CommonTests(common.ModelTesterMixin, GenerationTesterMixin):
    """The mixin, with the lists that our classes belong to; a subclass names `backbone`."""

    backbone: str
    moe = None
    # Our files carry no year, which the suite reads to spare models older than this test.
    test_can_init_all_missing_weights_before_2023 = True
    # Layers of the tower that are never read are frozen from the start; older suites train them all the same.
    test_all_params_have_gradient = "intentionally_frozen" in inspect.getsource(common)

    def setUp(self):
        """Build the tester and enter the class in the lists by which the mixin knows what has labels and images."""
        model_class = BACKBONES[self.backbone]
        stack = model_class.decoder_class
        self.all_model_classes = (stack, model_class) if self._is_composite else (model_class,)
        self.model_tester = Tester(self, model_class, self.moe)
        self.config_tester = configuration.ConfigTester(
            self, config_class=model_class.config_class, common_properties=["hidden_size", "image_token_id"]
        )
        entry = {model_class.config_class.model_type: model_class.__name__}
        has_experts = classmethod(lambda cls: self.moe is not None)
        for patched in (
            patch.dict(common.MODEL_MAPPING_NAMES, {model_class.config_class.model_type: stack.__name__}),
            patch.dict(common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, entry),
            patch.dict(common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, entry),
            # The class alone does not show it; this tester knows.
            patch.object(stack, "_can_set_experts_implementation", has_experts),
            patch.object(model_class, "_can_set_experts_implementation", has_experts),
        ):
            patched.start()
            self.addCleanup(patched.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        if self.moe is None:
            return super().test_training_gradient_checkpointing_use_reentrant_true()
        # The balance loss would get no gradient.
        model = self.all_model_classes[-1](self.model_tester.get_config())
        with pytest.raises(ValueError, match="has experts, whose balance loss gets no gradient from reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": True})

    def test_as_many_images_as_placeholders(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](config).eval()
        model(**inputs)
        fewer = copy.deepcopy(inputs) | {"pixel_values": inputs["pixel_values"][:1]}
        with pytest.raises(ValueError, match="48 image placeholders in input_ids but 1 images"):
            model(**fewer)


def case(backbone, moe, is_composite):
    """Return a TestCase of the mixin."""
    body = {"backbone": backbone, "moe": moe, "_is_composite": is_composite, "__module__": __name__}
    name = f"Test{backbone.title()}{'Experts' if moe else ''}{'Composite' if is_composite else ''}"
    return type(name, (CommonTests, unittest.TestCase), body)


# A config with a config of the tower in it is a composite one, whose decoder stack is a model of its own; the tests
# for the others hold as well.
CASES = [case(backbone, None, False) for backbone in BACKBONES] + [case("llama", None, True), case("llama", MOE, True)]
CASES += [case("phi", MOE, False)]
globals().update({one.__name__: one for one in CASES})
