"""Know which of the processes that share the questions this one is."""

from __future__ import annotations

import os
from datetime import timedelta


class Ranks:
    """The processes that share a benchmark: of torchrun, or started one by one with --num-chunks and --chunk-idx."""

    def __init__(self, num_chunks: int, chunk_idx: int | None, overwrite: bool = False):
        if overwrite and (num_chunks > 1 or chunk_idx is not None):
            raise ValueError(
                "--overwrite would delete the answers of the other chunks; write elsewhere, or leave --num-chunks and "
                "--chunk-idx out."
            )
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_launched = world > 1
        if self.is_launched and (num_chunks > 1 or chunk_idx is not None):
            raise ValueError("torchrun shares the questions itself; leave --num-chunks and --chunk-idx out.")
        self.count = world if self.is_launched else num_chunks
        if chunk_idx is not None and not 0 <= chunk_idx < self.count:
            raise ValueError(f"--chunk-idx {chunk_idx} of --num-chunks {self.count}; it counts from 0.")
        self.index = int(os.environ["RANK"]) if self.is_launched else chunk_idx or 0
        # Of several chunks, without an index: all were asked before, and are scored now.
        self.asks = self.is_launched or num_chunks == 1 or chunk_idx is not None
        self.scores = self.index == 0 if self.is_launched else chunk_idx is None or num_chunks == 1

    @property
    def is_first(self) -> bool:
        """Whether this process does what one alone must do."""
        return self.index == 0

    def __enter__(self):
        if self.is_launched:
            import torch.distributed as dist

            # A rank that is done waits for the slowest one; the default timeout is half an hour.
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        return self

    def __exit__(self, *error) -> None:
        if self.is_launched:
            import torch.distributed as dist

            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait for all ranks of torchrun."""
        if self.is_launched:
            import torch.distributed as dist

            dist.barrier()
