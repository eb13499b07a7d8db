"""Fashion-MNIST from disk or from its home page, label noise, and batches with augmentation."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import socket
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from bench import records

SIZE = 28
CLASSES = 10
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
CACHE_DIR = records.ROOT / "data" / "fashion-mnist"
TORCHVISION_DIR = records.ROOT / "data" / "torchvision"
KEPT = Path("FashionMNIST", "raw")  # where torchvision keeps the files, in the folder it is given
URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
TIMEOUT_S = 10

# sha256 of the compressed files as the authors publish them
FILES = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}

Opener = Callable[..., contextlib.AbstractContextManager[BinaryIO]]


class Images(NamedTuple):
    """Images with their labels."""

    images: Tensor  # [N, H, W], of one channel, or [N, C, H, W]; uint8
    labels: Tensor  # [N] int64


class Dataset(NamedTuple):
    """A training and a test set. `flip`: a mirrored image still belongs to its class."""

    name: str
    source: str
    train: Images
    test: Images
    flip: bool
    classes: int = CLASSES


class Augmentation(NamedTuple):
    """What is done to a batch besides shifts and flips: `before` them to uint8 pixels, and `after` normalising."""

    before: Callable[[Tensor, torch.Generator], Tensor] | None = None  # [B, C, H, W] uint8
    after: Callable[[Tensor, torch.Generator], Tensor] | None = None  # [B, C, H, W] float32


NOTHING_ELSE = Augmentation()


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, compressed or not.

    The format is two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit integer, and the data.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"Invalid idx file {path}: damaged gzip data ({error}).") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"Invalid idx file {path}: begins with {raw[:4].hex()!r}. Must begin with '000008'.")
    ndim = raw[3]
    header = 4 + 4 * ndim
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    count = torch.Size(shape).numel()
    if len(raw) != header + count:
        raise ValueError(
            f"Invalid idx file {path}: {len(raw)} bytes. Must be {header + count} for {shape=} in its header."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header).reshape(shape).clone()


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.is_file()), None)


def has_files(folder: Path) -> bool:
    """Return whether `folder` holds all four files, compressed or not."""
    return all(_find(folder, name) for name in FILES)


def _read_split(folder: Path, prefix: str) -> Images:
    images_name, labels_name = (name for name in FILES if name.startswith(prefix))
    paths = {name: _find(folder, name) for name in (images_name, labels_name)}
    for name, path in paths.items():
        if path is None:
            raise FileNotFoundError(f"No {name}.gz or {name} in {folder}.")
    images, labels = (read_idx(path) for path in paths.values() if path is not None)
    if images.dim() != 3 or images.shape[1:] != (SIZE, SIZE):
        raise ValueError(f"Invalid images of shape {list(images.shape)} in {folder}. Must be [N, 28, 28].")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"Invalid labels of shape {list(labels.shape)} in {folder}. Must be [{len(images)}].")
    if labels.numel() and int(labels.max()) >= CLASSES:
        raise ValueError(f"Invalid label {int(labels.max())} in {folder}. Must be < {CLASSES}.")
    return Images(images, labels.long())


def load_folder(folder: Path) -> Dataset:
    """Read Fashion-MNIST from a folder with the four idx files."""
    return Dataset("Fashion-MNIST", str(folder), _read_split(folder, "train"), _read_split(folder, "t10k"), flip=True)


def by_torchvision(folder: Path, download: bool = False) -> Dataset:
    """Read what torchvision keeps in a folder, or has it download; it checks sums of its own.

    Raises:
        RuntimeError: if there is no torchvision, or the files are not there.
    """
    reader = records.torchvision("torchvision's FashionMNIST").datasets.FashionMNIST
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # torchvision sets none
    try:
        parts = [reader(folder, train=train, download=download) for train in (True, False)]
    finally:
        socket.setdefaulttimeout(before)
    train, test = (Images(part.data, part.targets) for part in parts)
    return Dataset("Fashion-MNIST", str(folder), train, test, flip=True)


def download(folder: Path, opener: Opener = urllib.request.urlopen) -> None:
    """Fetch the four files; each gets its name only once its checksum is right."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sha256 in FILES.items():
        target = folder / f"{name}.gz"
        if target.exists():
            continue
        with opener(URL + target.name, timeout=TIMEOUT_S) as response:
            content = response.read()
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ValueError(f"Invalid download of {target.name}: sha256 is {found}. Must be {sha256}.")
        aside = target.with_suffix(f".part{os.getpid()}")
        aside.write_bytes(content)
        os.replace(aside, target)


