"""The words of a concept's pictures: what an instance is trained with, and what its class images are drawn with.

`[filewords]` in a prompt is the caption beside the picture. With two tokens, such as `sks dog` and `dog`, an instance's
words have the concept's and a class image's have the class's, whatever the captions say. No torch.
"""

import re

from training.config.concepts import FILEWORDS, ConceptConfig


def instance_prompt(concept: ConceptConfig, caption: str) -> str:
    """Return what a picture of the concept is trained with. Words that have the concept's token already keep it."""
    words = concept.prompt.replace(FILEWORDS, caption)
    token, class_token = concept.token, concept.class_images.token
    if not token or not class_token or _whole(token).search(words):
        return words
    return _whole(class_token).sub(lambda _: token, words)


def class_prompt(concept: ConceptConfig, caption: str) -> str:
    """Return what a class image for a picture of the concept is drawn with.

    Without class_images.prompt, both tokens make it from the concept's own. Raises ValueError when that cannot be, and
    when it is the picture's own prompt: such images would teach that the class looks like the concept.
    """
    made, token = concept.class_images, concept.token
    where = f"concept {concept.name!r}: class_images.prompt"
    if not made.prompt and not (token and made.token):
        raise ValueError(f"{where} is empty; say what class images show, or give token and class_images.token")
    words = (made.prompt or concept.prompt).replace(FILEWORDS, caption)
    if token and made.token:
        words = _whole(token, followed_by=made.token).sub(lambda _: made.token, words)
    if words.strip() == instance_prompt(concept, caption).strip():
        raise ValueError(
            f"{where} makes {words!r} of the caption {caption!r}, which is what the picture itself is trained with: "
            "class images would pull the concept back to what the model knew; give a prompt without the concept's name"
        )
    return words


def _whole(token: str, *, followed_by: str = "") -> re.Pattern[str]:
    """Match a token where it is no part of a longer word; what stands in it is taken as it is: `saber (fate)`.

    followed_by: taken in, too, where it comes next: of `sks dog` with the token `sks`, the class's `dog`.
    """
    tail = rf"(?:\s+{re.escape(followed_by)}(?!\w))?" if followed_by else ""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w){tail}")
