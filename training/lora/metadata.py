"""What a file of adapters says about itself: the ss_* entries that user interfaces read.

Only what is about the training: no folders, file names or tags of the data.
"""

import json

from training.config import RunConfig
from training.config.lora import LoraConfig


def ss_metadata(config: RunConfig, lora: LoraConfig, *, base: str, num_steps: str) -> dict[str, str]:
    """Return kohya's entries for a run. base: ss_base_model_version; num_steps: updates so far.

    Source: kohya-ss/sd-scripts, train_network.py (names and meaning).
    """
    text, optimizer = lora.text_encoder, config.optimizer
    module = "networks.lora" if lora.kind == "lora" else "lycoris.kohya"
    arguments = {"algo": lora.kind} if lora.kind in ("loha", "lokr") else {}
    arguments |= {"dora_wd": "True"} if lora.kind == "dora" else {}
    values = {
        "ss_base_model_version": base,
        "ss_v2": False,
        "ss_output_name": lora.title or config.name,
        "ss_network_module": module,
        "ss_network_dim": "Dynamic" if any(block.rank for block in lora.blocks) else lora.rank,
        "ss_network_alpha": "Dynamic" if any(block.alpha or block.rank for block in lora.blocks) else f"{lora.alpha:g}",
        "ss_network_args": json.dumps(arguments),
        "ss_network_dropout": lora.dropout,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate,
        "ss_text_encoder_lr": (optimizer.text_encoder_learning_rate or optimizer.learning_rate) if text else None,
        "ss_optimizer": optimizer.name,
        "ss_lr_scheduler": config.schedule.name,
        "ss_lr_warmup_steps": config.schedule.warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_mixed_precision": config.precision.autocast,
        "ss_seed": config.seed,
        "ss_resolution": str(config.buckets.resolution),
        "ss_total_batch_size": config.batch.batch_size,
        "ss_steps": num_steps,
        "ss_gradient_checkpointing": config.stage_c.gradient_checkpointing,
        "ss_max_token_length": config.stage_c.max_tokens,
    }
    return {key: str(value) for key, value in values.items()}
