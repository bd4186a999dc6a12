"""Name the verbs of `llava-lite`: where each lives, what it does, and what other programs call it."""

import argparse

from llava_lite import __version__

# Verbs whose flags can be read, and wrong ones answered, before torch is imported for what they do.
_OF_MODELS = ("answer", "bank", "chat", "convert", "demo", "eval", "merge", "push", "serve")
PARSERS = {verb: f"llava_lite.commands.{verb}" for verb in (*_OF_MODELS, "flagperf", "plan", "report")}
PARSERS |= {"check": "llava_lite.commands.check_flags", "apply-delta": "llava_lite.commands.apply_delta"}
PARSERS["single-turn"] = "llava_lite.commands.single_turn"
# Those whose command line may hold flags of `train` too.
WITH_FLAGS_OF_TRAIN = ("check", "plan")
# Verb -> (module whose main(argv) does it, what it does).
VERBS = {
    "train": ("llava_lite.train.train", "run a training stage from flags or a YAML file"),
    "check": ("llava_lite.commands.check", "look through data and images before any GPU time is spent"),
    "data": ("llava_lite.commands.data", "rewrite records of another format: llava-lite data convert IN OUT.json"),
    "single-turn": (
        "llava_lite.commands.single_turn",
        "write a record of each question of a conversation: llava-lite single-turn IN OUT",
    ),
    "plan": (
        "llava_lite.commands.plan",
        "estimate parameters and memory of a run: flags of train, and --num_devices N",
    ),
    "report": (
        "llava_lite.commands.report",
        "write the page of a run, in progress or ended: llava-lite report RUN_DIR",
    ),
    "chat": ("llava_lite.serve.cli", "chat with a model in the terminal: llava-lite chat MODEL --image-file x.jpg"),
    "serve": ("llava_lite.commands.serve", "answer requests as OpenAI's API: llava-lite serve MODEL --port 8000"),
    "demo": (
        "llava_lite.commands.demo",
        "chat on a web page, with one model or two side by side: llava-lite demo MODEL [MODEL...]",
    ),
    "eval": (
        "llava_lite.commands.eval",
        "score a model on a benchmark: llava-lite eval pope --model DIR --data DIR; llava-lite eval list",
    ),
    "answer": (
        "llava_lite.commands.answer",
        "answer a file of questions: llava-lite answer MODEL QUESTIONS.jsonl OUT.jsonl --image-folder DIR",
    ),
    "flagperf": (
        "llava_lite.commands.flagperf",
        "run FlagPerf's LLaVA-1.5 case: llava-lite flagperf DATA_DIR CONFIG",
    ),
    "convert": (
        "llava_lite.commands.convert",
        "write a model as transformers' own LLaVA, or back, and check that it is equal",
    ),
    "push": (
        "llava_lite.commands.push",
        "upload a finished directory to the Hub: llava-lite push DIRECTORY user/name",
    ),
    "merge": (
        "llava_lite.commands.merge",
        "merge LoRA, or a directory of trained weights, into a full model and check it",
    ),
    "apply-delta": (
        "llava_lite.commands.apply_delta",
        "add published differences to their base: llava-lite apply-delta BASE DELTA OUT",
    ),
    "bank": (
        "llava_lite.commands.bank",
        "store embeddings of images, which mixing media reads: llava-lite bank IMAGES OUT.safetensors",
    ),
}
# What other programs call a verb.
OTHER_VERBS = {
    "train": "finetune fine-tune pretrain fit sft",
    "check": "validate verify lint data inspect",
    "single-turn": "single_turn singleturn split llava_to_single_turn",
    "plan": "estimate memory",
    "report": "summary summarize summarise page html plot plots visualize visualise curves metrics",
    "chat": "run infer inference generate ask talk cli reply",
    "serve": "server api api-server api_server openai vllm sglang deploy host",
    "demo": "web webui web-ui ui gradio app playground gradio_web_server",
    "eval": "evaluate evaluation test benchmark benchmarks score bench lmms_eval lmms-eval",
    "answer": "answers batch batch-inference batch_inference batch_infer predict model_vqa model_vqa_loader vqa",
    "convert": "export",
    "push": "upload share",
    "merge": "fuse fold merge_lora merge-lora",
    "apply-delta": "apply_delta delta get_chinese_llama",
    "bank": "cache knn features feature_bank feature-bank embed",
}


def build_parser():
    """Return the parser of the verb; what follows it belongs to the verb's own parser."""
    verbs = "\n".join(f"  {verb:13}{words}" for verb, (_, words) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="llava-lite",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="llava-lite VERB ...",
        description="Train, check and use LLaVA-family models, dense or with sparse experts.",
        epilog=f"verbs:\n{verbs}\n\n`llava-lite VERB --help` lists the flags of a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llava-lite {__version__}")
    parser.add_argument("verb", nargs="?", metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the verb")
    return parser
