"""What holds for every benchmark: LLaVA's files and tables ask the same, and what is missing is listed."""

import shutil

import datasets
import pytest
import toy_benchmarks as toy

from llava_lite.eval.asking import read_images
from llava_lite.eval.benchmarks import BENCHMARKS, get_benchmark
from llava_lite.eval.benchmarks.base import Options

# Benchmark, split, variant -> makers of its files and of its tables.
CASES = [
    ("pope", None, None, toy.pope, toy.pope_table),
    ("textvqa", None, "ocr", toy.textvqa, toy.textvqa_table),
    ("textvqa", None, "no_ocr", toy.textvqa, toy.textvqa_table),
    ("vqav2", "val", None, toy.vqav2, toy.vqav2_table),
    ("vqav2", "test-dev", None, toy.vqav2, toy.vqav2_table),
    ("vqav2", "test", None, toy.vqav2, toy.vqav2_table),
    ("vizwiz", "val", None, toy.vizwiz, toy.vizwiz_table),
    ("vizwiz", "test", None, toy.vizwiz, toy.vizwiz_table),
    ("gqa", None, None, toy.gqa, toy.gqa_table),
    ("sqa", None, None, toy.sqa, toy.sqa_table),
    ("seed", None, None, toy.seed, toy.seed_table),
    ("mme", None, None, toy.mme, toy.mme_table),
]
MAKERS = {name: make for name, _, _, make, _ in CASES} | {"easy_vqa": toy.easy_vqa}


@pytest.fixture(autouse=True)
def cache_of_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("name", "split", "variant", "make", "make_table"), CASES)
def test_tables_ask_what_llavas_files_ask(name, split, variant, make, make_table, tmp_path):
    make(tmp_path / "files")
    make_table(tmp_path / "table")
    benchmark, options = get_benchmark(name), Options(split, variant)
    ours = benchmark.load(tmp_path / "files", options)
    theirs = benchmark.load(tmp_path / "table", options)

    def key(question):
        # Hugging Face's table of ScienceQA has another order here.
        return question.text, question.category, str(question.truth)

    assert sorted(map(key, ours)) == sorted(map(key, theirs))
    assert len(ours) > 1
    if name != "sqa":
        assert list(map(key, ours)) == list(map(key, theirs))
    images = [
        {question.text: [(image.size, image.tobytes()) for image in read_images(question)] for question in questions}
        for questions in (ours, theirs)
    ]
    assert images[0] == images[1]
    answers = ["yes"] * len(ours)
    scores = [benchmark.score(questions, answers, options) for questions in (ours, theirs)]
    assert scores[0].main == scores[1].main
    assert dict(scores[0].table) == dict(scores[1].table)
    if name != "sqa":
        assert scores[0].interval == scores[1].interval
        assert scores[0].each == scores[1].each


@pytest.mark.parametrize(("name", "split", "variant", "make", "make_table"), CASES)
def test_a_table_of_another_benchmark_is_refused(name, split, variant, make, make_table, tmp_path):
    parts = ("test", "val", "validation", "testdev")
    for part in parts:
        toy.write_table(tmp_path / f"data/{part}-00000-of-00001.parquet", [{"picture": "none", "words": "none"}])
    if name == "gqa":
        toy.write_table(tmp_path / "testdev_balanced_instructions/testdev-0.parquet", [{"picture": "none"}])
    with pytest.raises(ValueError, match=r"has no column .*; it has picture.* It may be that of another benchmark"):
        get_benchmark(name).load(tmp_path, Options(split, variant))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_is_listed_with_its_source(name, tmp_path, monkeypatch):
    # Without the package, whether it is installed or not.
    monkeypatch.setattr("llava_lite.eval.benchmarks.easy_vqa.installed", list)
    benchmark = get_benchmark(name)
    options = Options(benchmark.choose(None, "split"), benchmark.choose(None, "variant"))
    with pytest.raises(FileNotFoundError) as caught:
        benchmark.load(tmp_path, options)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{benchmark.title} needs files that are not in {tmp_path}:"
    for need in benchmark.needs:
        assert f"  {tmp_path / need.path}    from {need.source}" in lines
    assert lines[-1].startswith("Put them there, or name another directory with --data.")
    # One that is missing is listed alone.
    if name in MAKERS and benchmark.needs:
        MAKERS[name](tmp_path)
        gone = tmp_path / benchmark.needs[-1].path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(FileNotFoundError) as caught:
            benchmark.load(tmp_path, options)
        assert [line for line in str(caught.value).splitlines() if line.startswith("  ")] == [
            f"  {gone}    from {benchmark.needs[-1].source}"
        ]


def test_tables_are_named_where_the_split_is_not_there(tmp_path):
    toy.pope_table(tmp_path)
    (tmp_path / "data/test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no table of test; it has Full/random-00000-of-00001\.parquet\."):
        get_benchmark("pope").load(tmp_path, Options())


def test_a_saved_data_set_is_a_table_too(tmp_path):
    toy.mme_table(tmp_path / "hub")
    rows = datasets.Dataset.from_parquet(str(tmp_path / "hub/data/test-00000-of-00001.parquet"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "saved"))
    loaded = [get_benchmark("mme").load(tmp_path / name, Options()) for name in ("hub", "saved")]
    assert [one.text for one in loaded[0]] == [one.text for one in loaded[1]]
    assert read_images(loaded[0][0])[0].tobytes() == read_images(loaded[1][0])[0].tobytes()
    with pytest.raises(FileNotFoundError, match="has no split 'validation'; it has test"):
        get_benchmark("textvqa").load(tmp_path / "saved", Options())


@pytest.mark.parametrize(
    ("asked", "advice"),
    [("popes", "Did you mean 'pope'?"), ("vqa_v2", "Did you mean 'vqav2'?"), ("xyz", "'xyz'. Known: vqav2, gqa")],
)
def test_a_wrong_name_is_answered_with_the_near_one(asked, advice):
    with pytest.raises(ValueError, match="there is no benchmark") as caught:
        get_benchmark(asked)
    assert advice in str(caught.value)


def test_other_spellings_of_a_name_are_known():
    for spelling in ("ScienceQA", "sqa", "SQA"):
        assert get_benchmark(spelling).name == "sqa"
    assert get_benchmark("easy-VQA").name == get_benchmark("easyvqa").name == "easy_vqa"


def test_a_wrong_split_or_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="--split train: unknown for vqav2; known: val, test-dev, test"):
        get_benchmark("vqav2").choose("train", "split")
    with pytest.raises(ValueError, match="--variant ocr: unknown for pope; known: it has no variants"):
        get_benchmark("pope").choose("ocr", "variant")
