"""The real CLIP vocabulary, shipped with the package, as tokenizer files that transformers 4 and 5 both read.

No network and no transformers import here. Licence of the vocabulary: clip_bpe/LICENSE.txt.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

BPE_FILE = Path(__file__).parent / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49_408
NUM_MERGES = VOCABULARY_SIZE - 2 * 256 - 2
BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in vocabulary order.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (byte level BPE): printable
    bytes stand for themselves and come first, the others follow as the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def read_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return token -> id (49,408 entries) and the merges as "left right" lines, most frequent first."""
    with gzip.open(BPE_FILE, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : NUM_MERGES + 1]
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge.split()) for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, BOS_TOKEN, EOS_TOKEN])}, merges


def write_tokenizer_files(folder: Path) -> None:
    """Write vocab.json, merges.txt and the two config files of a CLIP tokenizer into folder; same bytes every time."""
    vocabulary, merges = read_vocabulary()
    write_slow_tokenizer_files(folder, vocabulary, merges, {})
    special = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": EOS_TOKEN, "unk_token": EOS_TOKEN}
    config = {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def write_slow_tokenizer_files(
    folder: Path, vocabulary: Mapping[str, int], merges: Sequence[str | Sequence[str]], added: Mapping[str, int]
) -> None:
    """Write vocab.json and merges.txt, which transformers 4 asks for, and added_tokens.json where tokens were added.

    merges: "left right", or pairs. added: token -> id; those that are in the vocabulary are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    if new := {token: number for token, number in added.items() if token not in vocabulary}:
        (folder / "added_tokens.json").write_text(json.dumps(new, ensure_ascii=False, indent=2), encoding="utf-8")
