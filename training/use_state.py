"""Use a run's state outside a launch: export weights, make pictures. One process; the run is not changed."""

from collections.abc import Iterator
from pathlib import Path

from training.config import RunConfig
from training.precision import DTYPES, choose_device
from training.preview import write_pictures
from training.recipes.base import Recipe, load_recipe
from training.run_dir import RunDir
from training.state_folder import LoadedState, load_state, newest_verified


def export_weights(
    config: RunConfig, root: Path, output: Path, *, chunk_name: str | None = None, dtype_name: str | None = None
) -> Iterator[str]:
    """Write the weights of the newest state, or of a chunk's final one, to `output`; yield a line per file.

    Raises StateError when there is no verified state.
    """
    state, recipe = _load(config, root, chunk_name)
    metadata = {
        "chunkline.run": str(RunDir(root).read_run_json().get("run_id", "")),
        "chunkline.chunk": str(state.facts["position"]["chunk"]),
        "chunkline.global_step": str(state.facts["global_step"]),
        "chunkline.images_seen": str(state.facts["position"]["images_seen"]),
    }
    for file in recipe.export(output, dtype=DTYPES[dtype_name or config.save.export_dtype], metadata=metadata):
        yield str(file)


def make_previews(config: RunConfig, root: Path, output: Path, *, chunk_name: str | None = None) -> Iterator[str]:
    """Make the run's previews from its newest state, or a chunk's final one; yield the files.

    Raises StateError, and ValueError when the config has no prompts.
    """
    if not config.preview.prompts:
        raise ValueError("preview.prompts is empty: there is nothing to draw")
    state, recipe = _load(config, root, chunk_name)
    pictures = recipe.preview(config.preview.prompts)
    for path in write_pictures(output, state.facts["global_step"], pictures):
        yield str(path)


def _load(config: RunConfig, root: Path, chunk_name: str | None) -> tuple[LoadedState, Recipe]:
    run_dir = RunDir(root)
    folder, _ = newest_verified(run_dir.state_folders(chunk_name))
    state = load_state(folder, is_verified=True)
    recipe = load_recipe(config)
    recipe.load(choose_device(config.device))
    recipe.trainable().load_state_dict(state.component("model"), strict=True)
    return state, recipe
