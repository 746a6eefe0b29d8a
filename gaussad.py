# SPDX-License-Identifier: MIT
"""Transfer Learning Gaussian Anomaly Detection by Fine-tuning Representations, in one module.

Rippel, Chavan, Lei, Merhof: IMPROVE 2022, arXiv 2108.04116. It reads top to bottom as the method:

    1. Data         normal images, a part of them held out
    2. Features     φ_l, the feature maps of an ImageNet network at several levels l
    3. Gaussian     N(μ_l, Σ_l) of normal features, Σ_l shrunk by Ledoit-Wolf
    4. Detector     score(x) = sum_l d_l(x), d_l² = (φ_l(x) - μ_l)ᵀ Σ_l⁻¹ (φ_l(x) - μ_l)
    5. Validator    held-out normal images against augmented ones: a gain, or forgetting?
    6. Fine-tuning  lowers the score of normal images, the Gaussian held fixed, while 5 sees a gain
    7. Metrics      AUROC, AU-PRO
    8. Files and devices

Docstrings name the source of a step: *abstract* is the paper's, *earlier code* the authors' for
their earlier paper (IEEE TIM 2021), *ours* what neither says. Nothing here prints."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from glob import glob
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# ---- 1. Data: the MVTec AD layout --------------------------------------------------------------

NORMAL = "good"  # MVTec AD's name for the folder of normal images


class Sample(NamedTuple):
    """One image of a data set in the MVTec AD layout."""

    path: Path
    defect: str  # the folder that it lies in; "good" for a normal image
    mask: Path | None  # where its defect is, if the data set says so


def list_categories(root: str | Path) -> list[str]:
    """The folders in `root` that have a train or a test folder; ValueError where none has."""
    folders = [*Path(root).glob("*/train/"), *Path(root).glob("*/test/")]
    if not folders:
        raise ValueError(f"no data set at {root}: give the folder above <category>/train/good")
    return sorted({folder.parent.name for folder in folders})


def list_samples(root: str | Path, category: str, split: str) -> list[Sample]:
    """The images of `root/category/split/<defect>/`, "train" (only "good") or "test", sorted.
    A mask lies as its image does, but in `root/category/ground_truth`, and is called `<stem>_mask`
    or `<stem>`: an image, or a folder of several. Raises ValueError without folders or images."""
    if category not in (names := list_categories(root)):
        raise ValueError(f"no category {category!r} in {root}; there are: {', '.join(names)}")
    home, truth = Path(root, category, split), Path(root, category, "ground_truth")
    masks = {(path if path.is_dir() else path.with_suffix("")).relative_to(truth): path
             for path in _all_below(truth) if path.is_dir() or _is_image(path)}  # fmt: skip
    samples = []
    for folder in sorted(home.glob("[!.]*/")):
        defect = NORMAL if folder.name.lower() == NORMAL else folder.name
        if split == "train" and defect != NORMAL:
            continue
        if defect.lower() in ("ok", "normal", "no_defect"):
            warnings.warn(f"{folder} counts as a defect: normal images are in a folder {NORMAL!r}")
        for path in list_images([folder]):
            stem = path.relative_to(home).with_suffix("")
            mask = masks.get(stem.with_name(f"{stem.name}_mask")) or masks.get(stem)
            samples.append(Sample(path, defect, mask))
    if not samples:
        raise ValueError(f"no images in {home / NORMAL}: {split} images are in such folders")
    return samples


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """The image files named, and those in the folders named, at any depth and not hidden, sorted.
    Warns of other files. Raises ValueError for a path without an image."""
    images = []
    for path in map(Path, paths):
        files = list(filter(Path.is_file, _all_below(path)))
        found = [path] if path.is_file() else list(filter(_is_image, files))
        if not found:
            raise ValueError(f"no images at {path}: give image files, or folders of them")
        if others := len(set(files) - set(found)):
            warnings.warn(f"files in {path} that are passed over, being no images: {others}")
        images += found
    return images


def _all_below(folder: Path) -> list[Path]:
    """Files and folders at any depth, in linked folders too, but none that are hidden; sorted."""
    return sorted(folder / name for name in glob("**", root_dir=folder, recursive=True))


def _is_image(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def hold_out(samples: Sequence, seed: int = 0) -> tuple[list, list]:
    """Normal samples, shuffled by `seed`: (those to fit, those held out). Held out are a fifth, but
    at least 16, or half if that is less (*ours*). Raises ValueError for fewer than six."""
    n = len(samples)
    if n < 6:
        raise ValueError(f"too few different normal images: {n}, and 6 are needed at the least")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    first = min(max(math.ceil(n / 5), 16), n // 2)
    return [samples[i] for i in shuffled[first:]], [samples[i] for i in shuffled[:first]]


def without_copies(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) without those equal to an earlier one, of which it warns: a held-out
    copy of a fitted image would seem more normal than any other."""
    first = {}
    for i, image in enumerate(images):
        first.setdefault(hash(image.numpy().tobytes()), i)
    if copies := len(images) - len(first):
        warnings.warn(f"{copies} of {len(images)} normal images are copies, and are left out")
    return images[list(first.values())]


