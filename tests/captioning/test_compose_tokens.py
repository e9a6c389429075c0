"""Lengths in CLIP tokens: the real vocabulary, cutting by weight of groups, what is told of it."""

from pathlib import Path

import pyarrow as pa
import pytest

from captioning.clip_tokens import keep_ranks, load_counter
from captioning.compose import compose
from captioning.edit_operations import add_tags, remove_tags
from captioning.edits import edit_captions
from captioning.plugin import ModelError
from captioning.policy import TokensConfig
from captioning.policy_diff import diff_policies
from captioning.words import Words
from sharding import schema
from sharding.tables import part_name, write_part

VOCABULARY = Path(__file__).parents[2] / TokensConfig().tokenizer
TEXTS = ["1girl", "long hair", "^_^", "<|>_<|>", "don't", "star (sky)", "初音ミク", "é!", "year 2021", "a", "!!"]


@pytest.fixture(autouse=True)
def _needs_tokenizers():
    pytest.importorskip("tokenizers")


def length(text):
    """Tokens of a text, as if it were one word."""
    words = Words()
    words.number(text)
    return int(load_counter(str(VOCABULARY), words).counts()[1].sum())


def config_of(lab, records, *, max_tokens, **rules):
    lab.keep(records)
    tokens = {"max_tokens": max_tokens, "tokenizer": str(VOCABULARY)}
    policy = {"groups": ["character", "series", "rest"], "tokens": tokens} | rules
    talk = {"kind": "captioner", "model": "unused"}
    return lab.config(policies={"default": policy}, annotate={"models": {"talk": talk}})


def write_texts(lab, model, texts):
    rows = [{"key": key, "text": text or None, "status": "ok" if text else "no_text"} for key, text in texts.items()]
    path = lab.workspace.annotations(model) / part_name(0)
    write_part(path, pa.Table.from_pylist(rows, schema=schema.TEXTS), made_from="talk")


def capped(lab, records, *, max_tokens, **values):
    lab.keep(records)
    policy = {
        "groups": ["character", "series", "rest"],
        "tokens": {"max_tokens": max_tokens, "tokenizer": str(VOCABULARY)} | values,
    }
    report = compose(lab.config(policies={"default": policy}), lab.workspace, policy="default")
    return lab.texts(), report


def test_counts_are_those_of_transformers_for_words_and_whole_captions(tmp_path):
    transformers = pytest.importorskip("transformers")
    from training.stage_c.clip_vocabulary import write_tokenizer_files

    write_tokenizer_files(tmp_path)
    peer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    words = Words()
    numbers = [words.number(text) for text in TEXTS]

    with_comma, alone = load_counter(str(VOCABULARY), words).counts()
    of_folder = load_counter(str(tmp_path), words).counts()

    assert [len(peer(text, add_special_tokens=False).input_ids) for text in TEXTS] == alone[numbers].tolist()
    whole = len(peer(", ".join(TEXTS), add_special_tokens=False).input_ids)
    assert with_comma[numbers[:-1]].sum() + alone[numbers[-1]] == whole
    assert [it.tolist() for it in of_folder] == [with_comma.tolist(), alone.tolist()]


def test_the_last_words_of_the_least_groups_are_cut(lab):
    # One token each, and one for each comma: red, blue, sky, rin, fate.
    record = lab.record("a", tags_general=["red", "blue", "sky"], tags_character=["rin"], tags_copyright=["fate"])
    other = lab.record("b", tags_general=["red"])

    by_order, report = capped(lab, [record, other], max_tokens=7)
    by_choice, _ = capped(lab, [record, other], max_tokens=7, cut_first=["series", "character"])
    exact, told = capped(lab, [record, other], max_tokens=9)

    assert by_order == ["rin, fate, red, blue", "red"]
    assert by_choice == ["rin, red, blue, sky", "red"]
    assert exact[0] == "rin, fate, red, blue, sky" and told.num_cut == 0
    assert (report.num_cut, report.cut) == (1, {("rest", "sky"): 1})
    assert "cut to tokens.max_tokens: 1\n    of rest 1 words: sky (1)" in report.summary()


