"""What a file of adapters says about them: the ss_* entries that user interfaces read.

How the run was trained is said by `training.export_facts`. Nothing here is about the data.
"""

import json

from training.config import RunConfig
from training.config.lora import LoraConfig


def network_metadata(config: RunConfig, lora: LoraConfig, *, base: str) -> dict[str, str]:
    """Return kohya's entries about adapters. base: ss_base_model_version.

    Source: kohya-ss/sd-scripts, train_network.py (names and meaning).
    """
    rate, text_rate = config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate
    arguments: dict[str, str] = {"algo": lora.kind} if lora.kind in ("loha", "lokr") else {}
    arguments |= {"dora_wd": "True"} if lora.kind == "dora" else {}
    is_plain = not any(block.rank or block.alpha for block in lora.blocks)
    return {
        "ss_base_model_version": base,
        "ss_v2": str(base.startswith("sd_v2")),
        "ss_network_module": "lycoris.kohya" if arguments else "networks.lora",
        "ss_network_dim": str(lora.rank) if is_plain else "Dynamic",
        "ss_network_alpha": f"{lora.alpha:g}" if is_plain else "Dynamic",
        "ss_network_args": json.dumps(arguments),
        "ss_network_dropout": str(lora.dropout),
        "ss_unet_lr": str(rate),
        "ss_text_encoder_lr": str(text_rate or rate) if lora.text_encoder is not None else "None",
    }
