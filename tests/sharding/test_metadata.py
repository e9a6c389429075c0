import json
from datetime import UTC, datetime
from pathlib import PurePosixPath

import pytest

from sharding.config import ConfigError, SourceConfig, parse_config
from sharding.metadata import IMPORTERS, TableError, Tables, check_tables, date_in_path, fingerprint

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


def test_a_path_pattern_replaces_the_usual_places():
    pattern = r"_(?P<year>\d{4})(?P<month>\d\d)?(?P<day>\d\d)?_"

    assert date_in_path(PurePosixPath("2001/a_20150809_1.jpg"), pattern) == datetime(2015, 8, 9, tzinfo=UTC)
    assert date_in_path(PurePosixPath("2001/a_2015_1.jpg"), pattern) == datetime(2015, 1, 1, tzinfo=UTC)
    assert date_in_path(PurePosixPath("2001/a_20151399_1.jpg"), pattern) is None
    assert date_in_path(PurePosixPath("2001/a_1066_1.jpg"), pattern) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"date_pattern": "(?P<year>"}, "date_pattern: is no regular expression"),
        ({"date_pattern": r"\d{4}"}, r"date_pattern: needs a group"),
        ({"date_pattern": r"(?P<year>\d{4})(?P<day>\d\d)"}, "group day, but none named month"),
        ({"importer": "kohya"}, "metadata belongs to importer"),
        ({"metadata": "a.json"}, "metadata belongs to importer"),
        ({"tag_dict": "a.json"}, "tag_dict and tag_categories belong to importer"),
    ],
)
def test_wrong_sources_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"root": "x", **values}, SourceConfig, name="x.toml")


@pytest.mark.parametrize("importer", sorted(IMPORTERS))
def test_txt_sidecars_are_read_by_every_importer_that_finds_no_tags(save, tmp_path, importer):
    save("Artist (abc)/1.txt", "red hair, sky")
    table = save("in.json", {"other": {}})

    read = IMPORTERS[importer](tmp_path / "raw", PurePosixPath("Artist (abc)/1.jpg"), Tables(metadata=table))

    assert read.tags == {"general": ("red_hair", "sky")}


# --- gelbooru ---


def test_a_gelbooru_post_is_translated(save, tmp_path):
    save("1.json", {
        "id": 77, "created_at": "Sat Nov 13 12:34:56 -0600 2021", "score": 4, "rating": "questionable", "md5": "m",
        "tags": "1girl don&#039;t_starve long_hair", "status": "deleted", "source": "",
    })  # fmt: skip

    metadata = IMPORTERS["gelbooru"](tmp_path / "raw", PurePosixPath("1.jpg"))

    assert metadata.tags == {"general": ("1girl", "don't_starve", "long_hair")}
    assert metadata.rating == "questionable" and metadata.flags == {"is_deleted"}
    assert metadata.created_at == datetime(2021, 11, 13, 18, 34, 56, tzinfo=UTC)
    assert metadata.custom == {"id": "77", "score": "4", "md5": "m"} and metadata.problem == ""


def test_gelbooru_tags_by_category_and_wrapped_posts_are_understood(save, tmp_path):
    post = {"tags": "a b c", "tags_general": "a", "tags_artist": ["b"], "tags_metadata": "c", "rating": "safe"}
    save("1.json", {"@attributes": {"count": 1}, "post": [post]})
    save("2.json", POST)

    wrapped = IMPORTERS["gelbooru"](tmp_path / "raw", PurePosixPath("1.jpg"))
    as_danbooru = IMPORTERS["gelbooru"](tmp_path / "raw", PurePosixPath("2.jpg"))

    assert wrapped.tags == {"general": ("a",), "artist": ("b",), "meta": ("c",)} and wrapped.rating == "general"
    assert as_danbooru.tags["character"] == ("hatsune_miku",)


# --- anime-pictures ---


