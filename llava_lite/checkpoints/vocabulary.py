"""Add vocabulary rows to a model for new tokens of its tokenizer."""

import torch

from llava_lite.checkpoints.copying import gathered, read_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Last part of the name of trained rows that are saved beside a frozen vocabulary matrix; see model/new_words.py.
ROWS = "new_rows"
# How far random rows lie from the mean, in standard deviations of each dimension over the rows before them: apart in
# half precision too (transformers' own 3e-5 are not), and no new token is likely before it is trained.
SPREAD = 0.1


def fit_rows(model, num_words, num_known, seed=None) -> None:
    """Give tokens num_known to num_words - 1 rows in both vocabulary matrices, around the mean of the others.

    seed: of the random numbers, the same on every rank; None for the mean itself, as in LLaVA and in its checkpoints
    that do not hold the rows. A matrix grows if needed and never shrinks: many vocabularies are padded to a round
    number of rows. Biases are the mean.
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
    """Copy rows [R, D] to the tokens `ids` of a vocabulary matrix, full or partitioned."""
    with torch.no_grad(), gathered([weight], modify=True):
        if weight.numel():
            # Weights of a ZeRO-3 checkpoint become tensors by contiguous() alone.
            weight[ids] = rows.contiguous().to(weight.device, weight.dtype)


def load_rows(model, ids: list[int], path) -> None:
    """Copy the rows of the tokens `ids` from an adapter file, which holds full matrices or these rows alone.

    LLaVA writes the input embeddings into mm_projector.bin, this package the rows of the output head too.
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
                f"{(num_rows, model.config.hidden_size)}, or {(len(ids), model.config.hidden_size)} for the new "
                "tokens alone. Add the same tokens as the stage that wrote it."
            )
        fill_rows(layer.weight, ids, rows)


def is_row_name(name: str) -> bool:
    """Tell whether a weight of this name is vocabulary rows beside a matrix."""
    return name.rpartition(".")[2] == ROWS


def load_saved_rows(model, weights: dict, ids: list[int] | None, where: str) -> dict:
    """Copy the rows among a directory's weights into the model's vocabulary matrices; return the other weights.

    ids: config.new_words of the directory. The matrices that LLaVA reads in the same directory hold the same rows and
    are left out. Raises ValueError if rows and ids do not fit.
    """
    saved = {name: rows for name, rows in weights.items() if is_row_name(name)}
    matrices = dict(model.named_parameters(remove_duplicate=False))
    for name, rows in saved.items():
        matrix = matrices.get(name.removesuffix(ROWS) + "weight")
        shape = (len(ids or []), model.config.hidden_size)
        if matrix is None or tuple(rows.shape) != shape:
            raise ValueError(
                f"{where} hold {name} of shape {tuple(rows.shape)}; expected {shape}, a row for each of the new_words "
                "in config.json. Copy both files again."
            )
        fill_rows(matrix, sorted(ids), rows)
    repeated = {f"{name.removesuffix(ROWS)}weight" for name in saved}
    return {name: weight for name, weight in weights.items() if name not in saved and name not in repeated}
