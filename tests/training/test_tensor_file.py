import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.tensor_file import TensorFile, TensorFileError, read_tensors, write_tensors


def many_tensors():
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(5, 7, generator=generator)
    return {
        "f32": floats, "f64": floats.double(), "f16": floats.half(), "bf16": floats.bfloat16(),
        "i64": torch.arange(5), "u8": torch.arange(3, dtype=torch.uint8), "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1e-40), "empty": torch.empty(0, 3), "one": torch.ones(1, dtype=torch.int8),
        "fp8": floats.to(torch.float8_e4m3fn), "nan": torch.tensor([float("nan"), -0.0]),
    }  # fmt: skip


def is_bit_equal(one, other):
    def raw(tensor):
        return tensor.reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def test_tensors_read_back_bit_for_bit_and_any_safetensors_reader_opens_the_file(tmp_path):
    tensors, path = many_tensors(), tmp_path / "x.safetensors"

    written = write_tensors(path, tensors)

    assert written.num_bytes == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for read in (read_tensors(path, expected_sha256=written.sha256), load_file(path)):
        assert set(read) == set(tensors)
        assert all(is_bit_equal(read[name], tensors[name]) for name in tensors)


def test_files_of_the_library_are_read_too(tmp_path):
    tensors = many_tensors()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})

    read = read_tensors(tmp_path / "x.safetensors")

    assert all(is_bit_equal(read[name], tensors[name]) for name in tensors)


def test_same_tensors_same_bytes(tmp_path):
    tensors = many_tensors()
    reversed_order = dict(reversed(list(tensors.items())))

    assert write_tensors(tmp_path / "a", tensors) == write_tensors(tmp_path / "b", reversed_order)


def test_a_file_without_tensors_is_fine(tmp_path):
    write_tensors(tmp_path / "x", {})

    assert read_tensors(tmp_path / "x") == {}
    assert load_file(tmp_path / "x") == {}


def test_every_truncation_and_appended_byte_is_found(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.arange(4.0)})
    good = path.read_bytes()

    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(TensorFileError):
            read_tensors(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(TensorFileError, match="longer"):
        read_tensors(path)


def test_every_flipped_byte_is_found_with_the_hash(tmp_path):
    path = tmp_path / "x"
    sha256 = write_tensors(path, {"a": torch.arange(4.0), "b": torch.ones(2)}).sha256
    good = path.read_bytes()

    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(TensorFileError):
            read_tensors(path, expected_sha256=sha256)


@pytest.mark.parametrize("tensor", [torch.ones(4, 4).T[1:], torch.ones(2, dtype=torch.complex64)])
def test_what_cannot_be_written_is_named(tmp_path, tensor):
    with pytest.raises(TensorFileError, match="weird"):
        write_tensors(tmp_path / "x", {"weird": tensor[:, 1:] if tensor.dim() == 2 else tensor})


def test_single_tensors_are_read_into_memory_of_their_own(tmp_path):
    tensors = many_tensors()
    save_file(tensors, tmp_path / "x.safetensors")

    file = TensorFile(tmp_path / "x.safetensors")
    found = {name: file.tensor(name) for name in reversed(tensors)}
    (tmp_path / "x.safetensors").write_bytes(b"")

    assert all(is_bit_equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(TensorFileError, match="ends too early"):
        file.tensor("f32")
