"""Makes small folders of images in the formats of Clothing1M and WebVision, and of own images, drawn from handwritten
digits.

Every maker returns the data folder. The images vary in size and in shape, and class c looks like the digit c % 10 in
the c // 10-th colour, so that a net can learn it. Nothing here needs pytest.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.data import grey_digits

PAPERS = [(255, 255, 255), (250, 190, 120), (130, 210, 250), (150, 240, 150), (240, 150, 220)]  # for c // 10 = 0 ... 4
WNIDS = [f"n{1440764 + 5 * c:08}" for c in range(50)]


@functools.cache
def _grey_by_digit() -> list[np.ndarray]:
    images, labels = grey_digits(1797)
    return [images[labels == digit] for digit in range(10)]


class Artist:
    """Draws images of given classes, each of another digit and size. The same seed gives the same sequence."""

    def __init__(self, seed: int, sides: tuple[int, int] = (24, 48)):
        self.rng = np.random.default_rng(seed)
        self.sides = sides

    def image(self, c: int) -> Image.Image:
        """RGB, dark digit on coloured paper; both sides between the two of `sides`."""
        digits = _grey_by_digit()[c % 10]
        ink = digits[self.rng.integers(len(digits))][..., None] / 255  # (8, 8, 1)
        pixels = np.array(PAPERS[c // 10]) * (1 - 0.9 * ink)
        width, height = self.rng.integers(self.sides[0], self.sides[1] + 1, 2).tolist()
        return Image.fromarray(pixels.round().astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)

    def draw(self, path: Path, c: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image(c).save(path, "JPEG", quality=90)

    def noisy(self, labels: np.ndarray, noise: float, num_class: int) -> np.ndarray:
        """Each label becomes another class with probability `noise`."""
        wrong = self.rng.random(len(labels)) < noise
        return np.where(wrong, (labels + self.rng.integers(1, num_class, len(labels))) % num_class, labels)


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_clothing1M(
    root: str | Path,
    n_train: int = 56,
    n_val: int = 28,
    n_test: int = 28,
    noise: float = 0.4,
    num_class: int = 14,
    images_folder: bool = True,
    sides: tuple[int, int] = (24, 48),
    seed: int = 0,
) -> Path:
    """Key lists as published, paths like images/7/17/0000000017,1000000017.jpg. Classes in turn, 0, 1, ... 13, 0, ...

    images_folder: whether the images are below images/ or directly in the folder; the lists are the same. As in the
    published files, the label files hold more images than the key lists.
    """
    root, artist = Path(root), Artist(seed, sides)
    n = n_train + n_val + n_test
    keys = [f"images/{i % 10}/{i % 100:02}/{i:010},{10**9 + i}.jpg" for i in range(n)]
    splits = np.split(np.arange(n), [n_train, n_train + n_val])
    labels = np.concatenate([np.arange(len(rows)) % num_class for rows in splits])
    for key, label in zip(keys, labels, strict=True):
        artist.draw(root / (key if images_folder else key.removeprefix("images/")), label)
    for name, rows in zip(("noisy_train", "clean_val", "clean_test"), splits, strict=True):
        _write(root / f"{name}_key_list.txt", [keys[i] for i in rows])
    noisy_labels = artist.noisy(labels, noise, num_class)
    noisy_label_kv = range(n_train + n_val // 2)
    clean_label_kv = [*range(0, n_train, 4), *range(n_train, n)]
    _write(root / "noisy_label_kv.txt", [f"{keys[i]} {noisy_labels[i]}" for i in noisy_label_kv])
    _write(root / "clean_label_kv.txt", [f"{keys[i]} {labels[i]}" for i in clean_label_kv])
    return root


def make_webvision(
    root: str | Path,
    n_train: int = 40,
    n_val: int = 20,
    n_imagenet: int = 20,
    noise: float = 0.2,
    num_class: int = 10,
    wnid_folders: bool = False,
    sides: tuple[int, int] = (24, 48),
    seed: int = 0,
) -> Path:
    """info/, google/, val_images_256/ and imagenet/val/ with `num_class` classes in turn; up to 50 can be drawn.

    After every tenth line the lists name an image of a later class, whose file is missing: the first `num_class`
    classes do not need it. wnid_folders: imagenet/val/n01440764/ instead of imagenet/val/0/.
    """
    root, artist = Path(root), Artist(seed, sides)

    def draw_all(n: int, name_of: Callable[[int, int], str]) -> tuple[list[str], np.ndarray]:
        labels = np.arange(n) % num_class
        names = [name_of(i, c) for i, c in enumerate(labels.tolist())]
        for name, c in zip(names, labels, strict=True):
            artist.draw(root / name, c)
        return names, labels

    def write_list(path: Path, names: list[str], labels: np.ndarray, later: str) -> None:
        lines = []
        for i, (name, label) in enumerate(zip(names, labels, strict=True)):
            lines.append(f"{name} {label}")
            if i % 10 == 9:
                lines.append(f"{later % i} {num_class + i % (1000 - num_class)}")
        _write(path, lines)

    names, labels = draw_all(n_train, lambda i, c: f"google/q{c + 1:04}/images{i % 3 + 1:06}/Zx_{i}-9Q.jpg")
    noisy_labels = artist.noisy(labels, noise, num_class)
    write_list(root / "info/train_filelist_google.txt", names, noisy_labels, "google/q1632/images000001/%d.jpg")
    names, labels = draw_all(n_val, lambda i, c: f"val_images_256/val{i:06}.jpg")
    names = [name.removeprefix("val_images_256/") for name in names]
    write_list(root / "info/val_filelist.txt", names, labels, "val9%05d.jpg")
    folders = WNIDS if wnid_folders else [str(c) for c in range(50)]
    draw_all(n_imagenet, lambda i, c: f"imagenet/val/{folders[c]}/ILSVRC2012_val_{i:08}.JPEG")
    _write(root / "info/synsets.txt", [f"{wnid} thing {c}, other name" for c, wnid in enumerate(WNIDS)])
    return root


def make_folder(
    root: str | Path, n: int = 24, num_class: int = 4, splits: tuple[str, ...] = (), sides=(16, 24), seed: int = 0
) -> Path:
    """n images in class folders c0, c1, ..., in turn; n in each of `splits` ("train", "test", ...)."""
    root, artist = Path(root), Artist(seed, sides)
    for split in splits or ("",):
        for i in range(n):
            artist.draw(root / split / f"c{i % num_class}" / f"{i:04}.jpg", i % num_class)
    return root


def make_digits(root: str | Path, wrong: float, seed: int = 0) -> tuple[Path, np.ndarray]:
    """scikit-learn's 1,797 digits, 8x8, as grey PNGs in class folders 0 to 9, named by their row; each is in another
    digit's folder with probability `wrong`. -> (the folder, the true labels)."""
    root, rng = Path(root), np.random.default_rng(seed)
    images, labels = grey_digits(1797)
    is_wrong = rng.random(len(labels)) < wrong
    noisy_labels = np.where(is_wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    for i, (image, label) in enumerate(zip(images, noisy_labels, strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{i:04}.png")
    return root, labels
