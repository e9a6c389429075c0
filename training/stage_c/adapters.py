"""What `[lora]` and `[tokens]` make of stage C: adapters on its layers, trained tokens over its text encoder's table.

The model is changed in place, before any engine sees it; the base below is frozen and left out of states. What comes
out again by name, from live weights or a state's, is the adapters, the tokens, or whole weights with both in them.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.config import RunConfig
from training.lora.adapter import Adapter
from training.lora.frozen_base import freeze_base
from training.lora.layers import (
    BASE_LAYER,
    LayerChoice,
    adaptable_names,
    add_adapters,
    chosen,
    is_adapter,
    put_in,
    taken_out,
)
from training.lora.merging import merged_state
from training.stage_c.adaptable import layer_shapes, layered_to_original, make_layered
from training.stage_c.adapter_files import read_adapters
from training.stage_c.adapter_names import NETWORK, TEXT, apart, expanded, is_together, official_order, together
from training.stage_c.model import StageCModel
from training.stage_c.text import EOS_ID
from training.tensor_file import digest_of_tensors
from training.tokens.choose import ChosenTokens, choose_tokens
from training.tokens.overlay import CHANGE, INITIAL, OverlaidEmbedding, rows_of, without_overlay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PREFIXES = {NETWORK: "network.", TEXT: "text.text_model."}
"""Where components lie in a StageCModel."""
_EMBEDDING = "text_model.embeddings.token_embedding"


class StageCAdapters:
    """Adapters and tokens of one model. Makes them; raises PatternError, AdapterError or ValueError naming the key.

    is_empty: the model has no weights, only shapes.
    """

    def __init__(
        self, config: RunConfig, model: StageCModel, tokenizer: "PreTrainedTokenizerBase", *, is_empty: bool = False
    ) -> None:
        self._config, self._model = config, model
        self._level = logging.DEBUG if is_empty else logging.INFO
        self._network, self._text = model.network, None if model.text is None else model.text.text_model
        self._freezes_network = config.lora is not None or (config.tokens is not None and config.tokens.only)
        self._freezes_text = self._text is not None and not config.of_stage_c.train_text_encoder
        self.digests = {} if is_empty else self._digests()
        """SHA-256 of frozen networks as they were loaded, by config key."""
        self.tokens: ChosenTokens | None = None
        if config.tokens is not None:
            self._put_tokens(tokenizer)
        self.layers: dict[str, dict[str, list[LayerChoice]]] = {}
        """{component: {block: layers}}, the block "" being all that are in no other."""
        if config.lora is not None:
            self._put_adapters()
        base = list(self._base_names())
        bf16 = config.lora is not None and config.lora.base_weights == "bf16"
        freeze_base(model, base, dtype=torch.bfloat16 if bf16 else None)
        if config.lora is not None and config.lora.init is not None and not is_empty:
            self._start_from(Path(config.lora.init))

    # --- making them ---

    def _digests(self) -> dict[str, str]:
        frozen: dict[str, nn.Module] = {}
        if self._freezes_network:
            frozen["stage_c.network"] = self._network
        if self._freezes_text and self._text is not None:
            frozen["stage_c.text_encoder"] = self._text
        return {key: digest_of_tensors(module.state_dict()) for key, module in frozen.items()}

    def _put_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        assert self._text is not None and self._config.tokens is not None
        embeddings = self._text.text_model.embeddings
        self.tokens = choose_tokens(tokenizer, embeddings.token_embedding.weight.detach(), self._config.tokens.train)
        embeddings.token_embedding = OverlaidEmbedding(embeddings.token_embedding, self.tokens)
        self._text.text_model.eos_token_id = EOS_ID  # else it pools at the highest id: a new token's
        logger.log(self._level, "%s", self.tokens)

    def _put_adapters(self) -> None:
        lora = self._config.lora
        assert lora is not None
        patterns = expanded(lora.targets, NETWORK)
        make_layered(self._network, together=is_together(patterns))
        blocks = [(block.name, block.targets, *lora.block_values(block)) for block in lora.blocks]
        self.layers[NETWORK] = chosen(self._network, patterns, rank=lora.rank, alpha=lora.alpha, blocks=blocks)
        if lora.text_encoder is not None and self._text is not None:
            own = lora.text_encoder
            patterns = expanded(own.targets, TEXT)
            key = "lora.text_encoder.targets"
            self.layers[TEXT] = chosen(self._text, patterns, rank=own.rank, alpha=own.alpha, key=key)
        for component in self.layers:
            layers = list(self._of(component))
            seed = _seed(self._config.seed, component)
            add_adapters(self._module(component), layers, kind=lora.kind, dropout=lora.dropout, seed=seed)
            logger.log(self._level, "%s: %s on %d layers", component, lora.kind, len(layers))

    def _start_from(self, path: Path) -> None:
        layers = {component: list(self._of(component)) for component in self.layers}
        shapes, own_names = layer_shapes(self._network), {layer.name for layer in layers[NETWORK]}
        order = official_order([name for name in self.module_order() if name in own_names])
        text_layers = [] if self._text is None else adaptable_names(self._text)
        found = read_adapters(path, shapes=shapes, order=order, text_layers=text_layers)
        is_one = any(layer.name.endswith(".in_proj") for layer in layers[NETWORK])
        for component, adapters in found.parts.items():
            if component == NETWORK:
                adapters = together(adapters) if is_one else apart(adapters)
            own = layers.get(component, [])
            module = self._module(component) if own else self._network
            num = put_in(module, own, adapters, source=f"lora.init {path}: {component}")
            logger.info("lora.init: %d of %d adapters of the %s start from %s", num, len(own), component, path)
        if self.tokens is not None and len(found.tokens[0]):
            self._start_tokens(found.tokens[0], found.tokens[1], path)

    @torch.no_grad()
    def _start_tokens(self, ids: Iterable[int], changes: Tensor, path: Path) -> None:
        assert self._text is not None and self.tokens is not None
        if tuple(ids) != self.tokens.ids:
            raise ValueError(
                f"lora.init {path}: its tokens are {list(ids)}, tokens.train names {list(self.tokens.ids)}"
            )
        self._text.text_model.embeddings.token_embedding.change.copy_(changes)

    def _base_names(self) -> Iterator[str]:
        """Yield names of all that neither is trained nor has to be in a state."""
        frozen = {NETWORK: self._freezes_network, TEXT: self._freezes_text}
        token_names = {f"{PREFIXES[TEXT]}{_EMBEDDING}.{name}" for name in (CHANGE, INITIAL)}
        for name in self._model.state_dict():
            component = NETWORK if name.startswith(PREFIXES[NETWORK]) else TEXT
            if frozen[component] and name not in token_names and not is_adapter(name):
                yield name

    def _module(self, component: str) -> nn.Module:
        module = self._network if component == NETWORK else self._text
        assert module is not None
        return module

    def _of(self, component: str) -> Iterator[LayerChoice]:
        return (layer for layers in self.layers.get(component, {}).values() for layer in layers)

    # --- training them ---

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return what is trained by part: network, text_encoder, tokens, and each block."""
        parts: dict[str, list[nn.Parameter]] = {}
        block_of = {
            f"{PREFIXES[NETWORK]}{layer.name}.": block or NETWORK
            for block, layers in self.layers.get(NETWORK, {}).items()
            for layer in layers
        }
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name == f"{PREFIXES[TEXT]}{_EMBEDDING}.{CHANGE}":
                part = "tokens"
            elif name.startswith(PREFIXES[TEXT]):
                part = TEXT
            else:
                part = next((part for prefix, part in block_of.items() if name.startswith(prefix)), NETWORK)
            parts.setdefault(part, []).append(parameter)
        return parts

    def learning_rates(self) -> dict[str, float]:
        """Return the peak rates of tokens and blocks; the others' are the recipe's."""
        lora, tokens, rate = self._config.lora, self._config.tokens, self._config.optimizer.learning_rate
        rates = {} if lora is None else {block.name: block.learning_rate or rate for block in lora.blocks}
        return rates | ({} if tokens is None else {"tokens": tokens.learning_rate or rate})

    # --- taking them out ---

    @property
    def exports_networks(self) -> bool:
        """Whether an export holds whole weights: where they are trained, or adapters are to be merged."""
        return not self._freezes_network or (self._config.lora is not None and "merged" in self._config.lora.formats)

    @property
    def changes_text(self) -> bool:
        """Whether the text model is another than it was, new tokens aside."""
        has_changed_rows = self.tokens is not None and self.tokens.num_new < len(self.tokens.ids)
        return self._text is not None and (not self._freezes_text or TEXT in self.layers or has_changed_rows)

    @property
    def text_width(self) -> int:
        """Channels of the text encoder's states, as the network expects them."""
        return self._network.config.c_clip_text

    def adapters(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Adapter]]:
        """Return adapters by component and layer. weights: of the whole model by name; the base may be missing."""
        return {
            component: taken_out(_of(weights, PREFIXES[component]), self._of(component)) for component in self.layers
        }

    def token_rows(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings (N, width) of trained tokens, fp32."""
        return rows_of(_of(weights, PREFIXES[TEXT]), _EMBEDDING)

    def token_changes(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what they changed by since the start."""
        return weights[f"{PREFIXES[TEXT]}{_EMBEDDING}.{CHANGE}"]

    def module_order(self) -> list[str]:
        """Return the network's layers in the order of its modules."""
        return list(dict.fromkeys(name.replace(BASE_LAYER, "") for name, _ in self._network.named_modules()))

    def merged_network(
        self, weights: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the network with its adapters in it, original layout.

        weights: in place of the live trained ones; dtype: of changed weights, others keep theirs.
        """
        merged = self._merged(NETWORK, weights, dtype)
        return layered_to_original(merged) if NETWORK in self.layers else merged

    def merged_text(
        self, weights: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the text model with adapters and trained rows of existing tokens in it."""
        merged = self._merged(TEXT, weights, dtype)
        return merged if self.tokens is None else without_overlay(merged, _EMBEDDING, self.tokens.ids)

    def _merged(self, component: str, weights: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
        live = {name: tensor.detach() for name, tensor in [*self._model.named_parameters(), *_buffers(self._model)]}
        state = _of({**live, **(weights or {})}, PREFIXES[component])
        return merged_state(state, self._of(component), dtype=dtype)


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in module.named_buffers() if name.endswith(f".{INITIAL}"))


def _seed(seed: int, component: str) -> int:
    return int.from_bytes(hashlib.sha256(f"adapters of the {component}, seed {seed}".encode()).digest()[:7], "big")
