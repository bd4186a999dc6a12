"""Every format is converted to records that mean the same, and what is left out is counted with its reason."""

import base64
import csv
import json

import pytest
from conftest import draw_image
from toy_shards import caption_files, image_bytes, tar_files, write_parquet

from llava_lite.data.converters.base import Options
from llava_lite.data.converters.convert import convert
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations

H, G = "human", "gpt"
BASE64 = base64.b64encode(image_bytes(7)).decode()


@pytest.fixture
def images(tmp_path):
    """A directory of six images, three of them under COCO's names too."""
    directory = tmp_path / "images"
    directory.mkdir()
    for k in range(3):
        draw_image(k).save(directory / f"{k}.png")
        draw_image(k).save(directory / f"COCO_train2014_{k:012d}.jpg")
    return directory


@pytest.fixture
def converted(tmp_path, images):
    """Return a function: content of a file, its name, options -> (Written, the records that were written)."""
    number = iter(range(100))

    def run(content, name="in.json", image_out=None, placeholder_as_text=False, **options):
        path = tmp_path / name
        if not isinstance(content, str):
            lines = name.endswith("l")
            content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content, indent=1)
        path.write_text(content)
        out = tmp_path / f"out{next(number)}.json"
        options = {"image_folder": str(images)} | options
        written = convert(str(path), str(out), Options(**options), image_out, placeholder_as_text)
        if not written.num_records:
            assert not out.exists()
            return written, []
        directory = written.image_folder
        return written, list(open_annotations(str(out), directory, cache_dir=str(tmp_path / "cache")))

    return run


def shown(records):
    return [(record.images, record.turns) for record in records]


