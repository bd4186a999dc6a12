"""Which card goes with a pushed model; the pushing itself is in tests/hub/test_errors.py."""

from huggingface_hub import ModelCard

from llava_lite.hub.mixins import choose_card, short_card

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
WRITTEN = "---\nlibrary_name: llava-lite\ntags:\n- digits\n---\n\n# Digits\n"


def test_written_card_goes_before_the_runs_and_the_runs_before_a_short_one(toy_model, tmp_path):
    config = toy_model().config
    config._name_or_path = str(tmp_path)
    assert "saved by llava-lite" in choose_card(config, "a/b", None, []).text
    (tmp_path / "README.md").write_text(WRITTEN.replace("# Digits", "# The run"))
    assert "# The run" in choose_card(config, "a/b", None, []).text
    card = choose_card(config, "a/b", ModelCard(WRITTEN), ["new", "digits"])
    assert "# Digits" in card.text
    assert card.data.tags == ["digits", "new"]


def test_short_card_says_what_the_model_is(toy_model):
    dense, sparse, text = toy_model().config, toy_model(moe=MOE).config, toy_model(tower=None).config
    assert short_card(dense, "a/b").data.tags == ["llava"]
    assert short_card(sparse, "a/b").data.tags == ["llava", "moe"]
    assert short_card(dense, "a/b").data.pipeline_tag == "image-text-to-text"
    assert short_card(text, "a/b").data.pipeline_tag == "text-generation"
    assert 'load("a/b")' in str(short_card(sparse, "a/b"))
