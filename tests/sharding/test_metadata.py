from datetime import UTC, datetime
from pathlib import PurePosixPath

import pytest

from sharding.config import SourceConfig
from sharding.metadata import IMPORTERS, date_in_path

POST = {
    "id": 4821, "score": 12, "fav_count": 30, "rating": "q", "created_at": "2019-03-01T23:30:00.000-05:00",
    "tag_string_general": "1girl ^_^ long_hair 1girl", "tag_string_character": "hatsune_miku", "tag_string_meta": "",
    "tag_string_copyright": "vocaloid", "tag_string_artist": "some_one", "is_deleted": True, "is_banned": False,
}  # fmt: skip


def test_every_importer_of_the_config_exists():
    assert set(IMPORTERS) == set(SourceConfig.model_fields["importer"].annotation.__args__)


def test_a_txt_sidecar_gives_general_tags_in_underscore_form(save, tmp_path):
    save("a/1.txt", "\ufefflong hair, ^_^,  o_o , hatsune miku \\(append\\), long_hair,,\nsky\n")

    metadata = IMPORTERS["folder"](tmp_path / "raw", PurePosixPath("a/1.jpg"))

    assert metadata.tags == {"general": ("long_hair", "^_^", "o_o", "hatsune_miku_(append)", "sky")}
    assert metadata.problem == ""


def test_no_sidecar_is_no_problem_in_a_plain_folder(tmp_path):
    assert IMPORTERS["folder"](tmp_path, PurePosixPath("a/1.jpg")).problem == ""


@pytest.mark.parametrize("name", ["1.json", "1.jpg.json"])
def test_a_post_is_translated(save, tmp_path, name):
    save(name, POST)

    metadata = IMPORTERS["booru"](tmp_path / "raw", PurePosixPath("1.jpg"))

    assert metadata.tags == {
        "general": ("1girl", "^_^", "long_hair"),
        "character": ("hatsune_miku",),
        "copyright": ("vocaloid",),
        "artist": ("some_one",),
    }
    assert metadata.rating == "questionable"
    assert metadata.created_at == datetime(2019, 3, 2, 4, 30, tzinfo=UTC)
    assert metadata.date_source == "post"
    assert metadata.custom == {"id": "4821", "score": "12", "fav_count": "30"}
    assert metadata.flags == {"is_deleted"}
    assert metadata.problem == ""


@pytest.mark.parametrize("date", ["none", "1970s", "", None, 2019, "2019-13-45T00:00:00", "2019"])
def test_what_is_not_a_date_gives_none(save, tmp_path, date):
    save("1.json", POST | {"created_at": date})

    metadata = IMPORTERS["booru"](tmp_path / "raw", PurePosixPath("1.jpg"))

    assert (metadata.created_at, metadata.date_source) == (None, "")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{not json", "not valid JSON"),
        (b"[1, 2]", "holds a list"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"tag_string_general": 7, "rating": "x"}', "tag_string_general is a int; rating 'x' is unknown"),
        (b'{"rating": [], "id": {}, "score": null}', ""),
        (b'{"rating": ["g"], "score": null}', "rating ['g'] is unknown"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_a_problem_and_no_crash(save, tmp_path, content, problem):
    save("1.json", content)

    metadata = IMPORTERS["booru"](tmp_path / "raw", PurePosixPath("1.jpg"))

    assert problem in metadata.problem
    assert (metadata.tags, metadata.rating, metadata.custom) == ({}, "", {})


@pytest.mark.parametrize("importer", sorted(IMPORTERS))
def test_garbage_beside_a_picture_never_raises(save, tmp_path, importer):
    for content in (b"\x00\x01\x02", b"\xff" * 50, b"{" * 9, b'{"pixiv_tags": 3, "tags": {"a": 1}}'):
        save("Artist/1.txt", content)
        save("Artist/1.json", content)

        metadata = IMPORTERS[importer](tmp_path / "raw", PurePosixPath("Artist/1.jpg"))

        assert metadata.problem or b"{" in content


def test_a_folder_in_the_place_of_a_sidecar_is_a_problem(save, tmp_path):
    (tmp_path / "raw" / "1.txt").mkdir(parents=True)

    assert "cannot be read" in IMPORTERS["folder"](tmp_path / "raw", PurePosixPath("1.jpg")).problem


def test_pixiv_takes_the_artist_from_the_folder_and_tags_from_either_sidecar(save, tmp_path):
    save(
        "Ms. 名前 (x)/9_p0.json", {"pixiv_tags": ["オリジナル", "blue sky"], "create_date": "2020-05-01T10:00:00+09:00"}
    )
    save("Other/8_p0.txt", "red hair, smile")

    first = IMPORTERS["pixiv"](tmp_path / "raw", PurePosixPath("Ms. 名前 (x)/9_p0.png"))
    second = IMPORTERS["pixiv"](tmp_path / "raw", PurePosixPath("Other/8_p0.png"))

    assert first.custom == {"artist_name": "Ms. 名前 (x)"}
    assert first.tags == {"general": ("オリジナル", "blue_sky")}
    assert first.created_at == datetime(2020, 5, 1, 1, tzinfo=UTC)
    assert second.tags == {"general": ("red_hair", "smile")}


@pytest.mark.parametrize(
    ("folder", "custom"),
    [
        ("Ever_17 (e17)", {"vn_name": "Ever_17", "vn_short": "e17"}),
        ("The_Question_(ttq)", {"vn_name": "The_Question", "vn_short": "ttq"}),
        ("A (b) (c)", {"vn_name": "A (b)", "vn_short": "c"}),
        ("no short name", {}),
    ],
)
def test_a_visual_novel_is_named_by_its_folder(tmp_path, folder, custom):
    metadata = IMPORTERS["visual_novel"](tmp_path, PurePosixPath(f"{folder}/bg/1.png"))

    assert metadata.custom == custom
    assert bool(metadata.problem) == (not custom)


@pytest.mark.parametrize(
    ("path", "date"),
    [
        ("trip 2015-08-09/1.jpg", datetime(2015, 8, 9, tzinfo=UTC)),
        ("2014/2015-02-30/1.jpg", datetime(2014, 1, 1, tzinfo=UTC)),
        ("a/2003/b/1.jpg", datetime(2003, 1, 1, tzinfo=UTC)),
        ("a/1889/1.jpg", None),
        ("a/2999/1.jpg", None),
        ("120150809-11-22/2015.jpg", None),
    ],
)
def test_a_date_in_the_path(path, date):
    assert date_in_path(PurePosixPath(path)) == date
