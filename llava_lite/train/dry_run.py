"""Open the data of a run as the run would, from its flags and without a weight of its model.

`llava-lite check` asks here whether a run would reach its first step, and what its batches are. Everything is done by
the functions of training itself; only the model is replaced by its config.
"""

from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from transformers import set_seed

from llava_lite.checkpoints.source import Checkpoint
from llava_lite.conversation.end_tokens import check_end_token
from llava_lite.data.check.check import apply_policy
from llava_lite.data.dataset import open_dataset
from llava_lite.media.layout import ImageLayout
from llava_lite.model.assemble import get_run_config
from llava_lite.model.encoders import build_vision_tower
from llava_lite.train.arguments.legacy import join_flags, split_flags
from llava_lite.train.arguments.parse import parse_args
from llava_lite.train.arguments.paths import check_enough_records
from llava_lite.train.build import add_image_tokens, add_tokens, build_tokenizer, get_config_overrides
from llava_lite.train.inputs.check import check_images_exist, check_sees_images
from llava_lite.train.inputs.load import load_data
from llava_lite.train.inputs.sampler import get_sampler
from llava_lite.train.inputs.shards import check_shard_flags
from llava_lite.train.inputs.template import example_settings, get_run_template
from llava_lite.train.saving.run_facts import load_run_facts

# Flags about devices, directories and services: none changes which records are read, or in which batches.
WITHOUT_DATA = {"deepspeed", "ep_size", "bf16", "fp16", "tf32", "use_cpu", "no_cuda", "report_to", "output_dir"}
WITHOUT_DATA |= {"resume_from_checkpoint", "push_to_hub", "fsdp", "fsdp_config", "local_rank", "optim"}


class ConfigOnly(torch.nn.Module):
    """Stands for the model of a run where data are read: its config and the image processor of its tower."""

    def __init__(self, config, image_processor=None):
        super().__init__()
        self.config = config
        self.tower = None if image_processor is None else SimpleNamespace(image_processor=image_processor)

    def get_vision_tower(self):
        """Return the tower's image processor as its attribute, or None as a model without a tower does."""
        return self.tower


class DryRun:
    """The data of a run on one process, from its flags; ValueError, OSError or ImportError as the run would raise.

    flags: of `llava-lite train`. layout: how an image becomes features, where no tower is named. model_args,
    data_args, training_args: as they were read. tokenizer, template, model: those of the run, the model as ConfigOnly.
    """

    def __init__(self, flags, layout: ImageLayout | None = None):
        words = join_flags([(name, values) for name, values in split_flags(flags) if name not in WITHOUT_DATA])
        more = ["--use_cpu", "True", "--report_to", "none", "--output_dir", "."]
        self.model_args, self.data_args, self.training_args = parse_args([*words, *more], command="check")
        # The order of the records does not depend on who reads them.
        self.training_args.dataloader_num_workers, self.training_args.dataloader_prefetch_factor = 0, None
        self.training_args.dataloader_persistent_workers, self.training_args.parallelism_config = False, None
        set_seed(self.training_args.seed)
        self.facts = load_run_facts()
        self.tokenizer = build_tokenizer(self.model_args, self.training_args)
        add_tokens(self.tokenizer, self.model_args.new_tokens or [])
        self.template = get_run_template(self.model_args, self.data_args, self.facts.moment)
        check_end_token(self.template, self.tokenizer, self.model_args.version)
        self.model = self._model() if layout is None else self._model_of(layout)
        self.layout = self.model.config.image_layout if self.model.config.has_vision_tower else None
        add_image_tokens(self.tokenizer, self.model.config)

    @property
    def _checkpoint(self):
        return Checkpoint.of_flag(self.model_args.model_name_or_path, self.training_args.cache_dir)

    def _model(self):
        overrides = get_config_overrides(self.model_args, self.data_args, self.training_args)
        config = get_run_config(self._checkpoint, self.model_args.vision_tower, overrides)
        config.name_or_path = str(self._checkpoint.path)
        if not config.has_vision_tower:
            return ConfigOnly(config)
        with torch.device("meta"):
            # The tower knows where its image processor lies.
            tower = build_vision_tower(config)
        return ConfigOnly(config, tower.image_processor)

    def _model_of(self, layout):
        """Return what stands for a model whose tower is not known: nothing can prepare its images."""
        chosen = self._checkpoint.fields | self.model_args.config_choices()
        config = SimpleNamespace(
            has_vision_tower=True,
            image_layout=layout,
            mm_use_im_start_end=bool(chosen.get("mm_use_im_start_end")),
            mm_use_im_patch_token=bool(chosen.get("mm_use_im_patch_token")),
            mm_injection=chosen.get("mm_injection") or "tokens",
            mm_image_position=chosen.get("mm_image_position") or "placeholder",
        )
        self.data_args.image_resize = None
        return ConfigOnly(config, image_processor=object())

    def open(self, paths, num_workers: int = 0, decode: bool = False):
        """Return the examples and the Report of annotation files, whatever --bad_record says.

        num_workers: processes that count tokens. decode: see check_annotations.
        """
        settings = example_settings(self.model, self.model_args, self.data_args, self.training_args, self.facts.moment)
        return open_dataset(
            paths,
            self.tokenizer,
            image_folder=self.data_args.image_folder,
            num_workers=num_workers,
            follow_links=self.data_args.follow_links,
            bad_record="skip",
            max_bad_fraction=1.0,
            decode=decode,
            **settings,
        )

    @contextmanager
    def start(self, opened: dict):
        """Return a context with the training set and evaluation set of the run; raise what the run would raise.

        opened: {paths: what `open` has returned}; the run's --bad_record is applied to it.
        """

        def get_opened(paths, *args, bad_record, max_bad_fraction, **settings):
            dataset, report = opened[tuple(paths)]
            apply_policy(report.bad, report.num_records + len(report.bad), bad_record, max_bad_fraction)
            return dataset, report

        args = self.training_args
        check_shard_flags(self.data_args, args)
        check_images_exist(self.data_args)
        check_sees_images(self.data_args, args)
        with TemporaryDirectory() as directory:
            # For the skipped-records log.
            args.output_dir = directory
            sets = load_data(self.model, self.tokenizer, self.model_args, self.data_args, args, self.facts, get_opened)
            check_enough_records(*sets, args)
            get_sampler(sets[0], args)
            yield sets

    def build_trainer(self, train_set, eval_set):
        """Return the trainer of the run inside the context of `start`; it can read and cannot train."""
        from llava_lite.train.train import build_trainer

        sets = train_set, eval_set
        return build_trainer(self.model, self.tokenizer, *sets, self.data_args, self.training_args, self.facts)
