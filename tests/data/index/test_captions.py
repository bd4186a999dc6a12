"""Caption files of LLaMA-Adapter: one line is one record, and what is wrong with a line is said by its number."""

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.index.captions import Columns, read_columns
from llava_lite.data.index.sources import open_sources


@pytest.fixture
def read(tmp_path):
    """Return a function: bytes of a file -> (images, caption) of its records."""

    def run(data, name="captions.csv"):
        (tmp_path / name).write_bytes(data)
        annotations = open_annotations(str(tmp_path / name))
        records = [annotations[i] for i in range(len(annotations))]
        assert {record.turns[0] for record in records} == {("human", "<image>")}
        return [(*record.images, record.turns[1][1]) for record in records]

    return run


TWO = [("/data/1.jpg", "a cat"), ("/data/2.jpg", "两只狗")]


@pytest.mark.parametrize(
    "text",
    [
        "url\tcaption\n/data/1.jpg\ta cat\n/data/2.jpg\t两只狗\n",
        "url\t\tcaption\n/data/1.jpg\t\ta cat\n/data/2.jpg\t两只狗",
        "url\tcaption\n/data/1.jpg\t\t\ta cat\n\n/data/2.jpg\t两只狗\n",
        "caption\turl\na cat\t/data/1.jpg\n两只狗\t/data/2.jpg\n",
        "\ufeffurl\tcaption\r\n/data/1.jpg\ta cat\r\n/data/2.jpg\t两只狗\r\n",
        'URL\tCaption\n"/data/1.jpg"\t"a cat"\n/data/2.jpg\t两只狗\n',
        "\turl\tcaption\n0\t/data/1.jpg\ta cat\n1\t/data/2.jpg\t两只狗\n",
        "id\timage\turl\tcaption\n1\t/data/1.jpg\thttp://a/1\ta cat\n2\t/data/2.jpg\thttp://a/2\t两只狗\n",
    ],
)
@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv"])
def test_the_columns_are_found_by_their_names_and_tabs(read, text, name):
    assert read(text.encode(), name) == TWO


def test_quotes_count_only_around_a_full_field(read):
    lines = ['"a ""red"" cat"', '"Go" said the cat', 'the "cat"', '"a" and "b"', "\"it's", '""""']
    data = "url\tcaption\n" + "".join(f"{k}.jpg\t{line}\n" for k, line in enumerate(lines))
    captions = [caption for _, caption in read(data.encode())]
    assert captions == ['a "red" cat', '"Go" said the cat', 'the "cat"', '"a" and "b"', "\"it's", '"']


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2.jpg\t", "line 4: the caption is empty. Write it, or remove the line"),
        ("2.jpg\t\t", "line 4: the caption is empty"),
        ('2.jpg\t""', "line 4: the caption is empty"),
        ("\ta dog", "line 4: the url is empty"),
        ("2.jpg", "line 4: 1 fields, expected 2, which tabs separate: url, caption"),
        ("2.jpg\ta\tdog", "line 4: 3 fields, expected 2"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_spoils_no_other(tmp_path, line, words):
    path = tmp_path / "captions.csv"
    path.write_text(f"url\tcaption\n1.jpg\tNone\n\n{line}\n3.jpg\tnan\n")
    annotations = open_annotations(str(path))
    assert annotations.record_facts().num_images.tolist() == [1, -1, 1]
    assert annotations[0].turns[1] == ("gpt", "None")
    with pytest.raises(DataError, match=words) as error:
        annotations[1]
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("url\ttext", "has no column of captions: its first line names 'url', 'text', and a caption file names `url`"),
        ("url", "has no column of captions"),
        ("/data/1.jpg\ta cat", "has no column of captions"),
        ("image,caption", "is a table; convert it first: llava-lite data convert"),
        ("file_name\tcaption", "is a table; convert it first"),
        ("question\tanswer", "is a table; convert it first"),
    ],
)
def test_a_file_without_captions_is_refused_at_once_and_other_tables_are_converted(tmp_path, header, words):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\nx\ty\n")
    with pytest.raises(DataError, match=words):
        open_sources(str(path))


def test_a_byte_that_is_no_text_is_named_by_its_place(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"url\tcaption\n1.jpg\ta \xff cat\n")
    with pytest.raises(DataError, match="line 2, column 9: byte 0xff is not UTF-8"):
        open_annotations(str(path))[0]
    path.write_bytes("url\tcaption\n".encode("latin1") + b"")
    with pytest.raises(DataError, match="holds no record"):
        open_annotations(str(path))
    path.write_bytes(b"u\xff\tcaption\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_sources(str(path))


def test_a_run_of_tabs_counts_as_one_where_the_header_has_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("url\t\tcaption\n")
    assert read_columns(str(path)) == Columns(("url", "caption"), runs=True)
    path.write_text("url\ttitle\tcaption\n")
    assert read_columns(str(path)) == Columns(("url", "title", "caption"), runs=False)
