"""META files of LLaMA-Adapter and LLaMA2-Accessory: their files, templates, recipes, samples and groups."""

import json
import random

import pytest

from llava_lite.conversation import alpaca_prompt
from llava_lite.data.check.check import check_annotations
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.index.sources import open_sources
from llava_lite.media.layout import ImageLayout

ALPACA = [{"instruction": f"Say {k}.", "input": "", "output": f"{k}"} for k in range(20)]
TALK = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cat."}]
TALK += [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
LLAVA = [{"id": str(k), "image": "1.png", "conversations": TALK} for k in range(4)]


@pytest.fixture
def write(tmp_path):
    """Write the files, and return a function: text of META -> path of the YAML file."""
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    (tmp_path / "llava.json").write_text(json.dumps(LLAVA))
    (tmp_path / "captions.csv").write_text("url\tcaption\n1.png\ta cat\n")
    several = [{"url": "1.png", "caption": ["a", "b", "c"]}, {"url": "1.png", "caption": "d"}]
    (tmp_path / "several.json").write_text(json.dumps(several))

    def run(text):
        path = tmp_path / "data.yaml"
        path.write_text(text)
        return str(path)

    return run


def test_a_list_of_paths_is_read_as_it_is(write, tmp_path):
    sources = open_sources(write("META: [alpaca.json, 'captions.csv']"), "images")
    assert [source.path for source in sources] == [str(tmp_path / "alpaca.json"), str(tmp_path / "captions.csv")]
    assert {(s.image_folder, s.sampling, s.group, s.template, s.recipe) for s in sources} == {
        ("images", "all", None, None, None)
    }


def test_typed_objects_name_group_template_recipe_root_and_ratio(write):
    text = """META:
      -
        path: 'alpaca.json'
        type: 'text'
        prompt_type: shortqa
        ratio: 0.5
      - {path: llava.json, type: image_text, preprocess: single_turn_llava, root: /coco}
      - {path: captions.csv, type: image_text, preprocess: caption, prompt_type: caption}
      - {path: alpaca.json, type: text, prompt_type: None}
      - {path: alpaca.json, type: text, prompt_type: qg}
    """
    sources = open_sources(write(text), "images")
    assert [(s.group, s.template, s.recipe, s.image_folder, s.sampling) for s in sources] == [
        ("text", "alpaca_short", None, "images", "ratio:0.5"),
        ("image_text", None, "single_turn_llava", "/coco", "all"),
        ("image_text", "caption", "caption", "images", "all"),
        ("text", "bare", None, "images", "all"),
        ("text", "question_generation", None, "images", "all"),
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{path: alpaca.json, prompt_type: vicuna}", "unknown prompt_type 'vicuna'; known: shortqa, qg, None, alpaca"),
        ("{path: alpaca.json, preprocess: dialog}", "unknown preprocess 'dialog'; known: single_turn_llava, caption"),
        ("{path: alpaca.json, preprocess: [a]}", "unknown preprocess"),
        ("{path: alpaca.json, weight: 2}", "the keys path, type, preprocess, prompt_type, root, ratio"),
        ("{type: text}", "expected a path, or the keys path"),
        ("{path: alpaca.json, ratio: 0}", "ratio is 0, expected a fraction"),
        ("{path: alpaca.json, ratio: 2.5}", "ratio is 2.5"),
        ("{path: alpaca.json, type: 3}", "type is 3, expected a text"),
        ('{path: "\\uD800.json"}', "path is str '.ud800.json', expected a path, and no file can have this name"),
        ("{path: alpaca.json, root: 2024}", "root is int 2024, expected a path in quotes"),
        (
            '{path: alpaca.json, root: "a\\0b"}',
            "root is str 'a.x00b', expected a path, and no file can have this name",
        ),
        ("missing.json", "no such annotation file"),
        ("7", "entry 7 of `META`"),
    ],
)
def test_a_wrong_entry_is_refused_with_what_is_known(write, entry, words):
    with pytest.raises(DataError, match=words):
        open_sources(write(f"META: [{entry}]"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("image_folder: 2024", "image_folder is int 2024, expected a path in quotes"),
        ("image_folder: 2024-01-01", "image_folder is date .*, expected a path in quotes"),
        ("image_folder: [a]", "image_folder is list, expected a path[.]"),
        ("image_folder: {a: b}", "image_folder is dict, expected a path[.]"),
        ("image_folder: true", "image_folder is bool True, expected a path in quotes"),
        ('image_folder: "a\\uD800"', "image_folder is str 'a.ud800', expected a path, and no file can have this name"),
        ("sampling_strategy: 5", "sampling_strategy is int 5, expected all, first:N, end:N or random:N"),
        ("sampling_strategy: [all]", "sampling_strategy is list, expected all, first:N"),
        ("sampling_strategy: 'ratio:.inf'", "sampling_strategy is str 'ratio:.inf', expected all, first:N"),
        ("sampling_strategy: 'last:9'", "alpaca.json': unknown sampling_strategy 'last:9'; known: all, first:N"),
    ],
)
def test_a_wrong_entry_of_datasets_is_named_with_its_file_and_what_is_expected(write, entry, words):
    with pytest.raises(DataError, match=rf"data\.yaml: entry .*{words}"):
        open_sources(write(f"datasets:\n- json_path: alpaca.json\n  {entry}\n"), "images")


