"""Turn a Trainer into one whose checkpoints go on with any number of ranks, or say why with as many as before."""

from __future__ import annotations

from llava_lite.train import manifest as paper
from llava_lite.train import other_ranks as other
from llava_lite.train.expert_parallel import parallel_experts


class OtherRanksMixin:
    """The part of CheckpointMixin that is about another number of ranks."""

    def _saved_by(self, path: str) -> int:
        """Return how many ranks saved a checkpoint."""
        return paper.read_manifest(path)["steps"][other.RANKS]

    def _refuse_other_ranks(self, path: str) -> None:
        """Say what changes with another number of ranks; ValueError for a run that must have as many as before."""
        saved, now = paper.read_manifest(path)["steps"], self._step_settings()
        if not other.has_other_ranks(saved, now):
            return
        if reason := self._why_as_many_ranks():
            raise ValueError(
                f"{path} was saved by {saved[other.RANKS]} ranks and cannot go on with {now[other.RANKS]}: {reason}. "
                f"Start {saved[other.RANKS]} ranks, or give it as --model_name_or_path of a new run."
            )
        has_experts = any(".mlp.gate." in name for name in now["trained parameters"])
        # Of packs their number counts, not that of the records in them.
        num_samples = 0 if self.args.dataloader_drop_last else len(self._get_train_sampler())
        other.say_what_changes(path, saved, now, has_experts, num_samples)

    def _why_as_many_ranks(self) -> str | None:
        """Return why this run goes on with as many ranks as it had and no others, None where any number will do."""
        if parallel_experts(self.model):
            return "its experts are shared out among ranks (--ep_size)"
        if self.args.save_on_each_node:
            return "--save_on_each_node keeps the files of the ranks apart"
        if self._zero_stage() == 3 and self._optimizer_on_nvme():
            return "its optimizer lies on the NVMe of each node"
        return None

    def _optimizer_on_nvme(self) -> bool:
        """Tell whether the DeepSpeed JSON keeps the optimizer on disks."""
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        return (zero.get("offload_optimizer") or {}).get("device") == "nvme"

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Take up the random state of this rank, or that of a rank of another number of them."""
        saved_by = self.args.world_size if checkpoint is None else self._saved_by(checkpoint)
        if saved_by == self.args.world_size:
            return super()._load_rng_state(checkpoint)
        place = self.args.process_index, self.args.seed, self.state.global_step
        other.random_state(checkpoint, saved_by, self.args.world_size, *place, super()._load_rng_state)
