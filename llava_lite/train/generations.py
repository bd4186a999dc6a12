"""Let the model answer a few held-out records during training and write the answers down."""

import json
import logging
from pathlib import Path

import torch

from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.collator import batch_pictures
from llava_lite.end_marks import end_ids, end_mark_of_config, stop_arguments
from llava_lite.train.expert_parallel import needs_all_ranks

logger = logging.getLogger(__name__)

GENERATIONS = "generations.jsonl"


def prompt_and_answer(input_ids, labels):
    """Cut an example into what comes before its first learned token and that first learned stretch.

    input_ids, labels: [L]. Returns (prompt ids [T], answer ids [A]).
    """
    learned = (labels != IGNORE_INDEX).tolist()
    start = learned.index(True)
    stop = learned.index(False, start) if False in learned[start:] else len(learned)
    return input_ids[:start], input_ids[start:stop]


def decode(tokenizer, ids, end_mark=""):
    """Return the text of ids up to an end mark, picture placeholders and special tokens left out."""
    text = tokenizer.decode([i for i in ids.tolist() if i >= 0], skip_special_tokens=True)
    return (text.partition(end_mark)[0] if end_mark else text).strip()


@torch.no_grad()
def generate_answers(model, tokenizer, examples, device, max_new_tokens):
    """Return [{"id", "prompt", "expected", "answer"}] for examples of the evaluation set, greedily.

    An answer ends where the prompt format of the model ends one, and where its generation config does.

    Under ZeRO-3 and --ep_size all ranks must call this with the same examples: every step needs all of them.
    """
    answers, mark = [], end_mark_of_config(model.config, tokenizer)
    stop = stop_arguments(mark, end_ids(model.generation_config, tokenizer), tokenizer)
    for example in examples:
        prompt, expected = prompt_and_answer(example["input_ids"], example["labels"])
        pictures = {"images": None} | batch_pictures([example])
        output = model.generate(
            prompt[None].to(device),
            **pictures,
            attention_mask=torch.ones_like(prompt[None], device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            # A rank that stops early would leave the others alone in the next gathering.
            synced_gpus=needs_all_ranks(model),
            pad_token_id=tokenizer.pad_token_id,
            **stop,
        )
        answers.append(
            {
                "id": example["id"],
                "prompt": decode(tokenizer, prompt),
                "expected": decode(tokenizer, expected, mark.text),
                "answer": decode(tokenizer, output[0], mark.text),
            }
        )
    return answers


def write_answers(output_dir, step, answers):
    """Append the answers of one evaluation to generations.jsonl."""
    with open(Path(output_dir) / GENERATIONS, "a", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n")


def report_answers(callbacks, step, answers):
    """Show the answers in the log, and as text where TensorBoard or W&B is on."""
    table = "\n\n".join(
        f"**{a['id']}** {a['prompt']}\n\nexpected: {a['expected']}\n\nanswer: {a['answer']}" for a in answers
    )
    for answer in answers:
        logger.info("step %d, %s: expected %r, answered %r", step, answer["id"], answer["expected"], answer["answer"])
    for callback in callbacks:
        kind = type(callback).__name__
        if kind == "TensorBoardCallback" and callback.tb_writer is not None:
            callback.tb_writer.add_text("generations", table, step)
        elif kind == "WandbCallback":
            rows = [[step, *answer.values()] for answer in answers]
            columns = ["step", *answers[0]]
            callback._wandb.log({"generations": callback._wandb.Table(columns=columns, data=rows)})
