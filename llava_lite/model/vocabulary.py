"""Make room in a model for words that its tokenizer has learned."""

import torch

from llava_lite.model.weights import gathered


def fit_rows(model, num_words, num_known) -> None:
    """Give words num_known to num_words - 1 rows in both vocabulary matrices, each the mean of the rows before them.

    As LLaVA does; transformers would draw them. A matrix grows if it must and never shrinks: many vocabularies are
    padded to a round number of rows.
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
                    weight[num_known:num_words] = weight[:num_known].mean(dim=0, keepdim=True)
