"""The processor: prompts and images to tensors, and its files."""

import io
import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_lite.constants import IMAGE_TOKEN_INDEX
from llava_lite.conversation import conv_templates
from llava_lite.mm_utils import tokenizer_image_token
from llava_lite.processing.processor import LlavaLiteProcessor

# The toy tower sees 4 x 4 patches.
NUM_FEATURES = 16


def image(red=200, size=(40, 30)):
    image = Image.new("RGB", size, (red, 90, 10))
    image.paste((0, 0, 255), (2, 3, 12, 9))
    return image


@pytest.fixture
def processor(toy_model, toy_tokenizer, toy_tower_dir):
    from llava_lite.media.preprocess import load_image_processor

    model = toy_model(conv_template="v1")
    return LlavaLiteProcessor.from_config(model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip")))


@pytest.fixture
def directory(toy_model, toy_tokenizer, tmp_path):
    """A directory as LLaVA leaves it: config, weights and tokenizer, and the tower elsewhere."""
    toy_model(conv_template="llava_v1", image_aspect_ratio="pad").save_pretrained(tmp_path / "llava")
    toy_tokenizer.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_ids_are_llavas_with_each_placeholder_repeated_for_every_feature(processor, toy_tokenizer):
    prompt = "A chat USER: <image>\nWhat colour is <image> the square? ASSISTANT:"
    inputs = processor(text=prompt, images=[image(), image(90)])
    expected = []
    for token in tokenizer_image_token(prompt, toy_tokenizer):
        expected += [token] * (NUM_FEATURES if token == IMAGE_TOKEN_INDEX else 1)
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)


def test_short_sequences_are_padded_on_the_left_and_masked(processor, toy_tokenizer):
    texts = ["Hello! <image>", "How many circles are there?", "Hello!"]
    inputs = processor(text=texts, images=[[image()], None, []])
    alone = [processor(text=text, images=[image()] if "<image>" in text else None) for text in texts]
    for row, mask, single in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
        kept = single["input_ids"].shape[1]
        assert row[-kept:].tolist() == single["input_ids"][0].tolist()
        assert mask.tolist() == [0] * (len(row) - kept) + [1] * kept
        assert set(row[:-kept].tolist()) <= {toy_tokenizer.unk_token_id}
    right = processor(text=texts[1:], padding_side="right")
    assert right["attention_mask"][1].tolist()[0] == 1
    assert right["attention_mask"][1].tolist()[-1] == 0


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_texts_with_an_image_are_told_by_a_mask_where_no_placeholder_tells_them(processor, kind):
    processor.mm_injection = "adaption_prompt"
    both = processor(text=["<image>\nHello!", "Hello!"], images=[[image()], None], return_tensors=kind)
    assert [bool(one) for one in both["image_rows"]] == [True, False]
    assert IMAGE_TOKEN_INDEX not in list(both["input_ids"][0])
    alone = processor(text="Hello!", return_tensors=kind)
    assert [bool(one) for one in alone["image_rows"]] == [False]
    assert len(alone["pixel_values"]) == 0
    assert {"image_rows", "pixel_values"} <= set(processor.model_input_names)
    if kind is not None:
        assert alone["pixel_values"].shape == (0, 3, 32, 32)
    processor.image_processor = None
    assert {"pixel_values", "image_rows"}.isdisjoint(processor(text="Hello!", return_tensors=kind))
    assert "image_rows" not in processor.model_input_names


def test_pixels_are_those_of_the_image_processor(processor):
    square = processor(text="<image>", images=image())["pixel_values"]
    expected = processor.image_processor(image(), return_tensors="pt")["pixel_values"]
    assert torch.equal(square, expected)
    processor.image_aspect_ratio = "pad"
    canvas = Image.new("RGB", (40, 40), (122, 116, 104))
    canvas.paste(image(), (0, 5))
    padded = processor(text="<image>", images=image())["pixel_values"]
    assert torch.equal(padded, processor.image_processor(canvas, return_tensors="pt")["pixel_values"])