def test_an_entry_without_an_image_folder_has_that_of_the_run(write):
    for text in ("", "  image_folder:\n"):
        (source,) = open_sources(write(f"datasets:\n- json_path: alpaca.json\n{text}"), "images")
        assert source.image_folder == "images"


@pytest.mark.parametrize("text", ["META: alpaca.json", "META: []", "META: [a.json]\ndatasets: [{json_path: a.json}]"])
def test_a_mixture_is_one_list(write, text):
    with pytest.raises(DataError, match=r"expected a list `datasets` of .* or a list `META` of paths"):
        open_sources(write(text))


def test_a_ratio_keeps_the_records_of_the_original_in_the_order_of_its_draw(write):
    annotations = open_annotations(write("META: [{path: alpaca.json, type: text, ratio: 0.37}]"))
    random.seed(0)
    expected = random.sample(ALPACA, int(len(ALPACA) * 0.37))
    answers = [annotations[i].turns[1][1] for i in range(len(annotations))]
    assert answers == [item["output"] for item in expected]
    with pytest.raises(DataError, match=r"ratio 0.01 of 20 records keeps none"):
        open_annotations(write("META: [{path: alpaca.json, type: text, ratio: 0.01}]"))


def test_groups_are_the_types_and_else_image_and_text(write, tmp_path):
    path = write("META: [{path: alpaca.json, type: chat, ratio: 0.1}, llava.json, captions.csv]")
    annotations = open_annotations(path)
    assert annotations.groups == ["chat"] * 2 + ["image"] * 5
    assert annotations.has_groups
    plain = open_annotations([str(tmp_path / "alpaca.json"), str(tmp_path / "llava.json")])
    assert (set(plain.groups), plain.has_groups) == ({"image", "text"}, False)


def test_one_file_by_two_templates_has_two_tables(write, toy_tokenizer):
    text = "META: [{path: alpaca.json, prompt_type: alpaca}, {path: alpaca.json, prompt_type: shortqa}, alpaca.json]"
    annotations = open_annotations(write(text))
    encoder = RecordEncoder(toy_tokenizer, "bare")
    assert [annotations[i].template for i in (0, 20, 40)] == ["alpaca", "alpaca_short", None]
    annotations.count_tokens(encoder, ImageLayout(4))
    names = ("alpaca", "alpaca_short", "bare")
    expected = [len(toy_tokenizer(alpaca_prompt("Say 7.", name=name) + "7</s>")["input_ids"]) for name in names]
    assert annotations.token_lengths[[7, 27, 47]].tolist() == expected


def test_a_recipe_makes_records_of_one_answer(write, tmp_path):
    annotations = open_annotations(write("META: [{path: llava.json, preprocess: single_turn_llava}, llava.json]"))
    assert annotations[0].turns == (("human", "What?\n<image>"), ("gpt", "A cat."))
    assert len(annotations[4].turns) == 4
    assert annotations.record_facts().num_turns.tolist() == [2] * 4 + [4] * 4
    bare = [record | {"conversations": TALK[2:]} for record in LLAVA]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    shown = open_annotations(write("META: [{path: bare.json, preprocess: single_turn_llava}]"))
    assert shown[0].turns == (("human", "<image>\nWhy?"), ("gpt", "So."))
    captions = open_annotations(write("META: [{path: several.json, preprocess: caption}]"))
    assert captions[0].turns[1][1] in ("a", "b", "c")
    assert captions[0] == captions[0]
    assert captions[1].turns == (("human", "<image>"), ("gpt", "d"))
    wrong = open_annotations(write("META: [{path: alpaca.json, preprocess: single_turn_llava}]"))
    with pytest.raises(DataError, match=r"alpaca.json\[0\]: preprocess single_turn_llava reads 'conversations'"):
        wrong[0]
    wrong = open_annotations(write("META: [{path: llava.json, preprocess: caption}]"))
    with pytest.raises(DataError, match="preprocess caption reads 'url' and 'caption'; it has id, image"):
        wrong[0]


def test_records_of_several_questions_are_counted_and_said_once(write, toy_tokenizer, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    text = "META: [{path: llava.json, type: a, prompt_type: alpaca}, {path: llava.json, type: b}]"
    annotations = open_annotations(write(text), str(tmp_path))
    report = check_annotations(annotations, RecordEncoder(toy_tokenizer, "v1"), ImageLayout(4), 2048)
    assert report.num_first_pairs == 4
    assert "4 records of more than one question, of which the template uses the first; `llava-lite single-turn`" in (
        report.summary()
    )
    assert "groups that share no batch: 4 a, 4 b" in report.summary()