def load_image(path: str | Path, size: int) -> Tensor:
    """Read an image as RGB, upright, resized whole to a square (*earlier code*): (3, size, size)
    uint8. What is not opaque is drawn over black. Raises ValueError, naming the file."""
    with _opened(path) as file:
        deep = file.mode.startswith("I") or ";16" in str(file.tile)  # 16 bits, as is or in RGB
        inverted = getattr(file, "tag_v2", {}).get(262) == 0  # TIFF's white-is-zero
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # Pillow's own conversion would clip
            values = np.asarray(image)
            if image.mode == "F" or inverted or values.min() < 0 or values.max() > 65535:
                raise ValueError("pixels are not from 0, black, to 65535, white: save as 8 bits")
            image = Image.fromarray((values // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert("RGB")
        if deep and max(high for _, high in image.getextrema()) < 64:
            raise ValueError("a quarter of 16 bits' range is used at most, as by a camera of 10 to "
                             "14 bits: scale all images to the whole range, or save as 8 bits")
        return F.pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def load_mask(path: str | Path, size: int, image: str | Path | None = None) -> Tensor:
    """Read where a defect is: (size, size) bool, True if any source pixel within is of a defect.

    A source pixel is, if it is opaque and any channel, or its palette index, is not 0; if that is
    none, and some are transparent, all opaque ones are. The masks of a folder are taken together.
    Where EXIF turns `image` a quarter, a mask of its raw size turns too. ValueError names the file.
    """
    if Path(path).is_dir():
        return torch.stack([load_mask(file, size, image) for file in list_images([path])]).any(0)
    with _opened(path) as file:
        mask = _turned_as(image, file) if image else file
        values = np.atleast_3d(np.asarray(mask))
        defect = (values[..., :-1] if mask.mode[-1] in "Aa" else values).any(-1)
        if mask.has_transparency_data:
            opaque = np.asarray(mask.convert("RGBA"))[..., 3] > 0
            told = opaque.all() or (defect & opaque).any()
            defect = defect & opaque if told else opaque
    defect = torch.from_numpy(defect.astype(np.float32))
    return nn.functional.adaptive_max_pool2d(defect[None], size)[0] > 0


def _turned_as(image: str | Path, mask: Image.Image) -> Image.Image:
    with _opened(image) as file:
        orientation = file.getexif().get(0x0112, 1)
        if orientation > 4 and file.size == mask.size:  # a quarter turn, and the mask is raw
            mask.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(mask)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too big ({error}): shrink it, or cut it into tiles") from error
    except Exception as error:  # a decoder raises whatever it likes on a broken file
        told = f"cannot read the image {path}: {error or type(error)}; mend or remove it"
        raise ValueError(told) from error


def load_images(paths: Sequence[str | Path], size: int, workers: int = 2) -> Tensor:
    """`load_image` of each, (N, 3, size, size) uint8, by threads: Pillow leaves Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        return torch.stack(list(pool.map(lambda path: load_image(path, size), paths)))


# ---- 2. Features: the levels of an ImageNet network --------------------------------------------

BACKBONES = tuple(models.list_models(models, ["efficientnet_*", "mobilenet_*", "*resne*"]))
PROBE = 224  # side of the blank image that tells the shapes of the levels


class FeatureExtractor(nn.Module):
    """The feature maps φ_l of some levels of a network, in evaluation mode (*ours*: no dropout).

    backbone    torchvision's name of an EfficientNet, MobileNet or ResNet (*abstract*: pre-trained
                on ImageNet); or one's own network, as stages that are each fed by the one before
    levels      counted from 1: the children of torchvision's `features`, a ResNet's stem and four
                stages, or one's own stages. By default those of stride 16 and more, the last one of
                equal shapes in a row (*ours*: earlier ones see light and pose; *earlier code*: all)
    weights     "imagenet": IMAGENET1K_V1, downloaded on first use; "random"; or the path of a state
                dict, which may lack the classifier. One's own network brings its weights
    mean, std   per channel, of the images in [0, 1] that one's own network was trained on

    Raises ValueError for what does not fit, ConnectionError without ImageNet's weights."""

    def __init__(self, backbone: str | Sequence[nn.Module] = "efficientnet_b4",
                 levels: Sequence[int] | None = None, weights: str | Path = "imagenet",
                 mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone if isinstance(backbone, str) else None
        if self.backbone:
            backbone, mean, std = _torchvision_stages(backbone, weights)
        if mean is None or std is None:
            raise ValueError("one's own network needs the mean and std of the images it was fed")
        self.stages = nn.ModuleList(backbone).eval()
        self.register_buffer("mean", torch.tensor(mean).float().view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).float().view(3, 1, 1))
        self.levels = list(range(1, len(self.stages) + 1))  # all of them, for their shapes
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8))
        shapes = [tuple(x.shape[1:]) for x in maps]
        if any(len(shape) != 3 for shape in shapes):
            raise ValueError(f"stages give feature maps (C, H, W), not {shapes}")
        self.strides = [PROBE / shape[-1] for shape in shapes]  # of level 1, 2, …
        if levels is None:
            levels = [level for level, (shape, following) in enumerate(pairwise([*shapes, None]), 1)
                      if shape != following and round(math.log2(self.strides[level - 1])) >= 4]
        self.levels = sorted(set(map(int, levels)))
        if not self.levels or self.levels[0] < 1 or self.levels[-1] > len(shapes):
            raise ValueError(f"this network has the levels 1 to {len(shapes)}, not {levels}")
        self.stages = self.stages[: self.levels[-1]]
        self.to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode, whatever `mode` a parent module is put in."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """One feature map (B, C_l, H_l, W_l) float32 per level, on the network's device, of images
        (B, 3, H, W) RGB on any device, uint8 or float in [0, 1]; ValueError for others."""
        known = images.is_floating_point() or images.dtype == torch.uint8
        if not known or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError("images are uint8, or floating-point in [0, 1], and (B, 3, H, W), not "
                             f"{images.dtype} and {list(images.shape)}")  # fmt: skip
        if images.is_floating_point() and not torch.compiler.is_compiling():
            if not (images.min() >= 0 and images.max() <= 1):  # or NaN
                raise ValueError("floating-point images are in [0, 1], and not yet normalised")
        images = F.to_dtype(images.to(self.mean.device), self.mean.dtype, scale=True)
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = []
        for level, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if level in self.levels:
                maps.append(x)
        return maps


@torch.no_grad()
def _torchvision_stages(backbone: str, weights: str | Path) -> tuple[list[nn.Module], list, list]:
    """The stages, and the mean and standard deviation of the images they were trained on."""
    if backbone not in BACKBONES:
        raise ValueError(f"no backbone {backbone!r}; there are: {', '.join(BACKBONES)}")
    network = _imagenet(backbone) if weights == "imagenet" else models.get_model(backbone)
    if weights == "random":  # with batch norm untrained, features would vanish with depth
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the last batch
        network.train()(torch.rand(8, 3, 64, 64))
    elif weights != "imagenet":
        _load_weights(network, backbone, weights)
    if isinstance(network.eval(), models.ResNet):
        stem = nn.Sequential(network.conv1, network.bn1, network.relu)
        layer1 = nn.Sequential(network.maxpool, network.layer1)
        stages = [stem, layer1, network.layer2, network.layer3, network.layer4]
    else:
        stages = list(network.features)
    fold_batch_norm(nn.ModuleList(stages))
    preset = models.get_model_weights(backbone)["IMAGENET1K_V1"].transforms()
    return stages, preset.mean, preset.std


def _imagenet(backbone: str) -> nn.Module:
    try:
        return models.get_model(backbone, weights="IMAGENET1K_V1")
    except Exception as error:  # no network, or a download that broke
        raise ConnectionError(
            f"no ImageNet weights of {backbone} ({error}): give a state dict's path, or 'random' "
            f"to try things out; delete a broken download from {torch.hub.get_dir()}/checkpoints"
        ) from error


def _load_weights(network: nn.Module, backbone: str, path: str | Path) -> None:
    state = load_plain(path)
    for key in ("state_dict", "model"):  # of a training's checkpoint
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {re.sub(r"^((module|backbone|model)\.)+", "", str(k)): v for k, v in state.items()}
    unneeded = re.compile(r"(classifier|fc)\.|.*\.num_batches_tracked$")
    held, needed = ({k: getattr(v, "shape", None) for k, v in of.items() if not unneeded.match(k)}
                    for of in (state, network.state_dict()))  # fmt: skip
    if held != needed:
        wrong = sorted(dict(held.items() ^ needed.items()))
        raise ValueError(f"{path} does not hold the weights of {backbone}: {len(wrong)} tensors "
                         f"are missing, unknown or of another shape, such as {wrong[0]!r}; it has "
                         f"{[*held][:2]}, …, and {[*needed][:2]}, … are needed")  # fmt: skip
    if not all(state[key].isfinite().all() for key in held):
        raise ValueError(f"the weights in {path} are not all finite numbers")
    network.load_state_dict({key: state[key] for key in held}, strict=False)


@torch.no_grad()
def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution just before it, w ← w γ / σ, b ← (b - μ) γ / σ + β:
    the same features, trained up to a third faster (*ours*). For a module in evaluation mode whose
    children run in their order."""
    for (name, layer), (next_name, following) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and type(following) is nn.BatchNorm2d:
            folded = fuse_conv_bn_eval(layer, following)
            setattr(module, name, folded.requires_grad_())  # torch leaves the new bias without
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


