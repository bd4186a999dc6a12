"""The end mark of a prompt format: one token of the tokenizer, or refused with what fits; known wherever it stops."""

import pytest
from toy_chat_templates import CASES
from transformers import GenerationConfig

from llava_lite.conversation import conv_templates, get_template
from llava_lite.end_marks import EndMark, add_end_mark, end_ids, end_mark_of, one_token, refuse_unfit, stop_arguments

TEXT = [name for name in conv_templates if name in ("default", "v0", "llava_v0", "v0_mmtag", "plain", "v0_plain")]
# Template -> the end mark that it was published with.
MARKS = dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag", "mistral", "minicpm"), "</s>")
MARKS |= dict.fromkeys(("llama_2", "llava_llama_2", "mistral_instruct"), "</s>")
MARKS |= dict.fromkeys(("chatml_direct", "mistral_direct", "mpt"), "<|im_end|>")
MARKS |= dict.fromkeys(("phi", "qwen", "stablelm"), "<|endoftext|>") | {"openchat": "<|end_of_turn|>"}


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
def test_a_template_fits_where_its_end_mark_is_one_token(toy_tokenizer_for, name, kind):
    tokenizer = toy_tokenizer_for(kind)
    mark, template = MARKS[name], get_template(name)
    assert end_mark_of(template, tokenizer).text == mark
    if mark in tokenizer.get_vocab():
        assert end_mark_of(template, tokenizer).ids == (tokenizer.convert_tokens_to_ids(mark),)
        refuse_unfit(template, tokenizer, name)
        return
    assert end_mark_of(template, tokenizer).ids == ()
    with pytest.raises(ValueError, match=f"--version {name} ends an answer with .* not one token of this tokenizer"):
        refuse_unfit(template, tokenizer, name)
    tokenizer.add_tokens([mark], special_tokens=True)
    refuse_unfit(template, tokenizer, name)


def test_refusal_names_the_templates_that_fit_and_chat_where_the_tokenizer_has_one(toy_tokenizer_for):
    fits = "chatml_direct, mistral_direct, mpt, phi, qwen, stablelm"
    with pytest.raises(
        ValueError, match=rf"'</s>', which is .* but \d+: .* fit it: {fits}, chat; with the text '###'"
    ):
        refuse_unfit(get_template("v1"), toy_tokenizer_for("qwen"), "v1")
    with pytest.raises(ValueError, match=rf"fit it: {fits}; with the text '###' as end mark default, v0, llava_v0, "):
        refuse_unfit(get_template("v1"), toy_tokenizer_for("gpt2"), "v1")
    broken = toy_tokenizer_for("qwen")
    broken.chat_template = CASES["solar: no end mark at all"].template
    with pytest.raises(ValueError, match=f"fit it: {fits}; with the text"):
        refuse_unfit(get_template("v1"), broken, "v1")


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_marks_of_text_fit_every_tokenizer_and_are_no_ids(toy_tokenizer_for, name, kind):
    mark = end_mark_of(get_template(name), toy_tokenizer_for(kind))
    assert mark == ("\n" if "plain" in name else "###", ())
    refuse_unfit(get_template(name), toy_tokenizer_for(kind), name)


def test_chat_is_refused_once_where_its_template_tells_no_answers(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    refuse_unfit(get_template("chat"), tokenizer, "chat")
    with pytest.raises(ValueError, match="--version chat: the template 'chat' needs a tokenizer with a chat template"):
        refuse_unfit(get_template("chat"), toy_tokenizer_for("gpt2"), "chat")
    tokenizer.chat_template = CASES["solar: no end mark at all"].template
    with pytest.raises(ValueError, match=r"has no end mark: .*--chat_end_mark <\|im_end\|>.*Templates that"):
        refuse_unfit(get_template("chat"), tokenizer, "chat")
    refuse_unfit(get_template("chat", chat_end_mark="<|endoftext|>"), tokenizer, "chat")
    with pytest.raises(ValueError, match="--chat_end_mark </s> is no token of this tokenizer"):
        refuse_unfit(get_template("chat", chat_end_mark="</s>"), tokenizer, "chat")


def test_a_template_for_reasoning_alone_is_not_refused_as_a_whole(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    tokenizer.chat_template = CASES["qwq: the prompt opens reasoning that answers lack"].template
    refuse_unfit(get_template("chat"), tokenizer, "chat")
    assert end_mark_of(get_template("chat"), tokenizer) == ("<|im_end|>", (tokenizer.eos_token_id,))


def test_end_marks_of_a_chat_template_are_those_of_earlier_answers_too(toy_tokenizer_for):
    case = next(case for name, case in CASES.items() if name.startswith("gpt-oss"))
    tokenizer = toy_tokenizer_for("gpt2")
    tokenizer.add_tokens(list(case.tokens), special_tokens=True)
    tokenizer.chat_template = case.template
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|end|>")]
    assert end_mark_of(get_template("chat"), tokenizer) == ("<|return|>", tuple(ids))
    two = next(case for name, case in CASES.items() if name.startswith("command r7b"))
    tokenizer.add_tokens(list(two.tokens), special_tokens=True)
    tokenizer.chat_template = two.template
    last = tokenizer.convert_tokens_to_ids("<|END_OF_TURN_TOKEN|>")
    assert end_mark_of(get_template("chat"), tokenizer) == ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", (last,))


def test_an_end_mark_is_added_to_the_ids_that_are_there(toy_tokenizer):
    config = GenerationConfig(eos_token_id=[7, 2])
    add_end_mark(config, EndMark("<|im_end|>", (9,)), toy_tokenizer)
    assert config.eos_token_id == [7, 2, 9]
    config = GenerationConfig(eos_token_id=None)
    add_end_mark(config, EndMark("</s>", (2,)), toy_tokenizer)
    assert config.eos_token_id == toy_tokenizer.eos_token_id == 2
    toy_tokenizer.eos_token = None
    config = GenerationConfig(eos_token_id=None)
    add_end_mark(config, EndMark(""), toy_tokenizer)
    assert config.eos_token_id is None
    assert end_ids(GenerationConfig(eos_token_id=5), toy_tokenizer) == [5]


def test_generation_stops_at_a_mark_of_text_by_its_words(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("gpt2")
    assert stop_arguments(EndMark("###"), [0], tokenizer) == {
        "eos_token_id": [0],
        "stop_strings": ["###"],
        "tokenizer": tokenizer,
    }
    assert stop_arguments(EndMark("<|im_end|>", (2,)), [0], tokenizer) == {"eos_token_id": [0, 2]}
    assert stop_arguments(EndMark(""), [0], tokenizer) == {"eos_token_id": [0]}


def test_a_mark_is_one_token_only_where_it_is_one_behind_text(toy_tokenizer_for):
    assert one_token("</s>", toy_tokenizer_for("llama")) == 2
    assert one_token("</s>", toy_tokenizer_for("gpt2")) is None
    assert one_token("", toy_tokenizer_for("gpt2")) is None
