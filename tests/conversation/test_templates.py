"""The prompts of Alpaca, LLaMA-Adapter and LLaMA2-Accessory, written out, and what of them is supervised."""

import pytest

from llava_lite.conversation import alpaca_prompt, get_template
from llava_lite.conversation.images import drop_placeholders
from llava_lite.conversation.tokenize import tokenize_rendered

NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
SHORT = NO_INPUT.replace("completes the request.", "completes the request using a single word or phrase.")
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("curious human", "curious user").replace("the human's", "the user's")
LLAVA = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab.You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
LINES = "{0}\n\n### Human: Q1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2\n###"
TWO = "{0}  {1}: Q1  {2}: A1</s> {1}: Q2  {2}: A2</s>"
DIALOGUES = {
    "accessory": LINES.format(HUMAN),
    "accessory_multimodal": LINES.format(LLAVA),
    "accessory_llava_v1": TWO.format(LLAVA, "USER", "ASSISTANT"),
    "accessory_vicuna": TWO.format(USER, "USER", "ASSISTANT"),
    "bair_v1": TWO.format("BEGINNING OF CONVERSATION:", "USER", "GPT"),
}
PROMPTS = {
    "alpaca": NO_INPUT,
    "alpaca_short": SHORT,
    "question_generation": "Generate a question whose answer is:\n{instruction}\n\nQuestion:\n",
    "caption": "",
    "bare": "{instruction}",
}
TURNS = (("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))


def supervised(rendered):
    return [rendered.text[start:end] for start, end in rendered.answers]


@pytest.mark.parametrize("name", PROMPTS)
def test_an_instruction_is_the_published_prompt_and_its_answer_follows_at_once(name):
    prompt = PROMPTS[name].format(instruction="Name a colour.")
    assert alpaca_prompt("Name a colour.", name=name) == prompt
    rendered = get_template(name).with_turns((("human", "Name a colour."), ("gpt", "Red."))).render()
    assert rendered.text == f"{prompt}Red.</s>"
    assert supervised(rendered) == ["Red.</s>"]


def test_an_input_has_its_own_heading_and_opening_and_a_blank_one_is_none():
    expected = WITH_INPUT.format(instruction="Translate.", input="rot")
    assert alpaca_prompt("Translate.", "rot") == expected
    for blank in (None, "", " \n"):
        assert alpaca_prompt("Translate.", blank) == NO_INPUT.format(instruction="Translate.")
    # LLaMA-Adapter V2 asks for `is None` alone.
    assert alpaca_prompt("Translate.", "", blank_is_none=False) == WITH_INPUT.format(
        instruction="Translate.", input=""
    )
    short = alpaca_prompt("Translate.", "rot", name="alpaca_short")
    assert short == expected.replace("completes the request.", "completes the request using a single word or phrase.")
    with pytest.raises(ValueError, match=r"'v1' is not one of a single instruction; known: alpaca, .*caption, bare\."):
        alpaca_prompt("Translate.", name="v1")


def test_a_system_text_of_a_record_replaces_the_opening():
    turns = (("human", "Q\n\n### Input:\nI"), ("gpt", "A"))
    text = get_template("alpaca").with_turns(turns, "Be brief.").render().text
    assert text == "Be brief.\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:A</s>"


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_dialogue_is_accessorys_letter_for_letter(name):
    conversation = get_template(name).with_turns(TURNS)
    end = "\n###" if "###" in DIALOGUES[name] else "</s>"
    last = "</s>" if end == "\n###" else ""
    assert conversation.render().text == conversation.get_prompt() == DIALOGUES[name] + last
    assert supervised(conversation.render()) == [f" A1{end}", f" A2{end}"]
    asked = get_template(name).with_turns((*TURNS[:3], ("gpt", None))).render()
    assert asked.text == DIALOGUES[name][: DIALOGUES[name].index(" A2")]


def test_the_end_of_text_is_learned_after_an_instruction_and_not_after_a_dialogue(toy_tokenizer):
    eos = toy_tokenizer.eos_token_id
    turns = (("human", "What colour"), ("gpt", "red"))
    ids, labels = tokenize_rendered(get_template("alpaca").with_turns(turns).render(), toy_tokenizer, has_image=False)
    assert (ids[-1], labels[-1]) == (eos, eos)
    ids, labels = tokenize_rendered(get_template("accessory").with_turns(turns).render(), toy_tokenizer, False)
    assert (ids[-1], labels[-1]) == (eos, -100)
    assert toy_tokenizer.decode([token for token in labels if token != -100]) == "red\n###"


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_the_end_of_text_is_the_tokenizers_own(toy_tokenizer_for, kind):
    tokenizer = toy_tokenizer_for(kind)
    turns = (("human", "Q"), ("gpt", "A"))
    for name in ("alpaca", "caption", "accessory", "accessory_vicuna"):
        assert get_template(name).with_turns(turns).render(tokenizer).text.endswith(tokenizer.eos_token)
        assert get_template(name).with_turns(turns).render().text.endswith("</s>")
    spelled = get_template("bare", special_tokens_in_text="text").with_turns((("human", "Q"), ("gpt", "</s>")))
    rendered = spelled.render(tokenizer)
    assert rendered.text == f"Q</s>{tokenizer.eos_token}"


def test_a_caption_keeps_the_image_of_its_question_alone():
    turns = (("human", "<image>\nDescribe it."), ("gpt", "two dogs"))
    assert get_template("caption").with_turns(turns).render().text == "<image>two dogs</s>"
    assert get_template("caption").with_turns(drop_placeholders(turns)).render().text == "two dogs</s>"
    asked = drop_placeholders((turns[0], ("gpt", None)))
    assert asked == (("human", "Describe it."), ("gpt", None))
    assert get_template("caption").with_turns(asked).render().text == ""


def test_texts_that_show_no_image_keep_their_spaces():
    turns = (("human", " <image>\n What? \n"), ("gpt", " A "))
    assert drop_placeholders(turns) == (("human", "What?"), ("gpt", " A "))
