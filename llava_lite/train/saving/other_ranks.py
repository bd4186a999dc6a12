"""Resume with another number of ranks than saved the checkpoint: the same records in each step.

A step has ranks x batch x accumulation records, consecutive in an order that does not depend on the ranks; so it stays
the same step as long as the product stays the same. The ranks' progress is distributed over the new ranks.
"""

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import set_seed

from llava_lite.hub.pickles import load_pickle

logger = logging.getLogger(__name__)

RANKS, BATCH, ACCUMULATION = "world_size", "per_device_train_batch_size", "gradient_accumulation_steps"
DIVISION = (RANKS, BATCH, ACCUMULATION)
ZERO_STAGE = "DeepSpeed ZeRO stage"


def has_other_ranks(saved: Mapping, now: Mapping) -> bool:
    """Tell whether the settings of a checkpoint have another number of ranks."""
    return saved.get(RANKS) != now[RANKS]


def global_batch(settings: Mapping) -> int:
    """Return how many records a step has."""
    return math.prod(settings[key] for key in DIVISION)


def describe_step(settings: Mapping) -> str:
    """Return the message for how a step is divided."""
    ranks, batch, accumulation = (settings[key] for key in DIVISION)
    ranks_text = f"{ranks} rank{'s' * (ranks != 1)}"
    return f"{ranks_text} x {batch} x {accumulation} accumulated = {global_batch(settings)} records a step"


def check_same_batch(path: str, saved: Mapping, now: Mapping) -> None:
    """Raise ValueError, with flags that fit, if a step of this run and of the checkpoint differ in records."""
    wanted, ranks = global_batch(saved), now[RANKS]
    if global_batch(now) == wanted:
        return
    if wanted % ranks:
        fit = [str(number) for number in range(1, wanted + 1) if wanted % number == 0]
        advice = f"{ranks} ranks cannot divide {wanted} records evenly; start {', '.join(fit[:-1])} or {fit[-1]} ranks"
    else:
        # The saved batch of a device, or the largest below that.
        batch = max(size for size in range(1, saved[BATCH] + 1) if wanted // ranks % size == 0)
        advice = f"give --{BATCH} {batch} --{ACCUMULATION} {wanted // ranks // batch}"
    raise ValueError(
        f"{path} cannot be resumed exactly: it was saved by {describe_step(saved)}, this run has "
        f"{describe_step(now)}. To resume with another number of ranks, {advice}; or choose a new --output_dir."
    )


def log_what_changes(path: str, saved: Mapping, now: Mapping, has_experts: bool, num_samples: int) -> None:
    """Log that a checkpoint is resumed by another number of ranks, and warn of what is not as it was.

    num_samples: records or packs of an epoch, 0 where an incomplete last batch is dropped.
    """
    logger.info("%s was saved by %s and is resumed by %s.", path, describe_step(saved), describe_step(now))
    logger.info(
        "random numbers, as for dropout, differ; rank r continues those of the saved rank r, if there was one."
    )
    if has_experts and saved[BATCH] != now[BATCH]:
        logger.warning(
            "the balance loss is a mean over micro-batches, which have %d records and had %d: give --%s %d for the "
            "same.",
            now[BATCH],
            saved[BATCH],
            BATCH,
            saved[BATCH],
        )
    repeats = [repeated(num_samples, settings) for settings in (saved, now)]
    if repeats[0] != repeats[1]:
        logger.warning(
            "the last step of an epoch repeats %d records from its beginning, and repeated %d, so that all ranks have "
            "equally many: from there on the losses differ a little.",
            repeats[1],
            repeats[0],
        )


def repeated(num_samples: int, settings: Mapping) -> int:
    """Return how many records of an epoch are repeated; a single process has a smaller last batch instead."""
    return 0 if settings[RANKS] == 1 else -num_samples % (settings[RANKS] * settings[BATCH])


# The state of each rank.


def rng_file(directory: str | Path, ranks: int, rank: int) -> Path:
    """Return the file in which the Trainer keeps the random state of a rank."""
    return Path(directory) / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")


def restore_random_state(trainer, directory: str, saved_by: int) -> None:
    """Restore the random state that the rank of the same number saved; a new rank gets one from the seed.

    Nothing happens where the Trainer finds the file of this rank itself.
    """
    ranks, rank, seed = trainer.args.world_size, trainer.args.process_index, trainer.args.seed
    if ranks > 1 and rng_file(directory, ranks, rank).is_file():
        return
    if rank >= saved_by:
        # The same whenever this checkpoint is resumed by so many ranks.
        set_seed((seed * 1_000_003 + trainer.state.global_step * 1_009 + rank) % 2**32)
        return
    with tempfile.TemporaryDirectory() as there:
        os.symlink(rng_file(directory, saved_by, rank).resolve(), rng_file(there, ranks, rank))
        # Trainer's own: it knows the random states of every kind of device.
        trainer._load_rng_state(there)


def read_progress(directory: str, saved_by: int) -> list[dict]:
    """Return the progress of each rank that saved a checkpoint."""
    files = [Path(directory) / f"progress_{rank}.pt" for rank in range(saved_by)]
    return [load_pickle(file) for file in files]


def get_shard(progress: Sequence[dict], ranks: int) -> dict:
    """Return the progress of each of `ranks` ranks: an equal part of what the saved ranks counted.

    The loss is logged as a mean over ranks; all other counts as sums, or as ratios of sums.
    """
    first = dict(progress[0])
    first["loss_since_log"] = torch.stack([part["loss_since_log"] for part in progress]).mean(dim=0)
    first["loss_logged"] = sum(part["loss_logged"] for part in progress) / len(progress)
    first["more"] = divide_counts([part["more"] for part in progress], ranks)
    return first


def divide_counts(parts: Sequence[dict], ranks: int) -> dict:
    """Return the counts of LLaVATrainer, divided among `ranks` ranks."""
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
