"""Use a run's state outside a launch: export weights, make pictures. One process; the run is not changed.

What is shown is what the run itself shows: the running average where it keeps one, else what is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from sharding.files import require_free_bytes
from training.config import RunConfig
from training.dreambooth.verdict.best import best_state
from training.engines.plain import PlainEngine
from training.export_facts import export_facts
from training.exports import write_export
from training.forecast import export_bytes
from training.position import Position
from training.precision import DTYPES, choose_device, set_weights
from training.preview import write_pictures
from training.preview_prompts import preview_prompts
from training.recipes.base import Recipe, load_recipe
from training.run_dir import RunDir
from training.stages import stage_config
from training.state_folder import LoadedState, load_state, newest_verified
from training.trained import load_trained


def export_weights(
    config: RunConfig, root: Path, output: Path, *, chunk_name: str | None = None, best: bool = False
) -> Iterator[str]:
    """Write the weights of the newest state, a chunk's final one, or the best, to `output`; yield a line per file.

    Formats and number format are those of `config.save`.

    Raises StateError when there is no verified state, DiskFullError before anything is written or in the middle of it.
    """
    with _shown(config, root, chunk_name, best=best) as (state, recipe):
        position, dtype = Position(**state.facts["position"]), DTYPES[config.save.export_dtype]
        metadata = export_facts(
            config, RunDir(root), chunk=position.chunk, global_step=position.global_step,
            images_seen=position.images_seen,
        )  # fmt: skip
        weights = recipe.trainable().state_dict()
        num_parameters = sum(tensor.numel() for tensor in weights.values())
        require_free_bytes(output, export_bytes(num_parameters, len(weights), save=config.save), "an export of weights")
        licences = config.save.licence_files
        for file in write_export(
            output, lambda folder: recipe.export(folder, dtype=dtype, metadata=metadata), licences=licences
        ):
            yield str(file)


def make_previews(
    config: RunConfig, root: Path, output: Path, *, chunk_name: str | None = None, best: bool = False
) -> Iterator[str]:
    """Make the run's previews from its newest state, a chunk's final one, or the best; yield the files.

    Raises StateError, and ValueError when the config has no prompts.
    """
    prompts = preview_prompts(config, RunDir(root))
    if not prompts:
        raise ValueError(
            "preview.prompts is empty, there is no preview.file, and no concept has sample.prompt: there is nothing "
            "to draw"
        )
    with _shown(config, root, chunk_name, best=best) as (state, recipe):
        pictures = recipe.preview(prompts)
    for path in write_pictures(output, state.facts["global_step"], pictures, prompts):
        yield str(path)


@contextmanager
def _shown(
    config: RunConfig, root: Path, chunk_name: str | None, *, best: bool
) -> Iterator[tuple[LoadedState, Recipe]]:
    run_dir = RunDir(root)
    folder, _ = newest_verified([best_state(run_dir)] if best else run_dir.state_folders(chunk_name))
    state = load_state(folder, is_verified=True)
    config = stage_config(config, state.facts["position"]["chunk"])
    device = choose_device(config.device)
    if config.optimizer.name == "schedule_free":  # its average is made from what the optimizer keeps
        trained = load_trained(config, PlainEngine(Accelerator(cpu=device.type == "cpu"), exact=False))
        trained.load(state)
        with trained.shown():
            yield state, trained.recipe
        return
    recipe = load_recipe(config)
    recipe.load(device)
    set_weights(recipe.trainable(), config.precision.weights)
    recipe.trainable().load_state_dict(state.component("model"), strict=True)
    if config.ema.enabled:
        recipe.trainable().load_state_dict(state.component("ema"), strict=False)
    yield state, recipe