def test_path_bytes_and_pil_are_one_image(processor, tmp_path):
    image().save(tmp_path / "a.png")
    forms = [image(), tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    pixels = processor(text="<image>" * 4, images=forms)["pixel_values"]
    assert all(torch.equal(pixels[0], other) for other in pixels)


def test_images_are_rotated_upright(processor, tmp_path):
    exif = Image.Exif()
    # 6: the camera was held so that the stored image has to be rotated by 270 degrees counter-clockwise.
    exif[0x0112] = 6
    stored = image(size=(32, 48)).rotate(90, expand=True)
    stored.save(tmp_path / "turned.png", exif=exif)
    turned = processor(text="<image>", images=tmp_path / "turned.png")["pixel_values"]
    opened = processor(text="<image>", images=Image.open(tmp_path / "turned.png"))["pixel_values"]
    upright = processor(text="<image>", images=image(size=(32, 48)))["pixel_values"]
    assert torch.equal(turned, upright)
    assert torch.equal(opened, upright)


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("<image> <image>", [image()], "2 <image> placeholders in 1 texts but 1 images"),
        (["<image>", "x"], [[image(), image()], None], "1 <image> placeholders but 2 images.*Add a placeholder"),
        (["<image> what?", "x"], [[], None], "1 <image> placeholders but 0 images.*add an image"),
        ("<image>", None, "1 <image> placeholders but 0 images"),
        (["a", "b"], [[image()]], "1 lists of images for 2 texts"),
        ("<image>", b"no image", "8 bytes"),
        ("<image>", "nowhere.png", "nowhere.png"),
    ],
)
def test_placeholders_and_images_that_do_not_fit_are_refused(processor, text, images, words):
    with pytest.raises(ValueError, match=words):
        processor(text=text, images=images)


