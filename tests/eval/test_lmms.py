"""lmms-eval runs its tasks with a model of this package: the classes by their contract, and its own program."""

import json
import logging
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import draw_image
from PIL import Image
from test_media_inputs import build as build_imagebind

from llava_lite import load, reply
from llava_lite.eval.likelihood import answer_losses
from llava_lite.eval.lmms_model import device_of_rank
from llava_lite.media.preprocess import load_image_processor

ROOT = Path(__file__).resolve().parents[2]
MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}
PROMPTS = {"mm_injection": "adaption_prompt", "adaption_prompt_len": 5, "adaption_prompt_layers": 2}
PROMPTS |= {"mm_projector_type": "query_vit", "mm_query_len": 5, "mm_query_hidden": 16, "mm_query_depth": 1}
PROMPTS |= {"mm_query_heads": 2, "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
PROMPTS |= {"conv_template": "alpaca"}
QUESTIONS = ["What colour is the square?", "How many circles are there?", "Hello!", "Is there one green square?"]
COLOURS = ["red", "blue", "green"]
SETTINGS = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture
def checkpoint(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """Return a function: arguments of toy_model -> directory of a model."""

    def make(name="toy", **keys):
        toy_model(**({"conv_template": "v1"} | keys)).save_pretrained(tmp_path / name)
        toy_tokenizer.save_pretrained(tmp_path / name)
        load_image_processor(toy_tower_dir("clip")).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def ten_documents():
    """Return ten documents: an image, a question and one of three answers."""
    return [
        {"image": draw_image(i), "question": f"{QUESTIONS[i % 4]}{' Human:' * (i % 3)}", "answer": i % 3}
        for i in range(10)
    ]


class Interface(ABC):
    """What lmms_eval.api.model.lmms asks of a class, in lmms-eval 0.7.3."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class GenerationResult:
    """What lmms-eval takes from a model beside a text."""

    text: object


@pytest.fixture
def classes(monkeypatch):
    """The module of our classes, over an interface with lmms-eval's name, which is not installed here."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Interface
    sys.modules["lmms_eval.api.instance"].GenerationResult = GenerationResult
    yield import_module("llava_lite.eval.lmms")
    sys.modules.pop("llava_lite.eval.lmms")


def opened(cls, directory, documents, **options):
    """Return a model with the documents of one task, as lmms-eval makes it."""
    model = cls(pretrained=str(directory), device="cpu", **options)
    model.task_dict["ten"] = {"test": documents}
    return model


def messages_of(document, **rounds):
    """As lmms-eval writes them for a task without a function of its own."""
    return [
        {
            "role": "user",
            "content": [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}],
        }
    ]


def chat_request(position, document, settings=None, messages=messages_of):
    settings = SETTINGS if settings is None else settings
    return SimpleNamespace(args=(document["question"], messages, settings, position, "ten", "test"))


def simple_request(position, document, settings=None):
    settings = SETTINGS if settings is None else settings
    return SimpleNamespace(args=(document["question"], settings, lambda one: [one["image"]], position, "ten", "test"))


def expected_answers(directory, documents, **changes):
    """Return what `reply` answers, one by one."""
    model, processor = load(str(directory), device="cpu")
    asked = {"max_new_tokens": 8} | changes
    return [reply(model, processor, one["question"], one["image"], **asked) for one in documents]


@pytest.mark.parametrize("batch_size", [1, "4"])
@pytest.mark.parametrize("keys", [{}, {"moe": MOE}, PROMPTS], ids=["dense", "experts", "adaption_prompt"])
def test_answers_are_those_of_reply_in_the_order_asked(keys, batch_size, checkpoint, classes):
    directory, documents = checkpoint(**keys), ten_documents()
    expected = expected_answers(directory, documents)
    assert len(set(expected)) > 3
    for cls, to_request in ((classes.LlavaLiteChat, chat_request), (classes.LlavaLiteSimple, simple_request)):
        model = opened(cls, directory, documents, batch_size=batch_size)
        assert model.generate_until([to_request(i, one) for i, one in enumerate(documents)]) == expected
        assert model.device.type == "cpu"
        assert cls.is_simple is (cls is classes.LlavaLiteSimple)


def test_a_template_of_model_args_takes_the_place_of_the_checkpoints(checkpoint, classes):
    directory, documents = checkpoint(), ten_documents()[:3]
    model = opened(classes.LlavaLiteChat, directory, documents, conv_template="llava_llama_2", batch_size=2)
    expected = expected_answers(directory, documents, conv_template="llava_llama_2")
    assert model.generate_until([chat_request(i, one) for i, one in enumerate(documents)]) == expected


def test_several_images_and_earlier_turns_are_read(checkpoint, classes):
    directory, images = checkpoint(), [draw_image(i) for i in range(3)]
    documents = [{"question": "", "images": images}]

    def messages(document):
        first, second, third = ({"type": "image", "url": image} for image in document["images"])
        return [
            {"role": "user", "content": [first, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Is"}, second, {"type": "text", "text": "like"}, third],
            },
        ]

    model = opened(classes.LlavaLiteChat, directory, documents)
    (answer,) = model.generate_until([chat_request(0, documents[0], messages=messages)])
    own, processor = load(str(directory), device="cpu")
    history = [("<image>\nWhat?", "red")]
    question = "Is\n<image>\nlike\n<image>"
    assert answer == reply(own, processor, question, images, history=history, max_new_tokens=8)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_answer_stops_at_the_ends_of_its_task(batch_size, checkpoint, classes):
    directory, documents = checkpoint(), ten_documents()[:2]
    free = expected_answers(directory, documents, max_new_tokens=40)
    # The prompt ends with the first. The second is a character, which lies inside a token, far from both starts.
    both = sorted(set(free[0]) & set(free[1]))
    ends = ["ASSISTANT:", max(both, key=lambda character: min(text.find(character) for text in free))]
    places = [text.find(ends[1]) for text in free]
    assert min(places) > 5
    assert places[0] != places[1]
    model = opened(classes.LlavaLiteChat, directory, documents, batch_size=batch_size)
    steps = []
    hook = model.model.register_forward_hook(lambda module, args, output: steps.append(1))
    settings = SETTINGS | {"max_new_tokens": 40, "until": ends}
    answers = model.generate_until([chat_request(i, one, settings) for i, one in enumerate(documents)])
    hook.remove()
    assert answers == [text[:place].rstrip() for text, place in zip(free, places, strict=True)]
    assert len(steps) < 40 * 2 / batch_size, "the model stops, and its answer is not only cut"


def test_requests_with_other_settings_are_asked_apart(checkpoint, classes):
    directory, documents = checkpoint(), ten_documents()[:4]
    model = opened(classes.LlavaLiteChat, directory, documents, batch_size=4)
    lengths = [2, 8, 2, 8]
    requests = [chat_request(i, one, {"max_new_tokens": lengths[i]}) for i, one in enumerate(documents)]
    expected = [
        expected_answers(directory, [one], max_new_tokens=length)[0]
        for one, length in zip(documents, lengths, strict=True)
    ]
    assert model.generate_until(requests) == expected


def test_unknown_settings_are_left_out_and_logged_once(checkpoint, classes, caplog):
    directory, documents = checkpoint(), ten_documents()[:2]
    model = opened(classes.LlavaLiteChat, directory, documents)
    settings = SETTINGS | {"image_aspect_ratio": "original", "seed": 42}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            answers = model.generate_until([chat_request(i, one, settings) for i, one in enumerate(documents)])
    assert answers == expected_answers(directory, documents)
    lines = [line for line in caplog.messages if line.startswith("Generation settings")]
    assert len(lines) == 1
    assert "left out: image_aspect_ratio, seed." in lines[0]


def test_rounds_go_on_until_the_task_says_so(checkpoint, classes):
    directory, documents = checkpoint(), ten_documents()[:2]
    seen = []

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages_of(document)
        seen.append((round_idx, len(previous_output), previous_round_info))
        again = {"role": "user", "content": f"{previous_output[-1]} Hello!"}
        return [again], round_idx == 2, None, round_idx

    model = opened(classes.LlavaLiteChat, directory, documents)
    rounds = model.generate_until_multi_round(
        [chat_request(i, one, messages=messages) for i, one in enumerate(documents)]
    )
    own, processor = load(str(directory), device="cpu")
    first = expected_answers(directory, documents)
    assert rounds == [[one, reply(own, processor, f"{one} Hello!", max_new_tokens=8)] for one in first]
    assert seen == [(1, 1, None), (2, 2, 1)] * 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_are_those_of_the_answers_in_the_order_asked(batch_size, checkpoint, classes):
    directory, documents = checkpoint(), ten_documents()[:4]
    model = opened(classes.LlavaLiteSimple, directory, documents, batch_size=batch_size)
    requests = [
        SimpleNamespace(args=(one["question"], f" {colour}", lambda one: [one["image"]], i, "ten", "test"))
        for i, one in enumerate(documents)
        for colour in COLOURS
    ]
    # A continuation that is written by the task, and one without a document, for acc_mutual_info.
    requests.append(
        SimpleNamespace(
            args=("Hello!", lambda one: COLOURS[one["answer"]], lambda one: [one["image"]], 1, "ten", "test")
        )
    )
    requests.append(SimpleNamespace(args=("Hello!", "red")))
    found = [result.text for result in model.loglikelihood(requests)]
    own, processor = load(str(directory), device="cpu")
    asked = [(one["question"], one["image"], colour) for one in documents for colour in COLOURS]
    asked += [("Hello!", documents[1]["image"], "blue"), ("Hello!", None, "red")]
    expected = [answer_losses(own, processor, [q], [image], [answer])[0] for q, image, answer in asked]
    # Padding changes the order of sums, in float32.
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [best for _, best in found] == [best for _, best in expected]


def test_a_model_with_imagebind_answers_about_sounds(toy_tokenizer, tmp_path, classes):
    own = build_imagebind(toy_tokenizer)
    for part in (own, toy_tokenizer, own.get_vision_tower().image_processor):
        part.save_pretrained(tmp_path / "toy")
    sound = {"array": [0.4 * (-1) ** (i // 20) for i in range(8000)], "sampling_rate": 16000}
    documents = [{"question": "What?", "sound": sound}, {"question": "Hello!", "image": draw_image(0)}]

    def messages(document):
        heard = {"type": "audio", "url": document["sound"]} if "sound" in document else None
        part = heard or {"type": "image", "url": document["image"]}
        return [{"role": "user", "content": [part, {"type": "text", "text": document["question"]}]}]

    model = opened(classes.LlavaLiteChat, tmp_path / "toy", documents, batch_size=2)
    answers = model.generate_until([chat_request(i, one, messages=messages) for i, one in enumerate(documents)])
    from llava_lite.eval.lmms_requests import as_media

    own, processor = load(str(tmp_path / "toy"), device="cpu")
    assert answers == [
        reply(own, processor, "What?", media={"audio": as_media(sound)}, max_new_tokens=8),
        reply(own, processor, "Hello!", draw_image(0), max_new_tokens=8),
    ]


def test_errors_name_the_document_and_what_to_do(checkpoint, classes, tmp_path):
    directory, documents = checkpoint(), ten_documents()[:2]
    documents[1]["image"] = str(tmp_path / "missing.png")
    model = opened(classes.LlavaLiteChat, directory, documents)
    with pytest.raises(ValueError, match=r"ten, document 1: .*missing\.png.*no such file"):
        model.generate_until([chat_request(i, one) for i, one in enumerate(documents)])
    sound = {"type": "audio", "url": "a.wav"}
    with pytest.raises(ValueError, match=r"ten, document 0: .*media are for a model with ImageBind|reads image"):
        model.generate_until(
            [chat_request(0, documents[0], messages=lambda one: [{"role": "user", "content": [sound]}])]
        )
    with pytest.raises(NotImplementedError, match="add --force_simple"):
        model.loglikelihood([])
    for size in ("auto", 0):
        with pytest.raises(ValueError, match=f"batch_size is {size!r}; llava_lite takes a whole number"):
            opened(classes.LlavaLiteChat, directory, documents, batch_size=size)
    with pytest.raises(ValueError, match="no model; name its directory or hub id: --model_args pretrained="):
        classes.LlavaLiteChat(device="cpu")
    with pytest.raises(ValueError, match="v9"):
        opened(classes.LlavaLiteChat, directory, documents, conv_template="v9")


def test_words_of_model_args_reach_the_loading(checkpoint, classes):
    model = opened(classes.LlavaLiteChat, checkpoint(), [], dtype="bfloat16", max_batch_size=8)
    assert model.model.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="conv_mode"):
        opened(classes.LlavaLiteChat, "nowhere", [], conv_mode="v1")


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    assert device_of_rank("cpu") == "cpu"
    assert device_of_rank("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_rank("cuda:0") == "cuda:1"
    assert device_of_rank("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of_rank(None) == "cuda:1"


# From here on lmms-eval itself.


@pytest.fixture(scope="session")
def lmms_python():
    """The Python of an environment with lmms-eval, made where it is missing."""
    directory = os.environ.get("LLAVA_LITE_LMMS_VENV", str(ROOT / ".venv-lmms"))
    command = ["bash", str(ROOT / "scripts/lib/lmms_eval.sh"), sys.executable, directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"lmms-eval cannot be installed here: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return done.stdout.strip()


@pytest.fixture(scope="session")
def metadata(tmp_path_factory):
    """A directory with what an installation of the package tells others, its entry points among them."""
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("metadata")
    (source / "llava_lite").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "llava_lite/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: ten.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.to_visual
doc_to_text: "{{{{question}}}}"
"""
GENERATED = """
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false, image_aspect_ratio: original}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
TWO_IMAGES = "doc_to_messages: !function utils.to_messages"
CHOSEN = """
doc_to_choice: [red, blue, green]
doc_to_target: "{{number}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image


def to_visual(document):
    return [Image.open(document["image"])]


def to_messages(document):
    images = [{"type": "image", "url": document[name]} for name in ("image", "other")]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]
"""


@pytest.fixture
def tasks(tmp_path):
    """A directory with three tasks over ten documents: one image, two images, one of three answers."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    lines = []
    for i, one in enumerate(ten_documents()):
        one["image"].save(directory / f"{i}.png")
        document = {"image": str(directory / f"{i}.png"), "other": str(directory / f"{(i * 3) % (i + 1)}.png")}
        document |= {"question": one["question"], "answer": COLOURS[one["answer"]], "number": one["answer"]}
        lines.append(document)
    (directory / "ten.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (directory / "utils.py").write_text(UTILS)
    (directory / "one.yaml").write_text(TASK.format(name="toy_one", kind="generate_until") + GENERATED)
    two = TASK.format(name="toy_two", kind="generate_until") + GENERATED + TWO_IMAGES
    (directory / "two.yaml").write_text(two)
    (directory / "choice.yaml").write_text(TASK.format(name="toy_choice", kind="multiple_choice") + CHOSEN)
    return directory


@pytest.fixture
def lmms_eval(lmms_python, metadata, tasks, tmp_path):
    """Return a function: checkpoint, tasks, flags, launcher -> (results, {task: {position: sample}}, output)."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{metadata}", "HF_HOME": str(tmp_path / "cache")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(directory, names, *flags, launcher=(), more_args=""):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        command = [lmms_python, *launcher, "-m", "lmms_eval", "--model", "llava_lite", "--device", "cpu"]
        command += ["--model_args", f"pretrained={directory}{more_args}", "--tasks", ",".join(names)]
        command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (results,) = out.rglob("*_results.json")
        samples = {}
        for name in names:
            (path,) = out.rglob(f"*_samples_{name}.jsonl")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            samples[name] = {line["doc_id"]: line for line in lines}
        return json.loads(results.read_text())["results"], samples, done.stdout + done.stderr

    return run


def texts(samples):
    """Return the answers of a task, in the order of its documents."""
    return [samples[i]["filtered_resps"] for i in range(len(samples))]


def documents_of(tasks):
    return [json.loads(line) for line in (tasks / "ten.jsonl").read_text().splitlines()]


RANKS = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
RANKS += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"moe": MOE}], ids=["dense", "experts"])
def test_lmms_eval_gets_the_answers_of_reply(keys, checkpoint, lmms_eval, tasks):
    directory, documents = checkpoint(**keys), documents_of(tasks)
    one = expected_answers(directory, documents)
    two = expected_answers(
        directory, [document | {"image": [document["image"], document["other"]]} for document in documents]
    )
    assert one != two
    runs = [("--batch_size", "1"), ("--batch_size", "4")]
    for flags, launcher in [(runs[0], []), (runs[1], []), (runs[1], RANKS)][: 3 if not keys else 2]:
        results, samples, output = lmms_eval(directory, ["toy_one", "toy_two"], *flags, launcher=launcher)
        assert texts(samples["toy_one"]) == one
        assert texts(samples["toy_two"]) == two
        right = sum(text == document["answer"] for text, document in zip(one, documents, strict=True))
        assert results["toy_one"]["exact_match,none"] == pytest.approx(right / 10)
        assert output.count("left out: image_aspect_ratio.") == 1
        # The end that lmms-eval fills in is not one that the task asks for.
        assert "Failed to load model entry-point manifests" not in output


@pytest.mark.slow
def test_lmms_eval_chooses_the_answer_of_the_lowest_loss(checkpoint, lmms_eval, tasks):
    directory, documents = checkpoint(), documents_of(tasks)
    results, samples, _ = lmms_eval(directory, ["toy_choice"], "--batch_size", "4", "--force_simple")
    own, processor = load(str(directory), device="cpu")
    right = 0
    for i, document in enumerate(documents):
        asked = [document["question"]] * 3, [Image.open(document["image"])] * 3
        losses = [loss for loss, _ in answer_losses(own, processor, *asked, COLOURS)]
        found = [float(loss) for loss, _ in samples["toy_choice"][i]["filtered_resps"]]
        assert found == pytest.approx(losses, rel=1e-3)
        right += min(range(3), key=losses.__getitem__) == document["number"]
    assert results["toy_choice"]["acc,none"] == pytest.approx(right / 10)


@pytest.mark.slow
def test_lmms_eval_gets_the_answers_of_an_adapter(checkpoint, lmms_eval, tasks):
    directory, documents = checkpoint(**PROMPTS), documents_of(tasks)
    _, samples, _ = lmms_eval(directory, ["toy_one"], "--batch_size", "4", "--force_simple")
    assert texts(samples["toy_one"]) == expected_answers(directory, documents)
