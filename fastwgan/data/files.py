"""Samples in the user's files: a folder of images, a .npy array, MNIST's idx format. Read when they are asked for.

Each kind is a class of :class:`fastwgan.data.Samples` whose ``shape`` is one sample's: (D,) for points, (C, H, W) for
images. Samples are float32, images in [-1, 1]. With a ``size``, one of :data:`SIZES`, an image's shorter side is scaled
to it, and the middle of the longer one kept. What is wrong with a file or an argument raises ValueError or OSError.
"""

import gzip
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

KINDS = ("folder", "npy", "idx")
SIZES = (8, 16, 32, 64, 128, 256)  # of square images; what the convolutional networks can make
FOLDER_SIZE = 32  # what a CPU can train on
AS_THEY_ARE = 16  # images that are no larger go into an MLP, which takes any height and width
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
GRAY = {"1", "L", "LA"}  # Pillow's modes
IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
IDX_NAMES = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz")


class BadDataError(ValueError):
    """A file does not hold what it should; some of them come to light only when the sample's turn comes."""


def _expect(fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise BadDataError(f"path: expected {expected}, got {got}")


def _check_size(size: int | None) -> None:
    if size is not None and size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(map(str, SIZES))}, got {size}")


def _image_files(root: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out what it cannot list

    paths = [Path(at, name) for at, _, names in os.walk(root, onerror=fail) for name in names]
    return sorted((p for p in paths if p.suffix.lower() in SUFFIXES), key=lambda p: p.relative_to(root).as_posix())


def _decode(path: Path) -> Any:
    """Return the Pillow image of a file, upright, or raise BadDataError; over 8 bits, too, as Pillow would clip."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds on a foreign or truncated file
        raise BadDataError(str(error).replace(str(path), path.name) or type(error).__name__) from error
    if upright.mode.startswith(("I", "F")):
        raise BadDataError(f"expected 8 bits to a channel, got Pillow's mode {upright.mode}")
    return upright


def _mode(path: Path) -> tuple[str, str]:
    """Return an image file's mode and "", or "" and why it cannot be used."""
    try:
        return _decode(path).mode, ""
    except BadDataError as error:
        return "", str(error)


class ImageFolder:
    """All image files under a directory, in the order of their names, without transparency. Needs Pillow.

    Every file is decoded once at the start, by ``workers`` threads, and when its turn comes. Those that cannot be are
    left out, in ``unusable`` with the reason. ``channels`` is 3 for RGB, 1 for gray, None for the first usable image's.
    """

    def __init__(self, path: Path | str, size: int = FOLDER_SIZE, channels: int | None = None, workers: int = 1):
        from PIL import Image

        root = Path(path)
        _check_size(size)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {channels}")
        _expect(root.is_dir(), "a directory of images", root)
        found = _image_files(root)
        Image.init()  # else the first threads to meet a rare format race for it, and some find it unknown
        parts = [found[i : i + 16] for i in range(0, len(found), 16)]  # that a thread looks through at a time
        with ThreadPoolExecutor(max(1, workers)) as pool:
            modes = list(chain(*pool.map(lambda part: [(path, *_mode(path)) for path in part], parts)))
        usable = {path: mode for path, mode, _ in modes if mode}
        self.unusable = [(path, problem) for path, _, problem in modes if problem]
        first = "".join(f"; {path.name}: {problem}" for path, problem in self.unusable[:1])
        _expect(len(usable) > 0, f"images in {root}", f"{len(found)} files that could be one{first}")
        self._paths = list(usable)
        self.shape = (channels or (1 if usable[self._paths[0]] in GRAY else 3), size, size)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        from PIL import ImageOps

        (channels, height, width), pixels = self.shape, []
        for path in (self._paths[i] for i in indices.tolist()):
            try:
                image = _decode(path).convert("L" if channels == 1 else "RGB")
            except BadDataError as error:  # it was all right at the start
                raise BadDataError(f"path: {path} has become unusable ({error})") from error
            pixels.append(np.asarray(ImageOps.fit(image, (width, height))).reshape(height, width, channels))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"path: no file at {path}")
    return path


