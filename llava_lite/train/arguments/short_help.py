"""The first page of help, with the flags that most runs need; made without importing what a run imports."""

import textwrap

# Heading -> (flag and its value, its meaning). Defaults are those of fields.py; tests compare them.
MAIN_FLAGS = {
    "What trains": (
        ("--model_name_or_path MODEL", "language model to start from, or the output of an earlier stage (needed)"),
        (
            "--tuning NAME",
            "projector (stage 1), full (stage 2), lora, moe (stage 3), prompts or bias_norm; default: full",
        ),
        ("--vision_tower TOWER", "CLIP, SigLIP or DINOv2, such as openai/clip-vit-large-patch14-336"),
        (
            "--mm_projector_type NAME",
            "connector: linear, mlp2x_gelu (LLaVA-1.5), ...; default: the model's, else linear",
        ),
        ("--pretrain_mm_mlp_adapter FILE", "mm_projector.bin of stage 1, for stage 2"),
        ("--version NAME", "conversation template: plain in stage 1; chat is the tokenizer's own; default: v1"),
    ),
    "Data": (
        ("--data_path FILE ...", "records: JSON, JSONL or YAML mixtures; or .tar and .parquet shards (needed)"),
        ("--image_folder DIRECTORY", "where the image paths of the records start"),
        ("--image_aspect_ratio NAME", "square, pad, anyres or random_crop; default: the model's, else square"),
        ("--model_max_length N", "longest sequence in tokens, image features included; default: 2048"),
        ("--eval_data_path FILE ...", "records to evaluate on"),
        ("--eval_split X", "records of --data_path to evaluate on instead: a fraction below 1, or a number"),
        ("--eval_strategy NAME", "when to evaluate: no, epoch, or steps (every --eval_steps); default: no"),
    ),
    "Length and rate": (
        ("--num_train_epochs X", "passes over the data; default: 1"),
        ("--max_steps N", "optimizer steps, in place of epochs"),
        ("--per_device_train_batch_size N", "records of a device in a micro-batch; default: 8"),
        ("--gradient_accumulation_steps N", "micro-batches of a step; default: 1"),
        ("--learning_rate X", "peak learning rate; default: 5e-05"),
        ("--warmup_steps X", "steps of warm-up; below 1 a fraction of all steps; default: 0.03"),
    ),
    "LoRA and experts": (
        ("--lora_r N", "rank of LoRA; default: 64"),
        ("--lora_alpha N", "scale of LoRA before it is divided by the rank; default: 16"),
        ("--bits N", "4 or 8: quantise the frozen weights under LoRA; default: 16"),
        ("--num_experts N ...", "experts of a layer with --tuning moe; default: 4"),
    ),
    "Device and memory": (
        ("--deepspeed NAME", "zero2, zero3, zero2_offload, zero3_offload, zero3_offload_nvme, or a DeepSpeed JSON"),
        ("--bf16 True", "compute in bfloat16; default: where the device can"),
        (
            "--gradient_checkpointing auto",
            "layers whose activations are recomputed: auto, as few as memory requires; True, all",
        ),
        ("--packing NAME", "none, samples or tokens: what a micro-batch is; default: samples where that is possible"),
        ("--dataloader_num_workers N", "processes that read and prepare images; default: 0"),
    ),
    "Output": (
        (
            "--output_dir DIRECTORY",
            "directory of checkpoints and of the final model; a run that finds checkpoints there continues (needed)",
        ),
        ("--save_steps X", "steps between two checkpoints; default: 500"),
        (
            "--resume_from_checkpoint X",
            "a checkpoint-N directory, True for the newest one, False to start from the beginning",
        ),
        ("--report_to NAME ...", "trackers that get the log, such as tensorboard or wandb; default: none"),
    ),
}
USAGE = """\
usage: llava-lite train --model_name_or_path MODEL --data_path FILE --output_dir DIRECTORY [--flag value ...]
       llava-lite train run.yaml [--flag value ...]

Train one stage in this process. On all GPUs:
    deepspeed --module llava_lite.train.train --deepspeed zero2 [--flag value ...]"""
END = "`llava-lite train --help all` lists every flag, those of transformers' Trainer included."
_COLUMN = 36
_WIDTH = 119


def asks_for_help(argv) -> str | None:
    """Return "main" or "all" if a command line asks for help, None if it does not."""
    argv = list(argv)
    at = next((i for i, word in enumerate(argv) if word in ("-h", "--help")), None)
    if at is None:
        return None
    return "all" if argv[at + 1 : at + 2] == ["all"] else "main"


def main_page() -> str:
    """Return the first page of help of `llava-lite train`."""
    sections = ["\n".join([f"{title}:", *map(_entry, flags)]) for title, flags in MAIN_FLAGS.items()]
    return "\n\n".join([USAGE, *sections, END]) + "\n"


def _entry(flag_and_text) -> str:
    flag, text = flag_and_text
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {flag}".ljust(_COLUMN), subsequent_indent=" " * _COLUMN)