def test_an_anime_pictures_post_is_mapped_to_danbooru_as_the_reference_does(save, tmp_path):
    tags = [
        ("girl", 2, None), ("long hair", 2, None), ("2 girls", 7, None), ("hatsune miku", 1, None),
        ("some one", 4, None), ("vocaloid", 3, None), ("a game", 5, None), ("a series", 6, None), ("highres", 9, None),
        ("no type", None, None), ("wrong", 2, "2020-01-01"),
    ]  # fmt: skip
    save("1.json", {
        "post": {"id": 5, "md5": "m", "width": 9, "height": 8, "size": 7, "score": 1, "score_number": 12,
                 "datetime": "2019-03-01T00:00:00", "spoiler": False, "download_count": 3, "color": [1, 2]},
        "tags": [{"tag": {"tag": tag, "type": kind}, "relation": {"removetime": gone}} for tag, kind, gone in tags],
    })  # fmt: skip

    metadata = IMPORTERS["anime_pictures"](tmp_path / "raw", PurePosixPath("1.jpg"))

    assert metadata.tags == {
        "general": ("long_hair", "2girls"), "character": ("hatsune_miku",), "artist": ("some_one",),
        "copyright": ("vocaloid", "a_game", "a_series"), "meta": ("highres", "no_type"),
    }  # fmt: skip
    assert metadata.created_at == datetime(2019, 3, 1, tzinfo=UTC) and metadata.date_source == "post"
    assert metadata.custom == {
        "id": "5", "md5": "m", "score": "12", "anime_pictures_score": "1", "anime_pictures_download_count": "3",
    }  # fmt: skip
    assert metadata.problem == ""


def test_a_girl_after_2_girls_stays_and_a_flat_post_is_read(save, tmp_path):
    save("1.json", {"id": 1, "tags": [{"tag": "2 girls", "type": 2}, {"tag": "girl", "type": 2}]})
    save("2.json", {"tags": "not a list"})
    save("3.json", POST | {"anime_pictures_erotics": 2})

    read = [IMPORTERS["anime_pictures"](tmp_path / "raw", PurePosixPath(f"{n}.jpg")) for n in (1, 2, 3)]

    assert read[0].tags == {"general": ("2girls", "1girl")}
    assert read[1].tags == {"general": ("not", "a", "list")}
    assert read[2].custom["anime_pictures_erotics"] == "2" and read[2].rating == "questionable"


# --- pixiv with tables ---


def test_pixiv_tags_are_translated_routed_and_cleared_of_what_says_nothing(save, tmp_path):
    save("Artist/1.json", {"pixiv_tags": [
        "初音ミク", "青空", "原神1000users入り", "オリジナル", "original character", "R-18", "OC", "Girl", "未訳",
        "blue eyes", "100+ bookmarks", "青空",
    ]})  # fmt: skip
    words = {
        "初音ミク": "hatsune_miku", "青空": "blue sky", "原神1000users入り": "genshin impact 1000+ bookmarks",
        "オリジナル": "original",
    }  # fmt: skip
    tables = Tables(
        tag_dict=save("tag_dict.json", words),
        tag_categories=save("tag_categories.json", {"hatsune_miku": 4, "genshin_impact": 3, "blue_sky": 0, "x": "?"}),
    )

    metadata = IMPORTERS["pixiv"](tmp_path / "raw", PurePosixPath("Artist/1.png"), tables)

    assert metadata.tags == {
        "character": ("hatsune_miku",), "general": ("blue_sky", "blue_eyes"), "copyright": ("genshin_impact",),
    }  # fmt: skip


@pytest.mark.parametrize(("content", "message"), [(b"{", "not valid JSON"), (b"[]", "holds a list")])
def test_a_table_that_cannot_be_used_is_an_error_before_anything_is_read(save, content, message):
    with pytest.raises(TableError, match=message):
        check_tables(Tables(tag_dict=save("t.json", content)))
    with pytest.raises(FileNotFoundError):
        check_tables(Tables(metadata=save("t.json", b"{}").with_name("absent.json")))


