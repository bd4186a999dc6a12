"""Turn the scores of the next token into a token, sequence by sequence, and tell how sure it is.

The sums of a batch are rounded in another order than those of one sequence. A token is certain where no such rounding
could change it. B sequences, V words, E experts, K experts of a token.
"""

import torch
from transformers import TopPLogitsWarper

# Measured in float32 on toys: a logit in a batch of 64 is off by up to 8 roundings of the largest one. A cache that is
# off as much adds some more.
ROUNDINGS = 64
# How far a sum of all probabilities may be off by rounding of its own.
SUM_ERROR = 1e-5
LEAST_TEMPERATURE = 1e-5


class Sampling:
    """How the tokens of one answer are drawn: the arguments of OpenAI's API, and a generator of its own.

    temperature: 0 for the most probable token. top_p: draw among the most probable tokens that add up to it. seed: the
    same seed gives the same answer, whoever else is asked at the time.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, device="cpu"):
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.generator = torch.Generator(device)
        self.restart()

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, and nothing is drawn."""
        return self.temperature == 0

    def restart(self) -> None:
        """Begin with the first draw again."""
        self.generator.manual_seed(self.seed)

    def draw(self, scores: torch.Tensor, error: float | None = None) -> tuple[int, bool]:
        """Return (token, is certain) for scores [V] that may be off by `error`, None for exact ones."""
        temperature = max(self.temperature, LEAST_TEMPERATURE)
        logits = scores / temperature
        # The argmax of logits + Gumbel(0, 1) is a draw from their softmax.
        noise = torch.empty_like(logits).exponential_(generator=self.generator).log().neg()
        noisy = logits + noise
        token = int(noisy.masked_fill(~nucleus(logits, self.top_p), -torch.inf).argmax())
        return token, error is None or self._is_certain(token, logits, noisy, error / temperature)

    def _is_certain(self, token: int, logits, noisy, error: float) -> bool:
        """Return whether a token wins in every nucleus that rounding might have chosen."""
        # A probability is off by a factor of at most exp(2 * error), and so are sums of them.
        sum_error = SUM_ERROR + 2 * error
        surely, possibly = (nucleus(logits, self.top_p + by) for by in (-sum_error, sum_error))
        rivals = noisy.masked_fill(~possibly, -torch.inf)
        if int(rivals.argmax()) != token or lead(rivals) <= error or not surely[token]:
            return False
        return bool(surely.all()) or bool(logits[token] - logits[~surely].max() > error)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the words [V] are the most probable ones that add up to `top_p`; all of them for 1 and more."""
    if top_p >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    return TopPLogitsWarper(max(top_p, 0.0))(None, logits[None])[0] > -torch.inf


def lead(scores: torch.Tensor, num_chosen: int = 1) -> torch.Tensor:
    """Return by how much the last of the chosen scores [..., N] exceeds the first that is not chosen."""
    best = scores.topk(num_chosen + 1, dim=-1).values
    return best[..., -2] - best[..., -1]


def rounding_error(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far values [..., N] that a model of a dtype computed in a batch may be off, [...]."""
    return ROUNDINGS * torch.finfo(dtype).eps * values.abs().amax(-1)


class RouterWatch:
    """Tells after a decode step whether rounding could have sent a token of a sequence to other experts.

    A context, for one thread that owns the model: hooks look at the routers while it is open, if it `is_on`.
    """

    def __init__(self, model, is_on: bool = True):
        self.blocks = list(model.moe_layers().values()) if is_on and hasattr(model, "moe_layers") else []
        self.dtype = model.dtype
        self._hooks, self._certain = [], []

    def __enter__(self):
        for block in self.blocks:
            if block.moe.top_k_experts < block.num_experts:
                self._hooks.append(block.gate.register_forward_hook(self._look(block.moe.top_k_experts)))
        return self

    def __exit__(self, *error):
        while self._hooks:
            self._hooks.pop().remove()

    def _look(self, top_k: int):
        def look(router, args, logits):
            self._certain.append(lead(logits, top_k) > rounding_error(logits, self.dtype))

        return look

    def certain(self, num_sequences: int) -> torch.Tensor:
        """Return for the step since the last call which sequences [B] took experts that are certain."""
        seen, self._certain = self._certain, []
        device = seen[0].device if seen else "cpu"
        together = torch.ones(num_sequences, dtype=torch.bool, device=device)
        for one in seen:
            together &= one.to(device)
        return together
