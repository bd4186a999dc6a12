"""Generate answers to a few held-out records during training, and write them to a file and the loggers."""

import json
import logging
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from llava_lite.constants import IGNORE_INDEX
from llava_lite.conversation.end_tokens import end_ids, get_config_end_token, stop_arguments
from llava_lite.data.collator import batch_images
from llava_lite.distributed.activity import note
from llava_lite.errors import get_sentence
from llava_lite.output_file import ESCAPED
from llava_lite.train.deepspeed.experts import needs_all_ranks
from llava_lite.train.monitor.log_lines import GENERATIONS
from llava_lite.train.monitor.run_log import RunLog

logger = logging.getLogger(__name__)


def prompt_and_answer(input_ids, labels):
    """Split an example into the prompt, up to its first supervised token, and its first supervised span.

    input_ids, labels: [L]. Returns (prompt ids [T], answer ids [A]).
    """
    supervised = (labels != IGNORE_INDEX).tolist()
    start = supervised.index(True)
    stop = supervised.index(False, start) if False in supervised[start:] else len(supervised)
    return input_ids[:start], input_ids[start:stop]


def decode(tokenizer, ids, end_token=""):
    """Return the text of ids up to an end token, image placeholders and special tokens left out."""
    text = tokenizer.decode([i for i in ids.tolist() if i >= 0], skip_special_tokens=True)
    return (text.partition(end_token)[0] if end_token else text).strip()


class StopIf(StoppingCriteria):
    """Ends the generation after the next token once `is_stopped` returns True."""

    def __init__(self, is_stopped):
        self.is_stopped = is_stopped

    def __call__(self, input_ids, scores, **kwargs):
        """Return [B], whether each sequence ends; input_ids: [B, T]."""
        return torch.full(input_ids.shape[:1], self.is_stopped(), device=input_ids.device)


@torch.no_grad()
def generate_answers(model, tokenizer, examples, device, max_new_tokens, is_stopped=lambda: False):
    """Return [{"id", "prompt", "expected", "answer"}] for examples of the evaluation set, greedily.

    An answer ends at the end token of the conversation template or of the generation config, or, incomplete, once
    `is_stopped()` is True.

    Under ZeRO-3 and --ep_size all ranks must call this with the same examples: every step needs all ranks.
    """
    answers, end_token = [], get_config_end_token(model.config, tokenizer)
    stop = stop_arguments(end_token, end_ids(model.generation_config, tokenizer), tokenizer)
    for example in examples:
        note(f"answering record {example['id']}", alone=True)
        prompt, expected = prompt_and_answer(example["input_ids"], example["labels"])
        images = {"images": None} | batch_images([example])
        output = model.generate(
            prompt[None].to(device),
            **images,
            attention_mask=torch.ones_like(prompt[None], device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            # A rank that stops early would leave the others waiting in the next all-gather.
            synced_gpus=needs_all_ranks(model),
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([StopIf(is_stopped)]),
            **stop,
        )
        answers.append(
            {
                "id": example["id"],
                "prompt": decode(tokenizer, prompt),
                "expected": decode(tokenizer, expected, end_token.text),
                "answer": decode(tokenizer, output[0], end_token.text),
            }
        )
    return answers


def begin_answers(output_dir, step, is_answered):
    """Drop from generations.jsonl what comes after `step`, and the answers at `step` too unless `is_answered`."""
    log = RunLog(output_dir, name=GENERATIONS)
    if log.path.is_file():
        log.start(step, None if is_answered else 0)


def write_answers(output_dir, step, answers):
    """Append the answers of one evaluation to generations.jsonl; a disk that is full must not stop the run for them.

    The log of the run shows them too.
    """
    try:
        with open(Path(output_dir) / GENERATIONS, "a", encoding="utf-8", errors=ESCAPED) as file:
            for answer in answers:
                file.write(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n")
    except OSError as error:
        logger.warning("the answers of step %d are not in %s: %s", step, GENERATIONS, get_sentence(error))


def report_answers(callbacks, step, answers):
    """Write the answers to the log, and as text to TensorBoard and W&B where they are on."""
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
            # The callback has begun its run; wandb's own functions write to it.
            import wandb

            wandb.log({"generations": wandb.Table(columns=columns, data=rows)})
