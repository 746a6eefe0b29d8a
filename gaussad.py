# SPDX-License-Identifier: MIT
"""Transfer Learning Gaussian Anomaly Detection by Fine-tuning Representations, in one module.

Rippel, Chavan, Lei, Merhof: IMPROVE 2022, arXiv 2108.04116. Read it top to bottom as the method:

    1. Data         normal images, split into those to fit and those held out
    2. Features     the levels φ_l of an ImageNet classifier, pooled over space
    3. Gaussian     N(μ_l, Σ_l) of each level; Σ_l shrunk by Ledoit-Wolf
    4. Detector     score(x) = Σ_l d_l(x), d_l² = (φ_l(x) - μ_l)ᵀ Σ_l⁻¹ (φ_l(x) - μ_l);
                    its mean over normal images is the loss that fine-tunes φ
    5. Validator    held-out normal images against augmented ones say when to stop
    6. Metrics      AUROC, AU-PRO

In ten lines, with image batches (B, 3, H, W), uint8 or float in [0, 1], that can be passed over
again, such as a list or a DataLoader:

    detector = GaussianAD(FeatureExtractor("efficientnet_b4")).fit(batches)
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-4)
    for images in batches:                  # the Gaussian stays as it was fitted
        optimizer.zero_grad()
        detector.loss(images).backward()
        optimizer.step()
    detector.fit(batches)                   # refit on the fine-tuned features
    with torch.no_grad():
        scores = detector(images)           # (B,): the higher, the more anomalous

Nothing here prints (but torchvision, while it downloads) or moves a tensor to another device.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# ------------------------------------------------------------------------------------------------
# 1. Data: the MVTec AD layout
# ------------------------------------------------------------------------------------------------

NORMAL = "good"  # MVTec AD's name for the folder of normal images
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CACHE_BYTES = 4 * 2**30  # decoded images that one `Images` keeps in memory, at most


@dataclass(frozen=True)
class Sample:
    """One image file of a data set in the MVTec AD layout."""

    path: Path
    defect: str  # name of the folder the image lies in; "good" for a normal image
    mask: Path | None  # where its defect is, if the data set says so

    @property
    def label(self) -> int:
        """0 for a normal image, 1 for an anomalous one."""
        return int(self.defect != NORMAL)


def list_categories(root: str | Path) -> list[str]:
    """The names of the folders in `root` that have a train or a test folder, sorted.

    Raises ValueError where `root` is no folder.
    """
    if not Path(root).is_dir():
        raise ValueError(f"no data set at {root}: there is no such folder")
    folders = [path for split in ("train", "test") for path in Path(root).glob(f"*/{split}")]
    return sorted({path.parent.name for path in folders if path.is_dir()})


def list_samples(root: str | Path, category: str, split: str) -> list[Sample]:
    """The images of `root/category/split/<defect>/`, sorted by defect and name.

    `split` is "train" or "test". A mask is `root/category/ground_truth/<defect>/<stem>_mask.png`
    where that file exists. Raises ValueError where the folders are missing or hold no image.
    """
    root = Path(root)
    folder = root / category / split
    if category not in (categories := list_categories(root)):
        names = ", ".join(categories) or "none (a category is a folder with train/good in it)"
        raise ValueError(f"no category {category!r} in {root}; there are: {names}")
    wanted = folder / NORMAL if split == "train" else folder
    if not wanted.is_dir():
        raise ValueError(f"no folder {wanted}: the MVTec AD layout has its {split} images there")
    folders = [wanted] if split == "train" else _visible_in(wanted)
    samples = [
        Sample(path, defect.name, _mask_of(root / category, defect.name, path.stem))
        for defect in folders
        if defect.is_dir()
        for path in _images_in(defect)
    ]
    if not samples:
        raise ValueError(f"no images in {wanted}: it has no file {', '.join(sorted(SUFFIXES))}")
    return samples


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files: those named, and those in the folders named, sorted by name.

    Raises ValueError for a path that does not exist and a folder without an image.
    """
    files = []
    for path in map(Path, paths):
        found = _images_in(path) if path.is_dir() else [path] if path.exists() else []
        if not found:
            raise ValueError(f"no images at {path}: give image files, or folders of them")
        files += found
    return files


