"""New tokens are trained under every tuning and are there in every export; no other vocabulary row changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_lite import load
from llava_lite.commands.plan import main as plan
from llava_lite.export.convert import convert
from llava_lite.export.merge import merge
from llava_lite.train.train import train

IMAGE_TOKENS = ["<im_start>", "<im_end>"]
WORDS = ["<seg>", "<loc_1>"]
# Ways in which a model gets tokens without trained vocabulary rows: flags, what lies beside the base, tokens.
WAYS = {
    "image_tokens": ("--mm_use_im_start_end=True", None, IMAGE_TOKENS),
    "flag": ("--new_tokens <seg> <loc_1>", None, WORDS),
    "beside": ("", WORDS, WORDS),
    "all": ("--mm_use_im_start_end=True --new_tokens <loc_1>", ["<seg>"], ["<seg>", "<loc_1>", *IMAGE_TOKENS]),
    # Room in a padded vocabulary, as Qwen's: nothing is resized.
    "padded": ("--new_tokens <seg> <loc_1>", None, WORDS),
    "pad": ("", ["[PAD]"], ["[PAD]"]),
}
TUNINGS = {
    "projector": ("projector", "--version=v1 --learning_rate=1e-2"),
    "lora": ("lora", "--learning_rate=1e-2 --weight_decay=0.1"),
    "moe": ("moe", "--learning_rate=1e-2"),
    "frozen": ("full", "--freeze_backbone=True --learning_rate=1e-2"),
}


@pytest.fixture
def base(toy_llm_dir, tmp_path):
    """Return a function: -> a base model's directory, with tied embeddings, more rows or more tokens if asked for."""

    def make(is_tied=False, vocab_size=None, words=()):
        directory = tmp_path / "base"
        model = AutoModelForCausalLM.from_pretrained(toy_llm_dir("llama"))
        if vocab_size is not None:
            model.resize_token_embeddings(vocab_size)
        if is_tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(toy_llm_dir("llama"))
        tokenizer.add_tokens(list(words), special_tokens=True)
        if "[PAD]" in words:
            tokenizer.pad_token = "[PAD]"
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def data(toy_data, tmp_path):
    """Records whose answers hold the new words, all with images."""
    path, images = toy_data(tmp_path / "words", num_records=12, text_only_every=0, num_turns=1)
    records = json.loads(Path(path).read_text())
    for record in records:
        record["conversations"][1]["value"] = "<loc_1> is the square <seg>"
    Path(path).write_text(json.dumps(records))
    return path, images


@pytest.fixture
def started(stage_flags, base, data, tmp_path):
    """Return a function: (tuning, way, tied, more flags) -> (trainer, its directory, ids of the new words)."""

    def start(tuning, way, is_tied=False, *more, out="out"):
        flags, beside, words = WAYS[way]
        directory = base(is_tied, 480 if way == "padded" else None, beside or ())
        stage, own = TUNINGS[tuning]
        argv = stage_flags(stage, tmp_path / out, data=data)
        argv[argv.index("--model_name_or_path") + 1] = str(directory)
        trainer = train([*argv, *own.split(), *flags.split(), "--max_steps=4", *more])
        return trainer, tmp_path / out, trainer.processing_class.convert_tokens_to_ids(words)

    return start


