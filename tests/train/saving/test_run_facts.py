"""A run that resumes keeps the date of its start and the records that it had left out."""

import json
from datetime import date, datetime

import pytest

from llava_lite.train.saving.run_facts import FACTS, load_run_facts
from llava_lite.train.train import prepare, train

FIRST, LATER = datetime(2026, 2, 28, 23, 50), datetime(2026, 3, 9, 8, 0)
TURNS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TEMPLATES = {
    "in front": "{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n' -}}" + TURNS,
    "in a variable": "{%- set day = strftime_now(\"%Y-%m-%d\") -%}{{- '# ' + day + '\\n' -}}" + TURNS,
    "twice": "{{- strftime_now('%B %Y') + ', ' + strftime_now('%d') + '\\n' -}}" + TURNS,
    "if there is a clock": "{%- if strftime_now is defined -%}{{- strftime_now('%d.%m.') -}}{%- endif -%}" + TURNS,
}


@pytest.fixture
def clock(monkeypatch):
    """Return a function: what time it is from now on, as the templates see it."""
    from llava_lite.conversation import chat_template

    def set_to(moment):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        class Day(date):
            @classmethod
            def today(cls):
                return moment.date()

        monkeypatch.setattr(chat_template, "datetime", Clock)
        monkeypatch.setattr(chat_template, "date", Day)

    return set_to


@pytest.fixture
def dated_flags(stage_flags, toy_llm_dir, toy_tokenizer, tmp_path):
    """Return a function: chat template, output directory, more flags -> flags of a run of 4 steps, saved every 2."""
    from transformers import AutoModelForCausalLM

    def make(template, out, *more):
        directory = tmp_path / "llm"
        toy_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        toy_tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama"))
        model.resize_token_embeddings(len(toy_tokenizer))
        model.save_pretrained(directory)
        toy_tokenizer.save_pretrained(directory)
        own = "--mm_projector_type mlp2x_gelu --max_steps 4 --save_strategy steps --save_steps 2 --logging_steps 1"
        return [*stage_flags("full", out, *own.split(), *more, model=directory), "--version", "chat"]

    return make


def ids(dataset):
    """Return the token ids of every record."""
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def losses(trainer):
    """Return the losses of a run, of its evaluations too."""
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in trainer.state.log_history]


@pytest.mark.parametrize("place", TEMPLATES)
def test_a_run_that_resumes_another_day_writes_the_date_of_its_first(place, dated_flags, clock, tmp_path):
    clock(FIRST)
    flags = dated_flags(TEMPLATES[place], tmp_path / "full", "--eval_split", "4", "--eval_strategy", "epoch")
    full = train(flags)
    again = [*flags, "--output_dir", str(tmp_path / "again")]
    clock(LATER)
    other_day = ids(prepare(again).trainer.train_dataset)
    assert other_day != ids(full.train_dataset)
    resuming = [*again, "--resume_from_checkpoint", f"{tmp_path}/full/checkpoint-2"]
    resumed = train(resuming)
    assert ids(resumed.train_dataset) == ids(full.train_dataset)
    assert ids(resumed.eval_dataset) == ids(full.eval_dataset)
    assert losses(resumed) == losses(full)
    # Its own checkpoints hand the first day on.
    assert json.loads((tmp_path / "again" / "checkpoint-4" / FACTS).read_text())["moment"] == FIRST.isoformat()


def test_a_checkpoint_from_before_there_were_facts_resumes_with_todays_date(dated_flags, clock, tmp_path):
    clock(FIRST)
    trainer = train(dated_flags(TURNS, tmp_path / "full"))
    directory = tmp_path / "full" / "checkpoint-2"
    (directory / FACTS).unlink()
    clock(LATER)
    facts = load_run_facts(str(directory))
    assert (facts.moment, facts.step, facts.before) == (LATER, 2, {})
    assert load_run_facts(False).moment == LATER
    assert trainer.facts.moment == FIRST


def test_what_was_found_after_a_checkpoint_is_known_with_the_earliest_time_of_each(tmp_path):
    directory = tmp_path / "checkpoint-4"
    directory.mkdir()
    found = {"step": 3, "since": 0, "place": 7}
    newer = [
        {"step": 6, "since": 1, "place": 2},
        {"step": 9, "since": 2, "place": 2},
        {"step": 2, "since": 0, "place": 5},
    ]
    kept = {"start": [{"place": 1}], "later": [found]}
    facts = {"moment": FIRST.isoformat(), "left_out": {"train": kept, "eval": {"start": [], "later": []}}}
    (directory / FACTS).write_text(json.dumps(facts))
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 0.8}))
    lines = [{"file": "toy.json", "position": 1}, *newer]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # A line that was cut short by a crash ends the log.
    (tmp_path / "skipped_records.jsonl").write_text(text + '{"step": 8, "pl')
    (tmp_path / "skipped_records-rank00001.jsonl").write_text(json.dumps({"step": 5, "since": 0, "place": 9}) + "\n")
    read = load_run_facts(str(directory))
    assert (read.moment, read.step, read.epoch) == (FIRST, 4, 0)
    assert [(line["place"], line["since"]) for line in read.before["train"]["later"]] == [(7, 0), (9, 0), (2, 1)]
    assert read.before["eval"] == {"start": [], "later": []}