# ---- 3. Gaussian: mean, Ledoit-Wolf covariance, Mahalanobis distance ---------------------------


class DegenerateError(ValueError):
    """Features or scores that are NaN or infinite, or do not vary: no Gaussian, no AUROC."""


class Moments:
    """The sums that a mean and a Ledoit-Wolf covariance need, one batch at a time, float64.
    Of z = x - o: sums of z, z zᵀ, ‖z‖² z and ‖z‖⁴, with o the mean of the first batch, so that a
    common offset costs no digits. Leading dimensions are independent Gaussians."""

    def __init__(self) -> None:
        self.count, self.total, self.scatter, self.cubic, self.quartic = 0, 0, 0, 0, 0

    def add(self, samples: Tensor) -> Moments:
        """Add samples (..., N, C). Returns self. Raises DegenerateError on NaN or infinity."""
        if not samples.isfinite().all():
            raise DegenerateError("the features hold NaN or infinity: no Gaussian fits them")
        x = samples.to(torch.float64)
        if self.count == 0:
            self.origin = x.mean(-2)
        z = x - self.origin.unsqueeze(-2)
        squares = z.square().sum(-1, keepdim=True)  # (..., N, 1)
        self.count += z.shape[-2]
        self.total += z.sum(-2)
        self.scatter += z.mT @ z  # in place: a map's takes hundreds of megabytes
        self.cubic += (squares * z).sum(-2)
        self.quartic += squares.square().sum((-2, -1))
        return self

    @property
    def mean(self) -> Tensor:
        """The mean μ = o + sum z / n, (..., C)."""
        return self.origin + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The sample covariance S = sum (x - μ)(x - μ)ᵀ / n, (..., C, C), not shrunk."""
        shift = self.total / self.count
        return self.scatter / self.count - shift.unsqueeze(-1) * shift.unsqueeze(-2)

    def effective_rank(self) -> Tensor:
        """How many directions the samples vary in: exp(-sum p ln p), (...), with p the eigenvalues
        of S over their sum (Roy and Vetterli 2007)."""
        eigenvalues = torch.linalg.eigvalsh(self.covariance).clamp(min=0)
        p = eigenvalues / eigenvalues.sum(-1, keepdim=True)
        return torch.special.entr(p).sum(-1).exp()

    def ledoit_wolf(self) -> tuple[Tensor, Tensor]:
        """The shrunk covariance (..., C, C) and the shrinkage (...) in [0, 1] of the samples added.

        Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
        matrices", section 3.2 (*earlier code*); with y = x - μ and ‖A‖² = tr(A Aᵀ) / C

            S = sum y yᵀ / n,  m = tr(S) / C,  d² = ‖S - m I‖²
            b² = min(d², sum ‖y yᵀ - S‖² / n²),  sum ‖y yᵀ - S‖² = sum ‖y‖⁴ / C - n ‖S‖²
            covariance = (b²/d²) m I + (1 - b²/d²) S

        Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples at least, not {self.count}")
        n, c = self.count, self.origin.shape[-1]
        s = self.covariance
        m = s.diagonal(dim1=-2, dim2=-1).mean(-1)
        s2 = torch.linalg.vector_norm(s, dim=(-2, -1)).square() / c  # ‖S‖²
        d2 = s2 - m.square()  # ‖S - m I‖²
        b2 = (self._quartic_about_mean() / (n * c) - s2) / n
        shrinkage = torch.where(d2 > 0, b2.clamp(min=0).minimum(d2) / d2, 0)
        s *= (1 - shrinkage)[..., None, None]
        s.diagonal(dim1=-2, dim2=-1).add_((shrinkage * m).unsqueeze(-1))
        return s, shrinkage

    def _quartic_about_mean(self) -> Tensor:
        """sum ‖x - μ‖⁴, which with s = sum z / n, the mean of z = x - o, is
        sum ‖z - s‖⁴ = sum ‖z‖⁴ + 4 sᵀ (sum z zᵀ s - sum ‖z‖² z) + 2 ‖s‖² sum ‖z‖² - 3 n ‖s‖⁴."""
        s = self.total / self.count
        along = (self.scatter @ s.unsqueeze(-1)).squeeze(-1)
        trace, s2 = self.scatter.diagonal(dim1=-2, dim2=-1).sum(-1), s.square().sum(-1)
        linear = (s * (along - self.cubic)).sum(-1)
        return self.quartic + 4 * linear + 2 * s2 * trace - 3 * self.count * s2.square()


