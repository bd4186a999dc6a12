"""A run refuses a template that does not fit its tokenizer; what it writes ends and prompts answers as it trained."""

import json

import pytest
from conftest import CHATML
from toy_chat_templates import CASES, REASONING

from llava_lite.commands.check import main as check
from llava_lite.export.convert import convert
from llava_lite.export.merge import merge
from llava_lite.inference import load, prepare
from llava_lite.train.train import main, train

QWEN3 = CASES["qwen3: an empty block of reasoning before the last answer"]


@pytest.fixture
def llm_with(toy_llm_dir, toy_tokenizer, tmp_path):
    """Return a function: chat template -> (directory of a toy language model that has it, the id of `<|im_end|>`)."""
    from transformers import AutoModelForCausalLM

    def make(chat_template=CHATML, model_type="llama"):
        directory = tmp_path / "llm"
        toy_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        toy_tokenizer.chat_template = chat_template
        model = AutoModelForCausalLM.from_pretrained(toy_llm_dir(model_type))
        model.resize_token_embeddings(len(toy_tokenizer))
        model.save_pretrained(directory)
        toy_tokenizer.save_pretrained(directory)
        return directory, toy_tokenizer.convert_tokens_to_ids("<|im_end|>")

    return make


def ends(directory):
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("tuning", ["projector", "full", "lora", "moe"])
def test_end_token_of_the_template_is_in_every_directory_that_is_written(stage_flags, llm_with, tmp_path, tuning):
    llm, end = llm_with()
    run = tmp_path / "run"
    # Its flags are those of a run from a language model: a connector of its own.
    flags = stage_flags(tuning, run, "--mm_projector_type", "mlp2x_gelu", "--max_steps", 1, model=llm)
    train([*flags, "--version", "mpt"])
    assert ends(run) == [2, end]
    model, _ = load(run, device="cpu")
    assert model.generation_config.eos_token_id == [2, end]
    model.save_pretrained(tmp_path / "again")
    assert ends(tmp_path / "again") == [2, end]
    if tuning in ("projector", "lora"):
        merge(run, tmp_path / "full", report=str)
        assert ends(tmp_path / "full") == [2, end]
    if tuning == "full":
        convert(run, tmp_path / "hf", report=str)
        assert ends(tmp_path / "hf") == [2, end]
        convert(tmp_path / "hf", tmp_path / "back", report=str)
        assert ends(tmp_path / "back") == [2, end]


def test_template_that_does_not_fit_the_tokenizer_is_refused_before_the_model_and_in_check(
    stage_flags, llm_with, toy_tokenizer_for, toy_data, tmp_path, capsys
):
    llm, _ = llm_with()
    toy_tokenizer_for("qwen").save_pretrained(llm)
    with pytest.raises(SystemExit):
        main(stage_flags("full", tmp_path / "run", model=llm))
    line = "--version v1 ends an answer with '</s>', which is not one token of this tokenizer"
    assert line in capsys.readouterr().err
    path, directory = toy_data(num_records=3)
    flags = ["--data_path", path, "--image_folder", directory, "--model_name_or_path", str(llm)]
    with pytest.raises(ValueError, match=line):
        check(flags)
    sizes = ["--image_size", "32", "--num_image_tokens", "16"]
    assert check([*flags, *sizes, "--version", "chat"]) == 0


def write_records(tmp_path, *answers):
    path = tmp_path / "records.json"
    turns = [[{"from": "human", "value": "Q1"}, {"from": "gpt", "value": answer}] for answer in answers]
    path.write_text(json.dumps([{"id": i, "conversations": output} for i, output in enumerate(turns)]))
    return str(path)


@pytest.mark.parametrize("answer", ["Because.", REASONING])
def test_a_model_is_asked_as_its_records_were_answered_with_reasoning_or_without(
    stage_flags, llm_with, tmp_path, answer
):
    llm, _ = llm_with(QWEN3.template)
    data = write_records(tmp_path, answer, answer), str(tmp_path)
    flags = stage_flags("full", tmp_path / "run", "--version", "chat", "--max_steps", 1, model=llm, data=data)
    trainer = train([*flags, "--mm_projector_type", "mlp2x_gelu"])
    example = trainer.train_dataset[0]
    labels = example["labels"].tolist()
    prompt_len = next(i for i, label in enumerate(labels) if label != -100)
    _, processor = load(tmp_path / "run", device="cpu")
    asked, end = prepare(processor, ["Q1"], [None])
    assert asked["input_ids"][0].tolist() == example["input_ids"][:prompt_len].tolist()
    assert end.text == "<|im_end|>"
    assert processor.enable_thinking == (answer == REASONING)


def test_flags_of_the_chat_template_are_kept_and_refused_elsewhere(stage_flags, llm_with, tmp_path):
    llm, _ = llm_with(CASES["solar: no end token at all"].template)
    data = write_records(tmp_path, "one", ""), str(tmp_path)
    flags = stage_flags(
        "full", tmp_path / "run", "--max_steps", 1, "--mm_projector_type", "linear", model=llm, data=data
    )
    with pytest.raises(ValueError, match="has no end token"):
        train([*flags, "--version", "chat"])
    with pytest.raises(ValueError, match="--chat_end_token </s> is for the tokenizer's own chat template"):
        train([*flags, "--chat_end_token", "</s>"])
    chosen = ["--version", "chat", "--chat_end_token", "</s>", "--special_tokens_in_text", "text"]
    train([*flags, *chosen])
    _, processor = load(tmp_path / "run", device="cpu")
    assert (processor.chat_end_token, processor.special_tokens_in_text) == ("</s>", "text")
    rendered = processor.render([("Q1", "one"), ("Q2", None)])
    assert rendered.text == "### User:\nQ1\n\n### Assistant:\none</s>### User:\nQ2\n\n### Assistant:\n"


def test_check_counts_empty_answers_and_special_tokens(llm_with, tmp_path, capsys):
    llm, _ = llm_with()
    path = write_records(tmp_path, "one", " ", "", "a </s> and <|im_end|>")
    flags = ["--data_path", path, "--model_name_or_path", str(llm), "--version", "chat"]
    assert check(flags) == 0
    output = capsys.readouterr().out
    assert "2 answers without text, of which only the end token is supervised: record '1' (records.json[1])" in output
    assert (
        "2 special tokens are spelled in the texts of 1 records, the first in record '3' (records.json[3])" in output
    )
    assert "they become those tokens, as in LLaVA; --special_tokens_in_text text encodes them as text" in output
    assert check([*flags, "--special_tokens_in_text", "text"]) == 0
    assert "they are encoded as text" in capsys.readouterr().out
    assert check([*flags[:1], write_records(tmp_path, "one"), *flags[2:]]) == 0
    assert "special" not in capsys.readouterr().out
