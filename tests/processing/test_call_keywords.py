"""What a processor is given, it hands on or refuses by name; where transformers' own processor exists, both agree."""

import numpy as np
import pytest
import torch
from conftest import draw_image
from transformers import AutoProcessor
from transformers.utils import PaddingStrategy, TensorType
from transformers.utils.chat_template_utils import render_jinja_template

from llava_lite.export.convert import convert
from llava_lite.inference import load
from llava_lite.processing.call_keywords import UnknownKeyword
from llava_lite.processing.processor import LlavaLiteProcessor

DRAWN, OTHER = draw_image(1), draw_image(2)
IMAGE, WORDS = {"type": "image", "image": DRAWN}, {"type": "text", "text": "What colour is the square?"}
SHOWN = [{"role": "user", "content": [IMAGE, WORDS]}]
GREETING = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
ANSWERED = [*GREETING, {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]}]
LONG = [{"role": "user", "content": [{"type": "text", "text": "word " * 300}]}]
AGAIN = [*ANSWERED, {"role": "user", "content": [{"type": "image", "image": OTHER}, WORDS]}]
WITH_TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}{% if documents %}DOCS {{ documents[0].title }} {% endif %}"
    "{% if mood is defined %}MOOD {{ mood }} {% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking %}<think>"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def directories(toy_llm_dir, toy_tower_dir, toy_tokenizer_for, tmp_path_factory):
    """Directories of one model: ours in the format v1, and what `convert` makes of it."""
    from llava_lite.model.assemble import assemble

    root = tmp_path_factory.mktemp("keywords")
    torch.manual_seed(3)
    settings = {"mm_projector_type": "mlp2x_gelu", "conv_template": "v1"}
    model = assemble(str(toy_llm_dir("llama")), str(toy_tower_dir()), config_overrides=settings, dtype=torch.float32)
    model.save_pretrained(root / "ours")
    toy_tokenizer_for("llama").save_pretrained(root / "ours")
    convert(root / "ours", root / "theirs", report=str)
    return root / "ours", root / "theirs"


@pytest.fixture
def pair(directories):
    """(transformers' own processor, ours of the same directory, ours of the directory in our format)."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    hf = AutoProcessor.from_pretrained(directories[1])
    hf.image_processor = AutoImageProcessor.from_pretrained(directories[1], backend="pil")
    return hf, load(directories[1], device="cpu")[1], LlavaLiteProcessor.from_pretrained(directories[0])


@pytest.fixture
def chat(directories, toy_tokenizer_for):
    """A processor that asks in its tokenizer's own chat template, which reads tools and more."""
    processor = LlavaLiteProcessor.from_pretrained(directories[0], conv_template="chat")
    processor.tokenizer.chat_template = WITH_TOOLS
    return processor


CHAT_CASES = {
    "nothing": (SHOWN, {}),
    "longer": (AGAIN, {}),
    "padding=max_length": (SHOWN, {"padding": "max_length", "max_length": 80}),
    "padding=max_length of the tokenizer": (GREETING, {"padding": "max_length"}),
    "truncation": (LONG, {"truncation": True, "max_length": 40}),
    "truncation of the tokenizer": (GREETING, {"truncation": True}),
    "truncation and padding": (LONG, {"truncation": "longest_first", "padding": "max_length", "max_length": 64}),
    "two, right": ([SHOWN, GREETING], {"padding": True, "padding_side": "right"}),
    "two, left": ([SHOWN, GREETING], {"padding": "longest", "padding_side": "left"}),
    "enums": ([SHOWN, GREETING], {"padding": PaddingStrategy.LONGEST, "return_tensors": TensorType.PYTORCH}),
    "multiple": ([SHOWN, AGAIN], {"padding": True, "pad_to_multiple_of": 16}),
    "multiple without padding": (SHOWN, {"padding": False, "pad_to_multiple_of": 16}),
    "numpy": (SHOWN, {"return_tensors": "np"}),
    "lists": ([SHOWN, GREETING], {"return_tensors": None, "padding": False}),
    "no special tokens": (GREETING, {"add_special_tokens": False}),
    "no mask": (GREETING, {"return_attention_mask": False}),
    "token types": (GREETING, {"return_token_type_ids": True}),
    "in a dict": (GREETING, {"processor_kwargs": {"padding": "max_length", "max_length": 70}}),
    "in dicts": (SHOWN, {"processor_kwargs": {"text_kwargs": {"padding": "max_length", "max_length": 99}}}),
    "image setting": (SHOWN, {"do_normalize": False}),
    "image setting in a dict": (SHOWN, {"processor_kwargs": {"images_kwargs": {"do_rescale": False}}}),
    "no generation prompt": (AGAIN, {"add_generation_prompt": False}),
    "one more answer": (ANSWERED, {"add_generation_prompt": True}),
    "going on": (ANSWERED, {"add_generation_prompt": False, "continue_final_message": True}),
    "continuing a question": (GREETING, {"add_generation_prompt": False, "continue_final_message": True}),
    "two of the user": ([*GREETING, *SHOWN], {}),
    "two of the assistant": ([*ANSWERED, ANSWERED[1]], {"add_generation_prompt": False}),
    "system": ([{"role": "system", "content": "Be brief."}, *SHOWN], {}),
    "system in parts": ([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *SHOWN], {}),
}


