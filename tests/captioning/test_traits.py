"""What a character's pictures share, measured, and the tables that come with the package."""

import pytest

from captioning import cli
from captioning.compose import compose
from captioning.lexicon import group_matcher
from captioning.tag_files import shipped_lists
from captioning.traits import measure_traits
from sharding.config import ConfigError


def pictures(lab, number, *tags, characters=("rin",), start=0):
    return [
        lab.record(f"k{start + place}", tags_general=list(tags), tags_character=list(characters))
        for place in range(number)
    ]


def config_of(lab, **rules):
    return lab.config(policies={"default": {"groups": ["character", "rest"]} | rules})


def test_tags_of_the_kinds_that_enough_pictures_share_are_traits(lab):
    lab.keep(
        pictures(lab, 3, "pink_hair", "blue_eyes", "closed_eyes", "smile", "school_uniform"),
        pictures(lab, 1, "pink_hair", "blue_hair", "school_uniform", start=10),
        pictures(lab, 5, "green_eyes", characters=("rin", "saber"), start=20)
        + pictures(lab, 1, "red_hair", characters=("saber",), start=30),
    )
    output = lab.folder / "traits.csv"

    report = measure_traits(
        config_of(lab),
        lab.workspace,
        policy="default",
        output=output,
        kinds=["hair", "eyes"],
        share=0.75,
        min_pictures=4,
    )

    assert [(it.character, it.tag, it.share, it.num_pictures) for it in report.traits] == [
        ("rin", "pink_hair", 1.0, 4),
        ("rin", "blue_eyes", 0.75, 4),
    ]
    assert report.num_characters == 1
    assert output.read_text().splitlines()[1:] == ["rin,pink_hair,1.000,4", "rin,blue_eyes,0.750,4"]


def test_the_table_is_what_a_policys_traits_read(lab):
    records = pictures(lab, 2, "pink_hair", "smile")
    lab.keep(records)
    output = lab.folder / "traits.csv"
    path = lab.folder / "small.toml"
    path.write_text('name = "small"\nsources.boards.root = "x"\n[policies.default]\ngroups = ["character", "rest"]\n')
    place = [str(path), "--workspace", str(lab.workspace.root), "--output", str(output)]

    codes = [cli.main(["traits", *place, "--min-pictures", "2"]), cli.main(["traits", *place, "--kinds", "shoes"])]
    compose(config_of(lab, traits=str(output)), lab.workspace, policy="default")

    assert codes == [0, 2]
    assert lab.texts() == ["rin, smile", "rin, smile"]


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 1.5}, {"min_pictures": 0}])
def test_shares_and_numbers_out_of_range_are_refused(lab, values):
    with pytest.raises(ConfigError, match="--share must be above 0"):
        measure_traits(
            config_of(lab), lab.workspace, policy="default", output=lab.folder / "t.csv", kinds=["hair"], **values
        )


@pytest.mark.parametrize("name", ["wiki_character", "traits"])
def test_shipped_tables_are_tags_in_underscore_form_each_in_one_group(name):
    table = shipped_lists(name)
    tags = [tag for group in table.values() for tag in group]

    assert all(tag == tag.strip().lower() and " " not in tag and "," not in tag for tag in tags)
    for group, found in table.items():
        assert len(set(found)) == len(found), group
    if name == "wiki_character":
        assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(
    ("tag", "group"),
    [
        ("pleated_skirt", "clothing"), ("school_uniform", "clothing"), ("light_smile", "expression"),
        ("tareme", "eye_style"), ("half-closed_eyes", "eye_style"), ("holding_sword", "action"), ("v", "action"),
        ("facing_away", "body_direction"), ("looking_back", "head_direction"), ("from_side", "camera"),
        ("white_background", "background"), ("1girl", ""), ("solo", ""), ("blue_eyes", ""), ("long_hair", ""),
        ("looking_at_phone", "head_direction"), ("shirt_lift", "action"),
    ],
)  # fmt: skip
def test_the_wikis_groups(tag, group):
    assert group_matcher(shipped_lists("wiki_character"))(tag) == group
