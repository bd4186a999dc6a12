"""Pushing and loading through the real huggingface_hub client, over HTTP, against a server on this machine."""

import json
from pathlib import Path

import pytest
from hub_client import asked, get, get_json

import llava_lite
from llava_lite.hub.push import files_to_share, shareable_config

MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "num_experts": [4],
    "top_k_experts": 2,
    "router_aux_loss_coef": 0.01,
}
CARD = "---\nlibrary_name: llava-lite\ntags:\n- llava\n---\n\n# Digits\n\nTrained on digits, loss 0.12.\n"


@pytest.fixture
def checkpoint(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """Return a function: a moe dict or None -> directory of a full model with processor and card."""
    from llava_lite.media.preprocess import load_image_processor
    from llava_lite.processing.processor import LlavaLiteProcessor

    def make(moe=None):
        directory = tmp_path / ("moe" if moe else "dense")
        model = toy_model(moe=moe, conv_template="v1", vision_config=None)
        model.save_pretrained(directory)
        tower = load_image_processor(toy_tower_dir("clip"))
        LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower).save_pretrained(directory)
        (directory / "README.md").write_text(CARD)
        return directory

    return make


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_pushed_model_answers_like_the_one_at_home(hub, client, checkpoint, moe):
    directory = checkpoint(moe)
    repo = f"tester/{directory.name}"
    at_home = client(
        f"""
        model, processor = load({str(directory)!r}, device="cpu")
        model.push_to_hub({repo!r})
        processor.push_to_hub({repo!r})
        print(reply(model, processor, "What colour is the square?", image, max_new_tokens=12))
        """
    )
    assert at_home.strip()
    before = len(asked(hub))
    from_hub = client(
        f"""
        load({repo!r}, device="cpu")
        model, processor = load({repo!r}, device="cpu")
        assert type(AutoProcessor.from_pretrained({repo!r})) is LlavaLiteProcessor
        print(reply(model, processor, "What colour is the square?", image, max_new_tokens=12))
        own = AutoModelForCausalLM.from_pretrained({str(directory)!r}).state_dict()
        theirs = AutoModelForCausalLM.from_pretrained({repo!r}).state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
        """,
        cache="elsewhere",
    )
    assert from_hub.splitlines()[-1] == at_home.splitlines()[-1] != ""
    fetched = [path for method, path, _ in asked(hub)[before:] if method == "GET"]
    assert fetched.count(f"/{repo}/resolve/main/model.safetensors") == 1
    paths = [path for method, path, _ in asked(hub) if method in ("POST", "PUT")]
    assert f"/{repo}.git/info/lfs/objects/batch" in paths
    # The weights are large enough to be sent in parts.
    assert any(path.startswith("/_lfs/") and path.endswith("/2") for path in paths)
    assert b"Trained on digits, loss 0.12." in get(f"{hub}/{repo}/resolve/main/README.md")
    assert get_json(f"{hub}/{repo}/resolve/main/processor_config.json")["conv_template"] == "v1"


def test_revision_is_a_branch_of_its_own(client, checkpoint):
    directory = checkpoint()
    printed = client(
        f"""
        model, processor = load({str(directory)!r}, device="cpu")
        model.push_to_hub("tester/branches")
        processor.push_to_hub("tester/branches")
        with torch.no_grad():
            model.lm_head.weight.neg_()
        commit = model.push_to_hub("tester/branches", revision="negative", commit_message="Turn it round")
        print(commit.oid)
        """
    )
    sha = printed.split()[-1]
    client(
        f"""
        weights = [
            AutoModelForCausalLM.from_pretrained("tester/branches", revision=revision).lm_head.weight
            for revision in ("main", "negative", {sha!r})
        ]
        assert torch.equal(weights[0], -weights[1]) and torch.equal(weights[1], weights[2])
        processor = AutoProcessor.from_pretrained("tester/branches", revision="negative")
        assert (processor.conv_template, processor.num_image_tokens) == ("v1", 16)
        model, _ = load("tester/branches", device="cpu", revision="negative")
        assert torch.equal(model.lm_head.weight, weights[1])
        """,
        cache="elsewhere",
    )


def test_card_in_the_repository_stays_and_a_model_without_one_gets_one(hub, client, checkpoint):
    directory = checkpoint(MOE)
    (directory / "README.md").unlink()
    client(
        f"""
        from huggingface_hub import HfApi, ModelCard
        model, processor = load({str(directory)!r}, device="cpu")
        processor.push_to_hub("tester/cards")
        model.push_to_hub("tester/cards", tags=["digits"])
        card = ModelCard.load("tester/cards")
        assert card.data.pipeline_tag == "image-text-to-text", card
        assert card.data.library_name == "llava-lite"
        assert card.data.tags == ["digits", "llava", "moe"]
        assert 'load("tester/cards")' in card.text
        card.text += "Written by hand."
        HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="tester/cards")
        model.push_to_hub("tester/cards")
        assert "Written by hand." in ModelCard.load("tester/cards").text
        """
    )
    assert ["POST", "/api/validate-yaml", {}] in asked(hub)


