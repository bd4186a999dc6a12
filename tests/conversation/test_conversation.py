"""The prompts are LLaVA's and MoE-LLaVA's, letter for letter, and the spans are the answers."""

import io

import pytest
from PIL import Image

from llava_lite.conversation import conv_templates, default_conversation, get_template
from llava_lite.conversation.images import place_images

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("curious human", "curious user").replace("the human's", "the user's")
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety"
    " of tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
LLAVA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
IM_SYSTEM = "<|im_start|>system\n"
MPT = (
    IM_SYSTEM + "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)

SINGLE = "{0}###Human: Q1###Assistant: A1###Human: Q2###Assistant: A2###"
TWO = "{0} USER: Q1 ASSISTANT: A1{1}USER: Q2 ASSISTANT: A2{1}"
INST = "[INST] <<SYS>>\n{0}\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"
IM = (
    "{0}<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
)
PROMPTS = {
    "v1": TWO.format(USER, "</s>"),
    "vicuna_v1": TWO.format(USER, "</s>"),
    "llama_2": INST.format(LLAMA_2),
    "llava_llama_2": INST.format(LLAVA_2),
    "mistral_instruct": "[INST] Q1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
    "chatml_direct": IM.format(IM_SYSTEM + "Answer the questions."),
    "mistral_direct": IM.format(IM_SYSTEM + "Answer the questions."),
    "llava_v0": SINGLE.format(HUMAN),
    "v0_mmtag": SINGLE.format(MMTAG),
    "llava_v1": TWO.format(HUMAN, "</s>"),
    "v1_mmtag": TWO.format(MMTAG, "</s>"),
    "mpt": IM.format(MPT),
    "mistral": TWO.format(USER, "</s>"),
    "openchat": TWO.format(USER, "<|end_of_turn|>"),
    "minicpm": TWO.format(USER, "</s>"),
    "phi": TWO.format(USER, "<|endoftext|>"),
    "qwen": TWO.format(USER, "<|endoftext|>"),
    "stablelm": TWO.format(USER, "<|endoftext|>"),
}
VERSIONS = {
    "default": "Unknown",
    "v0": "Unknown",
    "plain": "Unknown",
    "v0_plain": "Unknown",
    "llava_v0": "Unknown",
    "llama_2": "llama_v2",
    "llava_llama_2": "llama_v2",
    "mistral_instruct": "llama_v2",
    "chatml_direct": "mpt",
    "mistral_direct": "mpt",
    "vicuna_v1": "v1",
    "llava_v1": "v1",
    "qwen": "phi",
}
END_TOKENS = ("<|im_end|>", "###", "<|end_of_turn|>", "<|endoftext|>", "</s>")
CONVERSATION = (("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))
# Qwen3's habit: the last answer is written with an empty thought in front, the earlier ones without.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Writes how many turns there are in front of all of them: no prompt of a part is a prefix of the full prompt.
COUNTING = "{{ messages | length }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def supervised(rendered):
    return [rendered.text[start:end] for start, end in rendered.answers]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_published_one_letter_for_letter(name):
    conversation = get_template(name).with_turns(CONVERSATION)
    assert conversation.get_prompt() == PROMPTS[name]
    assert conversation.render().text == PROMPTS[name]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_of_an_open_turn_is_what_stands_before_its_answer(name):
    full = get_template(name).with_turns(CONVERSATION).render()
    for num_turns, (start, _) in zip((2, 4), full.answers, strict=True):
        conversation = get_template(name).with_turns((*CONVERSATION[: num_turns - 1], ("gpt", None)))
        rendered = conversation.render()
        assert rendered.text == conversation.get_prompt() == full.text[:start]
        assert supervised(rendered) == supervised(full)[: num_turns // 2 - 1]


@pytest.mark.parametrize("name", PROMPTS)
def test_an_answer_is_supervised_with_its_end_token_and_the_space_before_it(name):
    style = PROMPTS[name]
    end = next(end for end in END_TOKENS if style.endswith(end))
    if "[INST]" in style:
        expected = [" A1 </s>", " A2 </s>"]
    elif end == "<|im_end|>":
        expected = ["A1<|im_end|>", "A2<|im_end|>"]
    else:
        expected = [f" A1{end}", f" A2{end}"]
    assert supervised(get_template(name).with_turns(CONVERSATION).render()) == expected


def test_worked_prompt_of_v1_is_the_one_of_the_paper_code():
    conversation = get_template("v1").with_turns(
        (("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))
    )
    assert conversation.get_prompt() == f"{USER} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"


@pytest.mark.parametrize("name", ["v0", "default"])
def test_v0_begins_with_a_worked_example_that_is_not_supervised(name):
    conversation = get_template(name)
    conversation.append_message("Human", "Q")
    conversation.append_message("Assistant", "A")
    prompt = conversation.get_prompt()
    assert prompt.startswith(
        f"{HUMAN}###Human: What are the key differences between renewable and non-renewable energy "
    )
    assert prompt.count("###") == 5
    assert "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically" in prompt
    assert "to economic and social instability.\n###Human: Q###Assistant: A###" in prompt
    assert supervised(conversation.render()) == [" A###"]
    assert conversation.with_turns(CONVERSATION).get_prompt() == SINGLE.format(HUMAN)


@pytest.mark.parametrize("name", ["plain", "v0_plain"])
def test_plain_supervises_the_caption_and_its_newline_and_drops_the_instruction(name):
    conversation = get_template(name).with_turns((("human", "Describe it.\n<image>"), ("gpt", "two dogs")))
    rendered = conversation.render()
    assert rendered.text == "<image>two dogs\n"
    assert supervised(rendered) == ["two dogs\n"]
    asked = get_template(name).with_turns((("human", "Describe it.\n<image>"), ("gpt", None)))
    assert asked.render().text == "<image>"
    assert asked.get_prompt() == "Describe it.\n<image>\n"


def test_plain_without_an_image_has_nothing_to_ask():
    with pytest.raises(ValueError, match="only its <image> "):
        get_template("plain").with_turns((("human", "Hello"), ("gpt", None))).render()


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_are_the_ones_that_clients_look_at(name):
    assert conv_templates[name].version == VERSIONS[name]


def test_other_versions_are_their_names_and_v1_is_the_default():
    for name in ("v1", "v0_mmtag", "v1_mmtag", "mpt", "mistral", "openchat", "minicpm", "phi", "stablelm"):
        assert conv_templates[name].version == name
    assert default_conversation is conv_templates["vicuna_v1"]


def test_unknown_template_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"unknown conversation template 'v7'; known: default, v0, v1, .*bair_v1\."):
        get_template("v7")


@pytest.mark.parametrize("name", PROMPTS)
def test_the_end_token_of_an_empty_answer_is_supervised(name):
    rendered = get_template(name).with_turns((("human", "Q"), ("gpt", ""))).render()
    (piece,) = supervised(rendered)
    assert piece.strip() in END_TOKENS
    assert rendered.text.endswith(piece)


def test_a_last_turn_from_human_is_kept_and_not_supervised():
    rendered = get_template("v1").with_turns((*CONVERSATION, ("human", "Q3"))).render()
    assert rendered.text == PROMPTS["v1"] + "USER: Q3 "
    assert supervised(rendered) == [" A1</s>", " A2</s>"]


def test_a_first_turn_from_gpt_is_dropped():
    assert get_template("v1").with_turns((("gpt", "Hello!"), *CONVERSATION)).get_prompt() == PROMPTS["v1"]


def test_speakers_who_do_not_take_turns_are_refused():
    with pytest.raises(ValueError, match="turn 2 of 2 is from 'human', expected 'gpt'"):
        get_template("v1").with_turns((("human", "Q"), ("human", "Q")))
    with pytest.raises(ValueError, match="turn 1 of 1 is from 'robot', expected 'human'"):
        get_template("v1").with_turns((("robot", "Q"),))
    with pytest.raises(ValueError, match="no turn from human"):
        get_template("v1").with_turns((("gpt", "A"),))


def test_templates_do_not_change_by_use():
    conversation = get_template("v1")
    conversation.append_message(conversation.roles[0], "Q")
    other = conversation.copy()
    other.messages[0][1] = "changed"
    assert conv_templates["v1"].messages == ()
    assert conversation.messages == [["USER", "Q"]]
    conversation.messages[0][1] = None
    assert conversation.get_prompt() == f"{USER} USER:"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("What <image> is?", "<image>\nWhat  is?"),
        ("<image>", "<image>"),
        ("What?", "What?"),
        ("<image>\n<image>\nSame?", "<image>\n<image>\nSame?"),
        ("Is <image> like <image>?", "Is <image> like <image>?"),
        (None, None),
    ],
)
def test_one_image_goes_in_front_and_several_stay_where_they_are(text, expected):
    assert place_images((("human", text),), get_template("v1")) == (("human", expected),)


def test_placeholders_are_wrapped_for_mmtag_and_for_start_and_end():
    turns = (("human", "What?\n<image>"), ("gpt", "A"), ("human", "<image> or <image>"))
    assert place_images(turns, get_template("v1_mmtag")) == (
        ("human", "<Image><image></Image>\nWhat?"),
        ("gpt", "A"),
        ("human", "<Image><image></Image> or <Image><image></Image>"),
    )
    assert place_images(turns[:1], get_template("v1"), use_start_end=True) == (
        ("human", "<im_start><image><im_end>\nWhat?"),
    )
    both = place_images(turns[:1], get_template("v0_mmtag"), use_start_end=True)
    assert both == (("human", "<Image><im_start><image><im_end></Image>\nWhat?"),)


def test_plain_keeps_only_the_image_even_where_placeholders_are_wrapped():
    turns = place_images((("human", "Say.\n<image>"), ("gpt", "dogs")), get_template("plain"), use_start_end=True)
    assert get_template("plain").with_turns(turns).render().text == "<image>dogs\n"


def test_chat_is_the_tokenizers_own_template_with_answers_and_end_tokens_supervised(toy_tokenizer_for):
    rendered = get_template("chat").with_turns(CONVERSATION).render(toy_tokenizer_for("qwen"))
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    says = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    assert rendered.text == "".join(turn.format(*output) for output in says)
    assert supervised(rendered) == ["A1<|im_end|>", "A2<|im_end|>"]
    assert not rendered.add_special_tokens


def test_chat_leaves_an_open_turn_for_the_answer_and_renders_the_system_text(toy_tokenizer_for):
    conversation = get_template("chat").with_turns((*CONVERSATION[:3], ("gpt", None)))
    conversation.system = "Be brief."
    rendered = conversation.render(toy_tokenizer_for("qwen"))
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1")
    assert rendered.text.endswith("Q2<|im_end|>\n<|im_start|>assistant\n")
    assert supervised(rendered) == ["A1<|im_end|>"]


def test_an_empty_block_of_reasoning_that_a_template_writes_belongs_to_the_prompt(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    tokenizer.chat_template = THINKING
    rendered = get_template("chat").with_turns(CONVERSATION).render(tokenizer)
    assert supervised(rendered) == ["A1<|im_end|>", "A2<|im_end|>"]
    asked = get_template("chat").with_turns((*CONVERSATION[:3], ("gpt", None))).render(tokenizer)
    assert asked.text == rendered.text[: rendered.answers[-1][0]]


@pytest.mark.parametrize("answer", ["", "A<|im_end|>B", "think", " blank ", "Q2", "line\n"])
def test_chat_spans_hold_for_awkward_answers(toy_tokenizer_for, answer):
    turns = (("human", "Q1"), ("gpt", answer), ("human", "Q2"), ("gpt", answer))
    rendered = get_template("chat").with_turns(turns).render(toy_tokenizer_for("qwen"))
    assert supervised(rendered) == [f"{answer}<|im_end|>"] * 2


def test_chat_template_that_names_bos_ends_answers_with_eos(toy_tokenizer):
    toy_tokenizer.chat_template = WITH_BOS
    rendered = get_template("chat").with_turns(CONVERSATION).render(toy_tokenizer)
    assert rendered.text == "<s>[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>"
    assert supervised(rendered) == [" A1</s>", " A2</s>"]


def test_chat_without_a_usable_template_is_refused(toy_tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        get_template("chat").with_turns(CONVERSATION).render(toy_tokenizer)
    with pytest.raises(ValueError, match="no tokenizer"):
        get_template("chat").with_turns(CONVERSATION).render()
    with pytest.raises(ValueError, match=r"render\(tokenizer\)"):
        get_template("chat").with_turns(CONVERSATION).get_prompt()
    toy_tokenizer.chat_template = COUNTING
    with pytest.raises(ValueError, match="answer cannot be found"):
        get_template("chat").with_turns(CONVERSATION).render(toy_tokenizer)


def test_an_image_in_the_first_message_is_a_placeholder_in_front():
    image = Image.new("RGB", (20, 10), "red")
    conversation = get_template("llava_v1")
    conversation.append_message("USER", ("Which <image> colour?", image, "Pad"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == f"{HUMAN} USER: <image>\nWhich  colour? ASSISTANT:"
    assert conversation.dict()["messages"][0] == ["USER", "Which <image> colour?"]
    (shown,) = conversation.get_images(return_pil=True)
    assert shown.size == (20, 20)
    assert shown.getpixel((0, 0)) == (122, 116, 104)
    assert shown.getpixel((0, 10)) == (255, 0, 0)
    tagged = get_template("v1_mmtag")
    tagged.append_message("USER", ("Which?", image, "Crop"))
    assert tagged.get_prompt() == f"{MMTAG} USER: <Image><image></Image> ASSISTANT: Received.</s>USER: Which? "


def test_demo_images_are_made_smaller_and_shown_as_html():
    import base64

    conversation = get_template("llava_v1")
    conversation.append_message("USER", ("Which?", Image.new("RGBA", (2688, 1344), "blue"), "Default"))
    conversation.append_message("ASSISTANT", "Blue.")
    with Image.open(io.BytesIO(base64.b64decode(conversation.get_images()[0]))) as shown:
        assert shown.size == (1344, 672)
    ((question, answer),) = conversation.to_gradio_chatbot()
    assert question.startswith('<img src="data:image/jpeg;base64,')
    assert question.endswith("Which?")
    assert answer == "Blue."
    assert conversation.process_image(Image.new("RGB", (5, 9)), "Resize", return_pil=True).size == (336, 336)
    with pytest.raises(ValueError, match="unknown image_process_mode 'Zoom'; known: Default, Crop, Pad, Resize"):
        conversation.process_image(Image.new("RGB", (5, 9)), "Zoom")