# --- kohya ---


@pytest.mark.parametrize("form", ["absolute", "below the folder", "stem", "of another machine", "windows", "lines"])
def test_every_form_of_a_kohya_key_finds_its_picture(save, tmp_path, form):
    root = tmp_path / "raw"
    entry = {"caption": "a girl", "tags": "1girl, long hair", "train_resolution": [1, 2], "image_size": [3, 4]}
    key = {
        "absolute": str(root / "a" / "1.jpg"), "below the folder": "a/1.jpg", "stem": "a/1",
        "of another machine": "/mnt/disk/set/a/1.jpg", "windows": "C:\\set\\a\\1.jpg", "lines": "a/1.jpg",
    }[form]  # fmt: skip
    if form == "lines":
        table = save("in.jsonl", json.dumps({"image_path": key, **entry}) + "\n\n")
    else:
        table = save("in.json", {key: entry, "/mnt/disk/other/1.jpg": {"tags": "wrong"}})

    metadata = IMPORTERS["kohya"](root, PurePosixPath("a/1.jpg"), Tables(metadata=table))

    assert metadata.tags == {"general": ("1girl", "long_hair")} and metadata.custom == {"caption": "a girl"}
    assert metadata.problem == ""


@pytest.mark.parametrize(
    ("entry", "tags", "problem"),
    [
        ({"tags": ["1girl", "long hair"]}, ("1girl", "long_hair"), ""),  # as the tag editor exports
        ({"caption": "", "tags": ", 1girl"}, ("1girl",), ""),
        ({"tags": 3}, (), "tags is a int"),
        ({"caption": [1]}, (), "caption is a list"),
        ("text", (), "entry is a str"),
    ],
)
def test_odd_kohya_entries(save, tmp_path, entry, tags, problem):
    table = save("in.json", {"1": entry})

    metadata = IMPORTERS["kohya"](tmp_path / "raw", PurePosixPath("1.jpg"), Tables(metadata=table))

    assert metadata.tags.get("general", ()) == tags and problem in metadata.problem


def test_two_pictures_of_other_machines_with_one_name_are_not_guessed(save, tmp_path):
    table = save("in.json", {"/a/1.jpg": {"tags": "x"}, "/b/1.jpg": {"tags": "y"}})

    metadata = IMPORTERS["kohya"](tmp_path / "raw", PurePosixPath("1.jpg"), Tables(metadata=table))

    assert metadata.tags == {} and "no entry" in metadata.problem


def test_a_fingerprint_changes_only_for_the_picture_whose_entry_does(save, tmp_path):
    def prints():
        tables = Tables(metadata=table)
        return [fingerprint(tables, tmp_path / "raw", PurePosixPath(f"{number}.jpg")) for number in (1, 2, 3)]

    table = save("in.json", {"1": {"tags": "a"}, "2": {"tags": "b"}})
    before = prints()
    table = save("in.json", {"1": {"tags": "a"}, "2": {"tags": "changed"}})

    assert [old == new for old, new in zip(before, prints(), strict=True)] == [True, False, True]


# --- webdataset ---


def test_the_json_of_our_own_chunks_comes_back_as_it_went_in(save, tmp_path):
    save("KEY.json", {
        "caption": "solo", "tags_general": ["1girl"], "tags_artist": ["some_one"], "tags_meta": [],
        "rating": "explicit", "created_at": "2019-03-01T00:00:00+00:00", "artist_name": "Some One", "vn_name": "",
        "custom_score": "12",
    })  # fmt: skip

    metadata = IMPORTERS["webdataset"](tmp_path / "raw", PurePosixPath("KEY.jpg"))

    assert metadata.tags == {"general": ("1girl",), "artist": ("some_one",)} and metadata.rating == "explicit"
    assert metadata.created_at == datetime(2019, 3, 1, tzinfo=UTC)
    assert metadata.custom == {"caption": "solo", "artist_name": "Some One", "score": "12"}
