"""Samples from files, written here from real digits: what is read, and what is refused."""

import gzip
import io
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fastwgan.data import files

DIGITS = (load_digits().images[:20] * 15.9375).astype(np.uint8)  # [20, 8, 8], 0 to 255
ALL = torch.arange(len(DIGITS))


def scaled(pixels):
    """What uint8 [N, H, W] is to become."""
    return torch.from_numpy(pixels[:, None].astype(np.float32) / 127.5 - 1)


def png(image, format="png"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format)
    return file.getvalue()


def idx(array, magic=0x803):
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


# Folders


def fill(folder):
    """20 gray digits in files whose order is that of DIGITS, some of them deeper down, beside what is no image."""
    for i, image in enumerate(DIGITS):
        path = folder / (f"{i:02}.png" if i < 15 else f"z/{i:02}.PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    samples = files.ImageFolder(fill(tmp_path), size=8)
    assert samples.shape == (1, 8, 8)
    assert len(samples) == len(DIGITS)
    assert samples.unusable == []
    batch = samples[ALL]
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert torch.equal(batch, scaled(DIGITS))
    assert torch.equal(samples[torch.tensor([17, 3, 17])], scaled(DIGITS[[17, 3, 17]]))


def test_channels_are_the_first_images_or_as_asked(tmp_path):
    fill(tmp_path)
    color = np.zeros((8, 8, 3), np.uint8)
    color[..., 0] = 255
    (tmp_path / "03.png").write_bytes(png(color))
    assert files.ImageFolder(tmp_path, 8).shape == (1, 8, 8)
    samples = files.ImageFolder(tmp_path, 8, channels=3)
    assert torch.equal(samples[torch.tensor([3])][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(samples[torch.tensor([4])], scaled(DIGITS[4:5]).expand(-1, 3, -1, -1))
    (tmp_path / "00.png").write_bytes(png(color))
    assert files.ImageFolder(tmp_path, 8).shape == (3, 8, 8)
    (tmp_path / "00.png").write_text("not the first, as it is none")
    assert files.ImageFolder(tmp_path, 8).shape == (1, 8, 8)


@pytest.mark.parametrize("upright", [True, False])
def test_the_shorter_side_is_scaled_and_the_middle_kept(upright, tmp_path):
    image = np.zeros((64, 192), np.uint8)
    image[:, 64:128] = 200  # the middle square
    image[:, 100] = 0
    image = image if upright else image.T.copy()
    (tmp_path / "x.png").write_bytes(png(image))
    sample = files.ImageFolder(tmp_path, 16)[torch.tensor([0])][0, 0]
    sample = (sample if upright else sample.T + 0.0) * 127.5 + 127.5
    assert (sample[:, [*range(1, 7), *range(12, 15)]] > 190).all()
    assert (sample[:, 9] < 190).all()


def test_photographs_stand_upright(tmp_path):
    image = np.zeros((8, 8), np.uint8)
    image[:4] = 255
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(files.ImageFolder(tmp_path, 8)[torch.tensor([0])], scaled(image[None, ::-1]))


def test_unusable_files_are_left_out_with_their_reasons(tmp_path):
    fill(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    for name, content in {
        "a-truncated.png": png(noise)[:-1000],
        "b-truncated.jpg": png(noise, "jpeg")[:-1000],
        "c-text.png": b"text",
        "d-empty.gif": b"",
        "e-deep.png": png(noise.astype(np.uint16) * 256),
    }.items():
        (tmp_path / name).write_bytes(content)
    for workers in (0, 1, 3):
        samples = files.ImageFolder(tmp_path, 8, workers=workers)
        assert [path.name[0] for path, _ in samples.unusable] == list("abcde")
        assert all(reason for _, reason in samples.unusable)
        assert "8 bits" in samples.unusable[4][1]
        assert torch.equal(samples[ALL], scaled(DIGITS))


def test_a_file_that_goes_bad_later_is_named(tmp_path):
    samples = files.ImageFolder(fill(tmp_path), 8)
    (tmp_path / "03.png").write_text("text")
    with pytest.raises(files.BadDataError, match=r"^path: .*03\.png has become unusable"):
        samples[torch.tensor([2, 3])]


def test_folders_without_images_and_numbers_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^path: expected a directory of images, got .*nowhere"):
        files.ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^path: expected images in .*, got 0 files"):
        files.ImageFolder(tmp_path)
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"^path: expected images in .*, got 1 files that could be one; x\.png: \S"):
        files.ImageFolder(tmp_path)
    fill(tmp_path)
    for size in (0, 4, 12, 512):
        with pytest.raises(ValueError, match=f"^size: expected one of 8, .* got {size}"):
            files.ImageFolder(tmp_path, size)
    with pytest.raises(ValueError, match="^channels: expected 1 or 3, got 2"):
        files.ImageFolder(tmp_path, 8, channels=2)


# Arrays


def saved(path, array, **kwargs):
    np.save(path, array, **kwargs)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_points_are_taken_as_they_are(dtype, tmp_path):
    points = np.random.default_rng(0).normal(size=(30, 5)).astype(dtype)
    for array in (points, np.asfortranarray(points)):
        samples = files.read_npy(saved(tmp_path / "x.npy", array))
        assert samples.shape == (5,)
        assert len(samples) == 30
        batch = samples[torch.tensor([29, 0, 29])]
        assert torch.equal(batch, torch.from_numpy(points[[29, 0, 29]].astype(np.float32)))


def test_images_in_every_layout(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 10), np.uint8)
    for array, expected in (
        (color, color),
        (color.transpose(0, 2, 3, 1), color),
        (np.ascontiguousarray(color.transpose(0, 2, 3, 1)), color),
        (color[:, :1], color[:, :1]),
        (color[:, :1].transpose(0, 2, 3, 1), color[:, :1]),
        (color[:, 0], color[:, :1]),
    ):
        samples = files.read_npy(saved(tmp_path / "x.npy", array))
        assert samples.shape == expected.shape[1:]
        wanted = torch.from_numpy(expected.astype(np.float32)) / 127.5 - 1
        batch = samples[torch.arange(6)]
        assert torch.equal(batch, wanted)
        floats = files.read_npy(saved(tmp_path / "y.npy", array / 127.5 - 1))
        assert torch.allclose(floats[torch.arange(6)], wanted, atol=1e-6)


def test_an_array_is_mapped_and_not_read(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (2**18, 1024))  # 1 GiB, none of it on disk
    array[-1] = 7
    array.flush()
    del array
    tracemalloc.start()
    try:
        samples = files.read_npy(tmp_path / "x.npy")
        assert (samples[torch.tensor([2**18 - 1])] == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_array_images_are_scaled_where_asked(tmp_path):
    path = saved(tmp_path / "x.npy", np.full((4, 20, 40), 255, np.uint8))
    assert files.read_npy(path).shape == (1, 20, 40)
    samples = files.read_npy(path, 16)
    assert samples.shape == (1, 16, 16)
    batch = samples[torch.arange(4)]
    assert batch.shape == (4, 1, 16, 16)
    assert torch.allclose(batch, torch.ones(()))
    middle = np.zeros((4, 20, 40), np.uint8)
    middle[:, :, 10:30] = 255
    batch = files.read_npy(saved(path, middle), 8)[torch.arange(4)]
    assert (batch[..., 1:-1] > 0.99).all()
    with pytest.raises(ValueError, match="^size: is for images, and .* holds points"):
        files.read_npy(saved(tmp_path / "y.npy", np.zeros((4, 2))), 16)
    with pytest.raises(ValueError, match="^size: expected one of"):
        files.read_npy(path, 20)


REFUSED = {
    "objects": np.array([[1, "a"], [2, None]], dtype=object),
    "complex": np.zeros((4, 2), complex),
    "ints": np.zeros((4, 2), np.int64),
    "int images": np.zeros((4, 8, 8), np.int32),
    "bools": np.zeros((4, 8, 8), bool),
    "uint8 points": np.zeros((4, 2), np.uint8),
    "structured": np.zeros((4, 2), [("x", "f4")]),
    "text": np.full((4, 2), "a"),
    "none": np.zeros((0, 2)),
    "of no width": np.zeros((4, 0)),
    "one number": np.zeros(()),
    "a row": np.zeros(4),
    "five dimensions": np.zeros((4, 1, 8, 8, 8)),
    "two channels": np.zeros((4, 2, 8, 8), np.uint8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arrays_of_other_kinds_are_refused(name, tmp_path):
    with pytest.raises(files.BadDataError, match="^path: "):
        files.read_npy(saved(tmp_path / "x.npy", REFUSED[name], allow_pickle=True))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    whole = saved(tmp_path / "whole.npy", np.zeros((100, 2))).read_bytes()
    np.savez(tmp_path / "zip.npz", np.zeros((4, 2)))
    for content in (b"", b"text", pickle.dumps([1]), (tmp_path / "zip.npz").read_bytes(), whole[:50], whole[:-8]):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(files.BadDataError, match=r"^path: .*x\.npy is no usable npy file"):
            files.read_npy(tmp_path / "x.npy")
    for there in (tmp_path / "nowhere.npy", tmp_path):
        with pytest.raises(FileNotFoundError, match="^path: no file at"):
            files.read_npy(there)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("shape", [(10, 3), (10, 4, 4)])
def test_values_that_are_not_finite_are_refused_when_their_turn_comes(shape, value, tmp_path):
    array = np.zeros(shape)
    array[7].flat[-1] = value
    samples = files.read_npy(saved(tmp_path / "x.npy", array))
    samples[torch.arange(7)]
    with pytest.raises(files.BadDataError, match=r"^path: sample 7 of .*x\.npy has values"):
        samples[torch.tensor([2, 7, 9])]


def test_float_images_out_of_range_are_refused(tmp_path):
    array = np.zeros((4, 8, 8))
    array[2] = 1.0001
    assert files.read_npy(saved(tmp_path / "x.npy", array))[torch.arange(4)].max() > 1
    with pytest.raises(files.BadDataError, match=r"^path: expected float images in \[-1, 1\], got 0 to 255 in"):
        files.read_npy(saved(tmp_path / "x.npy", array.round() * 255))[torch.arange(4)]


# idx


def test_idx_is_padded_to_a_power_of_two(tmp_path):
    images = np.pad(DIGITS, ((0, 0), (10, 10), (9, 11)), constant_values=3)
    (tmp_path / "x").write_bytes(idx(images))
    samples = files.read_idx(tmp_path / "x")
    assert samples.shape == (1, 32, 32)
    batch = samples[ALL]
    assert torch.equal(batch[..., 2:-2, 2:-2], scaled(images))
    batch[..., 2:-2, 2:-2] = -1
    assert (batch == -1).all()
    assert torch.equal(files.read_idx(tmp_path / "x", 32)[ALL], samples[ALL])
    smaller = files.read_idx(tmp_path / "x", 16)
    assert smaller.shape == smaller[ALL].shape[1:] == (1, 16, 16)
    assert torch.allclose(smaller[ALL].mean(), samples[ALL].mean(), atol=0.02)


def test_small_idx_images_stay_as_they_are(tmp_path):
    narrow = DIGITS[:, :, :5]
    (tmp_path / "x").write_bytes(idx(narrow))
    samples = files.read_idx(tmp_path / "x")
    assert samples.shape == (1, 8, 5)
    assert torch.equal(samples[ALL], scaled(narrow))
    padded = files.read_idx(tmp_path / "x", 8)[ALL]
    assert torch.equal(padded[..., 1:6], scaled(narrow))
    assert (padded[..., [0, 6, 7]] == -1).all()
    assert files.read_idx(tmp_path / "x", 32)[ALL].shape == (20, 1, 32, 32)


def test_idx_gzip_is_known_by_its_content_and_found_in_a_directory(tmp_path):
    for name, content in (("x.gz", idx(DIGITS)), ("x", gzip.compress(idx(DIGITS)))):
        (tmp_path / name).write_bytes(content)
        assert torch.equal(files.read_idx(tmp_path / name)[ALL], scaled(DIGITS))
    with pytest.raises(FileNotFoundError, match="^path: no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"):
        files.read_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(DIGITS)))
    assert len(files.read_idx(tmp_path)) == 20
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(DIGITS[:5]))
    assert len(files.read_idx(tmp_path)) == 5
    with pytest.raises(FileNotFoundError, match="^path: no file at"):
        files.read_idx(tmp_path / "nowhere")


def test_foreign_and_damaged_idx_files_are_refused(tmp_path):
    whole = idx(DIGITS)
    for content, message in {
        b"": "0x00000000 and 0 bytes",
        b"text": "0x74657874 and 4 bytes",
        whole[:10]: "0x00000803 and 10 bytes",
        whole[:-1]: "expected 20 images of 8x8 after 16 bytes in .*, got 1279 bytes",
        whole + b"\0": "got 1281 bytes",
        idx(np.arange(20, dtype=np.uint8), 0x801): "0x00000801 and 28 bytes",
        idx(DIGITS.astype(">f4"), 0xD03): "0x00000d03",
        idx(DIGITS[:0]): "got 0 of 8x8",
        struct.pack(">4I", 0x803, *[2**32 - 1] * 3): "got 0 bytes",
        gzip.compress(whole)[:-20]: "is damaged",
        gzip.compress(whole)[:-1] + b"\xff": "is damaged",
        gzip.compress(whole)[:20] + b"\xff" * 50: "is damaged",
        gzip.compress(whole[:-1]): "got 1279 bytes",
    }.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(files.BadDataError, match=f"^path: .*{message}"):
            files.read_idx(tmp_path / "x")


def test_read_takes_each_kind(tmp_path):
    (tmp_path / "x").write_bytes(idx(DIGITS))
    np.save(tmp_path / "x.npy", DIGITS)
    fill(tmp_path / "folder")
    for kind, path in (("idx", "x"), ("npy", "x.npy"), ("folder", "folder")):
        assert files.read(kind, tmp_path / path, size=16, workers=2)[ALL].shape == (20, 1, 16, 16)
    assert files.read("folder", tmp_path / "folder").shape == (1, 32, 32)
    assert files.read("folder", tmp_path / "folder", channels=3).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="^channels: is for a folder"):
        files.read("idx", tmp_path / "x", channels=3)
