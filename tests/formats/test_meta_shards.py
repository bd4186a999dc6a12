"""Files of several ranks joined, and deltas added to their base."""

import logging

import pytest
import torch

from llava_lite.formats.meta_shards import add_difference, apply_delta, merge_shards

# Dimension that Meta's and Accessory's tensor parallelism cuts, None for a copy in every file.
CUT = {
    "tok_embeddings.weight": 1,
    "output.weight": 0,
    "norm.weight": None,
    "layers.0.attention_norm.weight": None,
    "layers.0.attention.wq.weight": 0,
    "layers.0.attention.wk.bias": 0,
    "layers.0.attention.wv.lora_a.weight": None,
    "layers.0.attention.wv.lora_b.weight": 0,
    "layers.0.attention.wo.weight": 1,
    "layers.0.attention.wo.bias": None,
    "layers.0.attention.wo.lora_a.weight": 1,
    "layers.0.attention.wo.lora_b.weight": None,
    "layers.0.feed_forward.w1.weight": 0,
    "layers.0.feed_forward.w2.weight": 1,
    "layers.0.feed_forward.w2.lora_a.weight": 1,
    "layers.0.feed_forward.w3.lora_b.weight": 0,
    "prefix_gate": 1,
    "prefix": None,
    "qformer_proj.0.weight": None,
    # Named like a cut one at its end.
    "qformer.qformer.encoder.layer.0.output.dense.weight": None,
    "rope.freqs": None,
}


def full_state(prefix=""):
    torch.manual_seed(0)
    return {
        f"{prefix}{name}": torch.randn(*((8,) if name.endswith(("norm.weight", "bias", "freqs")) else (8, 8)))
        for name in CUT
    }


def cut(state, ranks, prefix=""):
    return [
        {
            name: w if CUT[name.removeprefix(prefix)] is None else w.chunk(ranks, CUT[name.removeprefix(prefix)])[rank]
            for name, w in state.items()
        }
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("prefix", ["", "llma."])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_the_model_again(ranks, prefix):
    state = full_state(prefix)
    merged = merge_shards(cut(state, ranks, prefix))
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_embeddings_of_llama_3_are_cut_along_the_vocabulary():
    state = {"norm.weight": torch.ones(8), "tok_embeddings.weight": torch.randn(12, 8)}
    shards = [state | {"tok_embeddings.weight": part} for part in state["tok_embeddings.weight"].chunk(3)]
    assert torch.equal(merge_shards(shards)["tok_embeddings.weight"], state["tok_embeddings.weight"])


def test_shards_that_are_not_of_one_checkpoint_are_refused(caplog):
    first, second = cut(full_state(), 2)
    with pytest.raises(ValueError, match=r"rank 0 and of rank 1 .*norm\.weight"):
        merge_shards([first, {name: w for name, w in second.items() if name != "norm.weight"}])
    with pytest.raises(ValueError, match=r"wq\.weight has shapes \[\(4, 8\), \(4, 9\)\]"):
        merge_shards([first, second | {"layers.0.attention.wq.weight": torch.zeros(4, 9)}])
    with pytest.raises(ValueError, match="no consolidated file"):
        merge_shards([])
    with caplog.at_level(logging.WARNING):
        merged = merge_shards([first, second | {"norm.weight": torch.zeros(8)}])
    assert torch.equal(merged["norm.weight"], first["norm.weight"])
    assert "norm.weight should be the same" in caplog.text


def test_delta_is_added_in_float32_and_rope_keys_are_left_out_on_either_side():
    torch.manual_seed(0)
    base, delta = torch.randn(3, 3).half(), torch.randn(3, 3).half()
    summed = apply_delta({"w": base, "rope.freqs": torch.ones(2)}, {"w": delta, "layers.0.rope.freqs": torch.ones(2)})
    assert summed.keys() == {"w"}
    assert summed["w"].dtype == torch.float16
    assert torch.equal(summed["w"], (base.double() + delta.double()).half())


@pytest.mark.parametrize(
    ("base", "delta", "words"),
    [
        ({"a": 3, "b": 3}, {"a": 3}, r"\['b'\] \(1 in all\) are in the base only"),
        ({"a": 3}, {"a": 3, "c": 3}, r"\['c'\] \(1 in all\) in the delta only"),
        ({"a": 3}, {"a": 4}, r"a has shape \(3,\) in the base and \(4,\) in the delta"),
    ],
)
def test_delta_of_another_model_is_refused_by_name(base, delta, words):
    with pytest.raises(ValueError, match=words):
        apply_delta(
            {n: torch.zeros(size) for n, size in base.items()}, {n: torch.zeros(size) for n, size in delta.items()}
        )


def test_difference_is_added_to_what_is_there_and_is_new_where_nothing_is():
    base = {"w": torch.tensor([1.0, 2.0]).bfloat16(), "kept": torch.ones(1)}
    summed = add_difference(base, {"w": torch.tensor([0.5, 0.25]), "new": torch.tensor([7.0])})
    assert summed["w"].dtype == torch.bfloat16
    assert {name: w.tolist() for name, w in summed.items()} == {"w": [1.5, 2.25], "kept": [1.0], "new": [7.0]}
    with pytest.raises(ValueError, match=r"w has shape \(2,\) in the base and \(3,\) in the difference"):
        add_difference(base, {"w": torch.zeros(3)})
