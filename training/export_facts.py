"""What the header of exported weights tells about the run: whose they are, when they were saved, how they were trained.

No torch. ModelSpec entries that do not depend on the run are made by the recipe.
"""

from training.config import RunConfig
from training.run_dir import RunDir


def export_facts(
    config: RunConfig, run_dir: RunDir, *, chunk: str, global_step: int, images_seen: int
) -> dict[str, str]:
    """Return header entries for the weights of a state.

    The date is the state's, from the ledger, so that the same state gives the same bytes at any time.
    """
    lines = [line for line in run_dir.read_ledger() if line.event == "state_saved"]
    saved = [line.time for line in lines if line.fields["global_step"] == global_step]
    return {
        "chunkline.run": str(run_dir.read_run_json().get("run_id", "")),
        "chunkline.chunk": chunk,
        "chunkline.global_step": str(global_step),
        "chunkline.images_seen": str(images_seen),
        **({"modelspec.date": saved[-1]} if saved else {}),
        **(training_facts(config, global_step=global_step) if config.save.training_facts else {}),
    }


def training_facts(config: RunConfig, *, global_step: int) -> dict[str, str]:
    """Return kohya's `ss_*` entries for which this run has the same thing; other programs show them."""
    optimizer, caption = config.optimizer, config.caption
    width, height = config.buckets.resolution
    return {
        "ss_output_name": config.name,
        "ss_steps": str(global_step),
        "ss_seed": str(config.seed),
        "ss_optimizer": optimizer.name,
        "ss_learning_rate": str(optimizer.learning_rate),
        "ss_lr_scheduler": config.schedule.name,
        "ss_lr_warmup_steps": str(config.schedule.warmup_steps),
        "ss_max_grad_norm": str(optimizer.max_grad_norm),
        "ss_mixed_precision": config.precision.autocast,
        "ss_batch_size_per_device": str(config.batch.micro_batch_size),
        "ss_resolution": f"({width}, {height})",
        "ss_caption_dropout_rate": str(caption.caption_dropout_fraction),
        "ss_caption_tag_dropout_rate": str(caption.tag_dropout_fraction),
    }