def test_a_vocabulary_id_stands_for_a_feature_where_the_checkpoint_says_so(processor, toy_tokenizer):
    toy_tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor.image_token_index = toy_tokenizer.convert_tokens_to_ids("<image>")
    ids = processor(text="Hello! <image>", images=image())["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == NUM_FEATURES
    assert min(ids) >= 0
    assert processor.decode(ids, skip_special_tokens=True).strip() == "Hello!"


def test_what_generate_returns_can_be_decoded(processor, toy_tokenizer):
    output = toy_tokenizer.encode("The square", add_special_tokens=False)
    sequences = [[1, *[IMAGE_TOKEN_INDEX] * 3, *output, 2], [0, 1, *output, 2, 2, 2]]
    sequences[1] = sequences[1] + [2] * (len(sequences[0]) - len(sequences[1]))
    sequences[0] += [2] * (len(sequences[1]) - len(sequences[0]))
    texts = processor.batch_decode(torch.tensor(sequences), skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["The square", "The square"]
    assert processor.post_process_image_text_to_text(torch.tensor(sequences)) == texts
    assert processor.decode(torch.tensor(sequences[1]), skip_special_tokens=True) == texts[1]


def test_saved_processor_comes_back_through_auto_processor(processor, toy_model, tmp_path):
    processor.image_aspect_ratio = "pad"
    processor.conv_template = "llava_v0"
    toy_model(conv_template="v1").config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaLiteProcessor
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "LlavaLiteProcessor"
    assert (loaded.conv_template, loaded.image_aspect_ratio, loaded.num_image_tokens) == ("llava_v0", "pad", 16)
    before, after = (p(text="USER: <image>\nHello!", images=image()) for p in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert LlavaLiteProcessor.from_pretrained(tmp_path, conv_template="v1").conv_template == "v1"
    with pytest.raises(ValueError, match=r"unknown conversation template 'v9'.*llava_v1"):
        LlavaLiteProcessor.from_pretrained(tmp_path, conv_template="v9")
    with pytest.raises(TypeError, match="conv_mode"):
        LlavaLiteProcessor.from_pretrained(tmp_path, conv_mode="v1")


@pytest.mark.parametrize("sees", [True, False])
def test_a_processor_saved_without_its_model_comes_back(processor, toy_llm_dir, tmp_path, sees):
    given = processor if sees else LlavaLiteProcessor.from_pretrained(toy_llm_dir("llama"))
    given.conv_template = "llava_v0"
    given.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaLiteProcessor
    assert (loaded.conv_template, loaded.num_image_tokens) == ("llava_v0", 16 if sees else 0)
    inputs = {"text": "USER: <image>\nHello!", "images": image()} if sees else {"text": "Hello!"}
    before, after = given(**inputs), loaded(**inputs)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_processor_comes_from_a_directory_that_has_none(directory):
    loaded = AutoProcessor.from_pretrained(directory)
    assert type(loaded) is LlavaLiteProcessor
    assert (loaded.conv_template, loaded.image_aspect_ratio, loaded.num_image_tokens) == ("llava_v1", "pad", 16)
    assert loaded(text="<image>", images=image())["pixel_values"].shape == (1, 3, 32, 32)


def test_text_only_model_has_a_processor_too(toy_llm_dir, tmp_path):
    processor = LlavaLiteProcessor.from_pretrained(toy_llm_dir("llama"))
    assert processor.image_processor is None
    assert set(processor(text="Hello!")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="no vision tower"):
        processor(text="<image>", images=image())
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["conv_template"] == "v1"


def user(*parts):
    return {"role": "user", "content": list(parts)}


def words(text):
    return {"type": "text", "text": text}


def test_messages_become_the_prompt_of_the_checkpoints_format(processor):
    messages = [
        user({"type": "image", "image": image()}, words("What colour?")),
        {"role": "assistant", "content": [words("red")]},
        user(words("How many?")),
    ]
    conversation = conv_templates["v1"].copy()
    for role, text in zip((0, 1, 0, 1), ("<image>\nWhat colour?", "red", "How many?", None), strict=True):
        conversation.append_message(conversation.roles[role], text)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == conversation.get_prompt()
    inputs = processor.apply_chat_template(
        [messages, messages[2:]], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    expected = processor(text=[prompt, processor.render([("How many?", None)]).text], images=[[image()], None])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert prompt.startswith(conv_templates["v1"].system)
    reported = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages[2:]], None, True)
    assert reported == "Be brief. USER: How many? ASSISTANT:"


def test_images_of_messages_come_as_path_and_base64(processor, tmp_path):
    import base64

    image().save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    forms = [{"path": str(tmp_path / "a.png")}, {"url": str(tmp_path / "a.png")}, {"base64": data}]
    message = user(*({"type": "image", **form} for form in forms), words("Hello!"))
    inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][2])


def test_images_of_messages_come_as_openai_writes_them(processor, tmp_path):
    image().save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    output = [
        processor.apply_chat_template([user(part, words("Hello!"))], None, True, tokenize=True, return_dict=True)
        for part in (
            {"type": "image", "path": path},
            {"type": "image_url", "image_url": {"url": path}},
            {"type": "image_url", "image_url": path},
        )
    ]
    for inputs in output[1:]:
        assert torch.equal(inputs["input_ids"], output[0]["input_ids"])
        assert torch.equal(inputs["pixel_values"], output[0]["pixel_values"])


