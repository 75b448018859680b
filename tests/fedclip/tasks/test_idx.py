"""idx files: what was written is read, plain and zipped, and whatever is wrong with a file is said with its name."""

import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from fedclip.options import ConfigError
from fedclip.tasks.idx import read_idx, read_part
from tests.idx_folder import idx_bytes, write_idx_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 4)).astype(np.uint8)
WHOLE = idx_bytes(IMAGES)
ZIPPED = gzip.compress(WHOLE)


@pytest.mark.parametrize("data", [WHOLE, ZIPPED], ids=["plain", "zipped"])
def test_what_was_written_is_read(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "images"
    path.write_bytes(data)
    read = read_idx(path, 3)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.array_equal(read, IMAGES)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_a_folder_is_read_under_each_of_its_names(tmp_path: Path, zipped: bool, dotted: bool) -> None:
    write_idx_folder(tmp_path, train=7, test=4, side=5, zipped=zipped, dotted=dotted)
    assert [values.shape for part in ("train", "t10k") for values in read_part(tmp_path, part, 10)] == [(7, 5, 5), (7,), (4, 5, 5), (4,)]
    assert list(read_part(tmp_path, "train", 10)[1]) == list(range(7))


def header(*shape: int, kind: int = 8, begin: bytes = b"\0\0") -> bytes:
    return begin + bytes([kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


DAMAGE = {
    "empty": (b"", "is no idx file: it begins with nothing, not 00 00 08 03"),
    "other format": (b"\x89PNG" + WHOLE, "is no idx file: it begins with 89 50 4e 47"),
    "floats": (header(5, 3, 4, kind=0x0D) + bytes(240), r"unsigned bytes \(type 0x08\), got type 0x0d"),
    "labels": (idx_bytes(np.arange(5)), "expected 3 dimensions, got 1"),
    "half a header": (WHOLE[:9], "is cut off: it has 9 bytes of a header of 16"),
    "no images": (header(0, 3, 4), "holds nothing: its header says 0 x 3 x 4"),
    "no pixels": (header(5, 0, 4), "holds nothing: its header says 5 x 0 x 4"),
    "cut off": (WHOLE[:-1], "is cut off: its header says 60 bytes of data, it has 59"),
    "more": (WHOLE + b"\0", "has more data than the 60 bytes"),
    "zipped and cut off inside": (gzip.compress(WHOLE[:-1]), "is cut off: its header says 60 bytes of data, it has 59"),
    "zipped and more": (gzip.compress(WHOLE + b"\0"), "has more data than the 60 bytes"),
    "gzip cut off": (ZIPPED[:-9], "is damaged gzip: .*; copy or download"),
    "gzip without its checksum": (ZIPPED[:-8], "is damaged gzip"),
    "gzip with a wrong checksum": (ZIPPED[:-8] + bytes(8), "is damaged gzip: CRC check failed"),
    "gzip with a wrong byte": (ZIPPED[:10] + b"\xff" + ZIPPED[11:], "is damaged gzip"),
    "gzip and then something else": (ZIPPED + b"what", "is damaged gzip"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_with_the_files_name(tmp_path: Path, damage: str) -> None:
    data, said = DAMAGE[damage]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{path}.*{said}"):
        read_idx(path, 3)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_header_that_claims_a_lot_takes_no_memory(tmp_path: Path, zipped: bool) -> None:
    data = header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(1000)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(data) if zipped else data)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="is cut off"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_small_file_that_unzips_to_a_lot_takes_no_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = packer.compress(WHOLE) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(50)) + packer.flush()
    path = tmp_path / "images"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="has more data than the 60 bytes"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_files_that_are_not_there_or_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"There is no train-images-idx3-ubyte in {tmp_path}, plain or as \.gz; .*run\.data_dir"):
        read_part(tmp_path, "train", 10)
    write_idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match="There is no t10k-labels-idx1-ubyte"):
        read_part(tmp_path, "t10k", 10)
    (tmp_path / "t10k-labels-idx1-ubyte").mkdir()
    with pytest.raises(ConfigError, match="t10k-labels-idx1-ubyte cannot be read: Is a directory; "):
        read_part(tmp_path, "t10k", 10)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    with pytest.raises(ConfigError, match=rf"{labels}: expected labels from 0 to 8, found 9; set task\.classes"):
        read_part(tmp_path, "train", 9)
    labels.write_bytes(idx_bytes(np.zeros(59)))
    with pytest.raises(ConfigError, match=rf"{labels} has 59 labels, but .*train-images-idx3-ubyte has 60 images"):
        read_part(tmp_path, "train", 10)