CASES = [
    # (content, name of the file, options, images and turns of the records)
    (
        [
            {"instruction": "do", "input": "this", "output": "done"},
            {"instruction": "<image>do", "input": "", "output": "d", "images": ["0.png"]},
        ],
        "alpaca.json",
        {},
        [((), ((H, "do\nthis"), (G, "done"))), (("0.png",), ((H, "<image>do"), (G, "d")))],
    ),
    (
        [{"query": "q", "response": "a", "history": [["x", "y"]], "images": ["0.png"]}],
        "swift.jsonl",
        {},
        [(("0.png",), ((H, "<image>\nx"), (G, "y"), (H, "q"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "question": "q", "answer": "a"}],
        "qa.jsonl",
        {},
        [(("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "question": "q", "answers": [{"answer": "b"}, {"answer": "a"}, {"answer": "a"}]}],
        "vizwiz.json",
        {"answers": "majority"},
        [(("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "question": "q", "answers": ["b", "a", "b"]}],
        "vizwiz.json",
        {"answers": "all"},
        [(("0.png",), ((H, "<image>\nq"), (G, "b"))), (("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "question": "q", "answers": ["b", "a"], "multiple_choice_answer": "a"}],
        "vqa.json",
        {},
        [(("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        {"data": [{"image_id": 0, "question": "q", "answers": ["a", "a"]}]},
        "textvqa.json",
        {"image_key": ["image_id"], "image_name": "{}.png"},
        [(("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "caption": "a cat"}, {"image": "1.png", "text": "a dog"}],
        "pairs.jsonl",
        {},
        [(("0.png",), ((H, "<image>"), (G, "a cat"))), (("1.png",), ((H, "<image>"), (G, "a dog")))],
    ),
    (
        [{"img": "0.png", "caption": "a cat"}],
        "pairs.jsonl",
        {"image_key": ["img"]},
        [(("0.png",), ((H, "<image>"), (G, "a cat")))],
    ),
    (
        [{"image": "0.png", "captions": ["a", "b"]}, {"image": "1.png", "sentences": [{"raw": "c"}]}],
        "many.jsonl",
        {"answers": "first", "question": "What?"},
        [(("0.png",), ((H, "<image>\nWhat?"), (G, "a"))), (("1.png",), ((H, "<image>\nWhat?"), (G, "c")))],
    ),
    (
        "image,caption\n0.png,\"a, b\"\n1.png,c\n",
        "pairs.csv",
        {},
        [(("0.png",), ((H, "<image>"), (G, "a, b"))), (("1.png",), ((H, "<image>"), (G, "c")))],
    ),
    ("0.png\ta cat\n", "pairs.tsv", {"columns": ["image", "caption"]}, [(("0.png",), ((H, "<image>"), (G, "a cat")))]),
    ("path,question,answer\n0.png,q,a\n", "qa.csv", {"image_key": ["path"]},
     [(("0.png",), ((H, "<image>\nq"), (G, "a")))]),
    (
        [[{"image": "0.png", "conversations": [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]}]],
        "packed.json",
        {},
        [(("0.png",), ((H, "<image>q"), (G, "a")))],
    ),
    (
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "images": ["0.png"]}],
        "trl.jsonl",
        {"images_first": True},
        [(("0.png",), ((H, "<image>\nq"), (G, "a")))],
    ),
    (
        [
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          {"role": "assistant", "content": "a"}], "images": ["0.png", "1.png"]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]},
                          {"role": "assistant", "content": "a"}], "images": ["0.png"]},
            {"conversations": [{"from": "system", "value": "S"}, {"from": H, "value": "q <image>"},
                               {"from": G, "value": "a"}], "image": "0.png"},
        ],
        "trl.jsonl",
        {"images_first": True},
        [(("0.png", "1.png"), ((H, "<image>\n<image>\nq"), (G, "a"))), (("0.png",), ((H, "q<image>"), (G, "a"))),
         (("0.png",), ((H, "q <image>"), (G, "a")))],
    ),
    (
        [{"image_path": "0.png", "conversations": [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]}],
        "llava.json",
        {"image_key": ["image_path"]},
        [(("0.png",), ((H, "<image>q"), (G, "a")))],
    ),
    (
        [{"left": "0.png", "image_1": "1.png", "conversations": [{"from": H, "value": "<image><image>q"},
                                                                 {"from": G, "value": "a"}]}],
        "llava.json",
        {"image_key": ["left", "image_1"]},
        [(("0.png", "1.png"), ((H, "<image><image>q"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "mask": BASE64, "bbox": [1, 2], "conversations": [{"from": H, "value": "<image>q"},
                                                                              {"from": G, "value": "a"}]}],
        "llava.json",
        {"drop": ["mask", "bbox"]},
        [(("0.png",), ((H, "<image>q"), (G, "a")))],
    ),
    (
        [{"id": "\ud800", "image": "0.png", "mask": 1, "conversations": [{"from": H, "value": "<image>q"},
                                                                         {"from": G, "value": "a"}]}],
        "llava.json",
        {"drop": ["mask"]},
        [(("0.png",), ((H, "<image>q"), (G, "a")))],
    ),
    (
        [{"image": "0.png", "conversations": [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]}],
        "llava.json",
        {"image_prefix": "images/", "image_folder": None},
        [(("images/0.png",), ((H, "<image>q"), (G, "a")))],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "name", "options", "expected"), CASES, ids=lambda value: str(value)[:30])
def test_a_format_becomes_records_that_mean_the_same(converted, content, name, options, expected):
    written, records = converted(content, name, **options)
    assert shown(records) == expected
    assert written.left_out == {}
    assert written.num_records == len(expected)


def test_a_record_keeps_its_system_text_and_its_unsupervised_answers(converted):
    messages = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    item = {"id": 7, "system": "S", "messages": [*messages, {"role": "assistant", "content": "b", "weight": 0}]}
    _, (record,) = converted([item, item | {"tools": ["f"]}], "openai.jsonl")
    assert (record.id, record.system, record.not_supervised) == ("7", "S", {3})
    assert record.turns == ((H, "q"), (G, "a"), (H, "r"), (G, "b"))


COCO = {
    "images": [{"id": k, "file_name": f"COCO_train2014_{k:012d}.jpg"} for k in range(3)],
    "annotations": [{"image_id": k % 2, "id": k, "caption": f"c{k % 3}"} for k in range(6)],
}


@pytest.mark.parametrize(
    ("answers", "captions", "not_taken"),
    [("all", ["c0", "c2", "c1", "c1", "c0", "c2"], 0), ("first", ["c0", "c1"], 4), ("majority", ["c0", "c1"], 4)],
)
@pytest.mark.parametrize("name", ["coco.json", "coco.jsonl"])
def test_captions_of_coco_are_taken_as_asked(converted, answers, captions, not_taken, name):
    written, records = converted([COCO] if name.endswith("l") else COCO, name, answers=answers)
    assert [record.turns[1][1] for record in records] == captions
    assert records[0].images == ("COCO_train2014_000000000000.jpg",)
    assert sum(written.notes.values()) == not_taken
    # The third image has no caption, and that is reported.
    assert [(count, "has no caption" in reason) for count, reason in written.left_out.values()] == [(1, True)]


def test_several_answers_are_never_chosen_in_silence(converted):
    written, records = converted(COCO, "coco.json")
    assert records == []
    ((count, reason),) = [pair for pair in written.left_out.values() if "different" in pair[1]]
    assert (count, "--answers all (a record each), first, or majority" in reason) == (2, True)
    written, records = converted([{"image": "0.png", "question": "q", "answers": ["a", "b"]}], "vqa.json")
    assert records == []
    assert "has 2 different answers: 'a', 'b'" in next(iter(written.left_out.values()))[1]


def test_the_two_files_of_vqa_are_joined_by_question(converted, tmp_path):
    questions = [{"question_id": 10 + k, "image_id": k, "question": f"q{k}"} for k in range(3)]
    answers = [{"answer": word} for word in ("no", "yes", "no")]
    entries = [{"question_id": 10 + k, "multiple_choice_answer": "yes", "answers": answers} for k in range(2)]
    (tmp_path / "answers.json").write_text(json.dumps({"annotations": [*entries, {"question_id": 99, "answers": []}]}))
    content = {"data_subtype": "train2014", "questions": questions}
    named = {"annotations": str(tmp_path / "answers.json")}
    for choice, expected in (("majority", ["yes", "yes"]), ("first", ["no", "no"]), ("all", ["no", "yes"] * 2)):
        written, records = converted(content, answers=choice, **named)
        assert [record.turns[1][1] for record in records] == expected
    assert records[0].images == ("COCO_train2014_000000000000.jpg",)
    assert records[0].turns[0] == (H, "<image>\nq0")
    assert any("COCO_train2014_{:012d}.jpg" in line for line in written.remarks)
    reasons = " ".join(reason for _, reason in written.left_out.values())
    assert "question 12 (in.json[2]) has no answer" in reasons
    assert "1 annotations whose question_id no question has" in reasons
    with pytest.raises(DataError, match="name the file of its answers: --annotations FILE"):
        converted(content)
    with pytest.raises(DataError, match="has no data_subtype to name its images by"):
        converted({"questions": questions}, **named)
    with pytest.raises(DataError, match="has the answers of a VQA data set"):
        converted({"annotations": entries})


def test_an_image_folder_is_read_with_the_directories_of_its_metadata(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        draw_image(1).save(tmp_path / "in" / split / "1.png")
    (tmp_path / "in" / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "one"}))
    with open(tmp_path / "in" / "test" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "question", "answer"], ["1.png", "q", "a"], ["2.png", "q", "a"]])
    written = convert(str(tmp_path / "in"), str(tmp_path / "out.jsonl"), Options())
    records = list(open_annotations(str(tmp_path / "out.jsonl"), written.image_folder))
    assert written.image_folder == str(tmp_path / "in")
    assert shown(records) == [
        (("test/1.png",), ((H, "<image>\nq"), (G, "a"))),
        (("train/1.png",), ((H, "<image>"), (G, "one"))),
    ]
    ((count, reason),) = written.left_out.values()
    assert (count, "there is no such file" in reason) == (1, True)
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="Directories named after classes have no captions"):
        convert(str(tmp_path / "classes"), str(tmp_path / "no.json"), Options())


def test_a_meta_file_of_internvl_is_read_with_its_roots_and_first_placeholders(converted, images, tmp_path):
    conversation = [{"from": H, "value": "q"}, {"from": G, "value": "a"}]
    lines = [{"id": 1, "image": "0.png", "conversations": conversation}, {"id": 2, "conversations": conversation},
             {"id": 3, "video": "a.mp4", "conversations": conversation}]  # fmt: skip
    (tmp_path / "iv.jsonl").write_text("\n".join(map(json.dumps, lines)))
    meta = {"mine": {"root": str(images), "annotation": "iv.jsonl", "repeat_time": 2}}
    written, records = converted(meta, image_folder=str(tmp_path))
    assert shown(records) == [
        (("images/0.png",), ((H, "<image>\nq"), (G, "a"))),
        ((), ((H, "q"), (G, "a"))),
    ]
    assert "repeat_time 2 of 'mine' is not applied" in written.remarks[0]
    assert "cannot use the video" in next(iter(written.left_out.values()))[1]
    with pytest.raises(DataError, match=r"the annotation file 'no.jsonl' of 'mine' does not exist"):
        converted({"mine": {"root": "", "annotation": "no.jsonl"}})


def test_media_and_their_weights_stay_in_the_file_that_is_written(converted, images):
    (images / "a.wav").write_bytes(b"RIFF")
    turns = [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]
    items = [
        {"id": "1", "audio": "a.wav", "audio_weight": 0.5, "image": "0.png", "conversations": turns},
        {"id": "2", "image": "0.png", "image_weight": 1, "conversations": turns},
        {"id": "3", "audio": "a.wav", "question": "q", "answer": "a"},
        {"id": "4", "audio": "lost.wav", "conversations": turns},
    ]
    written, records = converted(items)
    assert (written.num_records, written.num_with_image) == (3, 3)
    assert [record.images[0].parts for record in records] == [
        (("image", "0.png", 1.0), ("audio", "a.wav", 0.5)),
        (("image", "0.png", 1.0),),
        (("audio", "a.wav", 1.0),),
    ]
    assert records[2].turns == ((H, "<image>\nq"), (G, "a"))
    assert "cannot use the audio" in next(iter(written.left_out.values()))[1]
    (item,) = converted([items[0] | {"image": "png"}], image_prefix="0.", image_folder=None)[1]
    assert [part.path for part in item.images[0].parts] == ["0.png", "0.a.wav"]


def test_data_sets_of_llama_factory_are_read_by_their_columns_and_tags(converted, tmp_path):
    turns = [{"who": "sys", "says": "S"}, {"who": "u", "says": "<image>q"}, {"who": "m", "says": "a"}]
    (tmp_path / "tags.json").write_text(json.dumps([{"conversation": turns, "pics": ["0.png"]}]))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"q": "do", "more": "this", "r": "done", "s": "S"}]))
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "u", "assistant_tag": "m", "system_tag": "sys"}
    info = {
        "tags": {"file_name": "tags.json", "formatting": "sharegpt", "tags": tags,
                 "columns": {"messages": "conversation", "images": "pics"}},
        "alpaca": {"file_name": "alpaca.json", "columns": {"prompt": "q", "query": "more", "response": "r",
                                                           "system": "s"}, "num_samples": 9},
        "ranked": {"file_name": "alpaca.json", "ranking": True},
        "remote": {"hf_hub_url": "a/b"},
    }  # fmt: skip
    _, (record,) = converted(info, dataset="tags")
    assert shown([record]) == [(("0.png",), ((H, "<image>q"), (G, "a")))]
    assert record.system == "S"
    written, (record,) = converted(info, dataset="alpaca")
    assert (record.system, record.turns) == ("S", ((H, "do\nthis"), (G, "done")))
    assert written.remarks == ["num_samples 9 of 'alpaca' is not applied"]
    for name, words in (
        (None, "has 4 data sets; name one with --dataset: tags, alpaca, ranked, remote"),
        ("other", "--dataset other is not one of them"),
        ("ranked", "'ranked' is preference data"),
        ("remote", "'remote' names no file_name"),
    ):
        with pytest.raises(DataError, match=words):
            converted(info, dataset=name)


def test_images_that_records_hold_are_written_once_and_named_by_their_content(tmp_path, converted):
    from datasets import Dataset

    rows = [{"images": [{"bytes": image_bytes(k % 2), "path": None}], "question": f"q{k}", "answer": "a"}
            for k in range(4)]  # fmt: skip
    sources = [str(write_parquet(tmp_path / "a.parquet", rows)), str(tmp_path / "saved")]
    Dataset.from_list(rows).save_to_disk(sources[1])
    for k, source in enumerate(sources):
        out = tmp_path / f"{k}.jsonl"
        written = convert(source, str(out), Options())
        assert (written.num_records, written.num_images, written.image_folder) == (4, 2, str(tmp_path / f"{k}_images"))
        records = list(open_annotations(str(out), written.image_folder))
        assert [record.turns[0][1] for record in records] == [f"<image>\nq{k}" for k in range(4)]
        for k, record in enumerate(records):
            assert (tmp_path / written.image_folder / record.images[0]).read_bytes() == image_bytes(k % 2)
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    _, (record,) = converted([{"messages": messages}], "openai.jsonl", image_folder=None)
    assert (tmp_path / "out0_images" / record.images[0]).read_bytes() == image_bytes(7)
    (tar,) = [tar_files(tmp_path / "a.tar", [file for n in range(2) for file in caption_files(n)])]
    assert convert(str(tar), str(tmp_path / "tar.json"), Options()).num_images == 2


def test_held_and_named_images_start_from_one_directory_or_are_refused(converted, images, tmp_path):
    conversation = [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]
    both = [{"image": "0.png", "conversations": conversation}, {"image": BASE64, "conversations": conversation}]
    with pytest.raises(DataError, match="some records hold their images and others name files"):
        converted(both)
    written, records = converted(both, image_out=str(images / "held"))
    assert written.image_folder == str(images)
    assert [(images / record.images[0]).is_file() for record in records] == [True, True]


def test_what_is_left_out_is_counted_by_reason(converted, tmp_path):
    conversation = [{"from": H, "value": "<image>q"}, {"from": G, "value": "a"}]
    items = [{"id": k, "image": f"{k}.png", "conversations": conversation} for k in range(6)]
    items += [{"id": 6, "conversations": conversation}, {"id": 7, "conversations": conversation, "tools": ["f"]}]
    items += [{"id": 8, "image": "http://a.org/b.png", "conversations": conversation}]
    written, records = converted(items)
    assert [record.id for record in records] == ["0", "1", "2"]
    lines = written.lines("out.json")
    assert lines[:2] == ["wrote 3 records, 3 with images, to out.json", "left out 6:"]
    assert lines[2].startswith("  3 x record '3' (in.json[3]): cannot use the image")
    rest = "\n".join(lines[3:])
    assert "1 x 1 <image> placeholder in the conversation but no image in record '6' (in.json[6])" in rest
    assert "1 x record '7' (in.json[7]) has the key 'tools'" in rest
    assert "it is a URL; images are read from the image folder only" in rest
    written, records = converted(items[6:7], placeholder_as_text=True)
    assert (records[0].images, records[0].turns[0]) == ((), (H, "<image>q"))


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("a cat\thttp://a/b.jpg\n", "cc3m.tsv", r"none of which is known; .*--columns image caption.*img2dataset"),
        ("", "empty.csv", "has the columns .none., none of which is known"),
        ({"info": 1}, "other.json", "has 'info'; expected a list of records, or one of COCO captions"),
        ("[{", "cut.json", "cut short"),
        ("x", "notes.txt", "known: JSON, JSONL, CSV, TSV, parquet"),
    ],
)
def test_what_is_of_no_format_is_refused_with_what_is_known(converted, content, name, words):
    with pytest.raises(DataError, match=words):
        converted(content, name)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
        ({"text_list": ["a"], "image_info": []}, "'MMC4', which is not supported"),
        ({"images": ["u", None], "texts": [None, "a"]}, "'OBELICS', which is not supported"),
        ({"image": "0.png", "question": "q", "answer": 3}, "'answer' is int 3"),
        ({"instruction": "i", "output": "o", "history": ["x"]}, "'history' holds str 'x', expected pairs"),
        ({"instruction": "i", "output": "o", "tools": "[{}]"}, "tools and functions"),
    ],
)
def test_a_record_that_cannot_be_converted_is_left_out_with_the_reason(converted, item, words):
    written, records = converted([item])
    assert records == []
    ((count, reason),) = written.left_out.values()
    assert count == 1
    assert words in reason


def test_a_file_without_a_single_record_is_not_read_to_its_end(converted, monkeypatch):
    monkeypatch.setattr("llava_lite.data.converters.convert.LEAST_JUDGED", 5)
    with pytest.raises(DataError, match=r"none of the first 5 records can be converted; the last: .*'chosen'"):
        converted([{"chosen": "a", "rejected": "b"}] * 9, "dpo.jsonl")


def test_a_file_that_exists_is_not_written_over(converted, tmp_path):
    (tmp_path / "out0.json").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        converted([{"instruction": "i", "output": "o"}])
    assert (tmp_path / "out0.json").read_text() == "mine"
    with pytest.raises(DataError, match=r"ends in \.json or \.jsonl"):
        convert(str(tmp_path / "in.json"), str(tmp_path / "out.txt"), Options())
    with pytest.raises(DataError, match="there is no such file or directory"):
        convert(str(tmp_path / "nowhere.json"), str(tmp_path / "o.json"), Options())
