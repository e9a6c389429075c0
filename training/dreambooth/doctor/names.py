"""Into how many pieces CLIP cuts words, without torch: with the vocabulary that comes with the package."""

from functools import lru_cache
from typing import Any

from training.stage_c.clip_vocabulary import read_vocabulary

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def pieces_of(text: str) -> list[str]:
    """Return the pieces, `</w>` at the end of words."""
    return list(_tokenizer().encode(text).tokens)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary, lines = read_vocabulary()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def shared_pieces(one: str, other: str) -> list[str]:
    """Return the pieces at which two names begin alike."""
    shared = []
    for left, right in zip(pieces_of(one), pieces_of(other), strict=False):
        if left != right:
            break
        shared.append(left)
    return shared
