"""Save and load the state of a DeepSpeed engine without what comes from the base model."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from llava_lite.model.engine_files import engine_folder, refuse_code
from llava_lite.train.trained_weights import drop_frozen
from llava_lite.train.universal import load_universal


def save_engine(engine, model, folder: str, is_writer: bool) -> None:
    """Write weights that train, master weights and optimizer; all ranks must call it.

    `latest`, by which the engine finds its files again, is written here: the engine writes it before the other ranks
    are done. Raises the first error of this rank, after the last collective.
    """
    with _errors_kept(engine, model) as errors:
        engine.save_checkpoint(folder, exclude_frozen_parameters=True, save_latest=False)
    if errors:
        raise errors[0]
    if is_writer:
        Path(folder, "latest").write_text(f"global_step{engine.global_steps}")


def load_engine(engine, path: str, saved_by: int, workspace: str, is_converter: bool) -> None:
    """Load what `save_engine` wrote; frozen weights stay those of the base model. All ranks must call it.

    saved_by: the number of ranks that saved it. workspace, is_converter: as in `load_universal`, where it is another.
    """
    from deepspeed import comm

    if saved_by != comm.get_world_size():
        return load_universal(engine, path, workspace, is_converter)
    refuse_code(engine_folder(path))
    loaded, _ = engine.load_checkpoint(path, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"DeepSpeed found no state it can use in {path}; name an older checkpoint.")


@contextmanager
def _errors_kept(engine, model):
    """Make DeepSpeed's writer collect errors: a rank that raised inside its save would leave the others in a barrier.

    Also drops what comes from the base model from the module's file: tied names and 4-bit tables.
    """
    writer, errors = engine.checkpoint_engine, []
    stock_save, stock_scripts = writer.save, engine._copy_recovery_script

    def save(state_dict, path):
        try:
            if "module" in state_dict:
                state_dict = {**state_dict, "module": drop_frozen(model, state_dict["module"])}
            stock_save(state_dict, path)
        except Exception as error:
            errors.append(error)

    writer.save, engine._copy_recovery_script = save, lambda save_path: None
    try:
        yield errors
    finally:
        writer.save, engine._copy_recovery_script = stock_save, stock_scripts
