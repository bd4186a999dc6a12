"""The end token of a prompt format: one token of the tokenizer, or refused with what fits; known wherever it stops."""

import pytest
from toy_chat_templates import CASES
from transformers import GenerationConfig

from llava_lite.conversation import get_template
from llava_lite.conversation.end_tokens import (
    EndToken,
    add_end_token,
    check_end_token,
    end_ids,
    get_end_token,
    one_token,
    stop_arguments,
)

TEXT = ["default", "v0", "llava_v0", "v0_mmtag", "plain", "v0_plain", "accessory", "accessory_multimodal"]
# Templates whose answers end with the tokenizer's own end of text.
OWN = ["alpaca", "alpaca_short", "question_generation", "caption", "bare"]
OWN += ["accessory_llava_v1", "accessory_vicuna", "bair_v1"]
# Template -> the end token that it was published with.
ENDS = dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag", "mistral", "minicpm"), "</s>")
ENDS |= dict.fromkeys(("llama_2", "llava_llama_2", "mistral_instruct"), "</s>")
ENDS |= dict.fromkeys(("chatml_direct", "mistral_direct", "mpt"), "<|im_end|>")
ENDS |= dict.fromkeys(("phi", "qwen", "stablelm"), "<|endoftext|>") | {"openchat": "<|end_of_turn|>"}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
def test_a_template_fits_where_its_end_token_is_one_token(toy_tokenizer_for, name, kind):
    tokenizer = toy_tokenizer_for(kind)
    end, template = ENDS[name], get_template(name)
    assert get_end_token(template, tokenizer).text == end
    if end in tokenizer.get_vocab():
        assert get_end_token(template, tokenizer).ids == (tokenizer.convert_tokens_to_ids(end),)
        check_end_token(template, tokenizer, name)
        return
    assert get_end_token(template, tokenizer).ids == ()
    with pytest.raises(ValueError, match=f"--version {name} ends an answer with .* not one token of this tokenizer"):
        check_end_token(template, tokenizer, name)
    tokenizer.add_tokens([end], special_tokens=True)
    check_end_token(template, tokenizer, name)


def test_refusal_names_the_templates_that_fit_and_chat_where_the_tokenizer_has_one(toy_tokenizer_for):
    fits = "chatml_direct, mistral_direct, mpt, phi, qwen, stablelm"
    own = "alpaca, alpaca_short, question_generation, caption, bare, accessory_llava_v1, accessory_vicuna, bair_v1"
    with pytest.raises(
        ValueError, match=rf"'</s>', which is .* but \d+: .* fit it: {fits}, chat, {own}; with the text '###'"
    ):
        check_end_token(get_template("v1"), toy_tokenizer_for("qwen"), "v1")
    with pytest.raises(
        ValueError, match=rf"fit it: {fits}, {own}; with the text '###' as end token default, v0, llava_v0, "
    ):
        check_end_token(get_template("v1"), toy_tokenizer_for("gpt2"), "v1")
    broken = toy_tokenizer_for("qwen")
    broken.chat_template = CASES["solar: no end token at all"].template
    with pytest.raises(ValueError, match=f"fit it: {fits}, {own}; with the text"):
        check_end_token(get_template("v1"), broken, "v1")


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_textual_ends_fit_every_tokenizer_and_are_no_ids(toy_tokenizer_for, name, kind):
    end = get_end_token(get_template(name), toy_tokenizer_for(kind))
    assert end == ("\n" if "plain" in name else "###", ())
    check_end_token(get_template(name), toy_tokenizer_for(kind), name)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
def test_the_end_of_text_of_a_tokenizer_ends_the_answers_of_instructions(toy_tokenizer_for, name, kind):
    tokenizer = toy_tokenizer_for(kind)
    assert get_end_token(get_template(name), tokenizer) == (tokenizer.eos_token, (tokenizer.eos_token_id,))
    check_end_token(get_template(name), tokenizer, name)


def test_chat_is_refused_once_where_its_template_shows_no_answers(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    check_end_token(get_template("chat"), tokenizer, "chat")
    with pytest.raises(ValueError, match="--version chat: the template 'chat' needs a tokenizer with a chat template"):
        check_end_token(get_template("chat"), toy_tokenizer_for("gpt2"), "chat")
    tokenizer.chat_template = CASES["solar: no end token at all"].template
    with pytest.raises(ValueError, match=r"has no end token: .*--chat_end_token <\|im_end\|>.*Templates that"):
        check_end_token(get_template("chat"), tokenizer, "chat")
    check_end_token(get_template("chat", chat_end_token="<|endoftext|>"), tokenizer, "chat")
    with pytest.raises(ValueError, match="--chat_end_token </s> is not a token of this tokenizer"):
        check_end_token(get_template("chat", chat_end_token="</s>"), tokenizer, "chat")


def test_a_template_that_is_refused_for_reasoning_still_has_an_end_token(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    tokenizer.chat_template = CASES["qwq: the prompt opens reasoning that answers lack"].template
    check_end_token(get_template("chat"), tokenizer, "chat")
    assert get_end_token(get_template("chat"), tokenizer) == ("<|im_end|>", (tokenizer.eos_token_id,))


def test_end_tokens_of_a_chat_template_are_those_of_earlier_answers_too(toy_tokenizer_for):
    case = next(case for name, case in CASES.items() if name.startswith("gpt-oss"))
    tokenizer = toy_tokenizer_for("gpt2")
    tokenizer.add_tokens(list(case.tokens), special_tokens=True)
    tokenizer.chat_template = case.template
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|end|>")]
    assert get_end_token(get_template("chat"), tokenizer) == ("<|return|>", tuple(ids))
    two = next(case for name, case in CASES.items() if name.startswith("command r7b"))
    tokenizer.add_tokens(list(two.tokens), special_tokens=True)
    tokenizer.chat_template = two.template
    last = tokenizer.convert_tokens_to_ids("<|END_OF_TURN_TOKEN|>")
    assert get_end_token(get_template("chat"), tokenizer) == ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", (last,))


def test_an_end_token_is_added_to_the_ids_that_are_there(toy_tokenizer):
    config = GenerationConfig(eos_token_id=[7, 2])
    add_end_token(config, EndToken("<|im_end|>", (9,)), toy_tokenizer)
    assert config.eos_token_id == [7, 2, 9]
    config = GenerationConfig(eos_token_id=None)
    add_end_token(config, EndToken("</s>", (2,)), toy_tokenizer)
    assert config.eos_token_id == toy_tokenizer.eos_token_id == 2
    toy_tokenizer.eos_token = None
    config = GenerationConfig(eos_token_id=None)
    add_end_token(config, EndToken(""), toy_tokenizer)
    assert config.eos_token_id is None
    assert end_ids(GenerationConfig(eos_token_id=5), toy_tokenizer) == [5]


def test_generation_stops_at_a_textual_end_by_its_text(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("gpt2")
    assert stop_arguments(EndToken("###"), [0], tokenizer) == {
        "eos_token_id": [0],
        "stop_strings": ["###"],
        "tokenizer": tokenizer,
    }
    assert stop_arguments(EndToken("<|im_end|>", (2,)), [0], tokenizer) == {"eos_token_id": [0, 2]}
    assert stop_arguments(EndToken(""), [0], tokenizer) == {"eos_token_id": [0]}


def test_an_end_token_is_one_token_only_where_it_is_one_after_text(toy_tokenizer_for):
    assert one_token("</s>", toy_tokenizer_for("llama")) == 2
    assert one_token("</s>", toy_tokenizer_for("gpt2")) is None
    assert one_token("", toy_tokenizer_for("gpt2")) is None