def ids_of(batch, placeholder):
    """Return sequences of ids with -1 at images, whatever their placeholder is."""
    sequences = batch["input_ids"].tolist() if hasattr(batch["input_ids"], "tolist") else batch["input_ids"]
    return [[-1 if one == placeholder else one for one in row] for row in sequences]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", [1, 2], ids=["chat template", "v1"])
@pytest.mark.parametrize("case", CHAT_CASES)
def test_keywords_of_a_chat_do_what_they_do_in_transformers(pair, case, which):
    hf, ours = pair[0], pair[which]
    conversation, given = CHAT_CASES[case]
    # One id for padding: theirs has a token for it, ours may do without.
    ours.tokenizer.pad_token = hf.tokenizer.pad_token = "<unk>"
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"} | given
    expected, found = (one.apply_chat_template(conversation, **given) for one in (hf, ours))
    assert ids_of(found, ours.image_token_index) == ids_of(expected, hf.image_token_id)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"input_ids", "pixel_values"}:
        assert type(found[name]) is type(expected[name])
        assert np.array_equal(np.array(found[name], dtype=object), np.array(expected[name], dtype=object)), name
    if "pixel_values" in expected:
        assert type(found["pixel_values"]) is type(expected["pixel_values"])
        assert np.array_equal(np.array(found["pixel_values"]), np.array(expected["pixel_values"]))
    # The prompt itself, too.
    prompt = {key: given[key] for key in ("add_generation_prompt", "continue_final_message") if key in given}
    expected, found = (one.apply_chat_template(conversation, **prompt) for one in (hf, ours))
    assert found == expected