def tables_of(model):
    """Return the two vocabulary matrices."""
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def assert_rows_were_trained(opened, trainer, directory, ids, tuning):
    """Compare a model that was opened with its base and with what the run held."""
    hf = AutoModelForCausalLM.from_pretrained(directory.parent / "base")
    held = trainer.unwrapped
    layers = (held.get_input_embeddings(), held.get_output_embeddings())
    for i, (table, before, layer) in enumerate(zip(tables_of(opened), tables_of(hf), layers, strict=True)):
        if tuning == "frozen" and (i == 1 or hf.config.tie_word_embeddings):
            # --freeze_backbone trains the full head.
            continue
        kept = [row for row in range(len(before)) if row not in ids]
        assert torch.equal(table[kept], before[kept])
        assert torch.equal(table[ids], layer.new_rows.detach())
        # The frozen matrix holds the vocabulary rows as they were drawn.
        moved = (table[ids] != layer.weight[ids]).any(1)
        # Embeddings of tokens that are in no record stay as they were drawn, unless they are tied to the head's.
        assert moved.all() or (i == 0 and not hf.config.tie_word_embeddings)
        if len(ids) > 1:
            assert len(table[ids].unique(dim=0)) == len(ids)
    return [layer.new_rows.detach() for layer in layers if hasattr(layer, "new_rows")]


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_vocabulary_rows_of_new_tokens_are_trained_and_no_others(tuning, way, is_tied, started):
    trainer, out, ids = started(tuning, way, is_tied)
    opened, processor = load(out, device="cpu")
    assert len(processor.tokenizer) <= len(tables_of(opened)[0])
    assert processor.tokenizer.convert_tokens_to_ids(WAYS[way][2]) == ids
    assert_rows_were_trained(opened, trainer, out, ids, tuning)
    if not (tuning == "frozen" and is_tied):
        assert json.loads((out / "config.json").read_text())["new_words"] == sorted(ids)
    # The model that answers is the one that was trained, not only its vocabulary rows.
    text = torch.tensor([[1, 50, *ids, 60, 70]])
    with torch.no_grad():
        ours, held = opened(input_ids=text).logits, trainer.model.eval()(input_ids=text).logits
    torch.testing.assert_close(ours, held, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_full_tuning_trains_all_rows_and_new_ones_are_drawn_apart(is_tied, stage_flags, base, data, tmp_path):
    argv = stage_flags("full", tmp_path / "out", "--new_tokens", *WORDS, "--max_steps=2", data=data)
    argv[argv.index("--model_name_or_path") + 1] = str(base(is_tied))
    train(argv)
    opened, processor = load(tmp_path / "out", device="cpu")
    ids = processor.tokenizer.convert_tokens_to_ids(WORDS)
    assert all(not torch.equal(table[ids[0]], table[ids[1]]) for table in tables_of(opened))
    assert opened.config.new_words is None


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_run_that_resumes_ends_as_one_that_never_stopped(tuning, started, tmp_path):
    saves = ("--save_strategy=steps", "--save_steps=2")
    full = started(tuning, "all", False, *saves, out="full")[0]
    shutil.copytree(tmp_path / "full/checkpoint-2", tmp_path / "out/checkpoint-2")
    shutil.rmtree(tmp_path / "base")
    again, _, _ = started(tuning, "all", False, *saves)
    expected = dict(full.model.named_parameters())
    assert any(name.endswith("new_rows") for name in expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.named_parameters())


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tuning", ["projector", "lora"])
@pytest.mark.parametrize("way", ["all", "padded"])
def test_merged_and_converted_models_hold_the_new_vocabulary_rows(way, tuning, is_tied, started, tmp_path):
    trainer, out, ids = started(tuning, way, is_tied)
    merge(out, tmp_path / "merged", report=lambda line: None)
    opened, _ = load(tmp_path / "merged", device="cpu")
    rows = assert_rows_were_trained(opened, trainer, out, ids, tuning)
    if way == "all":
        convert(tmp_path / "merged", tmp_path / "hf", report=lambda line: None)
        convert(tmp_path / "hf", tmp_path / "back", report=lambda line: None)
        back, _ = load(tmp_path / "back", device="cpu")
        assert all(torch.equal(table[ids], row) for table, row in zip(tables_of(back), rows, strict=True))
        assert back.config.new_words == sorted(ids)


@pytest.mark.parametrize("first", ["projector", "lora", "moe"])
@pytest.mark.parametrize("then", ["lora", "moe"])
def test_the_next_stage_trains_the_new_vocabulary_rows_further(first, then, started, stage_flags, data, tmp_path):
    _, out, ids = started(first, "all")
    rows = [table[ids] for table in tables_of(load(out, device="cpu")[0])]
    if first == "lora":
        merge(out, tmp_path / "merged", report=lambda line: None)
        out = tmp_path / "merged"
    argv = [*stage_flags(then, tmp_path / "next", data=data, model=out), "--max_steps=2"]
    if (first, then) == ("moe", "moe"):
        # A model that has experts keeps its own.
        del argv[argv.index("--num_experts") : argv.index("--num_experts") + 2]
    trainer = train(argv)
    held = trainer.unwrapped
    for layer, before in zip((held.get_input_embeddings(), held.get_output_embeddings()), rows, strict=True):
        assert torch.equal(layer.weight[ids], before)
        assert not torch.equal(layer.new_rows, before)
    opened, _ = load(tmp_path / "next", device="cpu")
    assert_rows_were_trained(opened, trainer, out.parent / "out", ids, then)
    again, _ = load(tmp_path / "next", device="cpu", dtype="bfloat16")
    assert torch.equal(again.lm_head.weight, opened.lm_head.weight.bfloat16())


def test_mm_projector_bin_carries_the_rows_to_a_stage_on_the_base_itself(started, stage_flags, data, tmp_path):
    trainer, out, _ = started("projector", "image_tokens")
    saved = torch.load(out / "mm_projector.bin", weights_only=True)
    held = trainer.unwrapped
    # The two vocabulary rows alone, as LLaVA reads them.
    assert torch.equal(saved["model.embed_tokens.weight"], held.get_input_embeddings().new_rows)
    assert torch.equal(saved["lm_head.weight"], held.lm_head.new_rows)
    adapter = ("--pretrain_mm_mlp_adapter", out / "mm_projector.bin", "--mm_use_im_start_end", "True")
    argv = stage_flags("lora", tmp_path / "next", *adapter, "--max_steps=1", "--learning_rate=0", data=data)
    argv[argv.index("--model_name_or_path") + 1] = str(tmp_path / "base")
    after = train(argv).unwrapped
    assert torch.equal(after.get_input_embeddings().new_rows, held.get_input_embeddings().new_rows)
    assert torch.equal(after.lm_head.new_rows, held.lm_head.new_rows)
    with pytest.raises(ValueError, match=r"holds embeddings of shape \(2, 32\); expected .* \(3, 32\) for the new"):
        train([*argv, "--new_tokens", "<seg>"])


def test_stage_one_with_image_tokens_opens_from_what_llava_keeps_of_it(started):
    trainer, out, ids = started("projector", "image_tokens")
    (out / "trained.safetensors").unlink()
    assert_rows_were_trained(load(out, device="cpu")[0], trainer, out, ids, "projector")


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tuning", ["projector", "lora"])
def test_a_full_checkpoint_of_what_trained_in_part_holds_the_new_vocabulary_rows(tuning, is_tied, started):
    trainer, out, ids = started(tuning, "all", is_tied, "--save_full=True")
    assert (out / "model.safetensors").is_file()
    assert_rows_were_trained(load(out, device="cpu")[0], trainer, out, ids, tuning)


def test_a_plan_counts_the_vocabulary_rows_of_a_model_that_has_new_tokens(started, capsys):
    _, out, _ = started("moe", "all")
    capsys.readouterr()
    plan([f"--model_name_or_path={out}", "--tuning=lora", f"--output_dir={out}", "--use_cpu=True"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 4 words of width 32, twice.
    assert [line[1] for line in lines if line and line[0] == "new_words"] == ["256"]


def test_only_vocabulary_rows_of_new_tokens_are_written(started):
    _, out, _ = started("lora", "all")
    sizes = {name: tuple(weight.shape) for name, weight in load_file(out / "trained.safetensors").items()}
    assert sizes["model.embed_tokens.new_rows"] == sizes["lm_head.new_rows"] == (4, 32)
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in sizes)


def test_vocabulary_rows_without_their_ids_are_refused(started):
    _, out, _ = started("lora", "flag")
    fields = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(fields | {"new_words": None}))
    with pytest.raises(ValueError, match=r"new_rows of shape \(2, 32\); expected \(0, 32\), a row for each"):
        load(out, device="cpu")


@pytest.mark.parametrize("words", [("<seg>", "<seg>"), (" <seg>",), ("",)])
def test_words_that_cannot_be_tokens_are_refused(words, stage_flags, data, tmp_path):
    with pytest.raises(ValueError, match=r"--new_tokens .*: give different words without spaces around them"):
        train([*stage_flags("lora", tmp_path / "out", data=data), "--new_tokens", *words])


def test_words_of_the_flag_are_trained_as_one_token_and_shown_in_answers(started):
    _, out, ids = started("lora", "flag")
    _, processor = load(out, device="cpu")
    for word, number in zip(WORDS, ids, strict=True):
        assert processor.tokenizer.encode(f"a{word}b", add_special_tokens=False).count(number) == 1
        assert processor.tokenizer.decode([number], skip_special_tokens=True) == word


def test_new_tokens_train_beside_weights_in_four_bits_too(started):
    pytest.importorskip("bitsandbytes")
    trainer, out, ids = started("lora", "all", False, "--bits=4")
    opened, _ = load(out, device="cpu")
    assert_rows_were_trained(opened, trainer, out, ids, "lora")