def _visible_in(folder: Path) -> list[Path]:
    """Sorted, without what is hidden, such as an editor's folders."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    files = _visible_in(folder)
    return [path for path in files if path.suffix.lower() in SUFFIXES and path.is_file()]


def _mask_of(category: Path, defect: str, stem: str) -> Path | None:
    path = category / "ground_truth" / defect / f"{stem}_mask.png"
    return path if path.is_file() else None


def split_normal(samples: Sequence, seed: int, few: int = 40) -> list[tuple[list, list]]:
    """Shuffle normal samples by `seed` and hold out a fifth of them: [(fit, held-out)].

    Of `few` samples a fifth says little. Where there are fewer, cross-fitting: five such splits (of
    less than ten samples, as many as hold out two or more each), which hold out each sample once.
    At least four are then to fit, of which a Gaussian needs three, and two held out, for mixing.
    Raises ValueError for fewer than six. The splits are our choice; the paper names none we know.
    """
    n = len(samples)
    if n < 6:
        raise ValueError(f"{n} normal images are too few: 6 are needed at the least")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = np.array_split(order, min(5, n // 2))

    def split(k: int) -> tuple[list, list]:
        fit = np.concatenate(parts[:k] + parts[k + 1 :])
        return [samples[i] for i in fit], [samples[i] for i in parts[k]]

    return [split(k) for k in range(len(parts) if n < few else 1)]


def load_image(path: str | Path, size: int) -> Tensor:
    """Read an image of any mode as RGB, upright, resized whole to a square: (3, size, size) uint8.

    The resize is Pillow's bilinear one, which averages over the source pixels when it shrinks;
    no crop and no padding, so that nothing of the part is lost (our choice). 16-bit images keep
    their whole range: 0..65535 becomes 0..255. Raises ValueError, naming the file, if it cannot.
    """
    with _opened(path) as file:
        image = _to_rgb(ImageOps.exif_transpose(file))
        return F.pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def load_mask(path: str | Path, size: int) -> Tensor:
    """Read where a defect is, all that is not black, resized by nearest neighbour: (size, size)
    bool.

    Raises ValueError, naming the file, if it cannot.
    """
    with _opened(path) as file:
        mask = file.convert("L").resize((size, size), Image.Resampling.NEAREST)
        return F.pil_to_tensor(mask)[0] > 0


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except MemoryError:
        raise
    except Exception as error:  # a decoder raises whatever it likes on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the image {path}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range; save as 8 or 16 bits")
    if image.mode == "P":  # a palette may carry transparency, which goes through RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


class Images:
    """The images of some files as uint8 batches, decoded by threads ahead of their use.

    Decoded images are kept for the next pass, up to CACHE_BYTES, the least recently used first
    to go. Threads, not processes: Pillow decodes and resizes outside Python's lock, one cache
    serves all, and an error in a file reaches the caller as it was raised.
    """

    def __init__(self, paths: Sequence[str | Path], size: int, workers: int = 2) -> None:
        self.paths, self.size, self.workers = list(paths), size, workers
        fitting = CACHE_BYTES // (3 * size * size)
        self._load = lru_cache(fitting)(lambda index: load_image(self.paths[index], size))

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int, shuffle: torch.Generator | None = None) -> Iterator[Tensor]:
        """Yield every image once in batches (B, 3, size, size), in an order drawn by `shuffle`."""
        n = len(self)
        order = range(n) if shuffle is None else torch.randperm(n, generator=shuffle).tolist()
        todo = deque(order[i : i + batch_size] for i in range(0, n, batch_size))
        ahead = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            while todo or ahead:
                while todo and len(ahead) < 2:  # one batch in use, one being decoded
                    ahead.append([pool.submit(self._load, i) for i in todo.popleft()])
                yield torch.stack([future.result() for future in ahead.popleft()])


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    A reader, or a run that is killed, sees the old file or the new one, never a part of one.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def draw_demo(root: str | Path, size: int = 128, seed: int = 0) -> None:
    """Draw a small data set in the MVTec AD layout at `root`, category "demo": a perforated disc.

    48 normal images to train; to test, 16 normal ones and 8 of each of three defects, with masks.
    """
    rng = np.random.default_rng(seed)
    plan = [("train", NORMAL, 48), ("test", NORMAL, 16)]
    plan += [("test", defect, 8) for defect in ("hole_missing", "scratch", "stain")]
    for split, defect, count in plan:
        folder = Path(root) / "demo" / split / defect
        masks = Path(root) / "demo" / "ground_truth" / defect
        for path in (folder, masks) if defect != NORMAL else (folder,):
            path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = _draw_disc(size, defect, rng)
            image.save(folder / f"{i:03d}.png")
            if defect != NORMAL:
                mask.save(masks / f"{i:03d}_mask.png")


def _draw_disc(size: int, defect: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A disc with six holes, turned at random and lit a little differently each time."""
    metal, dark = (int(v + rng.normal(0, 4)) for v in (170, 40))
    image, mask = Image.new("L", (size, size), dark), Image.new("L", (size, size), 0)
    centre, turn = size / 2 + rng.normal(0, size / 100, 2), rng.uniform(0, np.pi / 3)
    angles = turn + np.arange(6) * np.pi / 3
    holes = centre + 0.26 * size * np.stack([np.cos(angles), np.sin(angles)], 1)
    ImageDraw.Draw(image).circle(tuple(centre), 0.42 * size, fill=metal)
    for i, hole in enumerate(holes):
        where = mask if defect == "hole_missing" and i == 0 else image
        ImageDraw.Draw(where).circle(tuple(hole), 0.07 * size, fill=255 if where is mask else dark)
    place = centre + rng.uniform(-0.15, 0.15, 2) * size
    if defect == "scratch":
        end = place + rng.uniform(0.1, 0.2, 2) * rng.choice([-1, 1], 2) * size
        ImageDraw.Draw(mask).line([*place, *end], fill=255, width=max(1, size // 64))
    if defect == "stain":
        ImageDraw.Draw(mask).circle(tuple(place), rng.uniform(0.03, 0.06) * size, fill=255)
    if defect in ("scratch", "stain"):
        image.paste(metal - 50, mask=mask)
    pixels = np.asarray(image) + rng.normal(0, 4, (size, size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


# ------------------------------------------------------------------------------------------------
# 2. Features: the levels of an ImageNet classifier
# ------------------------------------------------------------------------------------------------

BACKBONES = tuple(models.list_models(models, ["efficientnet_*", "mobilenet_*", "*resne*"]))


class FeatureExtractor(nn.Module):
    """The feature maps of some levels of a torchvision classifier.

    backbone    an EfficientNet (B0 to B7, V2), MobileNet (V2, V3) or ResNet, by torchvision's name
    levels      counted from 1. Level i is the output of the i-th child of torchvision's `features`
                (nine in EfficientNet-B4), or of a ResNet's stem and four stages. By default those
                of stride 16 or more: earlier ones see light and pose rather than the part (our
                choice; the authors' earlier paper, IEEE TIM 2021, sums all nine of B4, of which
                level 7 alone is better). Of a MobileNet, whose children are single blocks, the
                last block of each stage
    weights     "imagenet": torchvision's IMAGENET1K_V1, downloaded on first use; "random":
                torchvision's initialisation; else the path of a state dict of the backbone, which
                may lack the classifier

    The network is in evaluation mode always: batch norm keeps its ImageNet statistics, and there
    is no dropout or stochastic depth while fine-tuning (our choice: a Gaussian is fitted on few
    images, and noise in the features would blur it). Batch norm is then an affine map of each
    channel, and is folded into the convolution before it: the same features, but training takes
    half the time. Stages past the last level are dropped.
    Raises ValueError for an unknown backbone, a level out of range, or weights that do not fit;
    ConnectionError where the ImageNet weights cannot be had.
    """

    def __init__(
        self,
        backbone: str = "efficientnet_b4",
        levels: Sequence[int] | None = None,
        weights: str | Path = "imagenet",
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"no backbone {backbone!r}; there are: {', '.join(BACKBONES)}")
        stages = _stages(_classifier(backbone, weights).eval())
        self.backbone = backbone
        self.levels = _checked_levels(levels, stages, backbone)
        self.stages = nn.ModuleList(stages[: self.levels[-1]])
        _fold_batch_norm(self.stages)
        preset = models.get_model_weights(backbone)["IMAGENET1K_V1"].transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1))
        self.to(memory_format=torch.channels_last)  # same numbers, 1.6 times faster on a CPU
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode, whatever `mode` a parent module is put in."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """One feature map (B, C_l, H_l, W_l) float32 per level.

        images      (B, 3, H, W) RGB, uint8 in 0..255 or float in [0, 1] (torchvision's convention).
                    They are normalised here, as the backbone was trained.

        Raises ValueError for another dtype, whose range is not known.
        """
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise ValueError(f"images are uint8, or floating-point in [0, 1], not {images.dtype}")
        x = (F.to_dtype(images, self.mean.dtype, scale=True) - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for level, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if level in self.levels:
                maps.append(x)
        return maps


def _classifier(backbone: str, weights: str | Path) -> nn.Module:
    if weights == "random":
        return models.get_model(backbone, weights=None)
    if weights == "imagenet":
        try:
            return models.get_model(backbone, weights="IMAGENET1K_V1")
        except Exception as error:  # no network, or a file in torch's cache that is broken
            raise ConnectionError(
                f"cannot get the ImageNet weights of {backbone} ({error}); give the path of "
                "a state dict as weights, or 'random' to try things out"
            ) from error
    network = models.get_model(backbone, weights=None)
    _load_weights(network, backbone, weights)
    return network


def _load_weights(network: nn.Module, backbone: str, path: str | Path) -> None:
    def needed(state: dict) -> dict:  # all but the classifier and batch norm's step counters
        unneeded = re.compile(r"(classifier|fc)\.|.*\.num_batches_tracked$")
        return {k: v for k, v in state.items() if not unneeded.match(str(k))}

    state, wanted = needed(load_plain(path)), needed(network.state_dict())
    wrong = [k for k in {*state, *wanted} if _shape(state.get(k)) != _shape(wanted.get(k))]
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of {backbone}: {len(wrong)} tensors are missing, "
            f"unknown or of another shape, {min(map(str, wrong))!r} for one"
        )
    network.load_state_dict(state, strict=False)


def _shape(value: object) -> tuple | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def load_plain(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a file of plain tensors and settings with `weights_only`: no code in it is run.

    Raises ValueError, naming the file, where it is missing or anything else than a dict so saved.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files it did not write
            content = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the unpickler raises whatever it likes on other files
        raise ValueError(f"{path} is not a file of tensors saved by torch.save") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def save_plain(content: dict, path: str | Path) -> None:
    """Write tensors and settings atomically to `path`, to be read by `load_plain`.

    Raises OSError where the file cannot be written; the old one then stays.
    """
    try:
        with atomic_path(path) as part:
            torch.save(content, part)
    except RuntimeError as error:  # torch's, where a folder is missing or a disk is full
        raise OSError(f"cannot write {path}: is the disk full?") from error


def _stages(network: nn.Module) -> list[nn.Module]:
    if isinstance(network, models.ResNet):
        stem = nn.Sequential(network.conv1, network.bn1, network.relu)
        layer1 = nn.Sequential(network.maxpool, network.layer1)
        return [stem, layer1, network.layer2, network.layer3, network.layer4]
    return list(network.features)


def _fold_batch_norm(module: nn.Module) -> None:
    """w ← w γ / σ and b ← β - μ γ / σ in place of (w * x - μ) γ / σ + β, all through a module."""
    for (name, layer), (next_name, following) in pairwise(list(module.named_children())):
        if isinstance(following, nn.BatchNorm2d):
            folded = fuse_conv_bn_eval(layer, following)
            setattr(module, name, folded.requires_grad_())  # torch leaves the new bias without
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        _fold_batch_norm(child)


def _checked_levels(levels: Sequence[int] | None, stages: list, backbone: str) -> list[int]:
    n = len(stages)
    levels = _default_levels(stages, backbone) if levels is None else sorted(set(levels))
    if not levels or levels[0] < 1 or levels[-1] > n:
        raise ValueError(f"levels of {backbone} are 1 to {n}, not {levels}")
    return levels


def _default_levels(stages: list, backbone: str) -> list[int]:
    levels = [i for i, stride in enumerate(_strides(stages), start=1) if stride >= 16]
    if backbone.startswith("mobilenet"):  # a stage is a run of equal widths
        width = [stage.out_channels for stage in stages] + [0]
        levels = [i for i in levels if width[i - 1] != width[i]]
    return levels


@torch.no_grad()
def _strides(stages: Sequence[nn.Module]) -> list[int]:
    strides, x = [], next(stages[0].parameters()).new_zeros(1, 3, 64, 64)
    for stage in stages:
        x = stage(x)
        strides.append(64 // x.shape[-1])
    return strides


# ------------------------------------------------------------------------------------------------
# 3. Gaussian: mean, Ledoit-Wolf covariance, Mahalanobis distance
# ------------------------------------------------------------------------------------------------


class DegenerateError(ValueError):
    """Features or scores that are NaN or infinite, or do not vary: no Gaussian, no AUROC."""


class Moments:
    """The sums that a mean and a Ledoit-Wolf covariance need, from batches, in constant memory.

    With y = x - μ, over all n samples x in R^C added so far, float64:

        mean    μ               (..., C)        cubic       Σ ‖y‖² y    (..., C)
        scatter Σ y yᵀ          (..., C, C)     quartic     Σ ‖y‖⁴      (...)

    The cubic sum is there because moving μ changes the quartic one by it. The sums stay central
    all along, so that a large common offset in the data costs no digits, and neither the size nor
    the order of the batches matters beyond rounding. Leading dimensions are independent Gaussians.
    """

    count = 0

    def add(self, samples: Tensor) -> Moments:
        """Add samples (..., N, C). Returns self. Raises ValueError on NaN or infinity."""
        if samples.shape[-2] == 0:
            return self
        if not samples.isfinite().all():
            raise DegenerateError("the samples have NaN or infinite entries: no Gaussian fits them")
        x = samples.to(torch.float64)
        if self.count == 0:
            self._start(x)
        self.count += x.shape[-2]
        mean = self.mean + (x - self.mean.unsqueeze(-2)).sum(-2) / self.count
        moved = self._move_to(mean, self.count - x.shape[-2])
        y = x - mean.unsqueeze(-2)  # (..., N, C)
        squares = y.square().sum(-1, keepdim=True)  # (..., N, 1)
        self.cubic += (squares * y).sum(-2)
        self.quartic += squares.square().sum((-2, -1))
        rows = torch.cat([y, moved.unsqueeze(-2)], -2)
        self.scatter += rows.mT @ rows  # in place: a map's scatter takes hundreds of megabytes
        return self

    def _start(self, x: Tensor) -> None:
        self.mean, self.cubic = x.new_zeros(x[..., 0, :].shape), x.new_zeros(x[..., 0, :].shape)
        self.quartic = x.new_zeros(x.shape[:-2])
        self.scatter = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-1])

    def _move_to(self, mean: Tensor, n: int) -> Tensor:
        """Express the sums of n samples by y + s, s = μ - mean, with Σ y = 0 to simplify them.

        All but the scatter, to which n s sᵀ is still to be added: returns √n s.
        """
        s = self.mean - mean  # (..., C)
        trace = self.scatter.diagonal(dim1=-2, dim2=-1).sum(-1)
        scatter_s = (self.scatter @ s.unsqueeze(-1)).squeeze(-1)
        ss = s.square().sum(-1)
        self.quartic += (
            4 * (s * (self.cubic + scatter_s)).sum(-1) + 2 * ss * trace + n * ss.square()
        )
        self.cubic += 2 * scatter_s + (trace + n * ss).unsqueeze(-1) * s
        self.mean = mean
        return math.sqrt(n) * s

    def ledoit_wolf(self) -> tuple[Tensor, Tensor]:
        """The shrunk covariance (..., C, C) and the shrinkage (...) in [0, 1] of the samples added.

        Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
        matrices", section 3.2, where the norm is ‖A‖² = tr(A Aᵀ) / C:

            S = Σ y yᵀ / n,  m = tr(S) / C,  d² = ‖S - m I‖²
            b² = min(d², Σ_k ‖y_k y_kᵀ - S‖² / n²)
            covariance = (b²/d²) m I + (1 - b²/d²) S

        Constant features get the variance (b²/d²) m. Where all are constant, the covariance and
        the shrinkage are 0, up to rounding; with two samples the shrinkage is 0. Raises ValueError
        for one sample.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples at least, not {self.count}")
        n, c = self.count, self.mean.shape[-1]
        covariance = self.scatter / n  # S, until it is shrunk in place: it can be large
        m = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        s2 = torch.linalg.vector_norm(covariance, dim=(-2, -1)).square() / c  # ‖S‖²
        d2 = s2 - m.square()  # ‖S - m I‖²
        b2 = (self.quartic / (n * c) - s2) / n
        shrinkage = torch.where(d2 > 0, b2.clamp(min=0).minimum(d2) / d2, 0)
        covariance *= (1 - shrinkage)[..., None, None]
        covariance.diagonal(dim1=-2, dim2=-1).add_((shrinkage * m).unsqueeze(-1))
        return covariance, shrinkage


def ledoit_wolf(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Ledoit-Wolf covariance (..., C, C) and shrinkage (...) of samples (..., N, C): see Moments.

    Raises ValueError for a single sample, NaN or infinity.
    """
    return Moments().add(samples).ledoit_wolf()


def whitening_matrix(covariance: Tensor) -> Tensor:
    """W = L⁻¹ with Σ = L Lᵀ, so that W Σ Wᵀ = I; (..., C, C), by a triangular solve.

    Raises ValueError where the covariance is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info.any() or not factor.isfinite().all():
        raise DegenerateError("the covariance is not positive definite")
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


class Gaussian(nn.Module):
    """N(μ, Σ) as its mean (..., C) and whitening matrix (..., C, C), float64 buffers.

    Leading dimensions are independent Gaussians: none for pooled features, (h, w) for a feature map
    with a Gaussian at each location.
    """

    def __init__(self, mean: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    @classmethod
    def fit(cls, moments: Moments, floor: float = 0.0, covariance: str = "full") -> Gaussian:
        """The Gaussian of the samples in `moments`, its covariance shrunk by Ledoit-Wolf.

        floor       this share of the mean variance over all features and leading dimensions is
                    added to each variance: a location that is blank in all images has none of its
                    own, and no distance without

        covariance  "full"; for comparison "diagonal", its diagonal alone, or "identity", with which
                    the distance is the Euclidean one to the mean

        But for the identity, the scale of the features changes no distance beyond rounding, at
        least from 1e-6 to 1e6.

        Raises ValueError for fewer than three samples (of two, y_k y_kᵀ = S, and so the shrinkage
        is 0 and S singular), and where their spread is no more than float32's rounding.
        """
        if moments.count < 3:
            raise ValueError(f"a Gaussian needs three samples at least, not {moments.count}")
        sigma, _ = moments.ledoit_wolf()
        diagonal = sigma.diagonal(dim1=-2, dim2=-1)
        diagonal += floor * diagonal.mean()
        rounding = torch.finfo(torch.float32).eps ** 2 * moments.mean.square().mean(-1)
        if (diagonal.mean(-1) <= rounding).any():
            raise DegenerateError("the features do not vary: are the images all the same?")
        if covariance == "diagonal":
            sigma = torch.diag_embed(diagonal)
        if covariance == "identity":
            sigma = torch.diag_embed(torch.ones_like(diagonal))
        return cls(moments.mean, whitening_matrix(sigma))

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance d = ‖W (x - μ)‖ = √((x - μ)ᵀ Σ⁻¹ (x - μ)) of (B, ..., C): (B, ...).

        float64; its gradient at x = μ, where the root has none, is 0.
        """
        centred = features.to(self.mean.dtype) - self.mean
        whitened = torch.einsum("...ij,b...j->b...i", self.whitening, centred)
        return torch.linalg.vector_norm(whitened, dim=-1)


# ------------------------------------------------------------------------------------------------
# 4. Detector
# ------------------------------------------------------------------------------------------------


COVARIANCES = ("full", "diagonal", "identity")
MAP_FLOOR = 1e-3  # of the mean variance, added at every location of a map (our choice)


class GaussianAD(nn.Module):
    """Gaussian anomaly detection: a feature extractor, one Gaussian per level, and for the anomaly
    map one Gaussian per location of some levels.

    Images are what FeatureExtractor takes, on the detector's device, all of one size. That is a
    CPU or a CUDA GPU, and `.half()` or `.float()` would take the Gaussians out of float64. On a GPU
    switch TF32 off where scores are made (`torch.backends.cudnn.allow_tf32 = False`): the
    directions of least variance carry the signal, and they are the first that rounding drowns.

    map_levels      levels of the extractor that make the anomaly map; by default those of stride
                    16 (or nearest to it): coarser ones lose the place, finer ones know the texture
                    but not the part. The Gaussians of a level take 8 h w C² bytes

    covariance      "full", "diagonal" or "identity": see `Gaussian.fit`

    Raises ValueError for a map level that the extractor has not, or another covariance.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        map_levels: Sequence[int] | None = None,
        covariance: str = "full",
    ) -> None:
        super().__init__()
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance is one of {', '.join(COVARIANCES)}, not {covariance!r}")
        self.extractor, self.covariance = extractor, covariance
        self.map_levels = _checked_map_levels(map_levels, extractor)
        self.gaussians = nn.ModuleList()  # one per level, once fitted
        self.map_gaussians = nn.ModuleList()  # one per map level, each (h, w) Gaussians
        self.image_size: list[int] | None = None  # [H, W] of the images it was fitted to
        self._set_calibration(math.nan, math.nan, math.nan)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> GaussianAD:
        """Fit all Gaussians to normal images in one pass, in constant memory. Returns self.

        What `calibrate` stored stays, so that thresholds can be had from images held out, and the
        Gaussians then be fitted to all. Raises ValueError for fewer than three images, images of
        several sizes, or features that are not finite or do not vary.
        """
        pooled, located = defaultdict(Moments), defaultdict(Moments)
        size = None
        for images in batches:
            size = size or images.shape[-2:]
            if images.shape[-2:] != size:
                sizes = [list(size), list(images.shape[-2:])]
                raise ValueError(f"images of several sizes, {sizes}: resize them to one")
            for level, features in zip(self.extractor.levels, self.extractor(images)):
                pooled[level].add(features.mean((-2, -1)))  # (B, C)
                if level in self.map_levels:
                    located[level].add(features.permute(2, 3, 0, 1))  # (h, w, B, C)
        self.gaussians = self._fit_all(self.extractor.levels, pooled)
        self.map_gaussians = self._fit_all(self.map_levels, located, MAP_FLOOR)
        self.image_size = list(size)
        return self

    def _fit_all(
        self, levels: list[int], moments: dict[int, Moments], floor: float = 0.0
    ) -> nn.ModuleList:
        gaussians = nn.ModuleList()
        for level in levels:  # popped, so that a level's sums are gone when the next is computed
            sums = moments.pop(level, Moments())
            gaussians.append(Gaussian.fit(sums, floor, self.covariance))
        return gaussians

    def forward(self, images: Tensor) -> Tensor:
        """Anomaly score of each image: Σ_l d_l, the sum over levels of the distance; (B,) float64.

        Raises ValueError before fit, or for images of another size than the fitted ones.
        """
        return self._scores(self._features(images))

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Anomaly score of each pixel, (B, H, W) float32, at the size of the images.

        The Mahalanobis distance at each location of a map level to the Gaussian of that location,
        bilinearly resized to the image and summed over the map levels (our choice; a Gaussian per
        location is PaDiM's, Defard et al. 2020). Raises ValueError as `forward`.
        """
        return self._maps(self._features(images))

    def scores_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `anomaly_map` from one pass through the network: (B,) and (B, H, W)."""
        features = self._features(images)
        return self._scores(features), self._maps(features)

    def _features(self, images: Tensor) -> dict[int, Tensor]:
        if self.image_size != list(images.shape[-2:]):
            fitted = f"was fitted to {self.image_size}" if self.image_size else "is not fitted"
            raise ValueError(f"images of {list(images.shape[-2:])}, but the detector {fitted}")
        return dict(zip(self.extractor.levels, self.extractor(images)))

    def _scores(self, features: dict[int, Tensor]) -> Tensor:
        levels = zip(self.gaussians, features.values())
        return torch.stack([g.distance(maps.mean((-2, -1))) for g, maps in levels]).sum(0)

    def _maps(self, features: dict[int, Tensor]) -> Tensor:
        total = 0
        for level, gaussian in zip(self.map_levels, self.map_gaussians):
            distance = gaussian.distance(features[level].permute(0, 2, 3, 1))  # (B, h, w)
            total = total + nn.functional.interpolate(
                distance.float().unsqueeze(1), self.image_size, mode="bilinear"
            )
        return total.squeeze(1)

    @torch.no_grad()
    def held_out_scores(self, batches: Iterable[Tensor]) -> Tensor:
        """What `calibrate` needs of held-out normal images, (N, 3) float64 on their device: the
        score, the maximum of the map, and the 99 % quantile of its pixels.

        Raises ValueError before fit, or where there is no image.
        """
        found = []
        for images in batches:
            scores, maps = self.scores_and_maps(images)
            values = maps.flatten(1).sort()[0].double()
            usual = values[:, int(0.99 * values.shape[1])]
            found.append(torch.stack([scores, values[:, -1], usual], 1))
        if not found:
            raise ValueError("no normal images to calibrate by")
        return torch.cat(found)

    def calibrate(self, held_out_scores: Tensor, quantile: float = 0.99) -> GaussianAD:
        """Learn from held-out normal images what is usual. Returns self.

        threshold       () what a share `quantile` of normal images score below (`tail_quantile`)
        map_threshold   () the same of the maximum of an image's map
        map_usual       () the (lower) median over images of the 99 % quantile of the map's pixels:
                        with map_threshold, a scale of colours that is the same for all images

        The scores (N, 3) are those of `held_out_scores`: of this detector, or of several put
        together, each fitted to other images and scoring the rest. An image above a threshold is
        classified as anomalous. Raises ValueError as `tail_quantile`.
        """
        scores, maxima, usual = held_out_scores.unbind(1)
        self._set_calibration(
            tail_quantile(scores, quantile), tail_quantile(maxima, quantile), usual.median().item()
        )
        return self

    def _set_calibration(self, threshold: float, map_threshold: float, map_usual: float) -> None:
        new = partial(torch.tensor, dtype=torch.float64, device=self.extractor.mean.device)
        self.register_buffer("threshold", new(threshold))
        self.register_buffer("map_threshold", new(map_threshold))
        self.register_buffer("map_usual", new(map_usual))

    def loss(self, images: Tensor) -> Tensor:
        """The mean score of normal images, which fine-tuning minimises; the Gaussian is fixed.

        The gradient is finite everywhere, at distance 0 too.
        """
        return self.forward(images).mean()

    def save(self, path: str | Path) -> None:
        """Write tensors and settings, all that `load` needs, atomically to `path`."""
        settings = {"backbone": self.extractor.backbone, "levels": self.extractor.levels}
        content = {
            "settings": settings,
            "map_levels": self.map_levels,
            "covariance": self.covariance,
            "image_size": self.image_size,
            "state": self.state_dict(),
        }
        save_plain(content, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> GaussianAD:
        """Rebuild what `save` wrote, on `device`; nothing is downloaded, no code in it is run.

        A blank image is scored, to see that it works. Raises ValueError where the file is missing
        or is not a detector.
        """
        content = load_plain(path, device)
        try:
            with torch.device("meta"):  # no memory and no random numbers for weights to come
                extractor = FeatureExtractor(**content["settings"], weights="random")
                detector = cls(extractor, content["map_levels"], content["covariance"])
            state, detector.image_size = content["state"], content["image_size"]
            for name, levels in (("gaussians", extractor.levels),
                                 ("map_gaussians", detector.map_levels)):
                for i in range(len(levels) if detector.image_size else 0):
                    mean, whitening = state[f"{name}.{i}.mean"], state[f"{name}.{i}.whitening"]
                    getattr(detector, name).append(Gaussian(mean, whitening))
            detector.load_state_dict(state, assign=True)
            detector._check(device)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except (AttributeError, LookupError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a detector saved by this gaussad.py") from error
        return detector

    @torch.no_grad()
    def _check(self, device: torch.device | str) -> None:
        """Score a blank image: shapes, sizes and dtypes that do not go together raise an error."""
        if self.image_size is not None:
            found = self.scores_and_maps(torch.zeros(1, 3, *self.image_size, device=device))
            if not all(values.isfinite().all() for values in found):
                raise ValueError("the network or the Gaussians hold NaN or infinity")


def _checked_map_levels(levels: Sequence[int] | None, extractor: FeatureExtractor) -> list[int]:
    if levels is None:
        strides = _strides(extractor.stages)
        octaves = {level: abs(math.log2(strides[level - 1] / 16)) for level in extractor.levels}
        levels = [level for level, off in octaves.items() if off == min(octaves.values())]
    levels = sorted(set(levels))
    if not levels or not set(levels) <= set(extractor.levels):
        raise ValueError(f"map levels {levels} are not among the levels {extractor.levels}")
    return levels


def tail_quantile(scores: Tensor, quantile: float) -> float:
    """The value that a share `quantile`, in (0, 1), of future scores stays below; scores (N,).

    Few scores do not reach far into the tail, so it is extrapolated. The excess of the highest
    fifth (of fewer than ten scores, two) over the next score u is taken as exponential, the limit
    for Gaussian-like tails (Pickands 1975). Its mean is known from k excesses only; averaged over
    what it may be, the next excess follows P(excess > x) = (1 + x / Σ excess)^-k, and so

        t = u + Σ excess · ((k / (N (1 - quantile)))^(1/k) - 1),  k scores above u

    At 99 %, averaged over drawn samples of N from 6 to 200, 0.6 to 1.4 % of future scores lie above
    t where they are normal, log-normal of σ up to 0.5 or gamma of shape 1 or more; with heavier
    tails (log-normal of σ = 1) up to 2.1 % (our choice). Where min(k, 10) scores or more lie past
    the quantile, it is the empirical one.
    Raises ValueError for no scores, NaN, or a quantile out of range.
    """
    if not 0 < quantile < 1 or not len(scores) or scores.isnan().any():
        raise ValueError("a quantile in (0, 1) of at least one score, none of them NaN, is needed")
    n, scores = len(scores), scores.double().sort(descending=True)[0]
    k = min(max(2, n // 5), n - 1)
    if k == 0 or n * (1 - quantile) >= min(k, 10):
        return scores.quantile(quantile).item()
    excess = (scores[:k] - scores[k]).sum()
    return (scores[k] + excess * ((k / (n * (1 - quantile))) ** (1 / k) - 1)).item()


# ------------------------------------------------------------------------------------------------
# 5. Augmentation validator: when does fine-tuning begin to forget?
# ------------------------------------------------------------------------------------------------
# Each augmentation takes uint8 images (B, 3, S, S), gives as many, and draws from torch's default
# generator, as torchvision's transforms do, on the CPU. An image's partner is the one before it.


def mixup(images: Tensor, alpha: float = 1.0) -> Tensor:
    """x̃_i = λ x_i + (1 - λ) x_j with λ ~ Beta(α, α) for each image (Zhang et al. 2018)."""
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1, 1, 1))
    return torch.lerp(images.roll(1, 0).float(), images.float(), weight).round().to(images.dtype)


def cutout(images: Tensor) -> Tensor:
    """Blank a square at a random place (DeVries and Taylor 2017) with the image's mean colour.

    The paper blanks with 0 after normalisation, which is the mean colour of its data set.
    """
    blank = images.float().mean((-2, -1), keepdim=True).round().to(images.dtype)
    return torch.where(_boxes(images), blank, images)


def cutmix(images: Tensor) -> Tensor:
    """Paste a square of another image at the same place (Yun et al. 2019)."""
    return torch.where(_boxes(images), images.roll(1, 0), images)


def augmix(images: Tensor) -> Tensor:
    """A mixture of chains of random operations (Hendrycks et al. 2020): torchvision's AugMix."""
    return torch.stack([v2.AugMix()(image) for image in images])


def _boxes(images: Tensor) -> Tensor:
    """Where a square about a random centre lies, cut at the border: (B, 1, H, W) bool.

    Its area is 0.2 to 10 % of the image's, log-uniform, before it is cut. Both papers take larger
    ones, as they are to make a classifier robust; here those are told from normal images at once,
    frozen or fine-tuned, and so tell nothing (our choice).
    """
    share = torch.empty(len(images), 1).uniform_(math.log(0.002), math.log(0.1)).exp()
    inside = []
    for length in images.shape[-2:]:
        centre = torch.rand(len(images), 1)
        inside.append(((torch.arange(length) + 0.5) / length - centre).abs() < share.sqrt() / 2)
    return (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)


AUGMENTATIONS = {"mixup": mixup, "cutout": cutout, "cutmix": cutmix, "augmix": augmix}
VERSIONS = 128  # augmented images of each kind; a few times the usual number of held-out ones


@dataclass(frozen=True)
class Validation:
    """What the validator finds at one moment of fine-tuning."""

    auroc: dict[str, float]  # held-out normal images against each augmentation, by name
    components: Tensor  # (N,) of each held-out image; their mean is the mean AUROC
    separation: Tensor  # (N,) of each held-out image

    @classmethod
    def pooled(cls, folds: Sequence[Validation]) -> Validation:
        """Of several validators, each with held-out images of its own.

        The AUROCs are means over folds, weighted by their images, as scores of different detectors
        are not compared. The detectors share images they are fitted to, so that standard errors
        come out a little small.
        """
        n = [len(fold.separation) for fold in folds]
        aurocs = {name: [fold.auroc[name] for fold in folds] for name in folds[0].auroc}
        return cls(
            {name: float(np.average(values, weights=n)) for name, values in aurocs.items()},
            torch.cat([fold.components for fold in folds]),
            torch.cat([fold.separation for fold in folds]),
        )

    def gain_over(self, other: Validation) -> tuple[float, float]:
        """The mean gain of the separation over another moment's, and its standard error."""
        return _paired(self.separation - other.separation)

    def auroc_gain_over(self, other: Validation) -> tuple[float, float]:
        """The gain of the mean AUROC over another moment's, and its standard error."""
        return _paired(self.components - other.components)

    def is_better_than(self, other: Validation, errors: float = 2.0) -> bool:
        """Whether the separation has gained, and the AUROC not lost, more than so many standard
        errors."""
        (gain, error), (change, noise) = self.gain_over(other), self.auroc_gain_over(other)
        return gain > errors * error and change >= -errors * noise


def _paired(differences: Tensor) -> tuple[float, float]:
    """Their mean and its standard error: of the same images at two moments, so that most of the
    spread between images cancels."""
    return differences.mean().item(), (differences.std() / math.sqrt(len(differences))).item()


class AugmentationValidator:
    """Tells the gain of fine-tuning from the onset of forgetting, without an anomalous image.

    Held-out normal images x are to lie near the Gaussian, and their augmented versions x̃ far from
    it. While fine-tuning improves the features both hold ever better; once it forgets what
    ImageNet taught them, augmented images fall together with normal ones, and once it learns the
    fitted images by heart, the held-out ones drift away from the Gaussian. The separation

        J(x) = log d(x̃) - 2 log d(x) = log (d(x̃) / d(x)) - log d(x),    log d(x̃) the mean over
                                                                       augmentations and draws

    rises by either gain and falls by either loss, by its own amount of each. It is for scores of a
    Gaussian that is refitted each time, which keeps the scale of d in place.

    The paper's measure, the AUROC between the two, saturates and is noisy on few images: gains
    that J sees by many standard errors it misses. But J may rise by held-out images that come
    nearer while augmented ones follow them; the AUROC then falls. So J tells a gain, and a falling
    AUROC forbids it (our choice). With P the share of pairs, ties as half, and x̃_i the versions
    of x_i,

        c_i = P(d(x̃) > d(x_i)) + P(d(x̃_i) > d(x)) - AUROC,    mean over i of c_i = AUROC

    are the AUROC's structural components (DeLong et al. 1988), for an image and its versions
    together (Obuchowski 1997), averaged over the augmentations. Of J and c, the spread over i of
    what they gain between two moments gives the standard error of their mean gain.

    The augmented images are drawn once, from `seed`, so that every call judges by the same ones.

    images          (N, 3, S, S) uint8 on the CPU, N >= 2, normal, not used for fitting
    versions        augmented images of each augmentation, in all, at least: as many of each image.
                    They are kept in memory

    Raises ValueError for fewer than two images.
    """

    def __init__(
        self,
        images: Tensor,
        seed: int = 0,
        versions: int = VERSIONS,
        augmentations: dict[str, Callable[[Tensor], Tensor]] = AUGMENTATIONS,
    ) -> None:
        if len(images) < 2:
            raise ValueError(f"{len(images)} held-out image(s): mixing needs two at the least")
        self.normal = images
        draws = math.ceil(versions / len(images))
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on undisturbed
            torch.default_generator.manual_seed(seed)
            self.augmented = {
                name: torch.cat([augment(images) for _ in range(draws)])
                for name, augment in augmentations.items()
            }

    @torch.no_grad()
    def __call__(self, score: Callable[[Tensor], Tensor], batch_size: int = 32) -> Validation:
        """Judge a score, such as a detector's.

        score       maps a batch of uint8 images on the CPU to their scores (B,) there: a detector,
                    or, on a GPU, `lambda images: detector(images.cuda()).cpu()`
        """

        def scores(images: Tensor) -> Tensor:
            return torch.cat([score(batch) for batch in images.split(batch_size)])

        normal, aurocs, components, logs = scores(self.normal), {}, [], []
        for name, images in self.augmented.items():
            augmented = scores(images)
            both = torch.cat([normal, augmented])
            aurocs[name] = auroc(both, torch.arange(len(both)) >= len(normal))
            above = 1 - _share_below(normal, augmented)  # (N,)
            versions = _share_below(augmented, normal).view(-1, len(normal)).mean(0)  # (N,)
            components.append(above + versions - aurocs[name])
            logs.append(augmented.view(-1, len(normal)).log().mean(0))  # (draws, N) to (N,)
        separation = torch.stack(logs).mean(0) - 2 * normal.log()
        return Validation(aurocs, torch.stack(components).mean(0), separation)


# ------------------------------------------------------------------------------------------------
# 6. Metrics
# ------------------------------------------------------------------------------------------------


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(anomalous = normal) / 2, in [0, 1].

    scores, labels      any shape, the same; labels 1 or True for anomalous, 0 or False for normal

    Exact with ties (equal to mid-ranks, Mann-Whitney): pairs are counted in integers.
    Raises ValueError for a NaN, for other labels, or where one of the two classes is missing.
    """
    scores, labels = torch.as_tensor(scores).flatten(), torch.as_tensor(labels).flatten()
    if scores.shape != labels.shape or not ((labels == 0) | (labels == 1)).all():
        raise ValueError("AUROC needs one label, 0 or 1, for each score")
    if scores.isnan().any():
        raise DegenerateError("AUROC needs scores that are numbers; there are NaNs among them")
    n_anomalous = int((labels == 1).sum())
    n_normal = len(labels) - n_anomalous
    if not n_anomalous or not n_normal:
        raise ValueError(f"AUROC needs both classes: {n_normal} normal, {n_anomalous} anomalous")
    pairs = _twice_below(scores[labels == 1], scores[labels == 0]).sum()
    return int(pairs) / (2 * n_anomalous * n_normal)


def _twice_below(scores: Tensor, others: Tensor) -> Tensor:
    """Twice the number of `others` (M,) below each score (N,), those equal counted half: int64."""
    others = others.sort()[0]
    below, not_above = (torch.searchsorted(others, scores, right=right) for right in (False, True))
    return below + not_above


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of `others` (M,), the share below each score (N,), those equal counted half; float64."""
    return _twice_below(scores, others).double() / (2 * len(others))


def aupro(maps: Tensor, masks: Tensor, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, over that rate: [0, 1].

    Every value of the maps is a threshold t; pixels with map >= t are classified as anomalous.
    PRO (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", IJCV) is the share of a true
    region that is, the mean over regions; FPR the share of normal pixels that is. The curve from
    (0, 0) is linear between thresholds, and its last point interpolated at the limit.

    maps        (N, H, W), the higher, the more anomalous
    masks       (N, H, W), 1 or True where anomalous; regions are 8-connected

    Exact: no bins. Raises ValueError for NaN, for other shapes or masks, where no pixel is
    anomalous or none normal, and for a limit outside (0, 1].
    """
    if maps.ndim != 3 or maps.shape != masks.shape or not ((masks == 0) | (masks == 1)).all():
        raise ValueError("AU-PRO needs maps and masks of 0 and 1, both (N, H, W)")
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"AU-PRO needs a limit in (0, 1], not {fpr_limit}")
    if maps.isnan().any():
        raise DegenerateError("AU-PRO needs maps that are numbers; there are NaNs among them")
    anomalous = masks.flatten() == 1
    if anomalous.all() or not anomalous.any():
        raise ValueError("AU-PRO needs anomalous and normal pixels, both")
    regions = label_regions(masks == 1).flatten()
    size = regions.bincount()[regions]  # of the region that a pixel lies in
    n_regions = (1 / size[anomalous].double()).sum().round()
    step = (1 / (n_regions * size.double())).where(anomalous, 0)  # PRO gained by telling a pixel
    values, order = maps.flatten().sort(descending=True)
    ends = values[1:] != values[:-1]  # not diff(): infinities are equal too
    last = torch.cat([ends, ends.new_ones(1)])  # of equal values
    pro = step[order].cumsum(0)[last]
    normal = (~anomalous)[order].cumsum(0)[last].double()
    area = _area_up_to(fpr_limit, normal / normal[-1], pro)
    return min(1.0, area / fpr_limit)  # rounding can carry a perfect map past 1


def _area_up_to(limit: float, x: Tensor, y: Tensor) -> float:
    """∫ y dx from 0 to the limit, 0 < limit <= x[-1], of the polygon (0, 0), (x_1, y_1), …"""
    zero = x.new_zeros(1)
    x, y = torch.cat([zero, x]), torch.cat([zero, y])
    end = int(torch.searchsorted(x, limit))  # the first point at or past the limit
    share = (limit - x[end - 1]) / (x[end] - x[end - 1])
    y_limit = y[end - 1] + share * (y[end] - y[end - 1])
    x, y = torch.cat([x[:end], zero + limit]), torch.cat([y[:end], zero + y_limit])
    return torch.trapezoid(y, x).item()


def label_regions(masks: Tensor) -> Tensor:
    """Number the 8-connected regions of masks (N, H, W) bool: (N, H, W) int64, 0 where normal.

    Each region has a number of its own over all masks, not consecutive: 1 + the last of its pixels.
    """
    labels = torch.zeros(masks.shape, dtype=torch.int64, device=masks.device)
    numbers = torch.arange(1, masks.numel() + 1, device=masks.device).view(masks.shape)
    for i in masks.flatten(1).any(1).nonzero().flatten().tolist():
        rows, columns = (masks[i].any(axis).nonzero() for axis in (1, 0))
        box = i, slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        labels[box] = _last_of_region(numbers[box], masks[box])
    return labels


def _last_of_region(numbers: Tensor, mask: Tensor) -> Tensor:
    """Let every pixel of a region in a mask (H, W) take the highest number in it; 0 where normal.

    Each pixel points to one of its region, at first itself. It looks at its neighbours for one
    that points further on, then follows the pointer of where it points to, which about doubles
    the way it sees, until nothing moves.
    """
    pointer = torch.arange(1.0, mask.numel() + 1, dtype=torch.float64, device=mask.device)
    pointer = pointer.view(mask.shape) * mask  # float64, as max_pool2d takes no integers
    while True:
        seen = nn.functional.max_pool2d(pointer[None], 3, stride=1, padding=1)[0] * mask
        further = seen.flatten()[(seen.long() - 1).clamp(min=0)] * mask
        if torch.equal(further, pointer):
            return numbers.flatten()[(pointer.long() - 1).clamp(min=0)] * mask
        pointer = further
