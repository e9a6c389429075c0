"""Room on the disk for a chunk: the forecast of its run, from what is trained, and whether what comes next fits."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sharding.files import require_free_bytes, size_text
from training.batch_plan import BatchPlan
from training.config import Prompt, RunConfig
from training.forecast import DiskForecast, disk_forecast
from training.memory.strategies import optimizer_state_bytes
from training.run_dir import RunDir
from training.started_chunk import StartedChunk
from training.state import check_room, state_bytes
from training.tensor_parts import InParts


def forecast_of(
    config: RunConfig,
    run_dir: RunDir,
    *,
    chunk: StartedChunk,
    plans: Sequence[BatchPlan],
    tensors: Mapping[str, Mapping[str, Tensor | InParts]],
    updated: Collection[str],
    prompts: Sequence[Prompt],
) -> DiskForecast:
    """Return how large the run folder gets. plans: of all epochs; tensors: of a state, by component.

    updated: names of the tensors of "model" that the optimizer updates; before its first step it has no tensors yet.
    """
    shapes = [tensor.shape for name, tensor in tensors["model"].items() if name in updated]
    coming = [] if tensors["optimizer"] else shapes
    kahan_bytes = 2 * sum(shape.numel() for shape in coming) * (config.precision.weight_rounding == "kahan")
    return disk_forecast(
        config,
        num_chunks=len(run_dir.read_run_json().get("chunks", [chunk.name])),
        num_steps=sum(len(plan.steps) for plan in plans),
        num_images=sum(plan.num_images for plan in plans),
        index_bytes=chunk.index_path.stat().st_size,
        num_tensors=sum(len(named) for named in tensors.values()) + 4 * len(coming),
        state_bytes=state_bytes(tensors) + optimizer_state_bytes(config.optimizer.name, coming) + kahan_bytes,
        num_parameters=sum(tensor.numel() for tensor in tensors["model"].values()),
        prompts=prompts,
    )


def require_room(root: Path, forecast: DiskForecast, *, keep_states: int, num_present: int, exports: bool) -> str:
    """Return what a chunk's states take, in a line; what it writes until its end has room.

    num_present: states of the chunk that are there already. exports: whether its weights are exported at the end, when
    the states are still there. Raises DiskFullError when it does not fit.
    """
    line = check_room(root, forecast.state_bytes, keep_last=keep_states, num_present=num_present)
    if exports:
        num_states = max(keep_states + 1 - num_present, 1)
        purpose = f"{num_states} more states of {size_text(forecast.state_bytes)} and an export"
        require_free_bytes(root, num_states * forecast.state_bytes + forecast.export_bytes, purpose)
    return line


def require_room_for_export(root: Path, forecast: DiskForecast) -> None:
    """Raise DiskFullError when an export does not fit any more; the final state is there, so that nothing is lost."""
    require_free_bytes(root, forecast.export_bytes, "an export (the chunk's final state is saved)")
