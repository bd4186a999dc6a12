"""Ids are LLaVA's and labels are the answers, on random conversations of every template."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import Rendered, conv_templates, get_template
from llava_lite.conversation.images import place_images
from llava_lite.conversation.tokenize import tokenize_rendered, truncate_example
from llava_lite.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token

WORDS = [
    *("the", "square", "is", "red", "What?", "a.", ",", "12", "naïve", "猫", "🐈", "é", "'", '"', ":", "▁", "three"),
    *(
        "ASSISTANT",
        " ASSISTANT: ",
        "USER:",
        "[/INST]",
        "[INST]",
        "<<SYS>>",
        "Human:",
        "###",
        "<Image>",
        "<image",
        "picture",
    ),
    *("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_end|>", "\t", "\n", "\n\n", " ", ""),
]
CLEAN_WORDS = ["the", "square", "is", "red", "and", "blue", "circles", "picture", "What", "three", "?", ".", ","]
KINDS = ("llama", "unlegacy", "gpt2", "qwen")


def unlegacy_tokenizer():
    """Return a Llama-like tokenizer that puts a space before the first word alone, not after special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([" ".join(CLEAN_WORDS) + " USER: ASSISTANT: assistant"] * 20, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    )


@pytest.fixture
def tokenizer_for(toy_tokenizer_for):
    return lambda kind: unlegacy_tokenizer() if kind == "unlegacy" else toy_tokenizer_for(kind)


def random_turns(rng, words, num_images=0):
    """Return 1 to 4 rounds of random words, with image placeholders anywhere in the questions."""
    turns = [[rng.choice(words) for _ in range(rng.randint(1, 12))] for _ in range(2 * rng.randint(1, 4))]
    for _ in range(num_images):
        question = rng.choice(turns[::2])
        question.insert(rng.randint(0, len(question)), "<image>")
    texts = [rng.choice([" ", " ", ""]).join(turn) for turn in turns]
    return tuple((("human", "gpt")[i % 2], text) for i, text in enumerate(texts))


def reference_ids(prompt, tokenizer):
    """LLaVA's rule: every chunk with its special tokens, BOS of the first kept, -200 between chunks."""
    chunks = [tokenizer(chunk)["input_ids"] for chunk in prompt.split("<image>")]
    has_bos = bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id
    ids = [tokenizer.bos_token_id] if has_bos else []
    for i, chunk in enumerate(chunks):
        ids += ([IMAGE_TOKEN_INDEX] if i else []) + chunk[int(has_bos) :]
    return ids


INSTRUCTIONS = ("alpaca", "alpaca_short", "question_generation", "caption", "bare")
DIALOGUES = ("accessory_llava_v1", "accessory_vicuna", "bair_v1")


