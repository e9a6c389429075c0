"""Who is in a picture, by a detector; styles; tokens; epochs; class images; what only a set shows."""

import numpy as np
import onnx
import pytest
from PIL import Image, ImageFilter

from tests.training.dreambooth.doctor.fix.pictures import painting
from training.config.concepts import ClassImagesConfig, ConceptConfig
from training.dreambooth.doctor.boxes import Box
from training.dreambooth.doctor.detector import load_detector
from training.dreambooth.doctor.examination import examine
from training.dreambooth.doctor.fix.copies import write_copies
from training.dreambooth.doctor.rules import DetectorRules, load_rules


def make_concept(folder, captions, *, name="nagisa", **more):
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        painting(120, 160, seed=number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return ConceptConfig(name=name, folder=folder, **more)


def found(concept, *overrides, detector=None):
    return {
        (one.rule, one.file.stem if one.file else "")
        for one in examine([concept], load_rules(overrides=overrides), detector=detector).findings
    }


def detector_of(*answers):
    """Answers in order, as shares of the sides."""
    left = [[Box(*box) for box in answer] for answer in answers]
    return lambda image: left.pop(0)


PERSON = ("person", 0.1, 0.1, 0.9, 1.0)
FACE = ("face", 0.4, 0.1, 0.6, 0.25)


def test_others_and_small_figures_are_found_by_boxes(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa"] * 4)
    other = ("person", 0.0, 0.0, 0.09, 1.0)
    detector = detector_of([PERSON], [PERSON, other], [("person", 0.4, 0.4, 0.5, 0.6)], [])

    seen = found(concept, detector=detector)

    assert {one for one in seen if one[0] in ("others_area", "subject_share")} == {
        ("others_area", "1"), ("subject_share", "2")
    }  # fmt: skip


def test_what_the_crop_cuts_off_does_not_count(tmp_path):
    concept = ConceptConfig(name="a", folder=tmp_path, prompt="x")
    painting(400, 100).save(tmp_path / "wide.png")
    at_the_edge = ("person", 0.0, 0.0, 0.2, 1.0)

    seen = found(concept, detector=detector_of([("person", 0.3, 0.0, 0.7, 1.0), at_the_edge]))

    assert not [rule for rule, _ in seen if rule == "others_area"]


def test_a_face_that_nobody_sees_is_a_note_unless_a_tag_explains_it(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa, smile"] * 5 + ["nagisa, from behind"])

    seen = found(concept, detector=detector_of(*[[PERSON, FACE]] * 4, [PERSON], [PERSON]))

    assert {one for one in seen if one[0] == "face_unseen"} == {("face_unseen", "4")}


def test_a_face_of_another_shape_and_close_ups_are_found(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa"] * 5)
    squeezed = ("face", 0.3, 0.1, 0.7, 0.25)
    close = ("face", 0.1, 0.1, 0.9, 0.7)

    seen = found(concept, detector=detector_of(*[[PERSON, FACE]] * 3, [PERSON, squeezed], [PERSON, FACE]))
    near = found(concept, detector=detector_of(*[[PERSON, close]] * 3, [PERSON, FACE], [PERSON, FACE]))

    assert {one for one in seen if one[0] == "squeezed_face"} == {("squeezed_face", "3")}
    assert ("close_ups", "") in near
    assert ("close_ups", "") not in seen


def test_a_function_of_a_python_file_is_a_detector(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def detect(image):\n    return [('face', 0, 0, image.width / 2, image.height, 0.9)]\n"
                    "def wrong(image):\n    return [('face', 1)]\n")  # fmt: skip

    assert load_detector(str(path), DetectorRules())(Image.new("RGB", (40, 30))) == [Box("face", 0, 0, 0.5, 1, 0.9)]
    with pytest.raises(ValueError, match=r"returned \('face', 1\)"):
        load_detector(f"{path}:wrong", DetectorRules())(Image.new("RGB", (40, 30)))
    for name, error in (
        (f"{path}:gone", ValueError),
        (str(tmp_path / "gone.py"), FileNotFoundError),
        ("x.txt", ValueError),
    ):
        with pytest.raises(error):
            load_detector(name, DetectorRules())


def detector_file(path, rows, *, names=None):
    """A network that answers with these rows (x, y, width, height, scores…) whatever it sees."""
    make = onnx.helper
    answer = np.asarray(rows, np.float32).T[None]
    zero = make.make_node("ReduceSum", ["images"], ["sum"], keepdims=0)
    nodes = [
        zero,
        make.make_node("Mul", ["sum", "none"], ["zero"]),
        make.make_node("Add", ["answer", "zero"], ["output"]),
    ]
    graph = make.make_graph(
        nodes,
        "boxes",
        [make.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 64, 64])],
        [make.make_tensor_value_info("output", onnx.TensorProto.FLOAT, answer.shape)],
        [
            make.make_tensor("none", onnx.TensorProto.FLOAT, [], [0.0]),
            make.make_tensor("answer", onnx.TensorProto.FLOAT, answer.shape, answer.ravel().tolist()),
        ],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    if names:
        make.set_model_props(model, {"names": names})
    onnx.save(model, path)
    return str(path)


def test_an_onnx_detector_is_read_in_its_input_pixels_without_doubles(tmp_path):
    rows = [[32, 16, 64, 32, 0.9, 0.1], [31, 16, 62, 32, 0.8, 0.1], [16, 8, 8, 8, 0.0, 0.6], [50, 8, 8, 8, 0.2, 0.2]]
    rules = DetectorRules(renamed={"head": "face"})

    boxes = load_detector(detector_file(tmp_path / "d.onnx", rows, names="{0: 'person', 1: 'head'}"), rules)(
        Image.new("RGB", (128, 64))
    )

    assert [(box.label, box.left, box.top, box.right, box.bottom) for box in boxes] == [
        ("person", 0, 0, 1, 1), ("face", 0.1875, 0.125, 0.3125, 0.375)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"detector\.labels"):
        load_detector(detector_file(tmp_path / "e.onnx", rows), rules)(Image.new("RGB", (64, 64)))


def test_style_sets_have_one_artist_and_three_characters(tmp_path):
    captions = ["bekkankou, purple hair", "bekkankou, brown hair", "bekkankou, blonde hair", "bekkankou, red hair"]
    good = make_concept(tmp_path / "Artwork" / "bekkankou", captions, name="bekkankou")
    bad = make_concept(
        tmp_path / "b",
        ["nekotofu, red hair", "bekkankou, red hair", "bekkankou, red hair", "red hair"],
        name="bekkankou",
    )
    of_style = {"style_artist", "style_artists", "style_characters", "first_tag", "default_tag"}

    seen = found(bad, 'training.styles=["bekkankou"]', 'words.artists=["nekotofu", "bekkankou"]')

    assert not {rule for rule, _ in found(good)} & of_style
    assert {one for one in seen if one[0] in of_style} == {
        ("style_artist", "0"), ("style_artist", "3"), ("style_artists", ""), ("style_characters", "")
    }  # fmt: skip


def test_tags_tell_of_covered_faces_and_bad_drawings(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa, smile", "nagisa, hand over face", "nagisa, bad hands"])

    assert {one for one in found(concept) if one[0] in ("face_covered", "bad_tag")} == {
        ("face_covered", "1"), ("bad_tag", "2")
    }  # fmt: skip


def test_the_same_caption_everywhere_says_nothing(tmp_path):
    same = make_concept(tmp_path / "a", ["nagisa"] * 5 + ["nagisa, smile"])
    other = make_concept(tmp_path / "b", [f"nagisa, {word}" for word in "abcdef"])

    assert ("same_captions", "") in found(same)
    assert ("same_captions", "") not in found(other)


def test_tokens_that_are_known_or_nowhere_are_told(tmp_path):
    concept = make_concept(tmp_path / "a", ["gotou hitori"], token="cat")

    assert {("token_common", ""), ("token_absent", "")} <= found(concept)
    rare = concept.model_copy(update={"token": "gotou hitori"})
    assert not {"token_common", "token_absent"} & {rule for rule, _ in found(rare)}


def test_planned_epochs_are_judged_by_the_number_of_pictures(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa"] * 3)  # 120 fit

    for epochs, rule in ((0, None), (40, "epochs_few"), (100, None), (200, "epochs_many")):
        rules = {rule for rule, _ in found(concept, f"training.epochs={epochs}")} & {"epochs_few", "epochs_many"}
        assert rules == ({rule} if rule else set())


def test_a_class_image_that_is_an_instance_is_found(tmp_path):
    (tmp_path / "class").mkdir()
    painting(120, 160, seed=1).resize((90, 120)).save(tmp_path / "class" / "girl.jpg")
    painting(120, 160, seed=9).save(tmp_path / "class" / "other.jpg")
    given = ClassImagesConfig(folder=str(tmp_path / "class"), prompt="1girl")
    concept = make_concept(tmp_path / "a", ["nagisa"] * 3, class_images=given)

    assert {one for one in found(concept) if one[0] == "class_leak"} == {("class_leak", "1")}


def test_one_blurred_picture_among_sharp_ones_is_found(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa"] * 6)
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 255, (512, 512, 3), np.uint8)
        Image.fromarray(noise).save(concept.folder / f"{number}.png")
    Image.open(concept.folder / "2.png").filter(ImageFilter.GaussianBlur(3)).save(concept.folder / "2.png")

    assert {one for one in found(concept) if one[0] == "sharpness_in_set"} == {("sharpness_in_set", "2")}


def test_what_is_cut_off_a_long_caption_is_named(tmp_path):
    concept = make_concept(tmp_path / "a", ["nagisa, " + "word " * 75 + ", the end"])

    (finding,) = [one for one in examine([concept], load_rules()).findings if one.rule == "token_count"]

    assert finding.text.endswith("the end")


def test_the_crop_of_a_copy_keeps_the_main_figure(tmp_path):
    concept = ConceptConfig(name="a", folder=tmp_path / "set", prompt="x")
    (tmp_path / "set").mkdir()
    painting(560, 320).save(tmp_path / "set" / "wide.png")
    boxes = [("person", 0.6, 0.0, 1.0, 1.0), ("person", 0.0, 0.2, 0.1, 0.8)]

    write_copies(examine([concept], load_rules(), detector=detector_of(boxes)), tmp_path / "out")

    copy = Image.open(tmp_path / "out" / "a" / "wide.png")
    assert copy.size == (512, 320)
    assert copy.tobytes() == painting(560, 320).crop((48, 0, 560, 320)).tobytes()
