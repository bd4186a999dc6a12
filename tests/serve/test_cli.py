"""The terminal chat: its turns, its history, its flags."""

import io
import os
import shlex
import subprocess
import sys
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from conftest import llm_config
from PIL import Image
from transformers import LlamaForCausalLM

from llava_lite.data.encode import RecordEncoder
from llava_lite.data.records.record import Record
from llava_lite.inference import load, prepare, reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.model.assemble import assemble
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve import cli

IMAGE = Image.new("RGB", (40, 30), (200, 80, 10))


@pytest.fixture
def toy_pair(toy_model, toy_tokenizer, toy_tower_dir):
    model = toy_model(conv_template="v1")
    tower = load_image_processor(toy_tower_dir("clip"))
    return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower)


@pytest.fixture
def checkpoint(toy_pair, tmp_path):
    model, processor = toy_pair
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    IMAGE.save(tmp_path / "a.png")
    return tmp_path


def typed(*lines):
    waiting = iter(lines)
    return lambda prompt: next(waiting)


def test_every_turn_is_the_reply_to_the_conversation_so_far(toy_pair):
    model, processor = toy_pair
    shown = io.StringIO()
    asked = {"temperature": 0.0, "max_new_tokens": 9}
    history = cli.chat(model, processor, [IMAGE], typed("What colour?", "How many?", ""), shown.write, **asked)
    first = reply(model, processor, "What colour?", IMAGE, **asked)
    conversation = [("<image>\nWhat colour?", first)]
    second = reply(model, processor, "How many?", IMAGE, history=conversation, **asked)
    assert history == [*conversation, ("How many?", second)]
    assert shown.getvalue() == f"ASSISTANT: {first}\nASSISTANT: {second}\n"
    assert "</s>" not in first + second