def reference_labels(prompt, answers, tokenizer, has_image):
    """Ask the tokenizer, character by character of each answer, which token it went into."""
    inside = {at for span in answers for at in range(*span)}
    labels = [] if tokenizer.bos_token_id is None else [IGNORE_INDEX]
    start = 0
    for i, chunk in enumerate(prompt.split("<image>") if has_image else [prompt]):
        labels += [IGNORE_INDEX] if i else []
        encoding = tokenizer.backend_tokenizer.encode(chunk, add_special_tokens=False)
        hit = {encoding.char_to_token(at) for at in range(len(chunk)) if start + at in inside}
        # The bytes of one character are tokens at one place, of which char_to_token names the first.
        places = {encoding.offsets[token] for token in hit if token is not None}
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        labels += [token if place in places else IGNORE_INDEX for token, place in pairs]
        start += len(chunk) + len("<image>")
    return labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_prompt_ids_are_those_of_llava(tokenizer_for, kind, num_images):
    tokenizer, rng = tokenizer_for(kind), random.Random(num_images)
    for _ in range(100):
        prompt = get_template("v1").with_turns(random_turns(rng, WORDS, num_images)).get_prompt()
        ids = tokenizer_image_token(prompt, tokenizer)
        assert ids == reference_ids(prompt, tokenizer)
        assert ids.count(IMAGE_TOKEN_INDEX) == num_images
    tensor = tokenizer_image_token(prompt, tokenizer, image_token_index=7, return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == [7 if token == IMAGE_TOKEN_INDEX else token for token in ids]


def test_unknown_kind_of_tensor_is_refused(toy_tokenizer):
    with pytest.raises(ValueError, match="unsupported return_tensors 'np'"):
        tokenizer_image_token("Q", toy_tokenizer, return_tensors="np")


@pytest.mark.parametrize("kind", KINDS)
# The text of `bare` is the question, which may begin with the text of BOS.
@pytest.mark.parametrize("name", [name for name in conv_templates if name not in ("chat", "bare")])
def test_answer_tokens_and_only_those_are_supervised(tokenizer_for, kind, name):
    tokenizer, rng = tokenizer_for(kind), random.Random(name)
    for _ in range(30):
        num_images = rng.choice([0, 1, 2]) if "plain" not in name else 1
        template = get_template(name)
        turns = random_turns(rng, WORDS, num_images)
        if num_images:
            turns = place_images(turns, template)
        rendered = template.with_turns(turns).render()
        ids, labels = tokenize_rendered(rendered, tokenizer, has_image=num_images > 0)
        assert ids == reference_ids(rendered.text, tokenizer)
        assert labels == reference_labels(rendered.text, rendered.answers, tokenizer, num_images > 0)
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
# Nothing stands between question and answer in `bare`, so a token may hold letters of both, as in LLaMA2-Accessory.
@pytest.mark.parametrize("name", [name for name in conv_templates if "plain" not in name and name != "bare"])
def test_supervised_tokens_read_as_the_answers_and_their_end_tokens(tokenizer_for, kind, name):
    tokenizer, rng = tokenizer_for(kind), random.Random(name)
    if name == "chat" and kind == "gpt2":
        tokenizer.chat_template = tokenizer_for("qwen").chat_template
    end_token = {"chat": "<|im_end|>"}.get(name) or get_template(name).sep2 or get_template(name).sep
    end_token = {"accessory": "\n###", "accessory_multimodal": "\n###"}.get(name, end_token)
    if name in INSTRUCTIONS or (name in DIALOGUES and end_token == "</s>"):
        end_token = tokenizer.eos_token
    before = dict.fromkeys(("mpt", "chatml_direct", "mistral_direct", "chat", *INSTRUCTIONS), "").get(name, " ")
    after = " " if name in ("llama_2", "llava_llama_2", "mistral_instruct") else ""
    for _ in range(20):
        turns = random_turns(rng, CLEAN_WORDS)
        rendered = get_template(name).with_turns(turns).render(tokenizer)
        ids, labels = tokenize_rendered(rendered, tokenizer, has_image=False)
        answers = [text for speaker, text in turns if speaker == "gpt"]
        assert tokenizer.decode(ids) == rendered.text
        output = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
        assert output == "".join(before + answer + after + end_token for answer in answers)


@pytest.mark.parametrize("name", ["v1", "vicuna_v1", "llava_v1", "mistral", "minicpm", "llama_2", "llava_llama_2"])
def test_labels_agree_with_llavas_rule_of_two_lengths(toy_tokenizer, name):
    """LLaVA counts each round alone, which is right where a word after `</s>` is written as at the start."""
    tokenizer, rng = toy_tokenizer, random.Random(name)
    delimiter = "[/INST] " if "llama_2" in name else " ASSISTANT: "
    for i in range(200):
        num_images = i % 2
        template = get_template(name)
        turns = random_turns(rng, CLEAN_WORDS, num_images)
        turns = place_images(turns, template) if num_images else turns
        turns = tuple((speaker, " ".join(text.split(" ")) or "x") for speaker, text in turns)
        rendered = template.with_turns(turns).render()
        ids, labels = tokenize_rendered(rendered, tokenizer, has_image=bool(num_images))
        expected, start = list(ids), 1
        expected[0] = IGNORE_INDEX
        for spoken in rendered.text.split("</s>")[:-1]:
            round_len = len(reference_ids(spoken, tokenizer))
            asked_len = len(reference_ids(spoken.split(delimiter)[0] + delimiter, tokenizer)) - 2
            expected[start : start + asked_len] = [IGNORE_INDEX] * asked_len
            start += round_len
        assert start == len(ids)
        assert labels == expected


def test_supervised_tokens_of_a_conversation_that_can_be_counted_by_hand(toy_tokenizer):
    turns = (("human", "<image>\nWhat?"), ("gpt", "red"), ("human", "square"), ("gpt", ""))
    rendered = get_template("v1").with_turns(turns).render()
    ids, labels = tokenize_rendered(rendered, toy_tokenizer, has_image=True)
    supervised = [token for token in labels if token != IGNORE_INDEX]
    end = toy_tokenizer.eos_token_id
    assert supervised == [
        *toy_tokenizer("red", add_special_tokens=False)["input_ids"],
        end,
        *toy_tokenizer.convert_tokens_to_ids(["▁▁"] if "▁▁" in toy_tokenizer.get_vocab() else ["▁", "▁"])[-1:],
        end,
    ]
    assert ids[0] == toy_tokenizer.bos_token_id
    assert labels[0] == IGNORE_INDEX


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_image", [False, True])
def test_a_prompt_is_the_beginning_of_what_was_trained(tokenizer_for, kind, has_image):
    tokenizer, rng = tokenizer_for(kind), random.Random(5)
    for _ in range(50):
        turns = random_turns(rng, CLEAN_WORDS, int(has_image))
        ids, labels = tokenize_rendered(get_template("v1").with_turns(turns).render(), tokenizer, has_image)
        open_turns = (*turns[:-1], ("gpt", None))
        prompt, nothing = tokenize_rendered(get_template("v1").with_turns(open_turns).render(), tokenizer, has_image)
        assert prompt == ids[: len(prompt)]
        assert nothing == labels[: len(prompt)]
        assert labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize("kind", KINDS)
def test_a_placeholder_in_a_record_without_images_is_plain_text(tokenizer_for, kind):
    tokenizer = tokenizer_for(kind)
    rendered = get_template("v1").with_turns((("human", "Say <image>."), ("gpt", "<image>!"))).render()
    ids, labels = tokenize_rendered(rendered, tokenizer, has_image=False)
    assert ids == tokenizer(rendered.text)["input_ids"]
    assert IMAGE_TOKEN_INDEX not in ids
    assert "<image>!" in tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("special", [False, True])
def test_a_placeholder_that_the_tokenizer_knows_stays_plain_text_too(toy_tokenizer_for, special):
    tokenizer = toy_tokenizer_for("gpt2")
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    rendered = get_template("phi").with_turns((("human", "Say <image>."), ("gpt", "<image>! <image>"))).render()
    ids, labels = tokenize_rendered(rendered, tokenizer, has_image=False)
    assert tokenizer.convert_tokens_to_ids("<image>") not in ids
    assert tokenizer.decode(ids) == rendered.text
    assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == " <image>! <image><|endoftext|>"
    ids, labels = tokenize_rendered(rendered, tokenizer, has_image=True)
    assert ids.count(IMAGE_TOKEN_INDEX) == 3
    assert IMAGE_TOKEN_INDEX not in labels


def test_bos_is_written_once(toy_tokenizer, toy_tokenizer_for):
    bos = toy_tokenizer.bos_token_id
    assert tokenize_rendered(Rendered("<s>[INST] Q", ()), toy_tokenizer, False)[0].count(bos) == 1
    assert tokenize_rendered(Rendered("<image>Q<image>", ()), toy_tokenizer, True)[0].count(bos) == 1
    assert tokenize_rendered(Rendered("<image>", ()), toy_tokenizer, True)[0] == [bos, IMAGE_TOKEN_INDEX]
    assert bos not in tokenize_rendered(Rendered("Q", (), add_special_tokens=False), toy_tokenizer, False)[0]
    assert tokenize_rendered(Rendered("<image>", ()), toy_tokenizer_for("gpt2"), True)[0] == [IMAGE_TOKEN_INDEX]


def test_chat_ids_are_those_of_the_tokenizers_own_template(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    turns = (("human", "What colour?"), ("gpt", "red"), ("human", "Why?"), ("gpt", "It is."))
    messages = [{"role": {"human": "user"}.get(who, "assistant"), "content": text} for who, text in turns]
    ids, _ = tokenize_rendered(get_template("chat").with_turns(turns).render(tokenizer), tokenizer, False)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def test_a_token_that_reaches_into_the_answer_is_supervised(toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("gpt2")
    text = "square" + "x"
    ids, labels = tokenize_rendered(Rendered(text, ((5, 7),)), tokenizer, False)
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert [label != IGNORE_INDEX for label in labels] == [end > 5 for _, end in spans]
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer does not return the characters"):
        tokenize_rendered(Rendered("Q", ()), ByT5Tokenizer(), False)


def expanded(*lengths):
    """Return ids where a negative length is an image of so many features, with labels equal to the ids."""
    ids = []
    for length in lengths:
        ids += [IMAGE_TOKEN_INDEX] * -length if length < 0 else list(range(1, length + 1))
    return ids, list(ids)


def test_a_short_example_is_not_cut():
    ids, labels = expanded(2, -4, 3)
    assert truncate_example(ids, labels, 9, [4]) == (ids, labels, 0)


def test_text_is_cut_at_the_end():
    ids, labels = expanded(2, -4, 3)
    assert truncate_example(ids, labels, 7, [4]) == (ids[:7], labels[:7], 0)
    assert truncate_example(ids, labels, 6, [4]) == (ids[:6], labels[:6], 0)


def test_complete_images_after_the_cut_are_counted():
    ids, labels = expanded(2, -4, 3, -4, -4, 1)
    assert truncate_example(ids, labels, 8, [4, 4, 4])[2] == 2
    assert truncate_example(ids, labels, 13, [4, 4, 4])[2] == 1
    assert truncate_example(ids, labels, 2, [4, 4, 4])[2] == 3
    assert truncate_example(ids, labels, 8, [4, 8])[2] == 1
    tensors = truncate_example(torch.tensor(ids), torch.tensor(labels), 8, [4, 4, 4])
    assert tensors[0].tolist() == ids[:8]
    assert tensors[2] == 2


def test_a_cut_through_an_image_is_refused_with_numbers():
    ids, labels = expanded(2, -4, 3)
    with pytest.raises(ValueError, match=r"9 tokens .* maximum of 5, .* leave 3 of the 4 features"):
        truncate_example(ids, labels, 5, [4])
    ids, labels = expanded(2, -4, -4)
    with pytest.raises(ValueError, match="leave 1 of the 4 features"):
        truncate_example(ids, labels, 7, [4, 4])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/data/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("out/llava-lora/checkpoint-100", "llava-lora_checkpoint-100"),
        ("checkpoint-100", "checkpoint-100"),
    ],
)
def test_model_name_is_the_last_part_of_the_path(path, name):
    assert get_model_name_from_path(path) == name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("with_prompt", [True, False])
def test_sequences_stop_at_their_keyword_and_not_at_one_in_the_prompt(tokenizer_for, kind, with_prompt):
    tokenizer = tokenizer_for(kind)
    prompt = torch.tensor([tokenizer("is ### red", add_special_tokens=False)["input_ids"]] * 3)
    prompt[:, 0] = IMAGE_TOKEN_INDEX
    criteria = KeywordsStoppingCriteria(["###", "</s>"], tokenizer, prompt)

    def is_done(*answers):
        rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        length = max(len(row) for row in rows)
        rows = torch.tensor([rows[1][:1] * (length - len(row)) + row for row in rows])
        seen = torch.where(prompt < 0, 0, prompt)
        return criteria(torch.cat([seen, rows], dim=1) if with_prompt else rows, None).tolist()

    assert is_done("blue ###", "red", "green </s>") == [True, False, True]
    assert is_done("red", "red", "red") == [False, False, False]
    empty = torch.zeros(3, 0, dtype=torch.long)
    seen = torch.cat([torch.where(prompt < 0, 0, prompt), empty], dim=1) if with_prompt else empty
    assert criteria(seen, None).tolist() == [False, False, False]
