"""A laboratory for the tests of captioning: pictures, records, kept parts, configs; and the demo's tiny models."""

import hashlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captioning.config import CaptioningConfig
from sharding.config import parse_config
from sharding.schema import MANIFEST, SCORES, TAGGER, Workspace
from sharding.tables import part_name, read_part, write_part


class Lab:
    """Everything lies under `folder`; the one source, `boards`, is folder/pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = folder / "pictures"
        self.workspace = Workspace(folder / "workspace")

    def png(self, width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> bytes:
        """Return a PNG of smooth random colours."""
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
        image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def plain(self, grey: int) -> bytes:
        """Return a PNG of one grey."""
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), (grey, grey, grey)).save(buffer, "PNG")
        return buffer.getvalue()

    def record(self, key: str = "k0", **values: Any) -> dict[str, Any]:
        """Return a manifest row of a kept file."""
        row: dict[str, Any] = {f"tags_{name}": [] for name in ("general", "character", "copyright", "artist", "meta")}
        row |= {"key": key, "source": "boards", "path": f"{key}.png", "num_bytes": 1, "rating": "", "custom": []}
        return row | {"status": "kept", "created_at": datetime(2023, 5, 1, tzinfo=UTC)} | values

    def save(self, *files: bytes) -> list[dict[str, Any]]:
        """Write pictures and return their records."""
        self.pictures.mkdir(exist_ok=True)
        rows = []
        for data in files:
            key = hashlib.sha256(data).hexdigest()[:16]
            (self.pictures / f"{key}.png").write_bytes(data)
            rows.append(self.record(key, num_bytes=len(data)))
        return rows

    def keep(self, *parts: list[dict[str, Any]], made_from: str = "test") -> None:
        """Write the parts of workspace.kept."""
        for number, rows in enumerate(parts):
            table = pa.Table.from_pylist(rows, schema=MANIFEST)
            write_part(self.workspace.kept / part_name(number), table, made_from=f"{made_from}-{number}")

    def config(self, **values: Any) -> CaptioningConfig:
        """Return a config with the source `boards`; values replace whole tables."""
        base: dict[str, Any] = {
            "name": "test",
            "sources": {"boards": {"root": str(self.pictures)}},
            "max_broken_fraction": 0.5,
        }
        return parse_config(base | values, CaptioningConfig, name="test.toml")

    def annotate_config(self, models: dict[str, Any], **values: Any) -> CaptioningConfig:
        return self.config(annotate={"models": models, "batch_size": 3, "workers": 0}, **values)

    def scores(self, model: str, scores: dict[str, float | None], *, part: int = 0, status: str = "no_result") -> None:
        """Write an annotation part of a scorer; None is a row without a score."""
        rows = [
            {"key": key, "score": score, "status": "ok" if score is not None else status}
            for key, score in scores.items()
        ]
        table = pa.Table.from_pylist(rows, schema=SCORES)
        write_part(self.workspace.annotations(model) / part_name(part), table, made_from=f"{model}-{sorted(scores)}")

    def tags(
        self, model: str, labels: list[tuple[str, str]], rows: dict[str, dict[int, float]], **ratings: Any
    ) -> None:
        """Write labels and a part of a tagger: {key: {tag_id: probability}}, ratings by key."""
        from captioning.taggers.base import Label, label_table

        folder = self.workspace.annotations(model)
        metadata = {"model_digest": "m"}
        write_part(
            folder / "labels.parquet", label_table([Label(*it) for it in labels]), made_from="m", metadata=metadata
        )
        table = pa.Table.from_pylist(
            [
                {
                    "key": key,
                    "rating_probs": ratings.get(key, []),
                    "tag_ids": list(tags),
                    "tag_probs": list(tags.values()),
                    "status": "ok",
                }
                for key, tags in rows.items()
            ],
            schema=TAGGER,
        )
        write_part(folder / part_name(0), table, made_from="tags", metadata=metadata)

    def rows(self, model: str, part: int = 0) -> dict[str, dict[str, Any]]:
        """Return the rows of an annotation part by key."""
        return {row["key"]: row for row in read_part(self.workspace.annotations(model) / part_name(part)).to_pylist()}

    def texts(self, policy: str = "default", part: int = 0) -> list[str]:
        """Return the captions of a part."""
        texts: list[str] = read_part(self.workspace.captions(policy) / part_name(part)).column("text").to_pylist()
        return texts


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's models: wd, aesthetic, clip, head."""
    for library in ("torch", "transformers", "onnx", "onnxruntime"):
        pytest.importorskip(library)
    from scripts.demo_models.captioning import make_captioning_models

    return make_captioning_models(tmp_path_factory.mktemp("models"), seed=0)


@pytest.fixture(scope="session")
def model_tables(demo_models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """annotate.models with all four kinds."""
    return {
        "wd": {"kind": "wd_tagger", "model": str(demo_models["wd"])},
        "aesthetic": {"kind": "aesthetic_shadow", "model": str(demo_models["aesthetic"])},
        "quality": {"kind": "aes_b32", "clip": str(demo_models["clip"]), "head": str(demo_models["head"])},
        "date": {"kind": "date"},
    }


def write_onnx(
    path: Path,
    weights: np.ndarray,
    *,
    side: int | str = 16,
    batch: int | str | None = "batch_size",
    layout: str = "nhwc",
    names: tuple[str, ...] = ("input", "output"),
    is_sigmoid: bool = False,
) -> Path:
    """Write a classifier whose values are (mean of each channel) @ weights (3, L), with a sigmoid if asked for.

    names: of the input, then of the outputs; all outputs but the last named are the means.
    """
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    axes, shape = ([1, 2], [batch, side, side, 3]) if layout == "nhwc" else ([2, 3], [batch, 3, side, side])
    values = "values" if is_sigmoid else names[-1]
    nodes = [
        helper.make_node("ReduceMean", [names[0]], ["means"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], [values]),
        *([helper.make_node("Sigmoid", ["values"], [names[-1]])] if is_sigmoid else []),
        *(helper.make_node("Identity", ["means"], [name]) for name in names[1:-1]),
    ]
    outputs = [helper.make_tensor_value_info(name, floats, [batch, 3]) for name in names[1:-1]]
    outputs.append(helper.make_tensor_value_info(names[-1], floats, [batch, weights.shape[1]]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(names[0], floats, shape)],
        outputs,
        [onnx.numpy_helper.from_array(weights.astype(np.float32), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def make_onnx() -> Callable[..., Path]:
    return write_onnx


def draw(width: int, height: int) -> Image.Image:
    """Return a picture by formula, so that golden values can be made of it elsewhere."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(7 * x + 13 * y) % 256, (x * x + 3 * y) % 256, (5 * x + y * y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def picture() -> Callable[[int, int], Image.Image]:
    return draw


def write_clip(folder: Path, *, num_features: int = 768) -> Path:
    """Write a tiny CLIP vision tower in transformers' format, with ViT-L/14's length of embeddings."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from captioning.torch_models import quiet_transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=num_features,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.CLIPVisionModelWithProjection(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that pictures differ
        model.save_pretrained(folder)
    values = {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def clip_768(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with 768 features."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip-768")
