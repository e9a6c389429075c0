"""Captioners on tiny models in the real formats: what they are asked, what is stored, what does not change it."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from captioning.annotate import annotate
from captioning.captioners import hf
from captioning.captioners.base import clean_text
from captioning.plugin import MissingExtraError, ModelError
from captioning.torch_models import quiet_transformers
from sharding import images
from sharding.config import ConfigError
from sharding.tables import part_metadata, part_name, read_part

PROMPTS = {"blip": "", "git": "", "llava": "<image> describe", "llava_chat": "describe", "florence2": "describe this"}


@pytest.fixture(scope="session")
def captioners(tmp_path_factory):
    """One folder for each kind of model, by name."""
    for library in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(library)
    from scripts.demo_models.captioners import MAKERS

    root = tmp_path_factory.mktemp("captioners")
    return {name: make(root / name) for name, make in MAKERS.items()}


def table(captioners, name, **values):
    base = {"kind": "captioner", "model": str(captioners[name]), "prompt": PROMPTS.get(name, "")}
    return base | {"max_new_tokens": 6, "max_pixels": 2500, "cleaning": "none"} | values


@pytest.mark.parametrize("name", PROMPTS)
def test_the_text_is_what_transformers_says_by_itself(lab, captioners, name):
    import torch

    (row,) = lab.save(lab.png(80, 60, seed=3))
    lab.keep([row])

    annotate(lab.annotate_config({"text": table(captioners, name)}, max_broken_fraction=1), lab.workspace)

    with quiet_transformers() as transformers:
        processor = transformers.AutoProcessor.from_pretrained(captioners[name], backend="pil")
        model = transformers.AutoModelForImageTextToText.from_pretrained(captioners[name]).eval()
    image = images.decode_rgb((lab.pictures / row["path"]).read_bytes())
    if not name.startswith(("blip", "florence")):  # their processors squash; the others get max_pixels
        image = image.resize((57, 43), Image.Resampling.BICUBIC)
    text = {"llava_chat": "user: <image> describebot:"}.get(name, PROMPTS[name])
    inputs = processor(images=image, return_tensors="pt", **({"text": text} if text else {}))
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    if name.startswith("llava"):
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    expected = " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
    assert (lab.rows("text")[row["key"]]["text"] or "") == expected
    assert lab.rows("text")[row["key"]]["prompt"] == PROMPTS[name]


QWEN = {"prompt": "<|vision_start|><|image_pad|><|vision_end|> describe"}


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_of_videos_says_that_it_needs_torchvision(captioners):
    with pytest.raises(MissingExtraError, match=r"torchvision is not installed: .*\[caption,cpu,video\]"):
        hf.load(hf.Settings(**table(captioners, "qwen2_vl", **QWEN)), device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_qwen2_vl_sees_pictures_that_pillow_resized(captioners):
    model = hf.load(hf.Settings(**table(captioners, "qwen2_vl", **QWEN)), device="cpu")

    rows = model.describe([np.full((50, 40, 3), 90, np.uint8)] * 2, [QWEN["prompt"]] * 2, ["a", "b"])

    assert type(model._processor.image_processor).__name__.endswith("Pil")
    assert rows[0] == rows[1] and rows[0]["text"] and "vision" not in rows[0]["text"]


def test_another_library_that_is_missing_is_not_taken_for_an_unknown_model(captioners, monkeypatch):
    def read(*arguments, **options):
        raise ImportError("requires the sentencepiece library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", read)

    with pytest.raises(ModelError, match=r"needs a library for it that is not installed \(requires the sentencep"):
        hf.load(hf.Settings(**table(captioners, "blip")), device="cpu")


def test_an_answer_is_as_long_as_asked_for(captioners):
    def num_words(**values):
        model = hf.load(hf.Settings(**table(captioners, "git", max_new_tokens=40, **values)), device="cpu")
        texts = [model.describe([np.full((40, 40, 3), 30 * n, np.uint8)], [""], ["k"])[0]["text"] for n in range(8)]
        return min(len((text or "").split()) for text in texts)

    assert num_words(min_new_tokens=40) > num_words()


def test_hints_of_a_record_stand_in_the_prompt_and_new_ones_ask_again(lab, captioners):
    rows = lab.save(lab.png(64, 64, seed=1), lab.png(65, 64, seed=2))
    rows[0] |= {
        "tags_general": ["red_umbrella", "<|>_<|>", "rain"],
        "tags_character": ["asuka_(eva)"],
        "rating": "general",
    }
    lab.keep(rows)
    ask = {"prompt": "<image> {characters}: {tags}, {rating}", "hints": "record", "prompt_without_hints": "<image>"}
    config = lab.annotate_config({"text": table(captioners, "llava", **ask, most_hints=2)})

    annotate(config, lab.workspace)
    prompts = [row["prompt"] for row in lab.rows("text").values()]
    rows[1] |= {"rating": "explicit"}
    lab.keep(rows)
    again = annotate(config, lab.workspace)

    assert prompts == ["<image> asuka (eva): red umbrella, <|>_<|>, general", "<image>"]
    assert (again.num_images, again.num_rows_reused) == (1, {"text": 1})
    assert [row["prompt"] for row in lab.rows("text").values()] == [prompts[0], "<image> : , explicit"]


def test_hints_of_a_tagger_need_no_second_decode(lab, captioners, model_tables, monkeypatch):
    lab.keep(lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(5))))
    ask = {"prompt": "<image> {tags}", "hints": "wd", "hint_threshold": 0.2}
    # Named first, so that it has to wait for the tagger, whose batches are larger.
    tables = {"text": table(captioners, "llava", **ask), "wd": model_tables["wd"]}
    config = lab.annotate_config(tables)

    report = annotate(config, lab.workspace)
    together = lab.rows("text")
    (lab.workspace.annotations("text") / part_name(0)).unlink()
    annotate(config, lab.workspace, models=["text"])

    assert report.num_decodes == 5 and report.num_rows == {"text": 5, "wd": 5}
    assert lab.rows("text") == together
    assert len({row["prompt"] for row in together.values()}) > 1
    (lab.workspace.annotations("wd") / part_name(0)).unlink()
    (lab.workspace.annotations("text") / part_name(0)).unlink()
    with pytest.raises(ConfigError, match=r"not every image has a row of 'wd'.* add wd to --models"):
        annotate(config, lab.workspace, models=["text"])


def test_another_floor_of_the_tagger_asks_again(lab, captioners, model_tables):
    lab.keep(lab.save(lab.png(60, 60)))
    tables = {"wd": model_tables["wd"], "text": table(captioners, "llava", prompt="<image> {tags}", hints="wd")}
    annotate(lab.annotate_config(tables), lab.workspace)

    report = annotate(lab.annotate_config(tables | {"wd": model_tables["wd"] | {"floor": 0.3}}), lab.workspace)

    assert report.num_rows == {"wd": 1, "text": 1}


def test_a_sampled_answer_depends_on_seed_and_key_alone(captioners):
    settings = hf.Settings(**table(captioners, "llava", sample=True, temperature=2.0))
    model = hf.load(settings, device="cpu")
    pixels = [np.full((40, 40, 3), 90 * n, np.uint8) for n in range(3)]
    asked = [settings.prompt] * 3

    together = model.describe(pixels, asked, ["a", "b", "c"])
    alone = [model.describe([it], asked[:1], [key])[0] for it, key in zip(pixels, "abc", strict=True)]
    same_picture = model.describe([pixels[0]] * 3, asked, ["a", "b", "c"])

    assert together == alone
    assert len({row["text"] for row in same_picture}) > 1


def test_settings_that_change_the_text_change_the_digest(captioners):
    def digest(**values):
        return hf.identify(hf.Settings(**table(captioners, "llava", **values))).digest

    assert digest() == digest(seed=7)  # not read without chance
    for values in (
        {"prompt": "<image> x"},
        {"max_new_tokens": 7},
        {"min_new_tokens": 2},
        {"num_beams": 2},
        {"cleaning": "sentences/1"},
    ):
        assert digest(**values) != digest(), values
    assert digest(sample=True, seed=7) != digest(sample=True)


def test_rules_and_model_are_stored_with_the_part(lab, captioners):
    lab.keep(lab.save(lab.png(60, 60)))

    annotate(lab.annotate_config({"text": table(captioners, "blip", licence="BSD-3")}), lab.workspace)

    facts = part_metadata(lab.workspace.annotations("text") / part_name(0))
    assert facts["licence"] == "BSD-3" and facts["revision"].startswith("sha256:")
    assert facts["preprocessing"] == "captioner/1 cleaning none"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Sure! Here's a detailed caption: A girl in the rain.", "A girl in the rain."),
        ("describe this: A red umbrella", "A red umbrella"),
        ("A girl. She smiles. She smiles. She smiles and then she", "A girl. She smiles."),
        ("a girl with with with with red hair", "a girl with red hair"),
        ("a cat, a cat, a cat, a cat", "a cat"),
        ("very very good", "very very good"),
        ("A sign reads 1.5 m. I'm sorry, I cannot name her.", "A sign reads 1.5 m."),
        ("  two\nlines ", "two lines"),
        ('"A girl."', "A girl."),
        ("As an AI I see nothing.", ""),
        ("", ""),
    ],
)
def test_cleaning_takes_out_what_does_not_speak_of_the_picture(raw, cleaned):
    assert clean_text(raw, prompt="Describe this") == cleaned
    assert clean_text(cleaned) == cleaned


def test_an_answer_of_which_nothing_is_left_is_no_text_and_not_broken_by_itself(lab, captioners, monkeypatch):
    monkeypatch.setattr(hf.HfCaptioner, "_generate", lambda self, images, prompts, seed=0: ["Sure!"] * len(images))
    lab.keep(lab.save(lab.png(60, 60)))

    report = annotate(lab.annotate_config({"text": table(captioners, "blip", cleaning="sentences/1")}), lab.workspace)

    assert report.without_result == {"no_text": 1}
    assert [row["text"] for row in lab.rows("text").values()] == [None]


def test_mistakes_are_named(lab, captioners, model_tables, demo_models):
    lab.keep(lab.save(lab.png(60, 60)))
    with pytest.raises(ValueError, match="hints and prompt: give both"):
        lab.annotate_config({"text": table(captioners, "llava", prompt="{tags}")})
    with pytest.raises(ValueError, match="sample and num_beams"):
        lab.annotate_config({"text": table(captioners, "llava", sample=True, num_beams=2)})
    with pytest.raises(ConfigError, match=r"text\.hints: 'other' is no tagger of annotate\.models; known: record, wd"):
        tables = {"text": table(captioners, "llava", prompt="<image> {tags}", hints="other"), "wd": model_tables["wd"]}
        annotate(lab.annotate_config(tables), lab.workspace)
    with pytest.raises(ModelError, match="does not take the prompt 'no image here'"):
        annotate(lab.annotate_config({"text": table(captioners, "llava", prompt="no image here")}), lab.workspace)
    with pytest.raises(ModelError, match=r"annotate\.models\.text: .* not an image-text-to-text model"):
        tables = {"text": table({"llava": demo_models["clip"]}, "llava")}
        annotate(lab.annotate_config(tables), lab.workspace)


# --- in captions ---


def texts_of(lab, captioners, sentences, rows):
    """Annotate and compose pictures that have the tag rain, and return what was said and the captions by key."""
    from captioning.compose import compose

    for row in rows:
        row["tags_general"] = ["rain"]
    lab.keep(rows)
    policies = {"default": {"groups": ["rest"], "sentences": {"captioner": "text", **sentences}}}
    config = lab.annotate_config({"text": table(captioners, "llava")}, policies=policies)
    annotate(config, lab.workspace)
    compose(config, lab.workspace, policy="default")
    said = {key: row["text"] for key, row in lab.rows("text").items()}
    return said, dict(zip(said, lab.texts(), strict=True))


@pytest.mark.parametrize(("use", "pattern"), [("appended", "rain, {}"), ("alone", "{}")])
def test_sentences_stand_behind_the_tags_or_alone(lab, captioners, use, pattern):
    said, captions = texts_of(lab, captioners, {"use": use}, lab.save(lab.png(64, 64), lab.png(65, 64)))

    assert captions == {key: pattern.format(text) for key, text in said.items()}
    path = lab.workspace.captions("default") / part_name(0)
    groups = [[group["group"] for group in row] for row in read_part(path).column("groups").to_pylist()]
    assert groups == [["rest", "sentence"] if use == "appended" else ["sentence"]] * 2


def test_mixed_sentences_depend_on_seed_and_key_alone(lab, captioners):
    rows = lab.save(*(lab.png(60 + n, 60, seed=n) for n in range(12)))
    said, captions = texts_of(lab, captioners, {"use": "mixed", "ratio": 0.5, "seed": 1}, rows)

    _, of_half = texts_of(lab, captioners, {"use": "mixed", "ratio": 0.5, "seed": 1}, rows[6:])
    _, other = texts_of(lab, captioners, {"use": "mixed", "ratio": 0.5, "seed": 2}, rows)

    assert all(caption in ("rain", said[key]) for key, caption in captions.items())
    assert set(captions.values()) & {"rain"} and len(set(captions.values())) > 1
    assert all(captions[key] == caption for key, caption in of_half.items())
    assert other != captions


def test_a_picture_without_sentences_keeps_its_tags(lab, captioners):
    rows = lab.save(lab.png(64, 64), b"no image")

    _, captions = texts_of(lab, captioners, {"use": "alone"}, rows)

    assert captions[rows[1]["key"]] == "rain" != captions[rows[0]["key"]]


def test_a_policy_names_a_captioner_and_a_tier_does_not(lab, captioners):
    models = {"text": table(captioners, "blip")}
    with pytest.raises(ValueError, match=r"sentences\.captioner: 'date' is no captioner of annotate\.models: text"):
        policy = {"groups": ["rest"], "sentences": {"captioner": "date"}}
        lab.annotate_config(models | {"date": {"kind": "date"}}, policies={"default": policy})
    with pytest.raises(ValueError, match="'text' is no scorer"):
        tier = {"model": "text", "comparison": ">", "steps": [[0.5, "good"]]}
        lab.annotate_config(models, policies={"default": {"groups": ["light"], "tiers": {"light": tier}}})