def test_pull_request_tag_and_shards_are_opened(hub, client, checkpoint, toy_tower_dir):
    directory = checkpoint()
    printed = client(
        f"""
        from huggingface_hub import HfApi
        model, processor = load({str(directory)!r}, device="cpu")
        model.push_to_hub("tester/shards", max_shard_size="60KB", private=True, commit_message="First of all")
        HfApi().create_tag("tester/shards", tag="v1.0")
        processor.push_to_hub("tester/shards", revision="v2", commit_message="Words and images")
        with torch.no_grad():
            model.lm_head.weight.neg_()
        pushed = model.push_to_hub("tester/shards", create_pr=True, commit_message="Turn it round")
        print(pushed.pr_revision)
        """
    )
    assert printed.split()[-1] == "refs/pr/1"
    flags = ["push", str(directory), "tester/shards", "--create-pr", "--path-in-repo", "inner"]
    printed = client(f"from llava_lite.cli import main\nmain({flags!r})")
    assert printed.split()[-1] == f"{hub}/tester/shards/discussions/2"
    printed = client(
        f"""
        import json
        from huggingface_hub import HfApi
        own = dict(token="tester", cache_dir={str(directory.parent / "elsewhere")!r})
        main, asked = (
            AutoModelForCausalLM.from_pretrained("tester/shards", revision=revision, **own).lm_head.weight
            for revision in ("v1.0", "refs/pr/1")
        )
        assert torch.equal(main, -asked)
        load("tester/shards", device="cpu", revision="refs/pr/2", subfolder="inner", **own)
        # Model and processor were pushed apart; the branch has both.
        load("tester/shards", device="cpu", revision="v2", **own)
        api = HfApi(token="tester")
        titles = [
            api.list_repo_commits("tester/shards", revision=revision)[0].title
            for revision in ("main", "v2", "v1.0", "refs/pr/1")
        ]
        config = json.load(open(api.hf_hub_download("tester/shards", "config.json")))
        print(json.dumps([api.list_repo_files("tester/shards", revision="v2"), titles, config]))
        """,
        token=None,
    )
    files, titles, config = json.loads(printed.splitlines()[-1])
    assert titles == ["First of all", "Words and images", "First of all", "Turn it round"]
    assert sum(name.endswith(".safetensors") for name in files) > 3
    assert {"model.safetensors.index.json", "processor_config.json", "README.md"} <= set(files)
    # The tower travels inside; where it once lay is nobody's business.
    assert config["mm_vision_tower"] == toy_tower_dir("clip").name
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert str(directory.parent) not in json.dumps(config)


def test_optimizer_skipped_logs_and_directories_stay_at_home(tmp_path):
    published = ["README.md", "config.json", "loss.png", "mm_projector.bin", "model-00001-of-00002.safetensors"]
    private = ["optimizer.pt", "training_args.bin", "trainer_state.json", "skipped_records.jsonl", ".hidden", "a.tmp"]
    for name in [*published, *private]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "notes.txt").write_text("")
    assert files_to_share(tmp_path) == published
    with pytest.raises(ValueError, match="holds nothing to upload"):
        files_to_share(tmp_path / "checkpoint-5")
    with pytest.raises(OSError, match=r"/gone': there is no such directory\."):
        files_to_share(tmp_path / "gone")


def test_part_that_stands_on_a_directory_of_this_machine_is_refused(tmp_path, toy_tower_dir, toy_llm_dir):
    tower, base = str(toy_tower_dir("clip")), str(toy_llm_dir("llama"))
    part = {"base_model_name_or_path": base, "mm_vision_tower": tower}
    with pytest.raises(ValueError, match=r"its base '.*' is a directory of this machine. Push the base first"):
        shareable_config(part, tmp_path)
    with pytest.raises(ValueError, match=r"the vision tower '.*' of .* is a directory of this machine"):
        shareable_config(part | {"base_model_name_or_path": base}, tmp_path, base=base)
    named = shareable_config(part, tmp_path, base="me/llm", tower="me/tower")
    assert named == {"base_model_name_or_path": "me/llm", "mm_vision_tower": "me/tower"}
    # A base that brings its tower along needs none.
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    found = shareable_config(part | {"base_model_name_or_path": str(tmp_path)}, tmp_path, base=str(tmp_path))
    assert found["mm_vision_tower"] == toy_tower_dir("clip").name


def test_settings_of_the_tests_are_nobody_elses():
    """Xet and endpoint are the user's own: no file of the package sets or reads them."""
    package = Path(llava_lite.__file__).parent
    texts = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    assert "HF_HUB_DISABLE_XET" not in texts
    assert "HF_ENDPOINT" not in texts