class Points:
    """The rows of a floating-point array [N, D], as they are. Well-behaved ones are of about unit size."""

    def __init__(self, array: np.ndarray, path: Path) -> None:
        self._array, self._path, self.shape = array, path, array.shape[1:]

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the rows as float32, all of them finite."""
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
            rows = torch.from_numpy(np.ascontiguousarray(self._array[indices.numpy()], np.float32))
        bad = ~rows.isfinite().flatten(1).all(1)
        if bad.any():
            i = int(indices[bad][0])
            raise BadDataError(f"path: sample {i} of {self._path} has values that are not finite in float32")
        return rows


class ArrayImages(Points):
    """Images [N, H, W], [N, C, H, W] or [N, H, W, C] of an array, C being 1 or 3, the second of both if it can be.

    They are uint8, which is scaled to [-1, 1], or floats, which have to lie there; without a ``size`` as large as they
    are. If ``padded``, black is put round them first, up to the next square of a power of two: 28x28 becomes 32x32, and
    only those up to 16x16 with no ``size`` stay as they are. ``path`` is for messages.
    """

    def __init__(self, array: np.ndarray, path: Path, size: int | None = None, *, padded: bool = False) -> None:
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[1] not in (1, 3):
            array = np.moveaxis(array, -1, 1)
        super().__init__(array, path)
        channels, height, width = self.shape
        self._pad = (0, 0, 0, 0)
        if padded and (size is not None or max(height, width) > AS_THEY_ARE):
            side = 1 << (max(height, width) - 1).bit_length()
            left, top = (side - width) // 2, (side - height) // 2
            self._pad = (left, side - width - left, top, side - height - top)
            height = width = side
        self.shape = (channels, height, width) if size is None else (channels, size, size)

    def __getitem__(self, indices: Tensor) -> Tensor:
        images = super().__getitem__(indices)
        if self._array.dtype == np.uint8:
            images = images / 127.5 - 1
        else:
            least, most = images.aminmax()
            fine = bool(torch.maximum(-least, most) <= 1 + 1e-3)  # beyond 1 it may be rounding
            _expect(fine, "float images in [-1, 1]", f"{least:g} to {most:g} in {self._path}")
        images = pad(images, self._pad, value=-1.0)
        if images.shape[1:] == self.shape:
            return images
        size = self.shape[-1]
        scale = size / min(images.shape[-2:])
        height, width = (max(size, round(side * scale)) for side in images.shape[-2:])
        images = interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
        top, left = (height - size) // 2, (width - size) // 2
        return images[..., top : top + size, left : left + size].contiguous()


def read_npy(path: Path | str, size: int | None = None) -> Points | ArrayImages:
    """Return the samples of a .npy file, which is mapped into memory and not read.

    Floats [N, D] are points, which take no ``size``; images are what :class:`ArrayImages` takes.
    """
    _check_size(size)
    path = _existing(Path(path))
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # of numpy.load, the part that takes .npy and no pickles
    except (ValueError, EOFError, SyntaxError, TypeError) as error:  # the header is an expression
        raise BadDataError(f"path: {path} is no usable npy file ({error})") from error
    got = f"{array.dtype} {list(array.shape)} in {path}"
    floats = np.issubdtype(array.dtype, np.floating)
    _expect(array.size > 0, "samples", f"none: {got}")
    if array.ndim == 2 and floats:
        if size is not None:
            raise ValueError(f"size: is for images, and {path} holds points")
        return Points(array, path)
    images = array.ndim == 3 or (array.ndim == 4 and not {1, 3}.isdisjoint(array.shape[1::2]))
    wanted = "floats [N, D], or uint8 or floats [N, H, W], [N, C, H, W] or [N, H, W, C] with C 1 or 3"
    _expect(images and (floats or array.dtype == np.uint8), wanted, got)
    return ArrayImages(array, path, size)


def read_idx(path: Path | str, size: int | None = None) -> ArrayImages:
    """Return gray images in the format of MNIST's files, gzipped or not: 28x28 is padded to 32x32, then scaled to size.

    ``path`` is a file, or a directory that has MNIST's training images under their own name.
    """
    path = Path(path)
    _check_size(size)
    if path.is_dir():
        there = [path / name for name in IDX_NAMES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"path: no {' or '.join(IDX_NAMES)} in {path}")
        path = there[0]
    content = _existing(path).read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise BadDataError(f"path: {path} is damaged ({error})") from error
    magic, wanted = int.from_bytes(content[:4], "big"), f"an idx file of images, which begins with 0x{IDX_IMAGES:08x}"
    _expect(len(content) >= 16 and magic == IDX_IMAGES, wanted, f"0x{magic:08x} and {len(content)} bytes in {path}")
    n, height, width = (int(side) for side in np.frombuffer(content, ">u4", 3, 4))
    elements, rest = n * height * width, len(content) - 16
    _expect(rest == elements, f"{n} images of {height}x{width} after 16 bytes in {path}", f"{rest} bytes there")
    _expect(elements > 0, "images", f"{n} of {height}x{width} in {path}")
    return ArrayImages(np.frombuffer(content, np.uint8, offset=16).reshape(n, height, width), path, size, padded=True)


def read(
    kind: str, path: Path | str, *, size: int | None = None, channels: int | None = None, workers: int = 0
) -> ImageFolder | Points | ArrayImages:
    """Return samples of one of :data:`KINDS`, as its own function does; channels and workers are for a folder."""
    if kind == "folder":
        return ImageFolder(path, size or FOLDER_SIZE, channels, workers)
    if channels is not None:
        raise ValueError(f"channels: is for a folder of images, got {channels} for {kind}:{path}")
    return read_npy(path, size) if kind == "npy" else read_idx(path, size)
