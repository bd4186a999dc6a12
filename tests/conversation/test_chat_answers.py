"""What of a chat template's text is supervised, over templates of every structure and awkward conversations."""

import re
from datetime import datetime

import pytest
from tokenizers import AddedToken
from toy_chat_templates import CASES, CHATML_LOOP, CHATML_PROMPT, IM, QWEN3, REASONING, with_template

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Rendered, get_template
from llava_lite.conversation.tokenize import tokenize_rendered
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.records.record import Record

KINDS = ("gpt2", "llama")
RIGHT = [name for name, case in CASES.items() if not case.refused]
REFUSED = [name for name, case in CASES.items() if case.refused]
MOMENT = datetime(2024, 7, 26, 12)
# None of them is a part of another, of a question or of a template.
QUESTIONS = ("Why one?", "Why two?", "Why three?", "Why four?")
ANSWERS = ("Because one.", "Because two.", "Because three.", "Because four.")


@pytest.fixture
def tokenizer_of(toy_tokenizer_for):
    """Return a function: case, kind of tokenizer -> a tokenizer with its chat template."""

    def make(case, kind="gpt2"):
        return with_template(toy_tokenizer_for(kind), case)

    return make


def render(tokenizer, answers, system=None, questions=QUESTIONS, **options):
    turns = [
        turn for pair in zip(questions, answers, strict=False) for turn in zip(("human", "gpt"), pair, strict=True)
    ]
    return get_template("chat", moment=MOMENT, **options).with_turns(turns, system).render(tokenizer)


def supervised(rendered):
    return [rendered.text[start:end] for start, end in rendered.answers]


def truth(case, answers):
    """Return what is supervised of answers, as the case lists by hand."""
    patterns = [case.inner] * (len(answers) - 1) + [case.last]
    return [pattern.replace("A", answer, 1) for pattern, answer in zip(patterns, answers, strict=True)]


def with_date(text):
    return text.replace("LONGDATE", "July 26, 2024").replace("DATE", "26 Jul 2024")