CALL_CASES = {
    "padding": (["<image>\nHi", "Hello there"], [DRAWN], {"padding": True}),
    "left": (["<image>\nHi", "Hello there"], [DRAWN], {"padding": True, "padding_side": "left"}),
    "text_kwargs": (["Hi", "Hello there"], None, {"text_kwargs": {"padding": True}}),
    "flat and in a dict": (["Hi", "Hello there"], None, {"text_kwargs": {"padding": True}, "padding_side": "right"}),
    "common_kwargs": (["Hi there"], None, {"common_kwargs": {"return_tensors": "pt"}}),
    "images": ("<image>\nHi", DRAWN, {"do_center_crop": True, "do_normalize": False}),
    "another mean": ("<image>\nHi", DRAWN, {"image_mean": [0.5, 0.5, 0.5], "image_std": [1.0, 1.0, 1.0]}),
    "types of tokens": ("<image>\nHi", DRAWN, {"return_mm_token_type_ids": True}),
    "max_length": (["a b c d e f g h"], None, {"truncation": True, "max_length": 5}),
    "none is not asked for": (["Hi"], None, {"truncation": None, "max_length": None, "pad_to_multiple_of": None}),
    "empty": ([""], None, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CALL_CASES)
def test_keywords_of_a_call_do_what_they_do_in_transformers(pair, case):
    hf, ours, _ = pair
    text, images, given = CALL_CASES[case]
    ours.tokenizer.pad_token = hf.tokenizer.pad_token = "<unk>"
    given = {"padding_side": hf.tokenizer.padding_side, "return_tensors": "pt"} | given
    expected, found = (one(images=images, text=text, **given) for one in (hf, ours))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_lists_of_pixels_are_arrays(pair):
    for processor in pair:
        found = processor(images=DRAWN, text="<image>\nHi", return_tensors=None)
        assert isinstance(found["input_ids"], list)
        assert [type(one) for one in found["pixel_values"]] == [np.ndarray]


MISSPELT = [
    ({"add_generation_promt": True}, "add_generation_prompt"),
    ({"pading": True}, "padding"),
    ({"maxlength": 4}, "max_length"),
    ({"enable_thinkin": True}, None),
    ({"return_tensor": "pt"}, "return_tensors"),
    ({"do_normalise": False}, "do_normalize"),
    ({"tool": []}, "tools"),
    ({"nonsense": 1}, None),
    ({"processor_kwargs": {"pading": True}}, "padding"),
    ({"text_kwargs": {"pading": True}}, "padding"),
]


@pytest.mark.parametrize(("given", "meant"), MISSPELT, ids=str)
@pytest.mark.parametrize("which", [1, 2], ids=["chat template", "v1"])
def test_a_misspelt_keyword_of_a_chat_is_named(pair, which, given, meant):
    with pytest.raises(UnknownKeyword, match="unknown keyword") as error:
        pair[which].apply_chat_template(GREETING, tokenize=True, return_dict=True, **given)
    assert meant is None or f"Did you mean {meant!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("given", "kind", "output"),
    [
        ({"pading": True}, TypeError, "'pading'. Did you mean 'padding'"),
        ({"return_offsets_mapping": True}, TypeError, "transformers' tokenizers have it, this processor has not"),
        ({"padding": "most"}, ValueError, "unknown padding 'most'; known: True, 'longest', 'max_length', False"),
        ({"padding": 1}, ValueError, "unknown padding 1"),
        ({"truncation": "only_second"}, ValueError, "unknown truncation 'only_second'"),
        ({"padding_side": "top"}, ValueError, "unknown padding_side 'top'"),
        ({"return_tensors": "tf"}, ValueError, "unknown return_tensors 'tf'; known: 'pt', 'np', None"),
        ({"max_length": 5}, ValueError, "max_length=5 alone does nothing: give truncation=True"),
        ({"max_length": -1, "truncation": True}, ValueError, "max_length is -1"),
        ({"max_length": "5", "truncation": True}, ValueError, "max_length is '5'"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of is 0"),
        ({"padding": True, "text_kwargs": {"padding": False}}, ValueError, "padding is given twice"),
        ({"text_kwargs": True}, ValueError, "text_kwargs is a dict of keywords; got True"),
        ({"videos_kwargs": {"fps": 1}}, ValueError, "videos_kwargs: the model sees images alone"),
        ({"crop_size": {"height": 16, "width": 16}}, ValueError, "crop_size: images would have 16 pixels a side"),
        ({"padding": False}, ValueError, r"sequences of \[3, 4\] tokens make no tensor without padding"),
    ],
    ids=str,
)
def test_a_keyword_that_cannot_be_followed_is_refused(pair, given, kind, output):
    with pytest.raises(kind, match=output):
        pair[2](text=["Hi", "Hi Hello!"], **given)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (None, "needs a text"),
        ([], "there is no text"),
        ([None], "prompt 1 is None, not a text"),
        (["a", 3], "prompt 2 is a int, not a text"),
        (SHOWN, "prompt 1 is a dict, not a text. Messages go to apply_chat_template"),
        (3, "text is a int"),
        (b"a", "text is a bytes"),
        ("\ud83d", "prompt 1 has a lone surrogate"),
    ],
    ids=["None", "no prompts", "a None", "a number", "messages", "number", "bytes", "surrogate"],
)
def test_what_is_no_text_is_named(pair, text, output):
    with pytest.raises(ValueError, match=output):
        pair[2](text=text)


