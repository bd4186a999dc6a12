"""What a user of transformers does with any model: switch attention, put PEFT on top, train with a plain Trainer."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

IMAGE = -200
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}


def batch(batch_size=2):
    ids = torch.tensor([[1, 300, IMAGE, 301, 302, 303], [1, IMAGE, 304, 305, 306, 307]])[:batch_size]
    labels = torch.where(ids > 302, ids, -100)
    pixels = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def answer(model, **arguments):
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **arguments)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_attention_can_be_switched_after_loading(moe, toy_model):
    model = toy_model(moe=moe)
    with torch.no_grad():
        before = model(**batch()).logits
        for name in ("eager", "varlen", "sdpa"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert model.get_vision_tower().encoder.config._attn_implementation == name
            assert torch.allclose(model(**batch()).logits, before, atol=1e-5)
        model.set_attn_implementation({"": "sdpa", "vision_config": "eager"})
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    attentions = model(**batch(), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(2, 4, 21, 21)] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_flash_attention_without_a_gpu_is_refused_in_a_sentence(toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash.?attention.*(CPU|GPU|installed)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match='attn_implementation="flash_attention_9"` is not supported'):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_9")


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_lora_is_trained_saved_loaded_and_merged(moe, toy_model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra")
    base = toy_model(moe=moe)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["mm_projector"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("mm_projector.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**batch()).loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "mm_projector.mod" in name
    )
    optimizer.step()
    model.eval()
    expected = answer(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
        assert not torch.allclose(base(**batch()).logits, model(**batch()).logits, atol=1e-2)
    assert torch.equal(answer(loaded), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    with torch.no_grad():
        assert torch.allclose(merged(**batch()).logits, model(**batch()).logits, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(answer(full), answer(merged))


class Sequences(torch.utils.data.Dataset):
    """Sequences as a processor gives them, one image each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[index % 2] for name, value in batch().items()}


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_hf_trainer_fits_the_sequences_and_accumulation_changes_nothing(moe, toy_model, tmp_path):
    finals = []
    for size, steps in ((4, 1), (2, 2)):
        # Averages of the balance loss over micro-batches differ by how they are cut, so it is left out.
        model = toy_model(moe=moe and moe | {"router_aux_loss_coef": 0.0})
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path / f"{size}"),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                num_train_epochs=6,
                learning_rate=3e-3,
                gradient_checkpointing=True,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                seed=3,
            ),
            train_dataset=Sequences(),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.5 * losses[0]
        finals.append(losses[-1])
    assert finals[0] == pytest.approx(finals[1], rel=0.02)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(answer(again), answer(trainer.model.eval()))


def test_hf_trainer_reports_the_loss_of_an_evaluation(toy_model, tmp_path):
    model = toy_model()
    rows = [{name: values[row] for name, values in batch().items()} for row in range(2)]
    arguments = TrainingArguments(
        output_dir=tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False, disable_tqdm=True
    )
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(model(**batch()).loss.item(), abs=1e-5)


def test_labels_that_stand_where_they_are_predicted_give_the_same_loss(toy_model):
    model = toy_model(tower=None)
    ids = torch.tensor([[1, 300, 301, 302, 303]])
    shifted = torch.tensor([[300, 301, 302, 303, -100]])
    assert model(ids, shift_labels=shifted).loss == model(ids, labels=ids).loss


def test_words_can_be_added(toy_model, tmp_path):
    model = toy_model()
    before = model(**batch()).logits
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert model(**batch()).logits.shape[-1] == model.vocab_size == model.config.vocab_size == size + 3
    assert torch.equal(model(**batch()).logits[..., :size], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_tied_embeddings_stay_one_weight(backbone, toy_model, tmp_path):
    untied = toy_model(backbone)
    fields = untied.config.to_dict() | {"tie_word_embeddings": True}
    model = type(untied)(type(untied.config)(**fields)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(model.config.vocab_size + 2)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_can_be_quantised_while_loading(bits, toy_model, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    from transformers import BitsAndBytesConfig

    toy = toy_model()
    fields = toy.config.to_dict()
    # Four bits are cut into blocks of 64 weights of one row, in the tower too.
    fields |= {"hidden_size": 64, "head_dim": 16, "mm_hidden_size": 64}
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 64}
    torch.manual_seed(0)
    model = type(toy)(type(toy.config)(**fields | {"initializer_range": 0.05})).eval()
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4"})
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    kinds = {type(module).__name__ for module in quantised.model.layers.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    with torch.no_grad():
        expected, got = model(**batch()).logits, quantised(**batch()).logits.float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > (
        0.99 if bits == 8 else 0.9
    )
    assert quantised.generate(torch.tensor([[1, 300]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)


def test_device_map_and_half_precision_are_taken(toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert answer(model).shape[0] == 2
    assert torch.isfinite(model(**batch()).loss)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_tuned_prompt_answers_text_as_its_own_steps_do(kind, toy_model):
    peft = pytest.importorskip("peft", reason="peft is an extra")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    model = peft.get_peft_model(toy_model(), config).eval()
    ids = torch.tensor([[1, 300, 301, 302], [1, 304, 305, 306]])
    expected = ids
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out, expected)


def test_tuned_norms_generate_what_their_logits_say(toy_model):
    peft = pytest.importorskip("peft", reason="peft is an extra")
    config = peft.LNTuningConfig(target_modules=["input_layernorm"])
    model = peft.get_peft_model(toy_model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + torch.rand_like(parameter))
    given = {name: value for name, value in batch().items() if name != "labels"}
    expected = model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), expected)


def test_hooks_of_layers_and_of_what_is_in_them_are_called_while_generating(toy_model):
    model, seen = toy_model(), []
    layer = model.model.layers[0]
    for module in (layer, layer.mlp, layer.self_attn, layer.input_layernorm):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    answer(model)
    assert {layer, layer.mlp, layer.self_attn, layer.input_layernorm} == set(seen)
