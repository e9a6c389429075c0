"""The settings of a run: one run.toml. No torch.

Defaults are the safe choice (fp32 master weights, bf16 autocast); what the seed's kohya command does instead is said
by the presets. Paths are relative to the current directory.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from sharding.config import Config, Name


class DataConfig(Config):
    """What is trained, in which order."""

    workspace: Path
    """Workspace that holds chunks/."""
    chunks: tuple[str, ...] = ("combined/*",)
    """Chunk names or glob patterns (`newest/*`), in training order; a pattern gives its chunks sorted by name."""
    epochs: int = Field(1, gt=0)
    """Passes over each chunk before the next one."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = Field(4, gt=0)
    """Micro-batches each worker keeps ready."""
    horizontal_flip: bool = False
    """Mirror half of the exposures, by counted randomness. Wrong for captions that say left and right."""
    crop: Literal["centre", "random"] = "centre"
    """Where the bucket's rectangle is cut out of the resized picture."""
    max_broken_fraction: float = Field(0.01, ge=0, le=1)
    """The run stops with exit code 3 when more than this share of a chunk's images cannot be read."""


class BatchConfig(Config):
    """How images become steps. World size is not part of it."""

    batch_size: int = Field(16, gt=0)
    """Images per optimizer step over all ranks, at most; a multiple of micro_batch_size."""
    micro_batch_size: int = Field(2, gt=0)
    """Images per forward on one rank."""
    remainder: Literal["short", "merge"] = "short"
    """A bucket's left-over images become a smaller micro-batch, or join the nearest bucket."""
    merge_max_crop_loss: float = Field(0.1, ge=0, lt=1)
    """With remainder = "merge": the largest share of an image that joining another bucket may cut off."""

    @model_validator(mode="after")
    def _divides(self) -> "BatchConfig":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}: "
                "a step is made of whole micro-batches"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        """M of the design."""
        return self.batch_size // self.micro_batch_size


class BucketConfig(Config):
    """Aspect-ratio buckets."""

    family: Literal["no_upscale", "area", "ratios"] = "no_upscale"
    """kohya's bucket_no_upscale, kohya's predefined area buckets, or the official StableCascade ratio list."""
    resolution: tuple[int, int] = (1024, 1024)
    """Width and height of the full picture; their product × encode_scale² bounds a bucket's area."""
    step: int = Field(64, gt=0)
    """Bucket sides are multiples of this many pixels fed to the image encoder; a multiple of 32."""
    min_side: int = Field(256, gt=0)
    """Shortest side of the `area` family."""
    max_side: int = Field(4096, gt=0)
    """Longest side of the `area` family."""


class CaptionConfig(Config):
    """What happens to a caption each time its image is trained."""

    separator: str = ", "
    """Between tags, when splitting a caption without groups and when joining."""
    shuffle: bool = True
    """Shuffle the tags that are not kept in front."""
    keep_groups: tuple[str, ...] = ()
    """Tag groups that stay in front in this order (`aesthetic`, `quality`, …)."""
    keep_first_tags: int = Field(0, ge=0)
    """For captions without groups: this many tags stay in front."""
    never_shuffled: tuple[str, ...] = ()
    """Tags that keep their place in front when present."""
    tag_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of leaving out each tag that is not kept."""
    caption_dropout_fraction: float = Field(0.0, ge=0, lt=1)
    """Probability of training an image with an empty caption."""
    token_warmup_min: int = Field(1, gt=0)
    """Tags at global step 0, when token_warmup_steps is not 0."""
    token_warmup_steps: int = Field(0, ge=0)
    """Global steps over which the number of tags grows to all; 0 is off."""
    prefix: str = ""
    """Text before every caption, joined by a space."""
    suffix: str = ""
    """Text behind every caption, joined by a space."""


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` is the factored one of the seed: relative_step, scale_parameter and warmup_init off."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the main network."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the text encoder when it is trained; default: learning_rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's; Adafactor has its own constants (beta2 = 1 - step^-0.8, clip threshold 1)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, times the learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""


class ScheduleConfig(Config):
    """Learning rate as a pure function of the global step over the whole run."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Shape of the rate; only `constant` has no warm-up."""
    warmup_steps: int = Field(100, ge=0)
    """Steps from 0 to the peak, once per run, not once per chunk."""
    total_steps: int | None = Field(None, gt=0)
    """Horizon of `linear` and `cosine`; `python -m training plan` prints the run's number of steps."""

    @model_validator(mode="after")
    def _horizon(self) -> "ScheduleConfig":
        if self.name in ("linear", "cosine") and self.total_steps is None:
            raise ValueError(f'name "{self.name}" needs total_steps: `python -m training plan` prints the number')
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps {self.total_steps} must be greater than warmup_steps {self.warmup_steps}")
        return self


class PrecisionConfig(Config):
    """Number formats."""

    autocast: Literal["no", "bf16"] = "bf16"
    """Compute format of the trained forward; weights stay fp32."""
    exact: bool | None = None
    """Fixed-order gradient reduction and deterministic kernels: bit-equal resume. Default: on a CPU only."""
    num_threads: int | None = Field(None, gt=0)
    """Pinned CPU threads per process; default: OMP_NUM_THREADS, else 1 in exact mode."""


