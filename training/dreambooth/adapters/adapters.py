"""What `[lora]` and `[tokens]` make of Stable Diffusion: adapters on its layers, trained tokens over its text tables.

The model is changed in place, before any engine sees it; the base below is frozen and left out of states. What comes
out again by name, from live weights or a state's, is the adapters, the tokens, or whole weights with both in them.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.config import RunConfig
from training.dreambooth.adapters.files import read_adapters
from training.dreambooth.adapters.names import PREFIXES, TEXT, UNET, expanded, text_parts, unread_layers
from training.dreambooth.model import SdNetworks
from training.dreambooth.single_file.layout import Family
from training.lora.adapter import Adapter, AdapterError
from training.lora.frozen_base import freeze_base
from training.lora.layers import LayerChoice, adaptable_names, add_adapters, chosen, is_adapter, put_in, taken_out
from training.lora.merging import merged_state
from training.precision import DTYPES
from training.stage_c.text import EOS_ID
from training.tensor_file import digest_of_tensors
from training.tokens.choose import ChosenTokens, choose_tokens, in_another_table
from training.tokens.overlay import CHANGE, INITIAL, OverlaidEmbedding, rows_of, without_overlay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_EMBEDDING = "embeddings.token_embedding"


class SdAdapters:
    """Adapters and tokens of one model. Makes them; raises PatternError, AdapterError or ValueError naming the key.

    Adapters are on every part that any stage trains; those that this one does not train are kept as they are.
    tokenizer: learns the new tokens. is_empty: the model has no weights, only shapes.
    """

    def __init__(
        self,
        config: RunConfig,
        model: SdNetworks,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        family: Family,
        is_empty: bool = False,
    ) -> None:
        self.family = family
        self._config, self._model, self._recipe = config, model, config.of_dreambooth
        self._level = logging.DEBUG if is_empty else logging.INFO
        self._modules: dict[str, nn.Module] = {UNET: model.unet}
        if model.text is not None:
            self._modules |= dict(zip(text_parts(family), model.text.texts, strict=True))
        ever = {*self._recipe.train, *(part for stage in self._recipe.stages for part in stage.train or ())}
        keeps_bases = config.lora is not None or (config.tokens is not None and config.tokens.only)
        self._frozen = frozenset(part for part in self._modules if keeps_bases or part not in ever)
        """Components whose own weights are never trained in this run."""
        self.digests = {} if is_empty else self._digests()
        """SHA-256 of frozen networks as they were loaded, by config key."""
        self.tokens: ChosenTokens | None = None
        if config.tokens is not None:
            self._put_tokens(tokenizer)
        self.layers: dict[str, dict[str, list[LayerChoice]]] = {}
        """{component: {block: layers}}, the block "" being all that are in no other."""
        if config.lora is not None:
            self._put_adapters([part for part in self._modules if part in ever])
        dtype = None if config.lora is None else DTYPES[config.lora.base_weights]
        freeze_base(model, list(self._base_names()), dtype=dtype, keeps_vectors=True)
        if config.lora is not None and config.lora.init is not None and not is_empty:
            self._start_from(Path(config.lora.init))
        self._freeze_what_other_stages_train()

    # --- making them ---

    def _digests(self) -> dict[str, str]:
        frozen = {part: module for part, module in self._modules.items() if part in self._frozen}
        return {f"dreambooth.{part}": digest_of_tensors(module.state_dict()) for part, module in frozen.items()}

    def _texts(self) -> Iterator[tuple[str, Any]]:
        """Yield (component, the module whose child `embeddings` is) of each text model."""
        for part, module in self._modules.items():
            if part != UNET:
                yield part, getattr(module, "text_model", module)

    def _put_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        assert self._config.tokens is not None
        train = self._config.tokens.train
        for _, inner in self._texts():
            table = inner.embeddings.token_embedding.weight.detach()
            if self.tokens is None:
                self.tokens = own = choose_tokens(tokenizer, table, train)
            else:
                own = in_another_table(self.tokens, tokenizer, table, train)
            inner.embeddings.token_embedding = OverlaidEmbedding(inner.embeddings.token_embedding, own)
            inner.eos_token_id = EOS_ID  # else it pools at the highest id: a new token's
        logger.log(self._level, "%s", self.tokens)

    def _put_adapters(self, components: list[str]) -> None:
        lora = self._config.lora
        assert lora is not None
        for part in components:
            module = self._modules[part]
            if part == UNET:
                blocks = [
                    (block.name, expanded(block.targets, UNET), *lora.block_values(block)) for block in lora.blocks
                ]
                patterns = expanded(lora.targets, UNET)
                self.layers[part] = chosen(module, patterns, rank=lora.rank, alpha=lora.alpha, blocks=blocks)
            else:
                assert lora.text_encoder is not None
                own, key = lora.text_encoder, "lora.text_encoder.targets"
                found = chosen(module, expanded(own.targets, part), rank=own.rank, alpha=own.alpha, key=key)
                self.layers[part] = {
                    "": [layer for layer in found[""] if not layer.name.startswith(self._unread(part))]
                }
            layers, seed = list(self._of(part)), _seed(self._config.seed, part)
            add_adapters(module, layers, kind=lora.kind, dropout=lora.dropout, seed=seed)
            logger.log(self._level, "%s: %s on %d layers", part, lora.kind, len(layers))

    def _unread(self, part: str) -> tuple[str, ...]:
        assert self._model.text is not None
        return unread_layers(self._model.text, text_parts(self.family).index(part))

    def _start_from(self, path: Path) -> None:
        found = read_adapters(path, family=self.family, layers=self.adaptable_layers())
        for part, adapters in found.items():
            if part not in self.layers:
                raise AdapterError(
                    f"lora.init {path}: has adapters of the {part}, which dreambooth.train does not name: they would "
                    "be lost; name it there"
                )
            unread = () if part == UNET else self._unread(part)
            read = {name: adapter for name, adapter in adapters.items() if not (unread and name.startswith(unread))}
            own = list(self._of(part))
            num = put_in(self._modules[part], own, read, source=f"lora.init {path}: {part}")
            logger.info("lora.init: %d of %d adapters of the %s start from %s", num, len(own), part, path)

    def adaptable_layers(self) -> dict[str, list[str]]:
        """Return the names of layers that can have an adapter, by component that is here."""
        return {part: adaptable_names(module) for part, module in self._modules.items()}

    def _base_names(self) -> Iterator[str]:
        """Yield names of all that neither is trained nor has to be in a state."""
        for name in self._model.state_dict():
            is_token = name.endswith((f"{_EMBEDDING}.{CHANGE}", f"{_EMBEDDING}.{INITIAL}"))
            if _component_of(name) in self._frozen and not is_token and not is_adapter(name):
                yield name

    def _freeze_what_other_stages_train(self) -> None:
        tokens_only = self._config.tokens is not None and self._config.tokens.only
        for name, parameter in self._model.named_parameters():
            is_token = name.endswith(f"{_EMBEDDING}.{CHANGE}")
            if not is_token and (tokens_only or _component_of(name) not in self._recipe.train):
                parameter.requires_grad_(False)

    def _of(self, component: str) -> Iterator[LayerChoice]:
        return (layer for layers in self.layers.get(component, {}).values() for layer in layers)

    # --- training them ---

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return what is trained by part: unet, text_encoder, text_encoder_2, tokens, and each block."""
        parts: dict[str, list[nn.Parameter]] = {}
        block_of = {
            f"{PREFIXES[UNET]}{layer.name}.": block or UNET
            for block, layers in self.layers.get(UNET, {}).items()
            for layer in layers
        }
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            part = _component_of(name)
            if name.endswith(f"{_EMBEDDING}.{CHANGE}"):
                part = "tokens"
            elif part == UNET:
                part = next((block for prefix, block in block_of.items() if name.startswith(prefix)), UNET)
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
        is_merged = self._config.lora is not None and "merged" in self._config.lora.formats
        return is_merged or not self._frozen.issuperset(self._modules)

    @property
    def changes_text(self) -> bool:
        """Whether a text model is another than it was, new tokens aside."""
        has_changed_rows = self.tokens is not None and self.tokens.num_new < len(self.tokens.ids)
        texts = self._modules.keys() - {UNET}
        return has_changed_rows or bool(texts & self.layers.keys()) or not self._frozen.issuperset(texts)

    def adapters(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Adapter]]:
        """Return adapters by component and layer. weights: of the whole model by name; the base may be missing."""
        return {part: taken_out(_of(weights, PREFIXES[part]), self._of(part)) for part in self.layers}

    def token_rows(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the embeddings (N, width) of trained tokens in each text model, fp32."""
        return {part: rows_of(_of(weights, PREFIXES[part]), self._embedding(part)) for part, _ in self._texts()}

    def _embedding(self, part: str) -> str:
        return f"text_model.{_EMBEDDING}" if hasattr(self._modules[part], "text_model") else _EMBEDDING

    def merged_unet(
        self, weights: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the UNet's weights with adapters in them, named as its module without adapters names them.

        weights: in place of the live trained ones; dtype: of changed weights, others keep theirs.
        """
        return self._merged(UNET, weights, dtype)

    def merged_text(
        self, index: int, weights: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return a text model's weights with adapters and trained rows of existing tokens in them. index: 0, or 1."""
        part = text_parts(self.family)[index]
        merged = self._merged(part, weights, dtype)
        return merged if self.tokens is None else without_overlay(merged, self._embedding(part), self.tokens.ids)

    def _merged(self, part: str, weights: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
        starts = [(name, one) for name, one in self._model.named_buffers() if name.endswith(f"{_EMBEDDING}.{INITIAL}")]
        live = {name: tensor.detach() for name, tensor in [*self._model.named_parameters(), *starts]}
        state = _of({**live, **(weights or {})}, PREFIXES[part])
        return merged_state(state, self._of(part), dtype=dtype)


def _component_of(name: str) -> str:
    return next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), TEXT)


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}


def _seed(seed: int, component: str) -> int:
    return int.from_bytes(hashlib.sha256(f"adapters of the {component}, seed {seed}".encode()).digest()[:7], "big")
