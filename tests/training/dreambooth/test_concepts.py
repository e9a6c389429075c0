"""Concept lists of other trainers, broken as people have them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sharding.config import ConfigError, load_config
from training.config.concepts import ConceptsFile
from training.dreambooth.concepts.extension import KEYS, is_path_key
from training.dreambooth.concepts.lenient_json import LenientJsonError, read_values
from training.dreambooth.concepts.reading import import_concepts

WIKI = Path(__file__).parent / "data" / "wiki_concepts.json"
"""The example of the wiki "Anime Training", as it stands there: no braces, no comma between its two concepts."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def picture(path, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def wiki_object(**changes):
    first, _ = read_values(WIKI.read_text())[0]
    return {**first, **changes}


def written(tmp_path, text, name="concepts.json", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@given(json_values)
def test_strict_json_is_read_as_json_reads_it_without_a_repair(value):
    for text in (json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False)):
        assert read_values(text) == ([value], [])


def test_the_wikis_broken_list_gives_its_two_concepts_of_18_keys():
    objects, repairs = read_values(WIKI.read_text(), is_path=is_path_key)

    assert [len(one) for one in objects] == [18, 18]
    assert set(objects[0]) == set(KEYS)
    assert objects[0]["instance_data_dir"] == r"E:\dataset\_FallenAngel\Anime\Nishikigi Chisato"
    assert [repair.line for repair in repairs] == [1, 18, 19]


def test_the_wikis_list_becomes_a_file_of_ours_that_reads_back_the_same(tmp_path):
    imported = import_concepts(WIKI, mapped=[("e:/dataset/", "/data/sets")])
    path = written(tmp_path, imported.toml(), "concepts.toml")

    assert load_config(path, ConceptsFile).concepts == imported.concepts
    assert import_concepts(path).concepts == imported.concepts
    chisato, takina = imported.concepts
    assert chisato.name == "Nishikigi Chisato" and takina.class_images.prompt.endswith("open jacket")
    assert str(chisato.folder) == "/data/sets/_FallenAngel/Anime/Nishikigi Chisato"
    assert (chisato.sample.seed, chisato.sample.steps, chisato.class_images.guidance) == (420420, 40, 12)


@pytest.mark.parametrize(
    "breaking",
    [
        lambda text: "[" + text + "]",
        lambda text: "{" + text + "}",  # all 36 keys in one object
        lambda text: "// from the wiki\n" + text.replace("true", "True"),
        lambda text: text.replace('""', '"",').replace(",,", ","),
        lambda text: text.replace("\\\\", "\\"),
        lambda text: text.replace('"instance_token"', "'instance_token'"),
        lambda text: text.replace('"masterpiece, best quality, 1girl, [filewords]"', "“masterpiece, best”"),
    ],
    ids=["list", "one object", "comment and True", "trailing commas", "lone backslashes", "quotes", "smart quotes"],
)
def test_every_way_of_breaking_the_list_still_gives_both_concepts(tmp_path, breaking):
    imported = import_concepts(written(tmp_path, breaking(WIKI.read_text())))

    assert [concept.name for concept in imported.concepts] == ["Nishikigi Chisato", "Inoue Takina"]


@pytest.mark.parametrize("folder", [r"E:\new\faces", r"E:\uploads\take", "E:\\dataset\\"])
def test_windows_paths_with_lone_backslashes_are_not_taken_for_line_breaks(tmp_path, folder):
    text = f'[{{"instance_data_dir": "{folder}",\n "instance_prompt": "[filewords]"}}]'

    imported = import_concepts(written(tmp_path, text))

    assert str(imported.concepts[0].folder) == folder
    assert any("lone backslash" in note for note in imported.notes)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_recognised(tmp_path, encoding):
    text = json.dumps([wiki_object(class_prompt="café")], ensure_ascii=False)

    assert import_concepts(written(tmp_path, text, encoding=encoding)).concepts[0].class_images.prompt == "café"


def test_db_config_numbers_in_quotes_and_unknown_keys_are_told(tmp_path):
    one = wiki_object(save_infer_steps="30", num_class_images_per="2", instance_promt="x")
    text = json.dumps({"model_name": "UltimateWaifuMk1", "concepts_list": [one]})

    imported = import_concepts(written(tmp_path, text, "db_config.json"))

    concept = imported.concepts[0]
    assert (concept.sample.steps, concept.class_images.images_per_image) == (30, 2)
    assert any("meant instance_prompt?" in note for note in imported.notes)


