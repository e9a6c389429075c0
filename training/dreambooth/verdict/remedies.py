"""What to do about a reading: the wiki's remedies, as `--set` lines where they are one setting.

Where the wiki contradicts common practice (it would have the learning rate raised against over-training, and lowered
against under-training), that is said, and no `--set` is given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from training.config import RunConfig
from training.config.dreambooth import DreamBoothConfig
from training.dreambooth.verdict.rule import Word

MORE_EPOCHS = 20
LEAST_EPOCHS = 51
USUAL_PRIOR_WEIGHT = 0.75


@dataclass(frozen=True)
class Remedy:
    """One thing to try. setting: for `--set`, "" where it is no single setting; run: which one it is for."""

    text: str
    setting: str = ""
    run: Literal["this", "new", ""] = ""

    def __str__(self) -> str:
        where = {"this": " (this run goes on)", "new": " (in a new run)", "": ""}[self.run]
        return f"{self.text}: --set '{self.setting}'{where}" if self.setting else f"{self.text}{where}"


def remedies(word: Word, *, config: RunConfig, best_epochs: int | None, has_class_images: bool) -> tuple[Remedy, ...]:
    """Return what to try, the most useful first.

    config: the run's, not a stage's. best_epochs: trained at the best state; None where none is known.
    """
    recipe = config.dreambooth
    if recipe is None or word in ("good", "unknown"):
        return ()
    if word == "over":
        return tuple(_against_over(config, recipe, best_epochs, has_class_images))
    return tuple(_against_under(config, recipe))


def _against_over(
    config: RunConfig, recipe: DreamBoothConfig, best_epochs: int | None, has_class_images: bool
) -> Iterator[Remedy]:
    yield Remedy("use the best state that was kept, not the last one")
    epochs = config.data.epochs
    fewer = best_epochs if best_epochs and best_epochs < epochs else max(epochs * 3 // 4, 1)
    if recipe.stages:
        yield Remedy("fewer epochs in the last of [[dreambooth.stages]]", run="new")
    elif fewer < epochs:
        yield Remedy("fewer epochs (wiki: less than 100)", f"data.epochs={fewer}", "new")
    if not has_class_images:
        yield Remedy("class images, 2 to 10 per picture: class_images.images_per_image of the concept", run="new")
    elif recipe.prior_weight < USUAL_PRIOR_WEIGHT:
        yield Remedy("a higher weight of class images", f"dreambooth.prior_weight={USUAL_PRIOR_WEIGHT}", "new")
    if recipe.trained_text and not recipe.stages:
        ratio = round(recipe.text_encoder_ratio / 2, 2)
        yield Remedy("train the text encoder for fewer epochs", f"dreambooth.text_encoder_ratio={ratio:g}", "new")
    yield Remedy("at most 8 tags in a caption (wiki)", run="new")
    yield Remedy(
        "the wiki says: raise the learning rate. Common practice (diffusers' DreamBooth report) is the opposite, a "
        "lower rate or an earlier state; nothing is proposed"
    )


def _against_under(config: RunConfig, recipe: DreamBoothConfig) -> Iterator[Remedy]:
    more = max(config.data.epochs + MORE_EPOCHS, LEAST_EPOCHS)
    if recipe.stages:
        yield Remedy(f"{MORE_EPOCHS} more epochs in the last of [[dreambooth.stages]] (wiki)", run="new")
    else:
        yield Remedy(f"{MORE_EPOCHS} more epochs, and more than 50 (wiki)", f"data.epochs={more}", "this")
    if not recipe.trained_text:
        yield Remedy("train the text encoder, too", 'dreambooth.train=["unet", "text_encoder"]', "new")
    elif recipe.text_encoder_ratio < 1 and not recipe.stages:
        yield Remedy("train the text encoder for longer", "dreambooth.text_encoder_ratio=1.0", "new")
    yield Remedy(
        "the wiki says: lower the learning rate. Common practice is the opposite, a higher rate or more steps; nothing "
        "is proposed"
    )