def rendered(template, conversation, **given):
    """Return what transformers' own renderer makes of messages whose contents are texts."""
    return render_jinja_template(conversations=[conversation], chat_template=template, **given)[0][0]


ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Go"},
]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {}}}]
TEMPLATE_CASES = {
    "tools": {"tools": TOOLS},
    "documents": {"documents": [{"title": "a", "text": "b"}]},
    "thinking": {"enable_thinking": True},
    "no thinking": {"enable_thinking": False},
    "a word of the template": {"mood": "glad"},
    "all": {"tools": TOOLS, "enable_thinking": True, "mood": "glad"},
}


@pytest.mark.parametrize("case", TEMPLATE_CASES)
def test_keywords_of_the_template_reach_it(chat, case):
    given = TEMPLATE_CASES[case] | {"add_generation_prompt": True}
    expected = rendered(WITH_TOOLS, ASKED, **given)
    assert chat.apply_chat_template(ASKED, **given) == expected
    ids = chat.apply_chat_template(ASKED, tokenize=True, **given, padding="max_length", max_length=300)
    assert ids[0][ids[0] != chat.pad_token_id].tolist() == chat.tokenizer(expected, add_special_tokens=False).input_ids


def test_roles_and_keys_of_tools_reach_the_template(chat):
    template = WITH_TOOLS.replace("{{ m.role }}", "{{ m.role }} {{ m.tool_calls }}")
    chat.tokenizer.chat_template = template
    call = {"id": "1", "function": {"name": "get_weather", "arguments": {}}}
    conversation = [
        ASKED[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
    ]
    # transformers leaves out what is null.
    bare = [ASKED[0], {"role": "assistant", "tool_calls": [call]}, conversation[2]]
    assert chat.apply_chat_template(conversation) == rendered(template, bare)


def test_a_developer_is_the_system_where_a_template_knows_none(chat, pair):
    conversation = [{"role": "developer", "content": "Be brief."}, *ASKED]
    system = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert chat.apply_chat_template(conversation, mood="glad") == rendered(WITH_TOOLS, system, mood="glad")
    chat.tokenizer.chat_template = WITH_TOOLS + "{# developer #}"
    assert "<developer>Be brief." in chat.apply_chat_template(conversation, mood="glad")
    assert pair[2].apply_chat_template(conversation) == pair[2].apply_chat_template(system)


def test_a_named_template_of_the_tokenizer_and_a_template_of_the_caller_are_used(chat):
    chat.tokenizer.chat_template = {
        "default": WITH_TOOLS,
        "short": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    }
    assert chat.apply_chat_template(ASKED, "short") == "[Hi][Hello][Go]"
    assert chat.apply_chat_template(ASKED, "{{ messages | length }}{{ word }}", word="x") == "3x"


def test_the_message_of_a_template_is_reported(chat):
    chat.tokenizer.chat_template = "{{ raise_exception('no system, please') }}{{ mood }}"
    with pytest.raises(ValueError, match=r"refuses this conversation .*no system, please"):
        chat.apply_chat_template(ASKED, mood="glad")


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ({"tools": TOOLS}, "unknown keyword 'tools': neither the processor nor the prompt format 'v1' reads it"),
        ({"documents": [{"title": "a"}]}, "unknown keyword 'documents'"),
        ({"enable_thinking": False}, "unknown keyword 'enable_thinking'"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        ({"return_assistant_tokens_mask": True}, "needs tokenize=True and return_dict=True"),
        ({"processor_kwargs": [1]}, "processor_kwargs is a dict"),
        ({"padding": True, "processor_kwargs": {"padding": True}}, "padding is given twice"),
        ({"add_generation_prompt": TOOLS}, "tools and documents go by name"),
        ({"sanitize_control_tokens": True}, "sanitize_control_tokens is an option of transformers' own"),
    ],
    ids=str,
)
def test_what_a_named_format_cannot_follow_is_refused(pair, given, output):
    with pytest.raises(ValueError, match=output):
        pair[2].apply_chat_template(GREETING, **given)
    # Nothing is asked for by these.
    nothing = {"tools": None, "documents": [], "load_audio_from_video": False, "streamer": None}
    assert pair[2].apply_chat_template(GREETING, **nothing) == pair[2].apply_chat_template(GREETING)


MASK = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}


