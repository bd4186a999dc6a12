"""Special tokens that are spelled in questions and answers: counted, tokens by default, text if so chosen."""

import pytest
from tokenizers import AddedToken

from llava_lite.constants import DEFAULT_IM_START_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import PromptOptions, get_template
from llava_lite.conversation.special_tokens import Fence, special_words
from llava_lite.conversation.tokenize import tokenize_rendered
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.records.record import Record

TURNS = (("human", "Is </s> an end? <|im_end|>"), ("gpt", "</s> is one, <|im_end|>too."), ("human", "Q"), ("gpt", "A"))
# Template, kind of tokenizer, its end token.
FORMATS = [("v1", "llama", "</s>"), ("llava_llama_2", "llama", "</s>"), ("chat", "qwen", "<|im_end|>")]
FORMATS += [("mpt", "qwen", "<|im_end|>"), ("llava_v0", "llama", "###")]


@pytest.fixture
def tokenizer_for(toy_tokenizer_for):
    """Return a function: kind -> a tokenizer that has both end tokens as tokens."""

    def make(kind):
        tokenizer = toy_tokenizer_for(kind)
        tokenizer.add_tokens(["</s>", "<|im_end|>"], special_tokens=True)
        return tokenizer

    return make


def encode(tokenizer, name, special_tokens_in_text, turns=TURNS, images=(), **options):
    template = get_template(name, special_tokens_in_text=special_tokens_in_text)
    return RecordEncoder(tokenizer, template, **options)(Record("r", images, turns, "toy.json[0]"))


def text_of(tokenizer, ids):
    return "".join(tokenizer.decode(ids, skip_special_tokens=False).split())


@pytest.mark.parametrize(("name", "kind", "end"), FORMATS)
def test_special_tokens_as_text_are_no_tokens_and_the_end_tokens_still_are(tokenizer_for, name, kind, end):
    tokenizer = tokenizer_for(kind)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")]
    plain = (("human", "Q"), ("gpt", "A"), ("human", "Q"), ("gpt", "A"))
    own = [token for token in encode(tokenizer, name, "text", plain)[0] if token in ends]
    ids, labels = encode(tokenizer, name, "text")
    assert [token for token in ids if token in ends] == own
    as_tokens, their_labels = encode(tokenizer, name, "token")
    assert len([token for token in as_tokens if token in ends]) == len(own) + 4
    # The same characters, the same of them supervised.
    assert text_of(tokenizer, ids) == text_of(tokenizer, as_tokens)
    output = [[token for token in row if token != IGNORE_INDEX] for row in (labels, their_labels)]
    assert text_of(tokenizer, output[0]) == text_of(tokenizer, output[1])
    assert text_of(tokenizer, output[0]).replace("\u2581", "") == f"</s>isone,<|im_end|>too.{end}A{end}"


def test_text_is_encoded_without_a_space_of_its_own(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    ids, _ = encode(tokenizer, "v1", "text", (("human", "a</s>b"), ("gpt", "c")))
    assert tokenizer.decode(ids).endswith("USER: a</s>b ASSISTANT: c</s>")
    assert ids.count(tokenizer.eos_token_id) == 1


def test_words_that_are_no_special_tokens_stay_tokens(tokenizer_for):
    tokenizer = tokenizer_for("qwen")
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    words = special_words(tokenizer)
    assert words.findall("<think> </s> <|im_end|> <image>") == ["</s>", "<|im_end|>"]
    tokenizer.add_tokens([AddedToken("[end]", special=False)])
    assert special_words(tokenizer, ("[end]", "no token")).findall("[end] no token <think>") == ["[end]"]
    ids, _ = encode(tokenizer, "chat", "text", (("human", "Q"), ("gpt", "<think>\nHm.\n</think>\n\n</s>")))
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids


def test_image_placeholders_and_their_frames_stay_what_they_are(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    turns = (("human", "<image>\nWhat </s>?"), ("gpt", "A"))
    ids, _ = encode(tokenizer, "v1", "text", turns, ("a.png",), mm_use_im_start_end=True)
    at = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[at - 1] == tokenizer.convert_tokens_to_ids(DEFAULT_IM_START_TOKEN)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_system_text_is_encoded_as_text_and_its_opening_is_not(tokenizer_for):
    tokenizer = tokenizer_for("qwen")
    for name in ("mpt", "chat"):
        template = get_template(name, special_tokens_in_text="text").with_turns(TURNS[2:], "<|im_end|> or </s>.")
        ids, _ = tokenize_rendered(template.render(tokenizer), tokenizer, False)
        assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert tokenizer.convert_tokens_to_ids("</s>") not in ids
        # Those of the system turn, of the question and of the answer.
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
        assert tokenizer.decode(ids).startswith("<|im_start|>system\n<|im_end|> or </s>.<|im_end|>")


def test_a_question_is_read_as_in_training(tokenizer_for):
    tokenizer = tokenizer_for("qwen")
    ids, labels = encode(tokenizer, "chat", "text", TURNS[:2])
    conversation = get_template("chat", special_tokens_in_text="text").with_turns((TURNS[0], ("gpt", None)))
    asked, _ = tokenize_rendered(conversation.render(tokenizer), tokenizer, False)
    assert asked == ids[: next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)]


def test_special_tokens_are_counted_and_the_setting_is_part_of_the_fingerprint(tokenizer_for):
    tokenizer = tokenizer_for("qwen")
    record = Record("r", (), TURNS, "toy.json[0]", system="</s>")
    encoders = [
        RecordEncoder(tokenizer, get_template("chat", special_tokens_in_text=setting)) for setting in ("token", "text")
    ]
    assert [encoder.measure(record).num_special for encoder in encoders] == [5, 5]
    assert encoders[0].fingerprint != encoders[1].fingerprint
    assert encoders[0].measure(record._replace(turns=TURNS[2:], system=None)).num_special == 0


def test_a_special_token_of_one_letter_cannot_be_text(tokenizer_for):
    tokenizer = tokenizer_for("qwen")
    tokenizer.add_tokens(["\u2603"], special_tokens=True)
    with pytest.raises(ValueError, match="cannot be encoded as text by this tokenizer"):
        encode(tokenizer, "chat", "text", (("human", "\u2603?"), ("gpt", "A")))


def test_fences_are_characters_that_no_text_has(tokenizer_for):
    fence = Fence.around(["\ue000", "\ue002"])
    assert fence == ("\ue001", "\ue003")
    text = fence.put("a</s>b", special_words(tokenizer_for("llama")))
    assert fence.take(text, [(0, len(text))]) == ("a</s>b", [(0, 6)], [(1, 5)])
    with pytest.raises(ValueError, match="changes a special token in a text"):
        fence.take("\ue001</s>", ())
    with pytest.raises(ValueError, match="needs the tokenizer"):
        get_template("v1", special_tokens_in_text="text").with_turns(TURNS).render()
    assert PromptOptions().special_tokens_in_text == "token"