def pieces(tokenizer, ids, labels):
    """Return the texts of the runs of supervised tokens."""
    runs, run = [], []
    for token, label in [*zip(ids, labels, strict=True), (None, IGNORE_INDEX)]:
        if label != IGNORE_INDEX:
            assert label == token
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def letters(text):
    """Return a text without spaces, of which a SentencePiece tokenizer adds some."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RIGHT)
def test_each_answer_with_its_end_token_is_supervised_at_every_turn_and_nothing_else(tokenizer_of, name, kind):
    case = CASES[name]
    tokenizer = tokenizer_of(case, kind)
    for num_turns in range(1, 2 if case.one_turn else 5):
        for system in (None, "S1") if not case.no_system else (None,):
            answers = ANSWERS[:num_turns]
            rendered = render(tokenizer, answers, system)
            assert supervised(rendered) == truth(case, answers)
            ids, labels = tokenize_rendered(rendered, tokenizer, has_image=False)
            found = pieces(tokenizer, ids, labels)
            assert list(map(letters, found)) == list(map(letters, truth(case, answers)))
            if kind == "gpt2":
                assert tokenizer.decode(ids) == rendered.text
            begins = with_date(case.system) if system else with_date(case.prompt).split("Q1")[0]
            assert rendered.text.startswith(begins)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_generation_prompt_ends_with_the_tokens_that_answers_were_trained_after(tokenizer_of, name, kind):
    case = CASES[name]
    tokenizer = tokenizer_of(case, kind)
    assert render(tokenizer, [None], questions=["Q1"]).text == with_date(case.prompt)
    for num_turns in range(1, 2 if case.one_turn else 4):
        for system in (None, "S1") if not case.no_system else (None,):
            ids, labels = tokenize_rendered(render(tokenizer, ANSWERS[:num_turns], system), tokenizer, False)
            last = len(labels) - next(i for i, label in enumerate(labels[::-1]) if label != IGNORE_INDEX)
            start = next(i for i in range(last, -1, -1) if labels[i - 1] == IGNORE_INDEX)
            asked = render(tokenizer, [*ANSWERS[: num_turns - 1], None], system)
            assert tokenize_rendered(asked, tokenizer, False)[0] == ids[:start]


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_answers_cannot_be_located_is_refused_with_the_reason(tokenizer_of, name):
    case = CASES[name]
    with pytest.raises(ValueError, match=re.escape(case.refused)):
        render(tokenizer_of(case), ["Because."])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.no_system])
def test_a_system_text_that_training_would_lose_is_refused(tokenizer_of, name):
    with pytest.raises(ValueError, match=re.escape(CASES[name].no_system)):
        render(tokenizer_of(CASES[name]), ["Because."], "S1")


@pytest.mark.parametrize("name", RIGHT)
def test_an_empty_system_text_is_written_where_a_template_keeps_one_and_is_not_its_default(tokenizer_of, name):
    case, tokenizer = CASES[name], tokenizer_of(CASES[name])
    begins = with_date(case.prompt).split("Q1")[0] if case.no_system else with_date(case.system).replace("S1", "", 1)
    for answers in (["Because."], [None]):
        rendered = render(tokenizer, answers, "")
        assert rendered.text.startswith(begins)
        assert supervised(rendered) == (truth(case, answers) if answers[0] else [])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.one_turn])
def test_a_second_question_is_refused_where_a_template_has_room_for_one(tokenizer_of, name):
    with pytest.raises(ValueError, match=re.escape(CASES[name].one_turn)):
        render(tokenizer_of(CASES[name]), ANSWERS[:2])


AWKWARD = {
    "empty": ("", "", ""),
    "one letter": ("a", "b", "a"),
    "the same": ("yes", "yes", "yes"),
    "spaces around": (" lead", "trail  ", "\n both \n"),
    "the question": (QUESTIONS[0], f"You ask: {QUESTIONS[0]}", f"{QUESTIONS[1]} {QUESTIONS[2]}"),
    "made-up words": ("answer0000zqj", "answer0001zqj ask0000zqj", "systemzqj"),
    "letters of the world": ("\u6f22\u5b57\u3002", "\u00e9e\u0301", "\U0001f642\u200d!"),
    "lines": ("one\n\ntwo", "```\ncode\n```\n- a", "\ttab\r\nend"),
    "words of templates": ("[INST] <|user|> ### User:", "USER: a ASSISTANT: b", "model\n\nuser\n"),
}


@pytest.mark.parametrize("awkward", AWKWARD)
@pytest.mark.parametrize("name", RIGHT)
def test_awkward_answers_come_out_as_written_less_what_a_template_strips(tokenizer_of, name, awkward):
    case = CASES[name]
    tokenizer = tokenizer_of(case)
    answers = AWKWARD[awkward][: 1 if case.one_turn else 3]
    rendered = render(tokenizer, answers)
    answers = [answer.strip() if case.strips else answer for answer in answers]
    assert supervised(rendered) == truth(case, answers)
    ids, labels = tokenize_rendered(rendered, tokenizer, False)
    assert pieces(tokenizer, ids, labels) == truth(case, answers)


@pytest.mark.parametrize("name", [name for name in RIGHT if "</think>" not in CASES[name].prompt])
def test_end_tokens_and_glue_inside_texts_move_no_span(tokenizer_of, name):
    case = CASES[name]
    tokenizer = tokenizer_of(case)
    end, glue = case.last.replace("A", "", 1).strip(), with_date(case.prompt).partition("Q1")[2].strip()
    answers = [f"{end} a", f"b {glue} c", f"{end}{end}"][: 1 if case.one_turn else 3]
    questions = [f"{glue} x {end}", f"{end}", "z"]
    rendered = render(tokenizer, answers, questions=questions)
    assert supervised(rendered) == truth(case, answers)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reasoning])
def test_reasoning_of_the_last_answer_is_supervised_as_written(tokenizer_of, name):
    case = CASES[name]
    tokenizer = tokenizer_of(case)
    rendered = render(tokenizer, [REASONING])
    assert supervised(rendered) == [case.reasoning]
    asked = render(tokenizer, [None], enable_thinking=True)
    assert rendered.text.startswith(asked.text)
    assert rendered.answers[0][0] == len(asked.text)
    if not case.refused:
        assert supervised(render(tokenizer, ["Because.", REASONING]))[1] == case.reasoning


@pytest.mark.parametrize("name", ["deepseek r1, first: reasoning is taken out of every turn", "qwen3: an empty block"])
def test_reasoning_that_a_template_takes_out_is_refused(tokenizer_of, name):
    (case,) = [case for key, case in CASES.items() if key.startswith(name)]
    tokenizer = tokenizer_of(case)
    answers = [REASONING, "Because."] if "qwen3" in name else [REASONING]
    with pytest.raises(ValueError, match="reasoning"):
        render(tokenizer, answers)


def test_reasoning_without_its_line_breaks_is_supervised_as_the_template_writes_it(tokenizer_of):
    case = CASES["qwen3: an empty block of reasoning before the last answer"]
    rendered = render(tokenizer_of(case), ["<think>Hm.</think>A1"])
    assert supervised(rendered) == [f"{REASONING}<|im_end|>"]
    with pytest.raises(ValueError, match="does not write answer 1 as it is in the record"):
        render(tokenizer_of(case), ["Hm.</think>A1"])


def test_a_dated_template_writes_the_moment_of_its_options_whenever_it_is_rendered(tokenizer_of):
    tokenizer = tokenizer_of(CASES["llama3.1, a system turn with today's date"])
    conversation = get_template("chat").with_turns((("human", "Q"), ("gpt", "A")))
    assert datetime.now().strftime("Today Date: %d %b %Y") in conversation.render(tokenizer).text
    encoders = [RecordEncoder(tokenizer, get_template("chat", moment=day)) for day in (MOMENT, datetime(2024, 7, 27))]
    assert encoders[0].fingerprint != encoders[1].fingerprint
    assert encoders[0].fingerprint == RecordEncoder(tokenizer, get_template("chat", moment=MOMENT)).fingerprint
    same_day = RecordEncoder(tokenizer, get_template("chat", moment=MOMENT.replace(hour=23)))
    assert encoders[0].fingerprint == same_day.fingerprint


def test_a_given_token_ends_answers_where_a_template_writes_no_end_token(tokenizer_of):
    solar = tokenizer_of(CASES["solar: no end token at all"])
    rendered = render(solar, ["one", "two"], chat_end_token="</s>")
    assert rendered.text == (
        "### User:\nWhy one?\n\n### Assistant:\none</s>### User:\nWhy two?\n\n### Assistant:\ntwo</s>"
    )
    assert supervised(rendered) == ["one</s>", "two</s>"]
    asked = render(solar, ["one", None], chat_end_token="</s>")
    assert rendered.text.startswith(asked.text)
    glm = tokenizer_of(CASES["glm4: the next role token ends an answer"])
    assert supervised(render(glm, ["one", "two"], chat_end_token="<|endoftext|>")) == [
        "\none<|endoftext|>",
        "\ntwo<|endoftext|>",
    ]
    # The next role token is there already, but for the last answer.
    rendered = render(glm, ["one", "two"], chat_end_token="<|user|>")
    assert supervised(rendered) == ["\none<|user|>", "\ntwo<|user|>"]
    assert rendered.text.count("<|user|>") == 3
    with pytest.raises(ValueError, match=r"ends answers with '<\|im_end\|>' itself; drop --chat_end_token </s>"):
        render(tokenizer_of(CASES["chatml"]), ["one"], chat_end_token="</s>")


PLACES = {
    "chatml": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n",
    "qwen2-vl: texts and parts, an image in its own tokens": "<|im_start|>user\n<image>\nWhat?<|im_end|>\n",
    "gemma3: parts trimmed one by one, system before the first question": "user\n<image>\nWhat?<end_of_turn>",
    "idefics3: parts alone": "User:<image>What?<end_of_utterance>",
    "llava-next of mistral: images first, parts alone": "[INST] <image>\nWhat? [/INST]",
}


@pytest.mark.parametrize("name", PLACES)
def test_an_image_is_one_placeholder_in_a_question_whatever_contents_a_template_takes(tokenizer_of, name):
    tokenizer = tokenizer_of(CASES[name])
    turns = (("human", "What?\n<image>"), ("gpt", "Red."), ("human", "<image> or <image>?"), ("gpt", "Blue."))
    record = Record("r", ("a.png", "b.png", "c.png"), turns, "toy.json[0]")
    encoder = RecordEncoder(tokenizer, "chat")
    ids, labels = encoder(record)
    assert ids.count(IMAGE_TOKEN_INDEX) == 3
    output = tokenizer.decode([token if token >= 0 else tokenizer.encode("\u2603")[0] for token in ids])
    assert PLACES[name].replace("<image>", "") in output.replace(tokenizer.decode(tokenizer.encode("\u2603")[:1]), "")
    assert pieces(tokenizer, ids, labels) == truth(CASES[name], ["Red.", "Blue."])


def test_a_record_that_does_not_fit_is_named_with_the_reason(tokenizer_of):
    encoder = RecordEncoder(tokenizer_of(CASES["phi3, first: no system text, the header with the question"]), "chat")
    record = Record("r7", (), (("human", "Q"), ("gpt", "A")), "toy.json[7]", system="Be brief.")
    with pytest.raises(DataError, match=r"record 'r7' \(toy.json\[7\]\) does not fit.*leaves out a system text"):
        encoder(record)
    broken = tokenizer_of(CASES["mistral, first"]._replace(template="{{ messages[9]['content'] }}"))
    with pytest.raises(DataError, match="refuses this conversation"):
        RecordEncoder(broken, "chat")(record)


def test_a_last_question_without_an_answer_is_context(tokenizer_of):
    tokenizer = tokenizer_of(CASES["chatml"])
    conversation = get_template("chat").with_turns((("human", "Q1"), ("gpt", "A1"), ("human", "Q2")))
    rendered = conversation.render(tokenizer)
    assert supervised(rendered) == ["A1<|im_end|>"]
    assert rendered.text.endswith("<|im_start|>user\nQ2<|im_end|>\n")


def test_a_token_that_would_reach_from_the_prompt_into_an_answer_is_cut(tokenizer_of):
    tokenizer = tokenizer_of(CASES["chatml"])
    # As in Qwen's and Llama-3's vocabularies, two line breaks are one token.
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    rendered = render(tokenizer, ["\nBecause."])
    assert tokenizer.convert_tokens_to_ids("\n\n") in tokenizer(rendered.text)["input_ids"]
    ids, labels = tokenize_rendered(rendered, tokenizer, False)
    assert pieces(tokenizer, ids, labels) == ["\nBecause.<|im_end|>"]
    prompt = tokenize_rendered(render(tokenizer, [None]), tokenizer, False)[0]
    assert ids[: len(prompt)] == prompt


def test_mask_of_transformers_is_what_is_supervised_where_a_template_has_blocks(tokenizer_of):
    for name in ("blocks that hold answers and end tokens", "blocks that hold the line break too"):
        tokenizer = tokenizer_of(CASES[name])
        output = [
            {"role": role, "content": text}
            for pair in zip(QUESTIONS, ANSWERS, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        hf = tokenizer.apply_chat_template(output, return_dict=True, return_assistant_tokens_mask=True)
        ids, labels = tokenize_rendered(render(tokenizer, ANSWERS), tokenizer, False)
        assert ids == hf["input_ids"]
        assert [label != IGNORE_INDEX for label in labels] == [bool(flag) for flag in hf["assistant_masks"]]


def test_without_strictness_a_template_that_cannot_be_trained_is_still_written(tokenizer_of):
    solar = tokenizer_of(CASES["solar: no end token at all"])
    assert render(solar, ["one"], is_strict=False) == Rendered(
        "### User:\nWhy one?\n\n### Assistant:\none", (), add_special_tokens=False, cuts_prompts=True
    )
    assert render(solar, ["one", None]).text.endswith("one### User:\nWhy two?\n\n### Assistant:\n")


def test_history_with_reasoning_is_asked_as_the_template_writes_it(tokenizer_of):
    tokenizer = tokenizer_of(CASES["qwen3: an empty block of reasoning before the last answer"])
    asked = render(tokenizer, [REASONING, None])
    assert "Hm." not in asked.text
    hf = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": REASONING}]
    hf.append({"role": "user", "content": QUESTIONS[1]})
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    assert asked.text == tokenizer.apply_chat_template(hf, **options)


def test_two_tokenizers_with_the_same_template_keep_their_own_end_tokens(tokenizer_of):
    zephyr = CASES["zephyr: eos ends every turn"]
    one, other = tokenizer_of(zephyr), tokenizer_of(zephyr._replace(eos="<eos>"))
    assert supervised(render(one, ["A"])) == ["A</s>"]
    assert supervised(render(other, ["A"])) == ["A<eos>"]
    one.chat_template = CHATML_LOOP + CHATML_PROMPT
    with pytest.raises(ValueError, match="no end token that is a token of this tokenizer"):
        render(tokenizer_of(zephyr._replace(template=CHATML_LOOP + CHATML_PROMPT, tokens=()), "llama"), ["A"])
    one.add_tokens(list(IM), special_tokens=True)
    assert supervised(render(one, ["A"])) == ["A<|im_end|>"]
    one.chat_template = QWEN3.replace("THINKS", "").replace("EMPTY", "<think>\n\n")
    assert supervised(render(one, ["A"])) == ["A<|im_end|>"]