@pytest.mark.slow
def test_a_chat_with_a_real_chat_template_prompts_as_training_writes_it(smollm2_tokenizer, toy_tower_dir, tmp_path):
    tokenizer, tower = smollm2_tokenizer, toy_tower_dir("clip")
    LlamaForCausalLM(llm_config("llama", len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    keys = {"mm_projector_type": "linear", "conv_template": "chat"}
    model = assemble(str(tmp_path), str(tower), config_overrides=keys, dtype=torch.float32).eval()
    processor = LlavaLiteProcessor.from_config(model.config, tokenizer, load_image_processor(tower))
    asked = {"temperature": 0.0, "max_new_tokens": 9}
    questions = ("What colour?", "And 12  34?", "Why?")
    history = cli.chat(model, processor, [IMAGE], typed(*questions, ""), lambda text: None, **asked)
    assert [question.removeprefix("<image>\n") for question, _ in history] == list(questions)
    for i, (_, answer) in enumerate(history):
        before = history[:i]
        assert reply(model, processor, questions[i], IMAGE, history=before, **asked) == answer
        inputs, end = prepare(processor, [questions[i]], [IMAGE], None, [before])
        prompt = [token for token, _ in groupby(inputs["input_ids"][0].tolist())]
        turns = [turn for pair in history[: i + 1] for turn in zip(("human", "gpt"), pair, strict=True)]
        ids, labels = RecordEncoder(tokenizer, "chat")(Record("r", ("a.png",), tuple(turns), "toy.json[0]"))
        ids = [token for token, _ in groupby(ids)]
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(ids[len(prompt) :]).startswith(f"{answer}<|im_end|>")
        assert end.text == "<|im_end|>"
        assert labels.count(tokenizer.eos_token_id) == i + 1


def test_conversation_without_an_image_ends_at_an_empty_line(toy_pair):
    model, processor = toy_pair
    history = cli.chat(model, processor, [], typed("Hello!", "   "), lambda text: None, max_new_tokens=3)
    assert [question for question, _ in history] == ["Hello!"]


def test_placeholder_without_an_image_gets_a_message_and_the_conversation_continues(toy_pair):
    model, processor = toy_pair
    shown = io.StringIO()
    history = cli.chat(model, processor, [], typed("<image> What?", "Hello!", ""), shown.write, max_new_tokens=3)
    assert [question for question, _ in history] == ["Hello!"]
    assert shown.getvalue().startswith("1 <image> placeholders in the conversation but 0 images.")


def test_control_c_ends_the_chat_as_an_empty_line_does(monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert cli._ask("USER: ") == ""


def test_control_c_stops_an_answer_and_the_chat_continues(toy_pair):
    model, processor = toy_pair
    shown = io.StringIO()

    def say(text):
        shown.write(text)
        if not text.endswith((": ", "\n")):
            # Ctrl-C comes after the first piece of an answer.
            raise KeyboardInterrupt

    asked = {"temperature": 0.0, "max_new_tokens": 9}
    history = cli.chat(model, processor, [], typed("What?", "And?", ""), say, **asked)
    full = reply(model, processor, "What?", **asked)
    assert [question for question, _ in history] == ["What?", "And?"]
    assert 0 < len(history[0][1]) < len(full)
    assert full.startswith(history[0][1])
    assert f"ASSISTANT: {history[0][1]} [stopped]\nASSISTANT: {history[1][1]} [stopped]\n" == shown.getvalue()


def test_image_that_is_shown_later_goes_with_the_next_question(toy_pair, checkpoint):
    model, processor = toy_pair
    shown = io.StringIO()
    lines = typed("Hello!", f"/image {checkpoint}/a.png", "How many?", "/exit", "never")
    asked = {"temperature": 0.0, "max_new_tokens": 6}
    history = cli.chat(model, processor, [], lines, shown.write, **asked)
    assert [question for question, _ in history] == ["Hello!", "<image>\nHow many?"]
    output = reply(model, processor, "How many?", IMAGE, history=history[:1], **asked)
    assert history[1][1] == output
    assert "An image (40 x 30) for the next question." in shown.getvalue()


def test_no_answer_is_reported_and_not_kept(toy_pair):
    shown = io.StringIO()
    # The end token first.
    bias = [[[toy_pair[1].tokenizer.eos_token_id], 1e9]]
    assert cli.chat(*toy_pair, [], typed("What?", ""), shown.write, sequence_bias=bias) == []
    assert shown.getvalue() == "ASSISTANT: [no answer]\n"


def test_clear_begins_the_conversation_again(toy_pair, checkpoint):
    model, processor = toy_pair
    lines = typed("What colour?", "/clear", "How many?", "")
    history = cli.chat(model, processor, [IMAGE], lines, lambda text: None, temperature=0.0, max_new_tokens=4)
    assert history == [("How many?", reply(model, processor, "How many?", max_new_tokens=4))]


def test_a_space_before_a_slash_sends_the_line_to_the_model(toy_pair):
    model, processor = toy_pair
    history = cli.chat(model, processor, [], typed(" /image", ""), lambda text: None, max_new_tokens=12)
    assert [question for question, _ in history] == ["/image"]


def test_debug_shows_the_prompt_as_the_model_sees_it(toy_pair):
    model, processor = toy_pair
    shown = io.StringIO()
    cli.chat(model, processor, [IMAGE], typed("What?", ""), shown.write, debug=True, max_new_tokens=3)
    assert repr(processor.render([("<image>\nWhat?", None)]).text) in shown.getvalue()


@pytest.mark.parametrize(
    ("template", "names"),
    [("v1", ("USER", "ASSISTANT")), ("llava_v0", ("Human", "Assistant")), ("mpt", ("user", "assistant"))],
)
def test_speakers_are_called_as_the_format_calls_them(template, names):
    assert cli.role_names(template) == names


def test_flags_are_llavas(toy_pair):
    flags = (
        "--model-path m --model-base b --image-file a.png --device cpu --conv-mode v1 --temperature 0.5 "
        "--max-new-tokens 7 --load-8bit --load-4bit --debug"
    )
    options = cli.build_parser().parse_args(shlex.split(flags))
    assert (options.model_path, options.model_base, options.image_file) == ("m", "b", ["a.png"])
    assert (options.temperature, options.max_new_tokens, options.load_8bit, options.debug) == (0.5, 7, True, True)
    defaults = cli.build_parser().parse_args(["m"])
    assert (defaults.temperature, defaults.max_new_tokens, defaults.conv_mode) == (0.2, 512, None)


def test_object_of_values_is_as_good_as_flags(checkpoint, toy_pair, monkeypatch, capsys):
    """LLaVA's `main(args)` gets what its own parser made: one image, no list."""
    lines = iter(["What colour?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    image = str(checkpoint / "a.png")
    args = SimpleNamespace(
        model_path=str(checkpoint / "model"),
        model_base=None,
        image_file=image,
        device="cpu",
        conv_mode=None,
        temperature=0,
        max_new_tokens=6,
        load_8bit=False,
        load_4bit=False,
        debug=False,
    )
    cli.main(args)
    answer = reply(*toy_pair, "What colour?", image, max_new_tokens=6)
    assert capsys.readouterr().out.endswith(f"ASSISTANT: {answer}\n")


@pytest.mark.parametrize("arguments", [[], ["m", "--model-path", "n"]])
def test_chat_wants_one_model(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "name one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--conv-mode", "v9"], "unknown conversation template 'v9'"),
        (["nowhere", "--device", "gpu"], "--device gpu: this machine has cpu"),
        (["nowhere", "--device", "0"], "--device 0: this machine has cpu"),
        (["nowhere", "--device", "cuda:99"], "--device cuda:99: this machine has cpu"),
        ([".", "--revision", "v1"], "--revision v1 is a branch, tag or commit of a repository, and . is on this"),
        (["nowhere", "--image-file", "none.jpg"], "cannot use the image 'none.jpg': there is no such file."),
        (["./nowhere"], "'./nowhere': there is no such directory."),
    ],
)
def test_what_is_wrong_is_reported_in_a_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 1
    assert f"llava-lite chat: {words}" in capsys.readouterr().err


def test_chat_runs_in_a_terminal(checkpoint, toy_pair):
    """As a program of its own, with typed lines and the end of the input."""
    model, processor = toy_pair
    image = str(checkpoint / "a.png")
    command = [sys.executable, "-m", "llava_lite.cli", "chat", str(checkpoint / "model"), "--image-file", image]
    done = subprocess.run(
        [*command, "--device", "cpu", "--temperature", "0", "--max-new-tokens", "6"],
        input="What colour?\n",
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = reply(model, processor, "What colour?", image, max_new_tokens=6)
    assert done.stdout.rstrip().endswith(f"USER: ASSISTANT: {answer}\nUSER:")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "--temperature is 0 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens at least 1"),
        (["--image", "a.png"], "unknown flag --image: write --image-file."),
        (["a.png"], "'a.png' belongs to no flag."),
    ],
)
def test_wrong_flags_are_reported_in_a_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nowhere", *flags])
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in output
    assert len(output.splitlines()) == 1


def test_keywords_of_python_are_reported_as_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["user/name", "--local-files-only"])
    assert "or run without --local-files-only." in capsys.readouterr().err


def test_image_for_a_model_without_a_tower_is_refused_before_its_weights_are_read(toy_llm_dir, checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main([str(toy_llm_dir()), "--image-file", str(checkpoint / "a.png"), "--device", "cpu"])
    shown = capsys.readouterr().err
    assert "has no vision tower: it reads text alone. Chat without --image-file." in shown
    assert "Loading weights" not in shown


def test_chat_with_a_plain_language_model(toy_llm_dir, monkeypatch, capsys):
    lines = iter(["Hello!", "/image a.png", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    cli.main([str(toy_llm_dir("mistral")), "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0"])
    shown = capsys.readouterr().out
    answer = reply(*load(str(toy_llm_dir("mistral")), device="cpu"), "Hello!", max_new_tokens=4)
    assert shown.splitlines() == [
        "Type a question; /help lists the commands, an empty line ends the chat.",
        f"USER: ASSISTANT: {answer}".removeprefix("USER: "),
        "This model has no vision tower: it reads text alone.",
    ]
