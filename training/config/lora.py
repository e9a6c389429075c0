"""Settings of a run: adapters on a frozen base, and single tokens that are trained."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sharding.config import Config, Name

LoraFormat = Literal["kohya", "official", "peft", "diffusers", "merged"]
_FORMATS_OF = {
    "stage_c": ("kohya", "official", "peft", "merged"),
    "dreambooth": ("kohya", "diffusers", "merged"),
}


class LoraBlockConfig(Config):
    """Targeted layers with a rank, alpha or learning rate of their own."""

    name: Name
    """Name of the block, for the chart `lr/NAME`."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Patterns over the layers that lora.targets names."""
    rank: int | None = Field(None, gt=0)
    """Default: lora.rank."""
    alpha: float | None = Field(None, gt=0)
    """Default: lora.alpha, where the rank is the same; else the alpha that keeps alpha / rank."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; default: optimizer.learning_rate."""


class LoraTextConfig(Config):
    """Adapters on the text encoder, too; their learning rate is optimizer.text_encoder_learning_rate."""

    targets: tuple[str, ...] = Field(("kohya",), min_length=1)
    """Patterns of layers; "kohya" is q, k, v, out, fc1 and fc2 of every layer."""
    rank: int = Field(4, gt=0)
    """Inner dimension."""
    alpha: float = Field(1.0, gt=0)
    """The change is multiplied by alpha / rank."""


class LoraConfig(Config):
    """Train adapters; the networks below stay as they are, and no state holds them.

    A pattern is a glob over layer names as weights files have them (`down_blocks.1.*.attention.attn.to_q`), or `re:`
    and a regular expression found anywhere in the name; one that matches nothing is an error."""

    FREE: ClassVar = frozenset({"init", "formats"})

    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    """How the change of a weight is factored."""
    targets: tuple[str, ...] = Field(("default",), min_length=1)
    """Layers that get one; "default" is stage C's "official", and "kohya" of Stable Diffusion.

    Stage C: "official" is q, k and v together, and the output, of every attention. "kohya": every linear layer and 1×1
    convolution but that of the image, with q, k and v apart. Patterns that name `in_proj` keep q, k and v together.

    Stable Diffusion: "kohya" is every linear layer and 1×1 convolution of the UNet's transformers, "attention" q, k, v
    and the output only, "kohya_conv" all of the transformers, ResNets and down- and upsamplers, 3×3 convolutions among
    them; "conv_3x3" is those alone, for a block with a rank of their own."""
    rank: int = Field(4, gt=0)
    """Inner dimension; official 4."""
    alpha: float = Field(1.0, gt=0)
    """The change is multiplied by alpha / rank; official 1, as kohya's default."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into a LoRA's or DoRA's first factor."""
    init: str | None = None
    """Start from this file: kohya's, the official or diffusers' layout, or a folder of PEFT's."""
    base_weights: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format of the frozen base in memory; of Stable Diffusion, norms and biases stay in fp32. Published weights of
    stage C lose nothing in bf16, those of Stable Diffusion nothing in fp16, which stage C does not take."""
    blocks: tuple[LoraBlockConfig, ...] = ()
    """Tables of name, targets, rank, alpha, learning_rate: layers that get others."""
    text_encoder: LoraTextConfig | None = None
    """Table: adapters on the text encoder."""
    formats: tuple[LoraFormat, ...] = Field(("kohya",), min_length=1)
    """What an export writes: `kohya` (ComfyUI and A1111 read it), `merged` (whole weights); of stage C `official`
    (StableCascade's code) and `peft` (folders for diffusers and transformers), of Stable Diffusion `diffusers`."""

    def block_values(self, block: LoraBlockConfig) -> tuple[int, float]:
        """Return (rank, alpha) of a block."""
        rank = block.rank or self.rank
        return rank, block.alpha or self.alpha * rank / self.rank

    @model_validator(mode="after")
    def _formats_can_be_written(self) -> "LoraConfig":
        names = [block.name for block in self.blocks]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"blocks: two are named {doubled!r}")
        if self.dropout and self.kind in ("loha", "lokr"):
            raise ValueError(f"dropout {self.dropout:g} is for lora and dora; a {self.kind} has nothing to drop from")
        if "official" in self.formats:
            if self.kind != "lora":
                raise ValueError(f'formats: "official" holds LoRA only, kind is "{self.kind}"')
            if self.text_encoder is not None:
                raise ValueError('formats: "official" has no place for text_encoder adapters; use "kohya" or "peft"')
        if self.kind != "lora" and any("in_proj" in target or target == "official" for target in self.targets):
            raise ValueError(
                f'kind "{self.kind}" needs q, k and v apart to be read by other programs: set targets = ["kohya"], or '
                "patterns that name to_q, to_k, to_v"
            )
        return self