def test_every_caption_fits_and_is_as_long_as_it_can_be(lab):
    words = ["star_(sky)", "very_long_hair", "^_^", "looking_at_viewer", "upper_body", "o_o", "solo"]
    records = [lab.record(f"k{n}", tags_general=words[n:] + words[:n]) for n in range(4)]

    full, _ = capped(lab, records, max_tokens=200)
    for limit in (1, 12):
        texts, _ = capped(lab, records, max_tokens=limit)
        for text, whole in zip(texts, full, strict=True):
            parts = text.split(", ") if text else []
            longer = ", ".join(whole.split(", ")[: len(parts) + 1])
            assert whole.startswith(text) and length(text) <= limit < length(longer)


def test_of_an_edited_caption_what_was_added_is_cut_last_and_the_sentence_stays(lab, caplog):
    # One token each, and one for each comma: of nine tokens five words are left.
    records = [
        lab.record("a", tags_general=["red", "blue", "sky"], tags_character=["rin"], tags_copyright=["fate"]),
        lab.record("b", tags_general=["red", "blue", "sky"], tags_character=["rin"]),
        lab.record("c", tags_general=["red", "blue", "sky", "sea", "sun", "top"]),
    ]
    write_texts(lab, "talk", {"a": "A girl with a very long sentence about her.", "b": "", "c": ""})
    config = config_of(lab, records, max_tokens=9, sentences={"captioner": "talk"})
    first = compose(config, lab.workspace, policy="default")
    assert (first.num_cut, first.num_cut_edited) == (1, 0)

    add_green = add_tags(["green"], place="tail", group="rest")
    edit_captions(config, lab.workspace, add_green, policy="default", description="x", dry_run=False)
    with_edits = lab.texts()
    diff = diff_policies(config, lab.workspace, before="default", after="default")
    (lab.workspace.captions("default") / part_name(0)).unlink()
    again = compose(config, lab.workspace, policy="default")

    assert with_edits == [
        "rin, fate, red, blue, green, A girl with a very long sentence about her.",
        "rin, red, blue, sky, green",
        "red, blue, sky, sea, green",
    ]
    assert lab.texts() == with_edits and diff.num_different == 0
    assert (again.num_cut, again.num_cut_edited) == (1, 2)
    # By `compose` top; for the edits sky of a, sun of c.
    assert again.cut == {("rest", "top"): 1, ("rest", "sky"): 1, ("rest", "sun"): 1}
    assert "edited captions cut to tokens.max_tokens: 2" in again.summary()
    assert "2 edited captions were longer" in caplog.text


def test_too_many_added_words_are_cut_from_the_end(lab):
    config = config_of(lab, [lab.record("a", tags_general=["red"], tags_character=["rin"])], max_tokens=5)
    compose(config, lab.workspace, policy="default")

    for words in (["green", "blue"], ["sea", "sun"]):
        edit_captions(
            config, lab.workspace, add_tags(words, group="rest"), policy="default", description="x", dry_run=False
        )

    assert lab.texts() == ["green, blue, sea"]


def test_an_edit_that_leaves_nothing_leaves_nothing(lab):
    config = config_of(lab, [lab.record("a", tags_general=["red"])], max_tokens=9, fallback="mine")
    compose(config, lab.workspace, policy="default")

    edit_captions(config, lab.workspace, remove_tags(["red"]), policy="default", description="x", dry_run=False)

    assert lab.texts() == [""]


def test_ranks_put_cut_first_last():
    assert keep_ranks(("a", "b", "c", "d"), ("b", "a")).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.txt.gz", ModelError, "is no file, no folder and no hub id"),
        ("", FileNotFoundError, r"neither tokenizer\.json nor vocab\.json"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load_counter(str(tmp_path / name), Words())
