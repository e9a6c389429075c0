"""From the flags of kohya's network trainers to [lora]."""

from training.kohya.flag_table import OF_THE_BRANCH
from training.kohya.given import Given
from training.kohya.setting import Translation

_RANK = 4
"""kohya's when --network_dim is not given."""
_KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
"""By `algo` of LyCORIS."""


def lora_settings(given: Given, found: Translation) -> None:
    """Add [lora]: adapters where networks.lora has them."""
    found.put("lora.kind", _kind(given, found), "network_module", "network_args")
    found.put("lora.targets", ["kohya"], "network_module", why="every linear layer and 1 × 1 convolution")
    rank, alpha = given.value("network_dim") or _RANK, given.value("network_alpha")
    found.put("lora.rank", rank, "network_dim")
    found.put("lora.alpha", alpha, "network_alpha")
    if given.script not in OF_THE_BRANCH:
        base, why = given.value("mixed_precision"), "the base, as in kohya"
        found.put("lora.base_weights", "fp32" if base == "no" else base, "mixed_precision", why=why)
    if given.value("network_dropout"):
        found.put("lora.dropout", given.value("network_dropout"), "network_dropout")
    if given.value("network_weights"):
        found.put("lora.init", given.value("network_weights"), "network_weights")
    found.put("lora.formats", ["kohya"], "network_module")
    if given.has("network_train_text_encoder_only") and given.script in OF_THE_BRANCH:
        text = "adapters on the text encoder alone are not here: [lora] has them on the network, too"
        found.refuse("network_train_text_encoder_only", text, "lora.targets")
    if not given.has("network_train_unet_only"):
        found.put("lora.text_encoder.rank", rank, "network_dim", "network_train_unet_only")
        found.put("lora.text_encoder.alpha", alpha, "network_alpha", "network_train_unet_only")


def _kind(given: Given, found: Translation) -> str:
    module = str(given.value("network_module") or "networks.lora")
    arguments = dict(word.partition("=")[::2] for word in given.value("network_args") or [])
    algorithm = arguments.pop("algo", "lora")
    if arguments.pop("dora_wd", "False").lower() == "true":
        algorithm = "dora"
    kind = "dora" if algorithm == "dora" else _KINDS.get(algorithm)
    if module not in ("networks.lora", "lycoris.kohya") or kind is None:
        found.refuse("network_module", f"{module} {algorithm} is not here: lora, dora, loha, lokr", "lora.kind")
    if arguments:
        text = f"{', '.join(arguments)} not here; blocks with ranks of their own are lora.blocks"
        found.refuse("network_args", text, "lora.blocks", "lora.targets")
    return kind or "lora"
