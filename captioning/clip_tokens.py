"""Lengths of words in tokens of a CLIP text encoder, each word counted once. No torch; needs the package `tokenizers`.

CLIP splits a text at spaces before anything else, and a comma sticks to the word before it. So the length of a caption
is the sum of its words' lengths with a comma behind, the last one without. Begin and end token are not counted.
"""

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captioning.plugin import ModelError
from captioning.words import Column, Ids, Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VOCABULARY_SIZE = 49_408
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# Source: openai/CLIP simple_tokenizer: what never joins in one token.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TokenCounter:
    """Counts the tokens of words; remembers them by number."""

    def __init__(self, tokenizer: "Tokenizer", words: Words) -> None:
        self._tokenizer, self._words = tokenizer, words
        self._with_comma, self._alone = Column(), Column()

    def of(self, words: Words) -> "TokenCounter":
        """Return a counter of other words with the same tokenizer."""
        return TokenCounter(self._tokenizer, words)

    def counts(self) -> tuple[Ids, Ids]:
        """Return for all words, by number, the tokens of the word with a comma behind, and alone."""
        new = self._words.texts()[len(self._alone) :].to_pylist()
        for column, ending in ((self._with_comma, ","), (self._alone, "")):
            for encoding in self._tokenizer.encode_batch([text + ending for text in new], add_special_tokens=False):
                column.append(len(encoding.ids))
        return self._with_comma.array(), self._alone.array()


def load_counter(tokenizer: str, words: Words) -> TokenCounter:
    """Return a counter of words by a vocabulary file of OpenAI's, a folder of tokenizer files, or a hub id.

    Raises ModelError when there is no such file, folder or id, FileNotFoundError for a folder without the files.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModelError("tokens.max_tokens needs the package tokenizers: pip install -e '.[caption]'") from None
    path = Path(tokenizer)
    if path.is_file():
        return TokenCounter(_from_merges(_read_merges(path)), words)
    if (path / "tokenizer.json").is_file():
        return TokenCounter(Tokenizer.from_file(str(path / "tokenizer.json")), words)
    if (path / "merges.txt").is_file() and (path / "vocab.json").is_file():
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#v")]
        return TokenCounter(_from_merges(merges, vocabulary), words)
    if path.is_dir():
        raise FileNotFoundError(f"{path}: has neither tokenizer.json nor vocab.json with merges.txt")
    if tokenizer.count("/") != 1 or path.suffix in (".gz", ".json", ".txt"):
        raise ModelError(f"tokens.tokenizer: {tokenizer!r} is no file, no folder and no hub id")
    try:
        return TokenCounter(Tokenizer.from_pretrained(tokenizer), words)
    except Exception as error:  # the package raises plain Exception for everything
        raise ModelError(f"tokens.tokenizer: {tokenizer!r}: {error}") from error


def _read_merges(path: Path) -> list[str]:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").split("\n")
    # A heading, then the merges; the file holds more than CLIP uses.
    return lines[1 : _VOCABULARY_SIZE - 2 * 256 - len(_SPECIAL_TOKENS) + 1]


def _from_merges(merges: list[str], vocabulary: dict[str, int] | None = None) -> "Tokenizer":
    """Return CLIP's tokenizer. Source: Radford et al., "Learning Transferable Visual Models", 2021 (byte level BPE)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    if vocabulary is None:
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(left + right for left, right in pairs)]
        vocabulary = {token: number for number, token in enumerate([*tokens, *_SPECIAL_TOKENS])}
    model = models.BPE(
        vocab=vocabulary, merges=pairs, unk_token="<|endoftext|>", end_of_word_suffix="</w>", fuse_unk=False
    )
    built = Tokenizer(model)
    built.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return built


def keep_ranks(groups: tuple[str, ...], cut_first: tuple[str, ...]) -> Ids:
    """Return a rank per group; the highest is cut first. Groups not in `cut_first` go after those, the last first."""
    order = [*(group for group in groups if group not in cut_first), *reversed(cut_first)]
    return np.array([order.index(group) for group in groups], dtype=np.int64)
