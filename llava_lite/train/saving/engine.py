"""Save and load the state of a DeepSpeed engine without the weights that come from the base model."""

from pathlib import Path

from llava_lite.checkpoints.engine_files import check_no_code, engine_directory
from llava_lite.train.deepspeed.private import collected_errors, safe_load
from llava_lite.train.deepspeed.universal import load_universal
from llava_lite.train.saving.trained_weights import drop_frozen


def save_engine(engine, model, directory: str, is_writer: bool) -> None:
    """Write trained weights, master weights and optimizer; all ranks must call it.

    `latest`, by which the engine finds its files again, is written here: the engine writes it before the other ranks
    are done. Raises the first error of this rank, after the last collective: a rank that raised inside the engine's
    save would leave the others in a barrier.
    """

    def change_state(state):
        # The engine leaves tied names and 4-bit tables of frozen weights in the module's file.
        return state | {"module": drop_frozen(model, state["module"])} if "module" in state else state

    with collected_errors(engine, change_state) as errors:
        engine.save_checkpoint(directory, exclude_frozen_parameters=True, save_latest=False)
    if errors:
        raise errors[0]
    if is_writer:
        Path(directory, "latest").write_text(f"global_step{engine.global_steps}")


def load_engine(engine, path: str, is_as_saved: bool, workspace: str, is_converter: bool) -> None:
    """Load what `save_engine` wrote; frozen weights stay those of the base model. All ranks must call it.

    is_as_saved: whether as many ranks under the same stage of ZeRO have saved it. workspace, is_converter: as in
    `load_universal`, which is used where they have not.
    """
    if not is_as_saved:
        return load_universal(engine, path, workspace, is_converter)
    # All files, before any of them is loaded; and again the bytes that are loaded.
    directory = engine_directory(path)
    check_no_code(directory)
    with safe_load(engine):
        loaded, _ = engine.load_checkpoint(path, tag=directory.name, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"DeepSpeed found no state it can use in {path}; name an older checkpoint.")
