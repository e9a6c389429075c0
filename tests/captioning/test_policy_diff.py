"""Two policies side by side: what changes, without writing."""

import json

import pytest

from captioning import cli
from captioning.compose import compose
from captioning.edit_operations import add_tags
from captioning.edits import edit_captions
from captioning.policy_diff import diff_policies
from sharding.config import ConfigError

TIERS = {"aesthetic": {"model": "aes", "comparison": ">", "steps": [[0.5, "fine"]], "rest": "poor"}}


@pytest.fixture
def config(lab):
    lab.keep(
        [lab.record("a", tags_general=["sky", "solo"]), lab.record("b", tags_general=["sky"])],
        [lab.record("c", tags_general=["solo", "sky"])],
    )
    lab.scores("aes", {"a": 0.6, "b": 0.9})
    lab.scores("aes", {"c": 0.1}, part=1)
    higher = {"aesthetic": TIERS["aesthetic"] | {"steps": [[0.8, "fine"]]}}
    policies = {
        "default": {"groups": ["aesthetic", "rest"], "tiers": TIERS},
        "strict": {"groups": ["aesthetic", "rest"], "tiers": higher, "tags": {"drop_tags": ["solo"]}},
        "turned": {"groups": ["rest", "aesthetic"], "tiers": TIERS},
    }
    return lab.config(annotate={"models": {"aes": {"kind": "aesthetic_shadow", "model": "x"}}}, policies=policies)


def test_words_gained_and_lost_are_counted_by_group(lab, config):
    report = diff_policies(config, lab.workspace, before="default", after="strict", num_examples=1)

    assert (report.num_captions, report.num_different, report.num_reordered) == (3, 2, 0)
    assert [(it.group, it.word, it.num_gained, it.num_lost) for it in report.changes] == [
        ("rest", "solo", 0, 2),
        ("aesthetic", "fine", 0, 1),
        ("aesthetic", "poor", 1, 0),
    ]
    assert [(it.key, it.before, it.after) for it in report.examples] == [("a", "fine, sky, solo", "poor, sky")]
    assert "rest: +0 −2 of 1 words\n  solo: +0 −2" in report.summary()
    assert not lab.workspace.captions("default").exists()


def test_another_order_is_a_difference_without_other_words(lab, config):
    report = diff_policies(config, lab.workspace, before="default", after="turned")

    assert (report.num_different, report.num_reordered, report.changes) == (3, 3, [])


def test_a_policy_does_not_differ_from_itself_and_an_unknown_one_is_an_error(lab, config):
    assert diff_policies(config, lab.workspace, before="strict", after="strict").num_different == 0
    with pytest.raises(ConfigError, match="policy 'nobody': unknown"):
        diff_policies(config, lab.workspace, before="default", after="nobody")


def test_the_command_prints_text_or_json(lab, capsys):
    lab.keep([lab.record("a", tags_general=["sky"])])
    path = lab.folder / "two.toml"
    path.write_text(
        f'name = "two"\nsources.boards.root = "{lab.pictures}"\n[policies.default]\ngroups = ["rest"]\n'
        '[policies.other]\ngroups = ["rest"]\nreplace = { sky = "heaven" }\n'
    )
    place = ["compose", str(path), "--workspace", str(lab.workspace.root)]

    codes = [cli.main([*place, "--diff", "default", "other", *more]) for more in ([], ["--json"])]
    refused = [cli.main([*place, *wrong]) for wrong in (["--json"], ["--diff", "a", "b", "--policy", "other"])]

    output, errors = capsys.readouterr()
    assert codes == [0, 0] and refused == [2, 2]
    assert "--diff A B names both policies; leave --policy out" in errors
    assert "− sky\n  + heaven" in output
    assert json.loads(output.splitlines()[-1])["num_different"] == 1


def test_each_side_has_the_edits_that_people_made_to_it(lab, config):
    compose(config, lab.workspace, policy="default")
    add_words = add_tags(["blue"], place="head", group="rest")
    edit_captions(config, lab.workspace, add_words, policy="default", description="add", dry_run=False)

    report = diff_policies(config, lab.workspace, before="default", after="strict", num_examples=1)
    back = diff_policies(config, lab.workspace, before="strict", after="default", num_examples=1)

    assert [(it.word, it.num_gained, it.num_lost) for it in report.changes if it.group == "rest"] == [
        ("blue", 0, 3),
        ("solo", 0, 2),
    ]
    assert [(it.before, it.after) for it in report.examples] == [("fine, blue, sky, solo", "poor, sky")]
    assert [(it.before, it.after) for it in back.examples] == [("poor, sky", "fine, blue, sky, solo")]
    assert lab.texts()[0] == "fine, blue, sky, solo"
