"""A checkpoint by directory or hub id: its config.json, read once, its files, and the base it stands on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cached_property

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from llava_lite.checkpoints.config import needs_auto_config, read_config
from llava_lite.checkpoints.files import ADAPTER, ADAPTER_WEIGHTS, COMPLETE, TRAINED, find_base, read_checkpoint
from llava_lite.checkpoints.manifest import verify_file
from llava_lite.formats import foreign_format
from llava_lite.hub.errors import (
    CONFIG,
    HUB_ARGUMENTS,
    SHARED_ARGUMENTS,
    HubError,
    find_file,
    has_file,
    no_file,
    readable_errors,
)
from llava_lite.hub.json_files import check_config, read_fields
from llava_lite.hub.source import LANGUAGE_MODEL, check_source

BASE = "base_model_name_or_path"


class Checkpoint:
    """A directory or hub repository, and where its files are looked for.

    path: None for a model without a checkpoint, which has no files. base: replaces the base that the checkpoint names.
    needed_by: the checkpoint that names this one, for messages. hub: keywords of HUB_ARGUMENTS, as in transformers'
    `from_pretrained`. Every file is looked up once, every JSON file is read once. Raises HubError, an OSError, where
    the Hub refuses or cannot be reached.
    """

    def __init__(self, path, *, base=None, needed_by=None, **hub):
        if unknown := sorted(hub.keys() - set(HUB_ARGUMENTS)):
            raise TypeError(f"Checkpoint has no keyword {unknown[0]!r}; known: {', '.join(HUB_ARGUMENTS)}.")
        self.path = None if path is None else os.fspath(path)
        self._given_base, self._needed_by = base, needed_by
        self._hub = {name: value for name, value in hub.items() if value is not None}
        self._files, self._json, self._bases = {}, {}, {}

    @classmethod
    def open(cls, path, arguments: dict | None = None, **more) -> Checkpoint:
        """Return the checkpoint of a path; a Checkpoint is returned as it is.

        arguments: the caller's keywords, out of which those of HUB_ARGUMENTS are taken. more: of the constructor.
        """
        found = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in (arguments or {})}
        return path if isinstance(path, cls) else cls(path, **found, **more)

    @classmethod
    def of_flag(cls, name, cache_dir=None) -> Checkpoint:
        """Return the checkpoint of --model_name_or_path; ValueError if none is named, OSError if it does not exist."""
        if name is None:
            raise ValueError("--model_name_or_path is needed: a language model, or the output of an earlier stage.")
        checkpoint = cls(name, cache_dir=cache_dir)
        checkpoint.check("--model_name_or_path")
        return checkpoint

    def __str__(self) -> str:
        return str(self.path)

    @property
    def keywords(self) -> dict:
        """The keywords of transformers' `from_pretrained` that find the files of this checkpoint."""
        return dict(self._hub)

    @property
    def shared_keywords(self) -> dict:
        """Those of `keywords` that also hold for the base and for the vision tower."""
        return {name: value for name, value in self._hub.items() if name in SHARED_ARGUMENTS}

    def readable_errors(self) -> AbstractContextManager:
        """Return a context that turns errors of the Hub's client into sentences."""
        return readable_errors(self.path, self._needed_by, **self._hub)

    def check(self, flag: str = "", example: str = LANGUAGE_MODEL) -> None:
        """Raise OSError at once if there is neither such a directory nor such a repository, see `check_source`."""
        check_source(self.path, flag, example, **self._hub)

    def file(self, name: str) -> str | None:
        """Return the local path of a file, fetched if need be; None if the checkpoint has none of that name."""
        if name not in self._files:
            with self.readable_errors():
                self._files[name] = None if self.path is None else find_file(self.path, name, self._hub)
        return self._files[name]

    def has(self, name: str) -> bool:
        """Tell whether the checkpoint has a file; unlike `file` never an error, and nothing is fetched again."""
        if name in self._files:
            return self._files[name] is not None
        return self.path is not None and has_file(self.path, name, self._hub)

    def read_json(self, name: str) -> dict:
        """Return the fields of a JSON file, {} if there is none. Not a copy.

        Raises ValueError for anything but fields, and for a file of a checkpoint-N that is not as it was saved.
        """
        if name not in self._json:
            path = self.file(name)
            if path is not None:
                verify_file(path)
            self._json[name] = {} if path is None else read_fields(path)
            if name == CONFIG:
                check_config(path, self._json[name])
        return self._json[name]

    @property
    def fields(self) -> dict:
        """The raw fields of config.json, {} if there is none."""
        return self.read_json(CONFIG)

    @cached_property
    def format(self):
        """The module of `formats` that reads this checkpoint, None for names of ours and for a plain model."""
        return foreign_format(self.fields)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Our config of a LLaVA model of any format, transformers' of a plain one. Copy it before you change it.

        Raises OSError if there is no config.json, ValueError for one of a model that cannot be opened.
        """
        self.require_config()
        if self.format is None and needs_auto_config(self.path, self.fields):
            for name in self.fields.get("configuration_files") or ():
                # One of these is read in place of config.json, by the version of transformers in its name.
                check_config(name, self.read_json(name))
            with self.readable_errors():
                return AutoConfig.from_pretrained(self.path, trust_remote_code=False, **self._hub)
        return read_config(self.path, self.fields, self.format)

    def weights(self) -> dict:
        """Return all weights by name, as they are stored; see `files.read_checkpoint`."""
        return read_checkpoint(self)

    def require_config(self) -> None:
        """Raise OSError if there is no config.json, or if it cannot be reached."""
        if self.file(CONFIG) is not None:
            return
        with self.readable_errors():
            # `file` does not tell a file that cannot be reached from one that does not exist.
            cached_file(self.path, CONFIG, **self._hub)
        if os.path.isdir(self.path):
            raise OSError(f"{self.path!r} is no checkpoint: it has no {CONFIG}.")
        raise HubError(no_file(None, self.path, os.path.join(self._hub.get("subfolder") or "", CONFIG), self._hub))

    @property
    def named_base(self) -> str | None:
        """The base that was given, else the one that config.json or LLaVA's adapter_config.json names."""
        return self._given_base or self.fields.get(BASE) or self.read_json(ADAPTER).get(BASE)

    @cached_property
    def base(self) -> Checkpoint | None:
        """The checkpoint that this one stands on: the one given, else the one it names; None for a complete model."""
        return self.stands_on(self._given_base or self.fields.get(BASE))

    def stands_on(self, named: str | None) -> Checkpoint | None:
        """Return the base of this checkpoint if config.json names `named` as such.

        LLaVA's LoRA directories name theirs in adapter_config.json. Raises ValueError for trained weights without a
        base, OSError for a base that is not there.
        """
        named = named or self._find_named_base()
        if named is None:
            return None
        found = find_base(str(named), self.path)
        if found not in self._bases:
            self._bases[found] = self.beside(found)
            self._bases[found].check("base")
        return self._bases[found]

    def _find_named_base(self) -> str | None:
        if self.path is None or any(map(self.has, COMPLETE)):
            return None
        named = self.read_json(ADAPTER).get(BASE)
        parts = [name for name in (*TRAINED, *ADAPTER_WEIGHTS) if not named and self.has(name)]
        if parts:
            raise ValueError(
                f"{self.path!r} holds only what was trained ({', '.join(parts)}) and names no base. Give the "
                "model that it was trained on: load_pretrained_model(..., model_base=...), or "
                "base_model_name_or_path in its config.json."
            )
        return named

    def beside(self, path, base=None) -> Checkpoint:
        """Return a checkpoint that this one names, looked for in the same cache and with the same token."""
        return Checkpoint(path, base=base, needed_by=self.path, **self.shared_keywords)