def ledoit_wolf(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Ledoit-Wolf covariance (..., C, C) and shrinkage (...) of samples (..., N, C)."""
    return Moments().add(samples).ledoit_wolf()


def whitening_matrix(covariance: Tensor) -> Tensor:
    """W = L⁻¹ with Σ = L Lᵀ, so that W Σ Wᵀ = I: (..., C, C). Raises DegenerateError."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info.any() or not factor.isfinite().all():
        raise DegenerateError("the covariance is not positive definite")
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


class Gaussian(nn.Module):
    """N(μ, Σ) as its mean (..., C) and whitening matrix (..., C, C), float64 buffers; leading
    dimensions are independent Gaussians: (h, w) where each location of a map has its own."""

    def __init__(self, mean: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    @classmethod
    def fit(cls, moments: Moments, floor: float = 0.0, covariance: str = "full") -> Gaussian:
        """The Gaussian of samples; ValueError for fewer than three, DegenerateError if all alike.

        floor       share of the mean variance, over features and leading dimensions, that is added
                    to each variance (*ours*)
        covariance  "full": Ledoit-Wolf's; for comparison its "diagonal", or "identity": Euclidean
        """
        if moments.count < 3:
            raise ValueError(f"a Gaussian needs three samples at least, not {moments.count}")
        sigma, _ = moments.ledoit_wolf()
        variances = sigma.diagonal(dim1=-2, dim2=-1)  # a view: sigma changes with it
        variances += floor * variances.mean()
        rounding = torch.finfo(torch.float32).eps * moments.mean  # of the features
        if (variances.mean(-1) <= rounding.square().mean(-1)).any():
            raise DegenerateError("the features do not vary, as if all images were the same")
        if covariance != "full":
            ones = torch.ones_like(variances)
            sigma = torch.diag_embed(variances if covariance == "diagonal" else ones)
        return cls(moments.mean, whitening_matrix(sigma))

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance d = ‖W (x - μ)‖ = √((x - μ)ᵀ Σ⁻¹ (x - μ)) of (B, ..., C): (B, ...)
        float64, and not its square (*earlier code*). Its gradient at x = μ is 0."""
        centred = features.to(self.mean.dtype) - self.mean
        whitened = torch.einsum("...ij,b...j->b...i", self.whitening, centred)
        return torch.linalg.vector_norm(whitened, dim=-1)


# ---- 4. Detector -------------------------------------------------------------------------------

COVARIANCES = ("full", "diagonal", "identity")
MAP_FLOOR = 1e-1  # of the mean variance, added at every location of a map (ours)


class GaussianAD(nn.Module):
    """A feature extractor, one Gaussian per level, and for the anomaly map one per location.

    map_levels      levels that make the anomaly map; by default those of stride 16, or nearest to
                    it (*ours*). Their Gaussians take 8 h w C² bytes, C the channels of them all
    covariance      "full", "diagonal" or "identity": see `Gaussian.fit`

    Images are what FeatureExtractor takes, all of one size. Raises ValueError for other arguments.
    """

    def __init__(self, extractor: FeatureExtractor, map_levels: Sequence[int] | None = None,
                 covariance: str = "full") -> None:  # fmt: skip
        super().__init__()
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance is one of {', '.join(COVARIANCES)}, not {covariance!r}")
        if map_levels is None:
            off = {i: abs(math.log2(extractor.strides[i - 1] / 16)) for i in extractor.levels}
            map_levels = [i for i in off if off[i] == min(off.values())]
        self.map_levels = sorted(set(map(int, map_levels)))
        if not self.map_levels or not set(self.map_levels) <= set(extractor.levels):
            raise ValueError(f"map levels {map_levels} are not among {extractor.levels}")
        self.extractor, self.covariance = extractor, covariance
        self.gaussians = nn.ModuleDict()  # "pooled l" of each level l, and "map", once fitted
        self.image_size: list[int] | None = None  # [H, W] of the images it was fitted to
        self.register_buffer("held_out", torch.zeros(0, 2, dtype=torch.float64))  # see calibrate

    def _features(self, images: Tensor, maps: bool = True) -> dict[str, Tensor]:
        """What each Gaussian is of: "pooled l" the spatial mean of a level, (B, C_l), and "map" all
        map levels at each location of the first of them, (B, h, w, C)."""
        levels = dict(zip(self.extractor.levels, self.extractor(images)))
        found = {f"pooled {level}": features.mean((-2, -1)) for level, features in levels.items()}
        if maps:
            chosen = [levels[level] for level in self.map_levels]
            resized = [nn.functional.interpolate(x, chosen[0].shape[-2:], mode="bilinear")
                       for x in chosen]  # fmt: skip
            found["map"] = torch.cat(resized, 1).permute(0, 2, 3, 1)
        return found

    @torch.no_grad()
    def fit(self, batches: Iterable, maps: bool = True,
            moments: dict[str, Moments] | None = None) -> GaussianAD:  # fmt: skip
        """Fit the Gaussians, with or without those of maps, in one pass. Returns self.
        Batches are normal images, or (images, label) pairs; they are added to the moments, if any
        are given, and all is fitted. An earlier calibration is forgotten. Raises ValueError for
        fewer than three images or for several sizes, DegenerateError for features that are not
        finite or do not vary."""
        moments = defaultdict(Moments) if moments is None else moments
        self.held_out = self.held_out[:0]
        for images in _images_of(batches):
            self.image_size = list(images.shape[-2:])
            for name, features in self._features(images, maps).items():
                moments[name].add(features.movedim(0, -2))
        self.gaussians = nn.ModuleDict()
        for name, sums in moments.items():
            floor = MAP_FLOOR if name == "map" else 0.0
            self.gaussians[name] = Gaussian.fit(sums, floor, self.covariance)
        return self

    def fit_and_calibrate(self, batches: Iterable, held_out: Tensor) -> GaussianAD:
        """Fit to normal images, `calibrate` by those held out, then fit to both: more images make
        better Gaussians, and thresholds then err towards fewer false alarms (*ours*)."""
        moments = defaultdict(Moments)
        calibrated = self.fit(batches, moments=moments).calibrate(held_out.split(16)).held_out
        self.fit(held_out.split(16), moments=moments)
        self.held_out = calibrated
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The paper's score: sum_l d_l, the distances of the spatial means of the levels; (B,)
        float64 (*earlier code*). Raises ValueError before fit, or for another size of images."""
        return sum(self._distances(images, maps=False).values())

    def loss(self, images: Tensor) -> Tensor:
        """The mean score, which fine-tuning minimises, the Gaussian held fixed (*abstract*)."""
        return self.forward(images).mean()

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Anomaly score of each pixel, (B, H, W) float32: see `scores_and_maps`."""
        return self.scores_and_maps(images)[1]

    def scores_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The paper's score (B,) float64, as `forward`, and the anomaly map (B, H, W) float32.
        A map is the distance of the map levels' features, joined at each location, to the Gaussian
        of that location (PaDiM's, Defard et al. 2020), bilinearly resized to the image (*ours*).
        Raises ValueError as `forward`, or without maps."""
        distances = self._distances(images, maps=True)
        maps = distances.pop("map").float().unsqueeze(1)
        maps = nn.functional.interpolate(maps, self.image_size, mode="bilinear").squeeze(1)
        return sum(distances.values()), maps

    def _distances(self, images: Tensor, maps: bool) -> dict[str, Tensor]:
        if self.image_size != list(images.shape[-2:]):
            fitted = f"was fitted to {self.image_size}" if self.image_size else "is not fitted"
            raise ValueError(f"images of {list(images.shape[-2:])}, but the detector {fitted}")
        features = self._features(images, maps)
        if not features.keys() <= self.gaussians.keys():
            raise ValueError("the detector was fitted without maps")
        return {name: self.gaussians[name].distance(x) for name, x in features.items()}

    @torch.no_grad()
    def calibrate(self, batches: Iterable) -> GaussianAD:
        """Keep the score and the map's maximum of held-out normal images, `held_out` (N, 2), for
        `anomaly_score` and the thresholds. Returns self. Raises ValueError before fit,
        DegenerateError for fewer than two images or scores that do not vary."""
        held_out = torch.cat([_both(*self.scores_and_maps(x)) for x in _images_of(batches)])
        if not (held_out.std(0) > 0).all():
            raise DegenerateError("calibration needs two held-out images that differ, at the least")
        self.held_out = held_out
        return self

    def anomaly_score(self, scores: Tensor, maps: Tensor) -> Tensor:
        """The one score to rank and to judge by, of what `scores_and_maps` gives: (B,) float64. The
        paper's score, of the whole image, plus the map's maximum, of one place, each standardised
        over held-out normal images (*ours*). Raises ValueError before `calibrate`."""
        if not len(self.held_out):
            raise ValueError("the detector has no held-out scores: calibrate it first")
        mean, std = self.held_out.mean(0), self.held_out.std(0)
        return ((_both(scores, maps) - mean) / std).sum(1)

    def threshold(self, false_alarms: float = 0.05) -> float:
        """The `anomaly_score` that a share, in (0, 1), of normal images is expected to exceed.
        Raises ValueError before `calibrate`."""
        scores, maxima = self.held_out.unbind(1)
        return tail_quantile(self.anomaly_score(scores, maxima[:, None, None]), 1 - false_alarms)

    def map_threshold(self, false_alarms: float = 0.05) -> float:
        """The value that the maximum of a share of normal maps is expected to exceed."""
        return tail_quantile(self.held_out[:, 1], 1 - false_alarms)

    def _settings(self) -> dict:
        return {"backbone": self.extractor.backbone, "levels": self.extractor.levels,
                "map_levels": self.map_levels, "covariance": self.covariance}  # fmt: skip

    def save(self, path: str | Path, **more: object) -> None:
        """Write all that `load` needs, and `more` plain content, as `save_plain` does."""
        save_plain({"detector": self._settings(), "image_size": self.image_size,
                    "state": self.state_dict(), **more}, path)  # fmt: skip

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | Path, device: torch.device | str = "cpu",
             extractor: FeatureExtractor | None = None) -> GaussianAD:  # fmt: skip
        """Rebuild what `save` wrote, on `device`; nothing is downloaded, no code in it is run.
        Of one's own network give the extractor, built as it was for training. Raises OSError where
        the file cannot be read, ValueError where it is not such a detector."""
        content = load_plain(path)
        try:
            settings, state = content["detector"], content["state"]
            if extractor is None:
                with torch.device("meta"):  # no memory and no random numbers for weights to come
                    extractor = FeatureExtractor(settings["backbone"], settings["levels"], "random")
            detector = cls(extractor, settings["map_levels"], settings["covariance"])
            if detector._settings() != settings:
                raise ValueError("the extractor that is given is another")
            detector.image_size, detector.held_out = content["image_size"], state["held_out"]
            for name in {key.split(".")[1] for key in state if key.startswith("gaussians.")}:
                mean, whitening = (state[f"gaussians.{name}.{of}"] for of in ("mean", "whitening"))
                detector.gaussians[name] = Gaussian(mean, whitening)
            detector.load_state_dict(state, assign=True)
        except (AttributeError, LookupError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a detector saved by this gaussad.py; one of one's own "
                             "network needs the extractor given to `load`") from error
        return detector.to(device)


def _both(scores: Tensor, maps: Tensor) -> Tensor:
    return torch.stack([scores, maps.amax((-2, -1)).double()], 1)


def _images_of(batches: Iterable) -> Iterator[Tensor]:
    """The images (B, 3, H, W) of batches, or of (images, label) pairs; ValueError where there are
    none, or of several sizes."""
    size = None
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        size = size or images.shape[-2:]
        if images.shape[-2:] != size:
            raise ValueError(f"images of {list(size)} and {list(images.shape[-2:])}: resize them")
        yield images
    if size is None:
        raise ValueError("no images, or batches that cannot be iterated again, as a list can")


def tail_quantile(scores: Tensor, quantile: float) -> float:
    """The value that a share `quantile`, in (0, 1), of future scores stays below; scores (N,).
    Few scores do not reach far into the tail: where fewer than k lie past the quantile, k being a
    fifth of them, from 2 to 10, the excesses of the k largest over the next one, u, are taken as
    exponential (*ours*). A future score exceeds u with probability p = (k + 1) / (N + 1), and then
    u + y (sum of the excesses) with probability (1 + y)^-k, so that

        t = u + (sum of the excesses) ((p / (1 - quantile))^(1/k) - 1)

    Raises ValueError for no scores, NaN, or a quantile out of range."""
    if not 0 < quantile < 1 or not len(scores) or scores.isnan().any():
        raise ValueError("a quantile in (0, 1) of at least one score, none of them NaN, is needed")
    n, scores = len(scores), scores.double().sort(descending=True)[0]
    k = min(max(2, n // 5), 10, n - 1)
    if k == 0 or n * (1 - quantile) >= k:
        return float(np.quantile(scores.cpu(), quantile, method="weibull"))
    excess = (scores[:k] - scores[k]).sum()
    p = (k + 1) / (n + 1)
    return (scores[k] + excess * ((p / (1 - quantile)) ** (1 / k) - 1)).item()


# ---- 5. Augmentation validator: when does fine-tuning begin to forget? -------------------------
# Each augmentation takes uint8 images (B, 3, S, S), gives as many, and draws from torch's default
# generator, as torchvision's transforms do, on the CPU. An image's partner is the one before it.


def mixup(images: Tensor, alpha: float = 1.0) -> Tensor:
    """x̃_i = λ x_i + (1 - λ) x_j with λ ~ Beta(α, α) for each image (Zhang et al. 2018)."""
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1, 1, 1))
    return torch.lerp(images.roll(1, 0).float(), images.float(), weight).round().to(images.dtype)


def cutout(images: Tensor) -> Tensor:
    """Blank a square at a random place with the image's mean colour (DeVries and Taylor 2017)."""
    blank = images.float().mean((-2, -1), keepdim=True).round().to(images.dtype)
    return torch.where(_squares(images), blank, images)


def cutmix(images: Tensor) -> Tensor:
    """Paste a square of another image at the same place (Yun et al. 2019)."""
    return torch.where(_squares(images), images.roll(1, 0), images)


def augmix(images: Tensor) -> Tensor:
    """A mixture of chains of random operations (Hendrycks et al. 2020): torchvision's AugMix."""
    return torch.stack([v2.AugMix()(image) for image in images])


def _squares(images: Tensor) -> Tensor:
    """Where a square about a random centre lies, cut at the border: (B, 1, H, W) bool.
    Uncut, its area is 0.2 to 10 % of the image's, log-uniform: larger ones are told at once, frozen
    or fine-tuned, and so tell nothing (*ours*)."""
    share = torch.empty(len(images), 1).uniform_(math.log(0.002), math.log(0.1)).exp()
    inside = []
    for length in images.shape[-2:]:
        centre = torch.rand(len(images), 1)
        inside.append(((torch.arange(length) + 0.5) / length - centre).abs() < share.sqrt() / 2)
    return (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)


AUGMENTATIONS = {"mixup": mixup, "cutout": cutout, "cutmix": cutmix, "augmix": augmix}
LOCAL = {"cutout": cutout, "cutmix": cutmix}  # those that change one place, as defects do


@dataclass(frozen=True)
class Validation:
    """What the validator finds at one moment of fine-tuning."""

    auroc: dict[str, float]  # held-out normal images against each augmentation, by name
    parts: Tensor  # (N,) of the separation, one of each held-out image; their mean is s

    @property
    def separation(self) -> float:
        """s: how far augmented images score above normal ones, in standard deviations."""
        return self.parts.mean().item()

    def gain_over(self, other: Validation) -> tuple[float, float]:
        """The gain of s over another moment's, and its standard error, paired by image."""
        gain = self.parts - other.parts
        return gain.mean().item(), (gain.std() / math.sqrt(len(gain))).item()


class AugmentationValidator:
    """Tells a gain of fine-tuning from the onset of forgetting, without an anomalous image.

    Held-out normal images x are to score low and their augmented versions x̃ high (*abstract*: the
    augmentations of vicinal risk minimisation detect the onset of forgetting). How far is ours:

        s = mean of r / σ,  r = log d(x̃) - log d(x),  σ the standard deviation of log d(x)

    with d the score, log d(x̃) the mean over augmentations and draws. For log-normal scores of
    equal σ the AUROC between the two is Φ(s/√2), but s does not saturate. Its standard error comes
    from the influence of each image; with l = log d(x), s is the mean over i of

        s_i = r_i / σ - r̄ ((l_i - l̄)² / σ² - 1) / (2 σ)

    images          (N, 3, S, S) uint8 on the CPU, normal, not fitted to; ValueError for N < 2
    seed            of the augmented images, which are drawn once
    versions        augmented images of each augmentation, at least; as many of each image
    augmentations   functions by name, such as AUGMENTATIONS"""

    def __init__(self, images: Tensor, seed: int = 0, versions: int = 128,
                 augmentations: dict[str, Callable] = LOCAL) -> None:  # fmt: skip
        if len(images) < 2 or images.dtype != torch.uint8:
            raise ValueError("the validator needs two held-out images at the least, as uint8")
        self.normal, draws = images, math.ceil(versions / len(images))
        with seeded(seed):
            self.augmented = {name: torch.cat([augment(images) for _ in range(draws)])
                              for name, augment in augmentations.items()}  # fmt: skip

    @torch.no_grad()
    def __call__(self, score: Callable[[Tensor], Tensor], batch_size: int = 16) -> Validation:
        """Judge a score, such as a detector: a function of images (B, 3, S, S) uint8, giving (B,).
        Raises DegenerateError for scores not above zero, or all the same."""

        def log_scores(images: Tensor) -> Tensor:
            found = torch.cat([score(batch).double().cpu() for batch in images.split(batch_size)])
            if not (found > 0).all():
                raise DegenerateError("the validator needs scores above zero, and found others")
            return found.log()

        normal = log_scores(self.normal)
        augmented = {name: log_scores(images) for name, images in self.augmented.items()}
        aurocs = {}
        for name, logs in augmented.items():
            labels = torch.arange(len(normal) + len(logs)) >= len(normal)
            aurocs[name] = auroc(torch.cat([normal, logs]), labels)
        versions = torch.cat(list(augmented.values())).view(-1, len(normal))
        r, sigma = versions.mean(0) - normal, normal.std(correction=0)
        if sigma == 0:
            raise DegenerateError("the scores of held-out images are all the same")
        z = (normal - normal.mean()) / sigma
        return Validation(aurocs, r / sigma - r.mean() * (z.square() - 1) / (2 * sigma))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator for the block; afterwards it goes on as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# ---- 6. Fine-tuning ----------------------------------------------------------------------------

FIRST_CHECK = 32  # steps: the first few throw the features off, and what is judged then misleads
RANK_GROWTH = 1.1  # of the effective rank over the pre-trained one, at most, for a check to be kept


@dataclass(frozen=True)
class Check:
    """What fine-tuning has come to after some steps."""

    step: int
    kept: bool = False  # the best so far; the detector is then fitted to all images and calibrated
    loss: float | None = None  # the mean over the steps since the check before
    validation: Validation | None = None  # None with steps=0, or after a failure
    effective_rank: float | None = None  # of the pooled features fitted to, mean over levels
    gain: tuple[float, float] | None = None  # of s over the best before, and its standard error
    state: dict | None = None  # plain tensors and numbers, with which `fine_tune` goes on from here
    failure: str = ""  # why it ended here: features no longer finite, or that no longer vary


def fine_tune(detector: GaussianAD, batches: Iterable, held_out: Tensor, steps: int = 512,
              lr: float = 1e-4, patience: int = 3, seed: int = 0, state: dict | None = None,
              augmentations: dict[str, Callable] = LOCAL) -> Iterator[Check]:  # fmt: skip
    """Fine-tune a detector on normal images; yield a check at steps 0, 32, 64, 128, … and the last.

    Training pulls the features to the Gaussians of the pre-trained ones, which are put back for it
    (*abstract*: the distance to the estimated Gaussian is the objective); what is judged and kept
    has Gaussians of the features as they are. A check is kept if s has gained more than two
    standard errors over the best one kept before, and the effective rank of the features has not
    grown by a tenth over the pre-trained one: forgetting spreads the normal images out. After
    `patience` checks in a row that were not, it ends. When to keep and to end, and Adam on all
    parameters, are ours. The detector is the best one only where a check is kept: save it there.

    batches     images, or (images, label) pairs, that can be iterated again, such as a list or a
                DataLoader, which shuffles alike in each run if it has no generator of its own
    held_out    (N, 3, H, W) uint8, normal, not among the batches
    steps       at most; 0 fits the frozen network, and does not validate
    state       of a check: goes on from it to the same bits. All else is as it was when the run
                began, the detector not yet trained; ValueError for another, or for other images"""
    if steps < 0 or patience < 1 or not 0 <= lr < math.inf:
        raise ValueError("steps and rate are 0 or more, patience 1 or more, and all are finite")
    if steps == 0:
        with seeded(seed):
            detector.fit_and_calibrate(batches, held_out)
        yield Check(0, kept=True)
        return
    validator = AugmentationValidator(held_out, seed, augmentations=augmentations)
    optimizer = torch.optim.Adam(detector.parameters(), lr=lr)
    with seeded(seed):
        first_rank = rank = _refit(detector, batches)
    pretrained, done, since, best, loss = detector.gaussians, -1, 0, None, None
    if state is not None:
        done, since, best = _go_on(detector, optimizer, state, rank)
    checks = [0, *(FIRST_CHECK << k for k in range(40) if FIRST_CHECK << k < steps), steps]
    for step in (step for step in checks if step > done):
        if since == patience:
            return
        try:
            with seeded(seed + step):
                if step > 0:
                    loss, rank = _train(detector, pretrained, optimizer, batches, step - done)
            found = validator(detector)
            gain = found.gain_over(best) if best else None
            kept = gain is None or (gain[0] > 2 * gain[1] and rank <= RANK_GROWTH * first_rank)
            if kept:
                with seeded(seed + step):
                    detector.fit_and_calibrate(batches, held_out)
        except DegenerateError as error:
            if step == 0:
                raise
            yield Check(step, failure=f"{error}: try a smaller learning rate")
            return
        done, since, best = (step, 0, found) if kept else (step, since + 1, best)
        state = {"step": step, "since": since, "best": vars(best), "first_rank": first_rank,
                 "network": detector.extractor.state_dict(), "optimizer": optimizer.state_dict()}
        yield Check(step, kept, loss, found, rank, gain, deepcopy(state))


def _go_on(detector: GaussianAD, optimizer: torch.optim.Optimizer, state: dict,
           rank: float) -> tuple[int, int, Validation]:  # fmt: skip
    """Put back what `state` holds: its step, how many checks ago the best one was, and that one."""
    if not math.isclose(rank, state["first_rank"], rel_tol=1e-3):  # a GPU's bits differ
        raise ValueError("the state is of other images, or the detector is not as it was at first")
    detector.extractor.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["since"], Validation(**state["best"])


def _train(detector: GaussianAD, gaussians: nn.ModuleDict, optimizer: torch.optim.Optimizer,
           batches: Iterable, steps: int) -> tuple[float, float]:  # fmt: skip
    """Take some steps towards the Gaussians given, then `_refit`: the mean loss, and the rank."""
    detector.gaussians, losses = gaussians, []
    endless = (images for _ in count() for images in _images_of(batches))
    for images in islice(endless, steps):
        optimizer.zero_grad()
        loss = detector.loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return fmean(losses), _refit(detector, batches)


def _refit(detector: GaussianAD, batches: Iterable) -> float:
    """Fit the Gaussians of the pooled features; their effective rank, the mean over levels."""
    moments = defaultdict(Moments)
    detector.fit(batches, maps=False, moments=moments)
    return fmean(sums.effective_rank().item() for sums in moments.values())


# ---- 7. Metrics --------------------------------------------------------------------------------


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(anomalous = normal) / 2, in [0, 1].
    Of scores and labels of any shape, the same; labels 1 for anomalous, 0 for normal. Exact with
    ties: pairs are counted in integers. Raises ValueError for a NaN, for other labels, or where one
    of the two classes is missing."""
    scores, labels = torch.as_tensor(scores).flatten(), torch.as_tensor(labels).flatten()
    labelled = scores.shape == labels.shape and ((labels == 0) | (labels == 1)).all()
    if not labelled or scores.isnan().any():
        raise ValueError("AUROC needs one label, 0 or 1, for each score, and no NaN")
    anomalous, normal = scores[labels == 1], scores[labels == 0].sort()[0]
    if not len(anomalous) or not len(normal):
        raise ValueError(f"AUROC needs both classes: {len(normal)} normal, {len(anomalous)} not")
    below = torch.searchsorted(normal, anomalous).sum()
    not_above = torch.searchsorted(normal, anomalous, right=True).sum()
    return (below + not_above).item() / (2 * len(anomalous) * len(normal))


def aupro(maps: Tensor, masks: Tensor, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, over that rate: [0, 1].
    Every value of the maps is a threshold t; pixels with map >= t are classified as anomalous.
    PRO (Bergmann et al. 2021, "The MVTec Anomaly Detection Dataset", IJCV) is the share of a true
    region that is, the mean over regions; FPR the share of normal pixels that is. The curve from
    (0, 0) is linear between thresholds, and its last point interpolated at the limit.

    maps, masks (N, H, W); masks 1 where anomalous, regions 8-connected. Exact: no bins. Raises
    ValueError for NaN, other shapes, masks or limits, and without anomalous or normal pixels."""
    if maps.ndim != 3 or maps.shape != masks.shape or not ((masks == 0) | (masks == 1)).all():
        raise ValueError("AU-PRO needs maps and masks of 0 and 1, both (N, H, W)")
    if maps.isnan().any() or not 0 < fpr_limit <= 1:
        raise ValueError("AU-PRO needs maps without NaN, and a limit in (0, 1]")
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
    Each region has a number of its own over all masks, not consecutive: 1 + the index of its
    last pixel."""
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
    the way it sees, until nothing moves."""
    pointer = torch.arange(1.0, mask.numel() + 1, dtype=torch.float64, device=mask.device)
    pointer = pointer.view(mask.shape) * mask  # float64, as max_pool2d takes no integers
    while True:
        seen = nn.functional.max_pool2d(pointer[None], 3, stride=1, padding=1)[0] * mask
        further = seen.flatten()[(seen.long() - 1).clamp(min=0)] * mask
        if torch.equal(further, pointer):
            return numbers.flatten()[(pointer.long() - 1).clamp(min=0)] * mask
        pointer = further


# ---- 8. Files and devices ----------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The CPU, or for "cuda" a GPU (else ValueError), for "auto" a GPU if any. Switches TF32 off:
    its rounding would drown the directions of least variance, on which scores rest."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; use the CPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def error_line(error: Exception) -> str:
    """What a user can mend, in one line; any other error is raised again, for its traceback."""
    if _is_out_of_memory(error):
        return "out of memory: use smaller batches or smaller images"
    if not isinstance(error, (ValueError, OSError)):
        raise error
    told = str(error)
    if isinstance(error, OSError) and error.filename:
        told = f"{error.strerror}: {error.filename}: check this path, or give another"
    return " ".join(told.split())  # a name may hold a line break


def _is_out_of_memory(error: Exception) -> bool:
    of_torch = isinstance(error, RuntimeError) and "allocate" in str(error)  # on a CPU or a GPU
    return of_torch or isinstance(error, MemoryError)


def load_plain(path: str | Path) -> dict:
    """Read a dict of tensors and settings onto the CPU; no code in the file is run. Raises OSError
    where it cannot be read, ValueError where it is anything else."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # only who has such a file needs the package

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that it did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"to read {path}, pip install safetensors") from error
    except Exception as error:  # the unpickler raises whatever it likes on other files
        if isinstance(error, OSError) or _is_out_of_memory(error):
            raise
        told = f"{path} is not a file saved by torch.save, or damaged: give another, or remove it"
        raise ValueError(told) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def save_plain(content: dict, path: str | Path) -> None:
    """Write tensors and settings atomically to `path`. Raises OSError; the old file then stays."""
    buffer = io.BytesIO()  # torch's own errors do not say what is wrong with a disk
    torch.save(content, buffer)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getbuffer())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside `path`, to take its place when the block ends without an error: a reader, or a
    run that is killed, sees the old file or the new one."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
