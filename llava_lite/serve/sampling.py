"""Turn a temperature, a top-p and a seed into logits processors that sample without the process's random state.

`generate` itself samples from torch's global generator, which requests of one server share.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


class Sample(LogitsProcessor):
    """Leave one token a sequence, sampled by its probability, so that greedy decoding takes it.

    generator: on the CPU, where the sampling is done: one seed is one answer on every device.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, input_ids, scores):  # [B, T], [B, V]
        """Return scores [B, V] of minus infinity but for the sampled token of each sequence."""
        probabilities = scores.float().softmax(dim=-1).cpu()
        picked = torch.multinomial(probabilities, 1, generator=self.generator).to(scores.device)  # [B, 1]
        return torch.full_like(scores, -torch.inf).scatter(1, picked, 0.0)


def sampling(temperature: float, top_p: float = 1.0, seed: int | None = None) -> LogitsProcessorList:
    """Return `logits_processor` of `reply` and `stream`, to be given with their own temperature left at 0.

    temperature: 0 for greedy decoding. top_p: in (0, 1]. seed: None for another answer every time.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"a temperature is 0 or more and top-p above 0 and at most 1; got {temperature} and {top_p}.")
    if temperature == 0:
        return LogitsProcessorList()
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([*warpers, Sample(generator)])