def masked_texts(processor, inputs, row=0):
    """Return the text of each run of tokens that are supervised as an answer."""
    ids, mask = inputs["input_ids"][row].tolist(), inputs["assistant_masks"][row].tolist()
    assert len(ids) == len(mask)
    texts, run = [], []
    for one, supervised in zip([*ids, 0], [*mask, 0], strict=True):
        if supervised:
            run.append(one)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts


def test_the_mask_of_a_named_format_is_what_training_supervises(pair):
    conversation = [*AGAIN, {"role": "assistant", "content": "blue"}]
    inputs = pair[2].apply_chat_template([conversation, GREETING, ANSWERED], **MASK, padding_side="right")
    assert masked_texts(pair[2], inputs) == ["It is red.</s>", "blue</s>"]
    assert masked_texts(pair[2], inputs, 1) == []
    assert masked_texts(pair[2], inputs, 2) == ["It is red.</s>"]
    alone = pair[2].apply_chat_template(GREETING, **MASK)
    assert alone["assistant_masks"].sum() == 0


@pytest.mark.parametrize("given", [{}, {"mood": "glad"}, {"tools": TOOLS}], ids=str)
def test_the_mask_of_a_chat_template_is_its_own(chat, given):
    conversation = [*ASKED, {"role": "assistant", "content": "Gone"}]
    inputs = chat.apply_chat_template(conversation, **MASK, **given)
    assert masked_texts(chat, inputs) == ["Hello</s>", "Gone</s>"]


def test_the_mask_of_a_chat_template_with_images_agrees_with_transformers(pair):
    hf, ours, _ = pair
    # Of a template with {% generation %} blocks; transformers masks no answer in others, without a warning.
    template = (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'image' %}<image>{% elif "
        "m.role == 'assistant' %}{% generation %}{{ p.text }}</s>{% endgeneration %}{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    conversation = [*SHOWN, ANSWERED[1]]
    found = ours.apply_chat_template(conversation, template, **MASK, return_tensors="pt")
    assert masked_texts(ours, found) == ["It is red.</s>"]
    expected = hf.apply_chat_template(conversation, chat_template=template, **MASK, return_tensors="pt")
    assert ids_of(found, ours.image_token_index) == ids_of(expected, hf.image_token_id)
    if not masked_texts(hf, expected):
        pytest.skip("this version of transformers looks for answers where they stand without images")
    assert torch.equal(found["assistant_masks"], expected["assistant_masks"])


def test_a_mask_that_cannot_be_known_is_refused(pair, chat):
    for text in ("Hi", ["Hi"]):
        with pytest.raises(ValueError, match="answers in the text of prompt 1 are not known"):
            pair[2](text=text, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="answers are known only if user and assistant alternate; got user, user"):
        pair[2].apply_chat_template([*GREETING, *GREETING], **MASK)
    with pytest.raises(ValueError, match=r"it has no \{% generation %\}"):
        chat.apply_chat_template(ASKED, "{% for m in messages %}{{ m.content }}{% endfor %}", **MASK)
    with pytest.raises(ValueError, match="exclude each other"):
        chat.apply_chat_template(ASKED, continue_final_message=True, **MASK)


def test_images_beside_the_messages_fill_the_places_without_one(pair):
    bare = [{"role": "user", "content": [{"type": "image"}, WORDS]}]
    options = {"tokenize": True, "return_dict": True}
    expected = pair[2].apply_chat_template(SHOWN, **options)
    for conversation in (bare, [{"role": "user", "content": "<image>\nWhat colour is the square?"}]):
        for images in (DRAWN, [DRAWN], [[DRAWN]], np.array(DRAWN)):
            found = pair[2].apply_chat_template(conversation, images=images, **options)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": OTHER}, WORDS]}]
    found = pair[2].apply_chat_template([two, bare], images=[DRAWN, OTHER], **options)
    order = [pair[2](images=one, text="<image>")["pixel_values"][0] for one in (DRAWN, OTHER, OTHER)]
    assert all(torch.equal(one, other) for one, other in zip(found["pixel_values"], order, strict=True))
    for images, output in (
        ([DRAWN] * 3, "3 images for 1 empty placeholders"),
        ([[DRAWN], []], "2 lists of images for 1"),
    ):
        with pytest.raises(ValueError, match=output):
            pair[2].apply_chat_template(bare, images=images, **options)
