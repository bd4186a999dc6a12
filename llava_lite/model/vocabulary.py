"""Make room in a model for words that its tokenizer has learned."""

import torch

from llava_lite.model.weights import gathered, read_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# How far drawn rows lie around the mean, in standard deviations of each dimension over the rows before them: apart in
# half precision too (transformers' own 3e-5 are not), and no word speaks up before it is trained.
SPREAD = 0.1


def fit_rows(model, num_words, num_known, seed=None) -> None:
    """Give words num_known to num_words - 1 rows in both vocabulary matrices, around the mean of the rows before them.

    seed: of the draw, the same on every rank; None for the mean itself, as LLaVA does and as its checkpoints mean it
    where they do not hold the rows. A matrix grows if it must and never shrinks: many vocabularies are padded to a
    round number of rows. Biases are the mean.
    """
    if num_words <= num_known:
        return
    if num_words > model.config.vocab_size:
        model.resize_token_embeddings(num_words, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad(), gathered(list(layer.parameters()), modify=True):
            for weight in layer.parameters():
                # Elsewhere than on rank 0 a gathered weight may still be empty here.
                if weight.numel():
                    weight[num_known:num_words] = rows_around(weight[:num_known], num_words - num_known, seed)


def rows_around(known: torch.Tensor, num_rows: int, seed: int | None) -> torch.Tensor:
    """Return rows around the mean of those that are known, [num_rows, D]; of numbers without dimensions the mean."""
    mean = known.mean(dim=0, keepdim=True)
    if seed is None or known.dim() == 1:
        return mean.expand(num_rows, *known.shape[1:])
    # On the CPU: the same numbers for every device and dtype.
    noise = torch.randn(num_rows, known.shape[1], generator=torch.Generator().manual_seed(seed))
    spread = SPREAD * known.float().std(dim=0, keepdim=True)
    return (mean.float() + spread * noise.to(known.device)).to(known.dtype)


def fill_rows(weight, ids: list[int], rows: torch.Tensor) -> None:
    """Copy rows [R, D] to the words `ids` of a vocabulary matrix, whole or partitioned."""
    with torch.no_grad(), gathered([weight], modify=True):
        if weight.numel():
            weight[ids] = rows.to(weight.device, weight.dtype)


def load_rows(model, ids: list[int], path) -> None:
    """Copy the rows of the words `ids` from an adapter file, whose matrices are whole or these rows alone.

    LLaVA writes the input embeddings into mm_projector.bin, we the rows of the output head too.
    """
    saved = read_weights(path)
    layers = (EMBEDDING, "embeddings", model.get_input_embeddings()), (HEAD, "a head", model.get_output_embeddings())
    for name, what, layer in layers:
        if name not in saved:
            continue
        num_rows, rows = model.config.vocab_size, saved[name]
        if rows.shape[0] == num_rows:
            rows = rows[ids]
        if rows.shape != (len(ids), model.config.hidden_size):
            raise ValueError(
                f"{str(path)!r} holds {what} of shape {tuple(rows.shape)}; expected "
                f"{(num_rows, model.config.hidden_size)}, or {(len(ids), model.config.hidden_size)} for the new words "
                "alone. Add the same words as the stage that wrote it."
            )
        fill_rows(layer.weight, ids, rows)
