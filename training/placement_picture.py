"""Show what becomes of one picture: source → resize → crop → bucket, as text and as a PNG (`plan --image FILE`)."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from sharding.files import replacing
from sharding.images import decode_rgb
from training.buckets import BucketError, BucketSettings
from training.config import RunConfig
from training.latent_sizes import latent_size
from training.plans import bucket_settings
from training.showings import Fit, fit

_DARK, _FRAME, _GAP = 0.3, (255, 64, 64), 16


@dataclass(frozen=True)
class PlacedPicture:
    """A picture's way into its bucket, in pixels; offsets are those of the centre crop."""

    path: Path
    width: int
    height: int
    """As stored, upright."""
    fit: Fit
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the crop in the resized picture."""
        bucket = self.fit.placement.bucket
        return self.left, self.top, self.left + bucket.width, self.top + bucket.height


def place_picture(path: Path, image: Image.Image, settings: BucketSettings) -> PlacedPicture:
    """Return how an upright picture gets into its bucket. Raises BucketError when it has none."""
    found = fit(image.width, image.height, settings)
    placed = found.placement
    spare = (placed.resized_width - placed.bucket.width, placed.resized_height - placed.bucket.height)
    return PlacedPicture(path, image.width, image.height, found, spare[0] // 2, spare[1] // 2)


def image_text(config: RunConfig, path: Path, *, output: Path | None = None) -> str:
    """Return what a run makes of a picture, and write a PNG of it to `output` when one is given.

    Raises FileNotFoundError, ImageError for a file that cannot be decoded, BucketError for a picture without a bucket.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    image = decode_rgb(path.read_bytes())
    settings = bucket_settings(config)
    try:
        picture = place_picture(path, image, settings)
    except BucketError as error:
        raise BucketError(
            error.reason, f"{path} ({image.width}x{image.height}) has no bucket: {error.detail}"
        ) from None
    if output is not None:
        with replacing(output) as temporary:
            draw_placement(picture, image).save(temporary, "PNG")
    return _text(picture, settings, config=config) + (f"\npicture  {output}" if output is not None else "")


def draw_placement(picture: PlacedPicture, image: Image.Image) -> Image.Image:
    """Return the resized picture with what is cut off darkened, and beside it the bucket as it is trained."""
    # The loader has the same filter; importing it from there would cost torch.
    placed = picture.fit.placement
    resized = image.resize((placed.resized_width, placed.resized_height), Image.Resampling.HAMMING)
    cropped = resized.crop(picture.box)
    shown = Image.eval(resized, lambda value: int(value * _DARK))
    shown.paste(cropped, picture.box[:2])
    left, top, right, bottom = picture.box
    ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline=_FRAME, width=2)
    canvas = Image.new("RGB", (shown.width + _GAP + cropped.width, shown.height), "white")
    canvas.paste(shown, (0, 0))
    canvas.paste(cropped, (shown.width + _GAP, top))
    return canvas


def _text(picture: PlacedPicture, settings: BucketSettings, *, config: RunConfig) -> str:
    placed, bucket = picture.fit.placement, picture.fit.placement.bucket
    spare = (placed.resized_width - bucket.width, placed.resized_height - bucket.height)
    factor = max(placed.resized_width / picture.width, placed.resized_height / picture.height)
    crop = config.data.crop
    moves = f"; data.crop {crop} moves it within 0–{spare[0]},0–{spare[1]}" if crop != "centre" and any(spare) else ""
    lines = [
        f"source   {picture.width}x{picture.height}  {picture.path}",
        f"resize   {placed.resized_width}x{placed.resized_height}  × {factor:.3f}"
        + " (encode_scale included)" * (settings.source_scale < 1)
        + ": the picture is enlarged" * (factor > 1),
        f"crop     {bucket} at {picture.left},{picture.top}, {placed.crop_loss_fraction:.1%} cut off{moves}",
        f"bucket   {bucket}  ratio {bucket.width / bucket.height:.3f}, the picture's"
        f" {picture.width / picture.height:.3f}; latent {latent_size(bucket, config)}; family {settings.family}",
    ]
    return "\n".join(lines)