class SaveConfig(Config):
    """States (to go on) and weights (to use)."""

    every_steps: int = Field(256, gt=0)
    """Save a state whenever the global step is a multiple of this; one is always saved at the end of a chunk."""
    keep_states: int = Field(2, ge=1)
    """Verified states kept within a chunk; older ones are removed only after a newer one is verified."""
    keep_chunks: int = Field(2, ge=1)
    """Finished chunks whose final state is kept, so that a branch can start there."""
    asynchronous: bool = True
    """Write states in the background while training goes on; costs one copy of them in CPU memory."""
    export_every_chunks: int = Field(1, ge=0)
    """Export weights after every n-th chunk; 0 exports only on command."""
    export_dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of exported weights; values that overflow or vanish are counted."""


class Prompt(Config):
    """One preview."""

    text: str
    negative: str = ""
    width: int = Field(1024, gt=0)
    height: int = Field(1024, gt=0)
    """Pixels of the picture that the full cascade would make."""
    seed: int = Field(0, ge=0)
    steps: int = Field(20, gt=0)
    guidance: float = Field(4.0, ge=0)


class PreviewConfig(Config):
    """Pictures generated during training: fixed prompts, seeds and sizes."""

    every_steps: int = Field(0, ge=0)
    """Make previews whenever the global step is a multiple of this; 0 makes them at the end of chunks only."""
    at_chunk_end: bool = True
    """Make previews when a chunk is done."""
    prompts: tuple[Prompt, ...] = ()
    """Tables of text, negative, width, height, seed, steps, guidance."""


class TrackerConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Event files in the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """One W&B run over all launches; offline writes files to sync later."""
    wandb_project: str = "chunkline"
    """W&B's project name."""
    trace: bool = False
    """Write keys, captions, timesteps, losses and rates of every step to trace.jsonl (for proofs)."""


class StageCConfig(Config):
    """The recipe `stage_c`: Stable Cascade stage C."""

    network: str
    """Weights to start from: a .safetensors file (any layout), a diffusers folder, or a hub id."""
    text_encoder: str
    """CLIP bigG text model: a Hugging Face folder, a hub id, or a bare .safetensors file."""
    tokenizer: str = "builtin"
    """Tokenizer folder or hub id; "builtin" is CLIP's vocabulary as shipped here."""
    effnet: str
    """EfficientNet encoder (.safetensors)."""
    previewer: str | None = None
    """Previewer (.safetensors); without it there are no previews."""
    train_text_encoder: bool = False
    """Train the text encoder together with the network."""
    max_tokens: Literal[75, 150, 225] = 75
    """Of a caption, in windows of 75; what does not fit is cut, and counted in the chart `sample_mean/cut_tokens`."""
    attention_mask: bool = True
    """Mask padding in the text encoder, as diffusers and the official code do; kohya does not."""
    encode_scale: float = Field(0.75, gt=0, le=1)
    """Pixels fed to the encoder per pixel of the picture: official 3/4 (24×24 latents for 1024²), kohya 1 (32×32).
    Buckets are sizes of what the encoder sees; previews follow the same density."""
    loss_weighting: Literal["p2", "adaptive"] = "p2"
    """kohya's default, or 1 / the running loss at a sample's noise level (the official finetunes)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, less memory."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the network's blocks and attention probabilities while training."""
    preview_shift: float = Field(2.0, gt=0)
    """Noise schedule shift when sampling previews."""


class RunConfig(Config):
    """One run.toml."""

    name: Name
    """Name of the run, for people and trackers."""
    seed: int = Field(0, ge=0)
    """Of all counted randomness and the order of samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    max_skipped_steps: int = Field(10, ge=0)
    """Consecutive steps with a non-finite loss or gradient passed over before the run stops (exit code 1)."""
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    buckets: BucketConfig = BucketConfig()
    caption: CaptionConfig = CaptionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    save: SaveConfig = SaveConfig()
    preview: PreviewConfig = PreviewConfig()
    trackers: TrackerConfig = TrackerConfig()
    stage_c: StageCConfig

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        if self.buckets.step % 32:
            raise ValueError(f"buckets.step {self.buckets.step} must be a multiple of 32, the encoder's stride")
        if self.preview.prompts and self.stage_c.previewer is None:
            raise ValueError("preview.prompts are given, but stage_c.previewer is not: no picture can be made")
        return self


FREE_KEYS = frozenset(
    {
        "data.workspace", "data.chunks", "data.workers", "data.prefetch", "data.max_broken_fraction", "device",
        "max_skipped_steps", "precision.num_threads",
        "save.every_steps", "save.keep_states", "save.keep_chunks", "save.asynchronous", "save.export_every_chunks",
        "save.export_dtype", "preview.every_steps", "preview.at_chunk_end", "preview.prompts", "trackers.tensorboard",
        "trackers.wandb", "trackers.wandb_project", "trackers.trace", "stage_c.previewer", "stage_c.network",
        "stage_c.text_encoder", "stage_c.tokenizer", "stage_c.effnet", "stage_c.preview_shift",
        "stage_c.gradient_checkpointing",
    }
)  # fmt: skip
"""Keys that may differ between launches of one run: they change speed, places or what is kept, not what is trained.
Weights may be moved: those of trained parts come from the state (the file only gives the shapes), and frozen ones must
hold the same values as at the first launch (run.json, frozen_weights)."""
