"""Tiny captioners with random weights, saved in the real formats: BLIP, GIT, Llava, Florence-2, Qwen2-VL.

They know twenty words and say them in no order: for tests of how captioners are asked, never of what they say.
"""

import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

WORDS = ["a", "girl", "stands", "in", "the", "rain", "with", "red", "umbrella", "describe", "this", "picture", "tags"]
_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
_CHAT = (
    "{% for m in messages %}user: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def tokenizer(*special: str, **options: Any) -> Any:
    """Return a tokenizer of whole words and single letters; <pad> 0, <s> 1, </s> 2, then the special ones."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *special]
    vocabulary = {word: n for n, word in enumerate([*names, *WORDS, *string.ascii_letters[1:], *",.:!?'<>_"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(special), **options,
    )  # fmt: skip


def blip(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[DEC]", "[ENC]", *WORDS, ".", ","])
    )
    words = transformers.BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    images = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}, **_MEAN)
    config = transformers.BlipConfig(
        text_config={
            **_TEXT, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 5, "pad_token_id": 0,
            "eos_token_id": 2, "sep_token_id": 2, "is_decoder": True,
        },
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )  # fmt: skip
    return _save(transformers.BlipForConditionalGeneration, config, transformers.BlipProcessor(images, words), folder)


def git(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS, ".", ","]))
    words = transformers.BertTokenizer(str(folder / "vocab.txt"))
    config = transformers.GitConfig(
        vision_config=_clip_vision().to_dict(), vocab_size=len(words), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return _save(transformers.GitForCausalLM, config, transformers.GitProcessor(_clip_images(), words), folder)


def llava(folder: Path, *, chat_template: str | None = None) -> Path:
    words = tokenizer("<image>")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT, vocab_size=len(words), pad_token_id=0),
        vision_config=_clip_vision(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    processor = transformers.LlavaProcessor(
        _clip_images(),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return _save(transformers.LlavaForConditionalGeneration, config, processor, folder)


def llava_chat(folder: Path) -> Path:
    """Write a Llava whose processor has a chat template."""
    return llava(folder, chat_template=_CHAT)


def florence2(folder: Path) -> Path:
    words = tokenizer("<image>", *(f"<loc_{n}>" for n in range(10)), extra_special_tokens={"image_token": "<image>"})
    images = transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, resample=3, **_MEAN
    )
    images.image_seq_length = 5
    config = transformers.Florence2Config(
        text_config=transformers.BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=len(words), max_position_embeddings=256, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        ),
        vision_config={
            "embed_dim": [8, 16], "num_heads": [1, 2], "num_groups": [1, 2], "depths": [1, 1], "patch_size": [7, 3],
            "patch_stride": [8, 4], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
            "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 8,
        },
        image_token_id=words.image_token_id,
    )  # fmt: skip
    processor = transformers.Florence2Processor(images, words)
    return _save(transformers.Florence2ForConditionalGeneration, config, processor, folder)


def qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL with the files of the published ones, but for the chat template; loading it takes torchvision.

    Its processor is read from them: it cannot be made without torchvision.
    """
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = words.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config={
            **_TEXT, "vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    words.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    return _save(transformers.Qwen2VLForConditionalGeneration, config, images, folder)


MAKERS = {
    "blip": blip, "git": git, "llava": llava, "llava_chat": llava_chat, "florence2": florence2, "qwen2_vl": qwen2_vl,
}  # fmt: skip


def _clip_images() -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **_MEAN
    )


def _clip_vision() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )


def _save(kind: Any, config: Any, processor: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # so that pictures differ
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