def test_images_are_fetched_from_their_address(processor, tmp_path):
    import base64
    import functools
    import http.server
    import threading

    image().save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            message = user(
                {"type": "image", "url": f"{address}/a.png"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                words("Hello!"),
            )
            inputs = processor.apply_chat_template([message], None, True, tokenize=True, return_dict=True)
            expected = processor(images=image(), text="<image>")["pixel_values"][0]
            assert all(torch.equal(pixels, expected) for pixels in inputs["pixel_values"])
            assert torch.equal(processor(images=f"{address}/a.png", text="<image>")["pixel_values"][0], expected)
            with pytest.raises(ValueError, match=r"b\.png.*404"):
                processor(images=f"{address}/b.png", text="<image>")
        finally:
            server.shutdown()
    with pytest.raises(ValueError, match="not base64"):
        processor(images="data:image/png;base64,???", text="<image>")


def test_final_message_can_be_continued(processor):
    messages = [user(words("What colour?")), {"role": "assistant", "content": "The square is"}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("USER: What colour? ASSISTANT: The square is")
    assert processor.apply_chat_template(messages).endswith("ASSISTANT: The square is</s>")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "assistant", "content": "a"}], "assistant"),
        ([{"role": "system", "content": "a"}], "needs at least one user message"),
        ([user({"type": "video", "video": "a.mp4"})], "'video'; known: text, image, image_url"),
        ([user({"type": "image"})], "image, path, url, base64"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(processor, messages, problem):
    with pytest.raises(ValueError, match=problem):
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


def test_images_of_messages_may_go_to_the_processor_with_the_prompt(processor):
    unfilled = [user({"type": "image"}, words("What colour?"))]
    shown = [user({"type": "image", "image": image()}, words("What colour?"))]
    prompt = processor.apply_chat_template(unfilled, add_generation_prompt=True)
    inputs = processor(images=image(), text=prompt, return_tensors="pt")
    expected = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("conv_template", ["v1", "chatml_direct", "llava_llama_2", "mpt", "phi"])
def test_without_a_generation_prompt_the_question_is_last(conv_template, processor):
    processor.conv_template = conv_template
    messages = [user(words("What colour?"))]
    opened = processor.apply_chat_template(messages, add_generation_prompt=True)
    closed = processor.apply_chat_template(messages)
    assert opened.startswith(closed)
    assert "What colour?" in closed
    assert conv_templates[conv_template].roles[1] not in closed or conv_template == "llava_llama_2"
    answered = processor.apply_chat_template([*messages, {"role": "assistant", "content": "red"}])
    assert answered.startswith(opened)


def test_sequences_are_padded_and_truncated_as_a_tokenizers_are(processor, toy_tokenizer):
    texts = ["Hello! How many circles are there?", "What colour?"]
    lengths = [len(toy_tokenizer(text)["input_ids"]) for text in texts]
    for options in (
        {"padding": "longest"},
        {"padding": "max_length", "max_length": 40},
        {"padding": True, "truncation": True, "max_length": 4},
        {"padding": True, "pad_to_multiple_of": 8},
    ):
        toy_tokenizer.pad_token, toy_tokenizer.padding_side = "<unk>", "left"
        expected = toy_tokenizer(texts, return_tensors="pt", **options)
        inputs = processor(text=texts, **options)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert processor(text=texts[0], padding=False)["input_ids"].shape == (1, lengths[0])
    with pytest.raises(ValueError, match="make no tensor without padding"):
        processor(text=texts, padding=False)
    with pytest.raises(ValueError, match="cuts 10 of the 16 image placeholders off a prompt of"):
        processor(text="<image> Hello!", images=image(), truncation=True, max_length=7)


def test_chat_format_is_the_tokenizers_own_without_a_second_bos(processor, toy_tokenizer_for):
    tokenizer = toy_tokenizer_for("qwen")
    processor = LlavaLiteProcessor(processor.image_processor, tokenizer, conv_template="chat", num_image_tokens=16)
    messages = [{"role": "user", "content": "<image>\nWhat colour?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = [user({"type": "image", "image": image()}, words("What colour?"))]
    assert processor.apply_chat_template(parts, add_generation_prompt=True) == prompt
    llama = toy_tokenizer_for("llama")
    llama.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    processor = LlavaLiteProcessor(processor.image_processor, llama, conv_template="chat", num_image_tokens=16)
    inputs = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].tolist().count(llama.bos_token_id) == 1


def test_bytes_of_a_file_in_memory_are_read(processor):
    buffer = io.BytesIO()
    image().save(buffer, "PNG")
    assert processor(text="<image>", images=[buffer.getvalue()])["pixel_values"].shape == (1, 3, 32, 32)