class TrainedTokenConfig(Config):
    """New words, or words that the tokenizer knows."""

    token: str | None = None
    """A new token, as captions have it: `[name]` or `<name>`."""
    initialise: str | None = None
    """Regular expression over words (`^dog</w>`): a new token starts as the mean of what it finds, else at 0."""
    existing: str | None = None
    """Regular expression over the vocabulary: train these tokens."""

    @field_validator("token")
    @classmethod
    def _is_bracketed(cls, token: str | None) -> str | None:
        if token is not None and not re.fullmatch(r"\[[^\s\[\]]+\]|<[^\s<>]+>", token):
            raise ValueError(f"must be [name] or <name> without spaces, got {token!r}")
        if token is not None and token != token.lower():
            raise ValueError(f"must be in lower case, as CLIP's tokenizer makes captions, got {token!r}")
        return token

    @field_validator("initialise", "existing")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _one_of_two(self) -> "TrainedTokenConfig":
        if (self.token is None) == (self.existing is None):
            raise ValueError("give either token (a new one) or existing (a regular expression over the vocabulary)")
        if self.initialise is not None and self.token is None:
            raise ValueError("initialise is for a new token; existing ones start as they are")
        return self


class TokensConfig(Config):
    """Train the embeddings of single tokens, as the official LoRA code's train_tokens does; all others stay."""

    train: tuple[TrainedTokenConfig, ...] = Field(min_length=1)
    """Tables of token and initialise, or existing."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; default: optimizer.learning_rate. Weight decay shrinks their change since the start."""
    only: bool = False
    """Train nothing but them."""

    @model_validator(mode="after")
    def _tokens_differ(self) -> "TokensConfig":
        names = [one.token for one in self.train if one.token is not None]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"train: {doubled!r} is there twice")
        return self


def adapter_problems(config: Any) -> list[str]:
    """Return what does not go together with [lora] and [tokens] in a RunConfig, one sentence each."""
    lora, tokens, problems = config.lora, config.tokens, []
    recipe = config.recipe
    if lora is not None:
        problems += _recipe_problems(lora, config)
    given = [] if tokens is None else [tokens.learning_rate]
    given += [] if lora is None else [block.learning_rate for block in lora.blocks]
    if config.dreambooth is not None:
        given += [recipe.text_encoder_2_learning_rate]
    if config.optimizer.name == "prodigy" and set(given) - {None, config.optimizer.learning_rate}:
        problems.append(
            'optimizer.name "prodigy" has one learning rate for all: take those of tokens, lora.blocks and '
            "text_encoder_2 out"
        )
    if tokens is not None and tokens.only and (lora is not None or recipe.train_text_encoder):
        problems.append(f"tokens.only: take [lora] and {recipe.text_key} out, they train other things")
    in_parts = config.parallel.strategy in ("fsdp2", "zero3")
    if in_parts and tokens is not None and lora is None and not tokens.only and not recipe.train_text_encoder:
        problems.append(
            f'tokens: parallel.strategy "{config.parallel.strategy}" cannot export a frozen text encoder; set '
            f"tokens.only, train adapters, or {recipe.text_key}"
        )
    if lora is not None and "merged" in lora.formats and in_parts:
        problems.append(
            f'lora.formats: "merged" needs whole weights, parallel.strategy "{config.parallel.strategy}" has parts; '
            "use `python -m training export --merged` when the run is over"
        )
    return problems


def _recipe_problems(lora: LoraConfig, config: Any) -> list[str]:
    """Return what of [lora] the recipe does not have."""
    known = _FORMATS_OF[config.recipe_name]
    problems = [
        f"lora.formats: {one!r} is not for the recipe {config.recipe_name}; choose from {', '.join(known)}"
        for one in lora.formats
        if one not in known
    ]
    if config.dreambooth is not None:
        return problems + _dreambooth_problems(lora, config.dreambooth, autocast=config.precision.autocast)
    if lora.text_encoder is not None and config.recipe.train_text_encoder:
        problems.append("lora.text_encoder and stage_c.train_text_encoder: train adapters on it, or all of it")
    if lora.base_weights == "fp16":
        problems.append('lora.base_weights "fp16" does not hold all values of stage C; set "bf16"')
    if lora.kind != "lora" and "default" in lora.targets:
        problems.append(
            f'lora.kind "{lora.kind}" needs q, k and v apart to be read by other programs; the default targets have '
            'them together: set targets = ["kohya"], or patterns that name to_q, to_k, to_v'
        )
    return problems


def _dreambooth_problems(lora: LoraConfig, recipe: Any, *, autocast: str) -> list[str]:
    """Return where [lora] disagrees with dreambooth.train, which says what gets adapters, and with autocast."""
    problems = []
    if lora.base_weights != "fp32" and autocast == "no":
        problems.append(
            f'lora.base_weights "{lora.base_weights}" needs precision.autocast: set base_weights = "fp32", or autocast'
        )
    if "diffusers" in lora.formats and lora.kind not in ("lora", "dora"):
        problems.append(f'lora.formats: "diffusers" holds LoRA and DoRA only, kind is "{lora.kind}"')
    if recipe.trained_text and lora.text_encoder is None:
        problems.append(f"dreambooth.train names {recipe.trained_text[0]}: give the table [lora.text_encoder], too")
    if lora.text_encoder is not None and not recipe.trained_text:
        problems.append("lora.text_encoder: dreambooth.train names no text encoder; add one, or take the table out")
    trained = {*recipe.train, *(part for stage in recipe.stages for part in stage.train or ())}
    if lora.blocks and "unet" not in trained:
        problems.append("lora.blocks: they are of the UNet, which dreambooth.train does not name")
    if recipe.freeze_clip_norms:
        problems.append("dreambooth.freeze_clip_norms: adapters leave all norms as they are; take it out")
    return problems
