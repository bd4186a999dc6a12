"""Pushing and loading through the real huggingface_hub client, over HTTP, against a server on this machine."""

import pytest
from hub_client import asked, get, get_json

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
    """Return a function: a moe dict or None -> folder of a whole model with processor and card."""
    from llava_lite.mm_utils import load_image_processor
    from llava_lite.processing import LlavaLiteProcessor

    def make(moe=None):
        folder = tmp_path / ("moe" if moe else "dense")
        model = toy_model(moe=moe, conv_template="v1", vision_config=None)
        model.save_pretrained(folder)
        tower = load_image_processor(toy_tower_dir("clip"))
        LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower).save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        return folder

    return make


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_pushed_model_answers_like_the_one_at_home(hub, client, checkpoint, moe):
    folder = checkpoint(moe)
    repo = f"tester/{folder.name}"
    at_home = client(
        f"""
        model, processor = load({str(folder)!r}, device="cpu")
        model.push_to_hub({repo!r})
        processor.push_to_hub({repo!r})
        print(reply(model, processor, "What colour is the square?", picture, max_new_tokens=12))
        """
    )
    assert at_home.strip()
    from_hub = client(
        f"""
        model, processor = load({repo!r}, device="cpu")
        assert type(AutoProcessor.from_pretrained({repo!r})) is LlavaLiteProcessor
        print(reply(model, processor, "What colour is the square?", picture, max_new_tokens=12))
        own = AutoModelForCausalLM.from_pretrained({str(folder)!r}).state_dict()
        theirs = AutoModelForCausalLM.from_pretrained({repo!r}).state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
        """,
        cache="elsewhere",
    )
    assert from_hub.splitlines()[-1] == at_home.splitlines()[-1] != ""
    paths = [path for method, path, _ in asked(hub) if method in ("POST", "PUT")]
    assert f"/{repo}.git/info/lfs/objects/batch" in paths
    # The weights are large enough to be sent in parts.
    assert any(path.startswith("/_lfs/") and path.endswith("/2") for path in paths)
    assert b"Trained on digits, loss 0.12." in get(f"{hub}/{repo}/resolve/main/README.md")
    assert get_json(f"{hub}/{repo}/resolve/main/processor_config.json")["conv_template"] == "v1"


def test_revision_is_a_branch_of_its_own(client, checkpoint):
    folder = checkpoint()
    printed = client(
        f"""
        model, processor = load({str(folder)!r}, device="cpu")
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
    folder = checkpoint(MOE)
    (folder / "README.md").unlink()
    client(
        f"""
        from huggingface_hub import HfApi, ModelCard
        model, processor = load({str(folder)!r}, device="cpu")
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


def test_second_load_comes_from_the_cache(hub, client, checkpoint):
    folder = checkpoint()
    client(
        f"""
        for part in load({str(folder)!r}, device="cpu"):
            part.push_to_hub("tester/cached")
        """
    )
    before = len(asked(hub))
    client('load("tester/cached", device="cpu")', cache="elsewhere")
    between = len(asked(hub))
    client('load("tester/cached", device="cpu")', cache="elsewhere")

    def fetched(log):
        return [path for method, path, _ in log if method == "GET" and path.endswith("/model.safetensors")]

    assert len(fetched(asked(hub)[before:between])) == 1
    assert fetched(asked(hub)[between:]) == []


def test_private_repository_is_for_its_owner_alone(client, checkpoint):
    folder = checkpoint()
    client(
        f"""
        model, processor = load({str(folder)!r}, device="cpu")
        model.push_to_hub("tester/secret", private=True)
        processor.push_to_hub("tester/secret")
        load("tester/secret", device="cpu")
        """
    )
    refused = client('load("tester/secret", device="cpu")', token=None, cache="stranger", succeeds=False)
    assert "tester/secret is not a local folder and is not a valid model identifier" in refused
    refused = client(f'load({str(folder)!r}, device="cpu")[0].push_to_hub("tester/secret")', "other", succeeds=False)
    assert "other may not write to tester/secret" in refused or "Repository" in refused
