"""The page is one file that fetches nothing, says what the run holds, and escapes what others wrote."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_lite.train.monitor.report.page import write_report
from llava_lite.train.monitor.summary import loss_line

BAD = "</dd><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.links, self.texts, self.open, self.events = set(), [], [], [], []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value for name, value in attrs if name.split(":")[-1] in ("src", "href", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def made(directory, **more):
    """Return the page of a directory, after what holds for every page."""
    markup = write_report(directory, **more).read_text(encoding="utf-8")
    page = Page(markup)
    assert "is not as llava-lite writes it" not in page.text
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not page.events
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert not re.search(r"@import|url\((?!#)", markup)
    assert "default-src 'none'" in markup
    return page


def line(step, **more):
    return {"step": step, "loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_s": 10.0} | more


DATA = {
    "sources": [[BAD, 4]], "records": 4, "with_image": 3, "images": 5, "media": {"audio": 1}, "tokens": 80,
    "supervised_fraction": 0.25, "truncated": 0, "max_length": 2048,
    "lengths": {"p5": 10, "p50": 20, "p95": 30, "longest": 31}, "histogram": {"counts": [2, 2], "edges": [10, 21, 32]},
}  # fmt: skip
RECORD = {
    "base": BAD, "model_type": "llava_llama", "tower": "clip", "connector": "mlp2x_gelu", "conv_template": "v1",
    "experts": {"0": {"num": 4, "top_k": 2}}, "tuning": "moe", "dtype": "bfloat16", "zero_stage": 2, "max_steps": 9,
    "parameters": {"experts": {"trained": 30, "frozen": 10, "learning_rate": 2e-5, "dtypes": ["float32"]}},
    "settings": {"data_path": [BAD]}, "versions": {"torch": "2.13"}, "data": {"train": DATA, "eval": DATA},
    "starts": [{"date": "2026-01-31T12:00:00", "step": 0, "command": f"train {BAD}", "ranks": 8, "device": BAD}],
    "images": {BAD: ["0_0.jpg"]},
}  # fmt: skip


@pytest.fixture
def full(run_dir):
    """A run with everything that a page shows, in which every text is an attack."""
    experts = {"0": {"load": [0.5, 0.3, 0.2, 0.0], "dead": 1, "dropped": 0.0, "balance_loss": 1.2}}
    lines = [line(i, lm_loss=3 / i, moe_loss=0.01, experts=experts, tokens=50, mfu=0.4) for i in range(1, 10)]
    directory = run_dir(
        [*lines, {"step": 9, "eval_loss": 1.0}],
        name="a & b",
        run=RECORD | {"end": {"date": "2026-01-31T13:00:00", "state": "failed", "reason": BAD}},
        generations=[{"step": 9, "id": BAD, "prompt": BAD * 9, "expected": BAD, "answer": BAD}],
        skipped_records=[{"place": 1, "id": BAD, "kind": BAD, "reason": BAD}],
        results={
            "benchmark": BAD, "title": BAD, "metric": BAD, "score": 85.0, "interval_95": [80.0, 90.0], "notes": [BAD],
            "scores": {BAD: 1.0}, "run": {"model": BAD}, "published": [{"model": BAD, "score": 1.0, "source": BAD}],
        },
    )  # fmt: skip
    (directory / "samples").mkdir()
    Image.new("RGB", (20, 10)).save(directory / "samples/0_0.jpg")
    return directory


@pytest.mark.usefixtures("plots")
def test_texts_of_others_are_escaped_wherever_they_stand(full):
    page = made(full)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "svg" in page.tags
    assert sum(link.startswith("data:image/jpeg") for link in page.links) == 1
    headings = [
        "Worth knowing",
        "The run",
        "Data",
        "What trained",
        "Curves",
        "Expert load",
        "Samples",
        "Scores",
        "Cost",
    ]
    at = [page.text.index(heading) for heading in headings]
    assert at == sorted(at)


def test_the_facts_of_a_run_are_on_its_page(full):
    page = made(full)
    for words in (
        "a & b failed",
        "experts, router and connector (MoE-LLaVA's stage 3) · 2026-01-31 12:00 to 13:00",
        "steps 9",
        "evaluation loss 1.0000",
        "4 experts, 2 for each token; in layers 0",
        "4, 3 of them with images",
        "25.0% of the tokens",
        "20 (median); 5 to 95%: 10 to 30",
        "30 of 40 parameters trained (75.0%)",
        "experts 30 10 2e-05 float32",
        "80.0 to 90.0",
        "450",
        "DeepSpeed ZeRO-2",
        "Dead experts, without a token in the last tenth of the log: layer 0: expert 3.",
        "1 flag not at the default",
        "Curves The curves are drawn where matplotlib is installed",
    ):
        assert words in page.text, words


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize(
    "files",
    [
        {"lines": [line(1)]},
        {"lines": [{"step": 1, "loss": "nan"}]},
        {"lines": [{"step": 4, "eval_loss": 2.0}]},
        {"trainer_state": {"global_step": 0, "log_history": []}},
        {"run": {}},
        {"run": RECORD | {"data": {"train": {"sources": [["a.tar", 0]], "is_stream": True}}}},
        {"lines": [line(1, tokens_per_s=None, experts={"0": {"load": []}})]},
        {"lines": [line(1)], "config": {"moe": {"num_experts": [4], "moe_layers_idx": [0], "top_k_experts": 2}}},
    ],
)
def test_a_run_that_holds_little_has_a_page(files, run_dir):
    assert "What trained" in made(run_dir(**files)).text


def test_a_run_without_evaluation_experts_or_end_says_so(run_dir):
    page = made(run_dir([line(1), line(2)]))
    assert "my run no end recorded last written 20" in page.text
    assert "Samples None: answers are written at each evaluation" in page.text
    assert "Scores None found." in page.text
    assert "Expert load" not in page.text
    assert page.text.count("the directory has no run.json. Runs of earlier versions wrote none.") == 4
    assert "loss so far" in page.text


def test_a_page_is_written_where_it_is_asked_for(full, tmp_path):
    assert write_report(full, tmp_path / "new/page.html") == tmp_path / "new/page.html"
    assert not (full / "report.html").exists()
    assert write_report(full) == full / "report.html"
    with pytest.raises(IsADirectoryError, match=r"'.*new' is a directory; name a file, such as '.*new/report.html'"):
        write_report(full, tmp_path / "new")


def test_an_answer_that_has_no_bytes_is_written(run_dir):
    answers = [{"step": 1, "id": "a", "prompt": "p", "expected": "x", "answer": "\ud83d"}]
    assert r"at step 1 \ud83d" in made(run_dir([line(1)], generations=answers)).text


def test_the_loss_is_that_of_the_terminal_and_says_what_it_is(run_dir):
    lines = [line(i, loss=float(i), lm_loss=40.0 - i) for i in range(1, 31)]
    begun = {"starts": [{"date": "2026-01-31T12:00:00", "ranks": 1, "device": "CPU"}]}
    ended = begun | {"end": {"date": "2026-01-31T13:00:00", "state": "finished"}}
    said = loss_line(lines, 0.0)
    assert said == "11.0000 at the end, 38.0000 at the start (means of the last and first 3 logs)"
    words = "11.0000 mean of the last 3 logs; 38.0000 of the first 3"
    assert f"loss at the end {words}" in made(run_dir(lines, run=ended)).text
    for state in ("open", "stopped", "failed"):
        record = begun | ({} if state == "open" else {"end": {"date": "2026-01-31T13:00:00", "state": state}})
        page = made(run_dir(lines, state, run=record))
        assert f"loss so far {words}" in page.text
        assert "at the end" not in page.text
    assert (
        "loss so far 39.0000 the last log; 39.0000 at the first" in made(run_dir(lines[:1], "short", run=begun)).text
    )


def test_flags_that_were_given_stand_apart_from_those_that_the_run_chose(run_dir):
    settings = {"data_path": ["a.json"], "use_cpu": True, "packing": "samples"}
    page = made(run_dir([line(1)], run=RECORD | {"settings": settings, "given": ["data_path", "seed"]}))
    given, chosen = "1 flag given flag value --data_path a.json", "2 flags not given, whose value the run chose"
    assert f"Flags {given} {chosen} flag value --packing samples --use_cpu True" in page.text


@pytest.mark.parametrize(
    ("num", "words"),
    [(1, "1 log; 1 evaluation."), (5, "All 5 logs; 1 evaluation."), (250, "12 of 250 logs, evenly spaced; 1 evalu")],
)
def test_curves_as_numbers_say_how_many_logs_they_have(num, words, run_dir):
    lines = [line(i) for i in range(1, num + 1)]
    assert f"The curves as numbers {words}" in made(run_dir([*lines, {"step": num, "eval_loss": 2.0}])).text