def load_digits() -> Dataset:
    """Return scikit-learn's 1797 digits, 8x8 enlarged to 24x24 and padded to 28x28; one fifth is the test set."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images) * (255 / 16)
    images = images.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    images = torch.nn.functional.pad(images, (2, 2, 2, 2)).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    split = {part: Images(images[index], labels[index]) for part, index in (("train", train), ("test", test))}
    return Dataset("digits", "scikit-learn", **split, flip=False)


def load(data_dir: Path | None = None, say: Callable[[str], None] = print) -> Dataset:
    """Return the first that is there: `data_dir`, Debian's package, an earlier download, a download, digits.

    An explicit `data_dir` is used or refused, never replaced by another source. It may be a folder of torchvision's,
    which also downloads where it can be imported.
    """
    if data_dir is not None:
        return load_folder(data_dir / KEPT if (data_dir / KEPT).is_dir() else data_dir)
    for folder in (DEBIAN_DIR, CACHE_DIR, TORCHVISION_DIR / KEPT):
        if has_files(folder):
            return load_folder(folder)
    with contextlib.suppress(RuntimeError, OSError, http.client.HTTPException):
        return by_torchvision(TORCHVISION_DIR, download=True)
    try:
        say(f"Downloading Fashion-MNIST to {CACHE_DIR}")
        download(CACHE_DIR)
    except (OSError, http.client.HTTPException, ValueError) as error:
        say(
            f"Fashion-MNIST is not installed (Debian: dataset-fashion-mnist) and not downloaded: {error}\n"
            "Using scikit-learn's digits instead: the figures say nothing about Fashion-MNIST."
        )
        return load_digits()
    return load_folder(CACHE_DIR)


def corrupt_labels(labels: Tensor, fraction: float, seed: int, classes: int = CLASSES) -> Tensor:
    """Add symmetric label noise: exactly round(fraction * N) labels get another class, each alike."""
    if not 0 <= fraction < 1:
        raise ValueError(f"Invalid {fraction=}. Must be in [0, 1).")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + shift) % classes
    return noisy


def subset(data: Images, size: int, seed: int) -> Images:
    """Return `size` of the images, drawn by `seed`; all of them if there are fewer."""
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[:size]
    return Images(data.images[chosen], data.labels[chosen])


class Batches:
    """Normalised batches [B, C, H, W] with random shifts and flips.

    Order and augmentation follow from (seed, epoch): a resumed run sees what an uninterrupted one sees, and
    both optimizers see the same epochs.

    Args:
        data: the training images.
        batch_size: the last, incomplete batch is dropped.
        shift: shift by up to this many pixels in each direction.
        flip: mirror every second image on average.
        reflect: what comes in at the border is the image's mirror, without the border's own pixels; or else black.
        augmentation: what else is done.
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        *,
        shift: int,
        flip: bool,
        seed: int,
        device: torch.device,
        reflect: bool = False,
        augmentation: Augmentation = NOTHING_ELSE,
    ) -> None:
        if not 1 <= batch_size <= len(data.labels):
            raise ValueError(f"Invalid {batch_size=}. Must be in [1, {len(data.labels)}], the images.")
        self.mean, self.std = statistics(data.images)
        self.labels = data.labels.to(device)
        self.images = channelled(data.images).to(device)
        self.batch_size, self.shift, self.flip = batch_size, shift, flip
        self.seed, self.device, self.reflect, self.augmentation = seed, device, reflect, augmentation

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        before, after = self.augmentation
        for index in order.split(self.batch_size)[: len(self)]:
            rows, columns = self._windows(len(index), generator)
            at = index.to(self.device)
            images = self.images[at] if before is None else before(self.images[at], generator)
            border = 0 if self.reflect else self.shift
            padded = torch.nn.functional.pad(images, (border,) * 4).movedim(1, -1)
            image = torch.arange(len(index), device=self.device)
            shifted = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
            normalised = normalise(shifted, self.mean, self.std)
            yield normalised if after is None else after(normalised, generator), self.labels[at]

    def _windows(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return row and column numbers in the padded image, [count, H] and [count, W]; with `reflect` in its own."""
        height, width = (torch.arange(size) for size in self.images.shape[-2:])
        top, left = torch.randint(0, 2 * self.shift + 1, (2, count, 1), generator=generator)
        columns = width.expand(count, len(width))
        if self.flip:
            mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        windows = top + height, left + columns
        if self.reflect:
            windows = tuple(_mirrored(w - self.shift, n) for w, n in zip(windows, self.images.shape[-2:], strict=True))
        return windows[0].to(self.device), windows[1].to(self.device)


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Return places from -size to 2 size - 2, those outside of [0, size) mirrored at the border pixel."""
    return size - 1 - (size - 1 - places.abs()).abs()


def channelled(images: Tensor) -> Tensor:
    """Return [N, H, W] or [N, C, H, W] as [N, C, H, W]."""
    return images.unsqueeze(1) if images.dim() == 3 else images


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the pixels of each channel, scaled to [0, 1]; [C, 1, 1] float32."""
    values, found = torch.arange(256, dtype=torch.float64) / 255, []
    for channel in channelled(images).unbind(dim=1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = counts @ values / counts.sum()
        found.append((mean, (counts @ (values - mean).square() / (counts.sum() - 1)).sqrt()))
    mean, std = (torch.stack(column).float()[:, None, None] for column in zip(*found, strict=True))
    return mean, std


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn [B, H, W] or [B, C, H, W] uint8 into [B, C, H, W] float32, channels last, of mean 0 and variance 1."""
    scaled = (channelled(images).float() / 255 - mean.to(images.device)) / std.to(images.device)
    return scaled.contiguous(memory_format=torch.channels_last)