def test_a_total_of_class_images_is_shared_among_the_pictures(tmp_path):
    for number in range(4):
        picture(tmp_path / "her" / f"{number}.png")
    text = json.dumps({"instance_data_dir": "her", "instance_prompt": "her", "class_prompt": "a girl"})

    one = {**json.loads(text), "num_class_images": 10}
    imported = import_concepts(written(tmp_path, json.dumps([one])))

    assert imported.concepts[0].class_images.images_per_image == 3
    assert imported.concepts[0].folder == tmp_path / "her"


def test_a_windows_folder_is_found_beside_the_list(tmp_path):
    picture(tmp_path / "Anime" / "Inoue Takina" / "1.png", "inoue takina")

    imported = import_concepts(written(tmp_path, WIKI.read_text()))

    assert imported.concepts[1].folder == tmp_path / "Anime" / "Inoue Takina"
    assert any("1 pictures, 1 captions" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of concepts"),
        ("[]", "no list of concepts"),
        ('[{"instance_data_dir": ""}]', "no concept in it"),
        ('{"a": }', "line 1"),
        ('[{"instance_data_dir": "x", "save_infer_steps": "many"}]', "save_infer_steps|sample.steps"),
    ],
)
def test_training_never_starts_on_an_empty_or_senseless_list(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        import_concepts(written(tmp_path, text))


def test_class_images_of_the_instances_own_prompt_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="instance's own prompt"):
        import_concepts(
            written(tmp_path, json.dumps([wiki_object(class_prompt="[filewords]", num_class_images_per=2)]))
        )


def test_kohya_folders_give_repeats_and_words(tmp_path):
    picture(tmp_path / "10_sks girl" / "1.png")
    picture(tmp_path / "3_takina" / "1.png", "takina, smile")
    picture(tmp_path / "notes" / "1.png")

    imported = import_concepts(tmp_path)

    assert [(one.name, one.repeats, one.prompt) for one in imported.concepts] == [
        ("sks girl", 10, "sks girl"),
        ("takina", 3, "[filewords]"),
    ]
    assert any(note.startswith("notes:") for note in imported.notes)


def test_a_tree_of_folders_gives_a_concept_for_each_that_has_pictures(tmp_path):
    picture(tmp_path / "Anime" / "nishikigi chisato" / "1.png", "nishikigi chisato, smile")
    picture(tmp_path / "Parts" / "hands" / "1.png", "hands")

    assert [concept.name for concept in import_concepts(tmp_path).concepts] == ["nishikigi chisato", "hands"]


def test_kohyas_dataset_config_gives_subsets_and_their_class_images(tmp_path):
    picture(tmp_path / "her" / "1.png")
    path = written(
        tmp_path,
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 512\n'
        '[[datasets.subsets]]\nimage_dir = "her"\nclass_tokens = "sks girl"\nnum_repeats = 4\n'
        '[[datasets.subsets]]\nimage_dir = "girls"\nis_reg = true\nclass_tokens = "girl"\n',
        "dataset.toml",
    )

    imported = import_concepts(path)

    (concept,) = imported.concepts
    assert (concept.prompt, concept.repeats, concept.class_images.prompt) == ("sks girl", 4, "girl")
    assert any("resolution" in note for note in imported.notes)


def test_onetrainers_list_leaves_out_what_is_disabled(tmp_path):
    listed = [
        {"name": "her", "path": str(tmp_path), "enabled": True, "balancing": 2.0, "text": {"prompt_source": "sample"}},
        {"name": "him", "path": "/x", "enabled": False, "text": {}},
        {"name": "held", "path": "/y", "type": "VALIDATION", "text": {}},
    ]

    imported = import_concepts(written(tmp_path, json.dumps(listed)))

    assert [(one.name, one.repeats) for one in imported.concepts] == [("her", 2)]
    assert any("disabled" in note for note in imported.notes)


@pytest.mark.parametrize("text", ['{"a": "b', '{"a" 1}', "{1: 2}", "?"])
def test_what_makes_no_sense_is_an_error_with_its_line(text):
    with pytest.raises(LenientJsonError, match="line 1"):
        read_values(text)
