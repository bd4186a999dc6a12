"""Let a run go on with another number of ranks than saved its checkpoint: the same records in each step.

A step is made of ranks x batch x accumulation records, consecutive ones of an order that does not depend on the ranks;
so it stays the same step as long as the product stays the same. What each rank had for itself is shared out anew.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import set_seed

logger = logging.getLogger(__name__)

RANKS, BATCH, ACCUMULATION = "world_size", "per_device_train_batch_size", "gradient_accumulation_steps"
DIVISION = (RANKS, BATCH, ACCUMULATION)


def has_other_ranks(saved: Mapping, now: Mapping) -> bool:
    """Tell whether the settings of a checkpoint are of another number of ranks."""
    return saved.get(RANKS) != now[RANKS]


def global_batch(settings: Mapping) -> int:
    """Return how many records a step learns from."""
    return math.prod(settings[key] for key in DIVISION)


def in_words(settings: Mapping) -> str:
    """Return how a step is divided."""
    ranks, batch, accumulation = (settings[key] for key in DIVISION)
    records = math.prod((ranks, batch, accumulation))
    ranks_in_words = f"{ranks} rank{'s' * (ranks != 1)}"
    return f"{ranks_in_words} x {batch} x {accumulation} accumulated = {records} records a step"


def refuse_other_batch(path: str, saved: Mapping, now: Mapping) -> None:
    """Raise ValueError, with flags that would do, if a step of this run is not as large as one of the checkpoint."""
    wanted, ranks = global_batch(saved), now[RANKS]
    if global_batch(now) == wanted:
        return
    if wanted % ranks:
        fit = [str(number) for number in range(1, wanted + 1) if wanted % number == 0]
        advice = f"{ranks} ranks cannot share {wanted} records evenly; start {', '.join(fit[:-1])} or {fit[-1]} ranks"
    else:
        batch = best_batch(wanted // ranks, saved[BATCH])
        advice = f"give --{BATCH} {batch} --{ACCUMULATION} {wanted // ranks // batch}"
    raise ValueError(
        f"{path} cannot be resumed exactly: it was saved by {in_words(saved)}, this run has {in_words(now)}. To go on "
        f"with another number of ranks, {advice}; or choose a new --output_dir."
    )


def best_batch(records_of_rank: int, batch: int) -> int:
    """Return the batch of a device for so many records a step and rank: the saved one, or the largest below that."""
    return max(size for size in range(1, batch + 1) if records_of_rank % size == 0)


def say_what_changes(path: str, saved: Mapping, now: Mapping, has_experts: bool, num_samples: int) -> None:
    """Log that a checkpoint goes on with another number of ranks, and warn of what is then not as it was.

    num_samples: records or packs of an epoch, 0 where what does not fill the last batch is left out.
    """
    logger.info("%s was saved by %s and goes on with %s.", path, in_words(saved), in_words(now))
    logger.info("random numbers, as of dropout, are others; those of rank r go on where there was a rank r.")
    if has_experts and saved[BATCH] != now[BATCH]:
        logger.warning(
            "the balance loss of experts is a mean over micro-batches, which hold %d records and no longer %d: give "
            "--%s %d for the same.",
            now[BATCH],
            saved[BATCH],
            BATCH,
            saved[BATCH],
        )
    repeats = [repeated(num_samples, settings) for settings in (saved, now)]
    if repeats[0] != repeats[1]:
        logger.warning(
            "the last step of an epoch fills up with %d records of its beginning, not %d, so that the ranks have "
            "equally many: from there on the losses differ a little.",
            repeats[1],
            repeats[0],
        )


def repeated(num_samples: int, settings: Mapping) -> int:
    """Return how many records of an epoch come twice; a single process learns from a smaller last batch."""
    return 0 if settings[RANKS] == 1 else -num_samples % (settings[RANKS] * settings[BATCH])


# What each rank had for itself.


def rng_file(folder: str | Path, ranks: int, rank: int) -> Path:
    """Return the file in which the Trainer keeps the random state of a rank."""
    return Path(folder) / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")


def random_state(folder: str, saved_by: int, ranks: int, rank: int, seed: int, step: int, load: Callable) -> None:
    """Take up the random state that the rank of the same number saved; of a rank that is new, one made of the seed.

    load: the Trainer's own way, which takes a directory.
    """
    if rank >= saved_by:
        # As good as any, and the same whenever this checkpoint goes on with so many ranks.
        set_seed((seed * 1_000_003 + step * 1_009 + rank) % 2**32)
        return
    with tempfile.TemporaryDirectory() as there:
        os.symlink(rng_file(folder, saved_by, rank).resolve(), rng_file(there, ranks, rank))
        load(there)


def read_progress(folder: str, saved_by: int) -> list[dict]:
    """Return what each rank that saved a checkpoint remembered."""
    files = [Path(folder) / f"progress_{rank}.pt" for rank in range(saved_by)]
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def share_of(progress: Sequence[dict], ranks: int) -> dict:
    """Return what each of `ranks` ranks remembers of what others did: an even share of what was counted.

    The loss is logged as a mean over ranks; all other counts as sums, or as means of what they are summed to.
    """
    first = dict(progress[0])
    first["loss_since_log"] = torch.stack([part["loss_since_log"] for part in progress]).mean(dim=0)
    first["loss_logged"] = sum(part["loss_logged"] for part in progress) / len(progress)
    first["more"] = shared([part["more"] for part in progress], ranks)
    return first


def shared(parts: Sequence[dict], ranks: int) -> dict:
    """Return the counts of LLaVATrainer shared out among `ranks` ranks."""
    more = dict(parts[0])
    if "balance_sum" in more:
        more["balance_sum"] = torch.stack([part["balance_sum"] for part in parts]).mean(dim=0)
    if "experts" in more:
        layers = {layer for part in parts for layer in part["experts"]}
        more["experts"] = {
            layer: sum(part["experts"][layer] for part in parts if layer in part["experts"]) / ranks
            for layer in layers
        }
    if "meter" in more:
        counts = [sum(column) // ranks for column in zip(*(part["meter"]["counts"] for part in parts), strict=True)]
        more["meter"] = more["meter"] | {"counts": counts}
    return more
