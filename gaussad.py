# SPDX-License-Identifier: MIT
"""Transfer Learning Gaussian Anomaly Detection by Fine-tuning Representations, in one module.

Rippel, Chavan, Lei and Merhof, IMPROVE 2022, arXiv 2108.04116. The method comes first:

    1. Features     φ_l, the feature map of an ImageNet network at level l
    2. Gaussian     N(μ, Σ) of normal features, Σ by Ledoit-Wolf shrinkage; Mahalanobis distance
    3. Detector     pooled score sum_l d_l, d_l the distance of the spatial mean of φ_l; anomaly map
    4. Validator    AUROC of held-out normal images against augmented versions of them
    5. Fine-tuning  minimises the pooled score of normal images; the validator picks the step
    6. Metrics      AUROC and AU-PRO

Sections 7 to 10 support it: helpers, networks, images and data sets, files. Docstrings name the
source of a step: *abstract*: the paper's abstract (we had no access to the rest); *earlier code*:
the authors', for their IEEE TIM paper of 2021; *ours*: our own choice."""

from __future__ import annotations

import io
import math
import os
import re
import runpy
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, count, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# ---- 1. Features: the levels of an ImageNet network --------------------------------------------


class FeatureExtractor(nn.Module):
    """The feature maps φ_l of images at several levels l of a network.

    backbone    torchvision's name of an EfficientNet, MobileNet or ResNet, pre-trained on ImageNet
                (*abstract*). Or your own network: a list of modules applied in sequence, or the
                path of a Python file, which is executed and defines such `stages`, `mean` and `std`
    levels      numbered from 1: for EfficientNet and MobileNet the children of `features`, for
                ResNet the stem and the four stages, else your own modules. By default, levels of
                stride 16 or more; where neighbouring levels have the same shape, only the last
                (*ours*; *earlier code* uses all). For EfficientNet-B4 that is 5 to 9, for
                MobileNetV2 11, 14, 17, 18, 19. Earlier levels respond to light and pose
    weights     for torchvision's networks: "imagenet" (IMAGENET1K_V1, downloaded once), "random",
                or the path of a state dict, which may lack the classifier
    mean, std   for your own network: of each channel of its training images, in [0, 1]

    The network stays in evaluation mode: batch norm and dropout are fixed (*ours*). Raises
    ValueError for invalid arguments, ConnectionError if ImageNet weights cannot be downloaded."""

    def __init__(
        self,
        backbone: str | Sequence[nn.Module] = "efficientnet_b4",
        levels: Sequence[int] | None = None,
        weights: str | Path = "imagenet",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, str) else None
        if isinstance(backbone, str):
            backbone, mean, std = named_stages(backbone, weights)
        if mean is None or std is None:
            raise ValueError("your own network needs the mean and std of its training images")
        self.stages = nn.ModuleList(backbone).eval()
        dtype = next((p.dtype for p in self.stages.parameters()), torch.float32)
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(3, 1, 1))
        shapes, self.strides = self._probe()  # of level 1, 2, …
        if levels is None:
            deep = [round(math.log2(stride)) >= 4 for stride in self.strides]
            last = [a != b for a, b in pairwise([*shapes, None])]
            levels = [i + 1 for i in range(len(shapes)) if deep[i] and last[i]] or [len(shapes)]
        self.levels = sorted(set(map(int, levels)))
        if not self.levels or self.levels[0] < 1 or self.levels[-1] > len(shapes):
            raise ValueError(f"this network has the levels 1 to {len(shapes)}, not {levels}")
        self.stages = self.stages[: self.levels[-1]]
        self.to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU

    @torch.no_grad()
    def _probe(self, side: int = 224) -> tuple[list[torch.Size], list[float]]:
        """The shape and the stride of every level, found with a blank image."""
        self.levels = list(range(1, len(self.stages) + 1))
        shapes = [x.shape[1:] for x in self(torch.zeros(1, 3, side, side, dtype=torch.uint8))]
        if any(len(shape) != 3 for shape in shapes):
            raise ValueError(f"every module must return feature maps (B, C, H, W), not {shapes}")
        return shapes, [side / shape[-1] for shape in shapes]

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode, whatever `mode` a parent module is set to."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C_l, H_l, W_l), one per level, with the network's dtype (float32) and
        device. Images are (B, 3, H, W) RGB, uint8 or in [0, 1]; ValueError for others."""
        check_images(images)
        images = F.to_dtype(images.to(self.mean.device), self.mean.dtype, scale=True)
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = []
        for level, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if level in self.levels:
                maps.append(x)
        return maps


# ---- 2. Gaussian: mean, Ledoit-Wolf covariance, Mahalanobis distance ---------------------------


def ledoit_wolf(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The shrunk covariance Σ (..., C, C) and the shrinkage b²/d² (...) in [0, 1] of samples
    (..., N, C), float64; leading dimensions are independent. ValueError for fewer than two samples.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices"
    (*earlier code*). With y = x - mean, |y|² = yᵀy and ‖A‖² = tr(A Aᵀ) / C,

        S = sum y yᵀ / N,  m = tr(S) / C,  d² = ‖S - m I‖²
        b² = min(d², sum ‖y yᵀ - S‖² / N²),  where  sum ‖y yᵀ - S‖² = sum |y|⁴ / C - N ‖S‖²
        Σ = (b²/d²) m I + (1 - b²/d²) S"""
    n, c = samples.shape[-2:]
    if n < 2:
        raise ValueError(f"a covariance needs at least two samples, not {n}")
    x = samples.double()
    y = x - x.mean(-2, keepdim=True)
    S = y.mT @ y / n
    m = S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    I = torch.eye(c, dtype=S.dtype, device=S.device)
    d2 = (S - m * I).square().sum((-2, -1)) / c
    b2 = (y.square().sum(-1).square().sum(-1) - n * S.square().sum((-2, -1))) / c / n**2
    shrinkage = torch.where(d2 > 0, b2.clamp(min=0).minimum(d2) / d2, 0)
    return torch.lerp(S, m * I, shrinkage[..., None, None]), shrinkage


class Gaussian(nn.Module):
    """N(μ, Σ) as its mean μ (..., C) and whitening matrix W (..., C, C), W Σ Wᵀ = I, float64.
    Leading dimensions are independent: (h, w) if each location of a map has its own."""

    def __init__(self, mean: Tensor, whitening: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)

    @classmethod
    def fit(cls, samples: Tensor, ridge: float = 0.0, covariance: str = "full") -> Gaussian:
        """The Gaussian of samples (..., N, C).

        ridge       added to each variance (*ours*)
        covariance  "full": Ledoit-Wolf (*earlier code*). For the ablation, "diagonal" keeps only
                    its variances, and "identity" gives Euclidean distances

        Raises ValueError for fewer than three samples, or if they are not finite or do not vary."""
        *shape, n, c = samples.shape
        if n < 3:  # with two, the shrinkage is 0 and Σ is singular
            raise ValueError(f"a Gaussian needs at least three samples, not {n}")
        if not samples.isfinite().all():
            raise ValueError("features are not finite: lower the learning rate, or check weights")
        pieces = samples.reshape(-1, n, c).split(32)  # bounds the memory that Σ takes
        fits = [_mean_and_whitening(x, ridge, covariance) for x in pieces]
        mean, whitening = (torch.cat(parts) for parts in zip(*fits))
        return cls(mean.view(*shape, c), whitening.view(*shape, c, c))

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance d = √((x - μ)ᵀ Σ⁻¹ (x - μ)) = ‖W (x - μ)‖ of x (B, ..., C): (B, ...)
        float64, not squared (*earlier code*). Its gradient at x = μ is 0."""
        centred = x.to(self.mean.dtype) - self.mean
        whitened = torch.einsum("...ij,b...j->b...i", self.whitening, centred)
        return torch.linalg.vector_norm(whitened, dim=-1)


def _mean_and_whitening(samples: Tensor, ridge: float, covariance: str) -> tuple[Tensor, Tensor]:
    """μ, and W = L⁻¹ with Σ = L Lᵀ (Cholesky), of samples (..., N, C)."""
    mean, (sigma, _) = samples.double().mean(-2), ledoit_wolf(samples)
    variances = sigma.diagonal(dim1=-2, dim2=-1)  # a view: sigma changes with it
    variances += ridge
    rounding = torch.finfo(torch.float32).eps * mean  # less variance is noise
    constant = variances.mean(-1) <= rounding.square().mean(-1)
    identity = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    if covariance == "diagonal":
        sigma = sigma * identity
    elif covariance == "identity":
        sigma = identity.expand_as(sigma)
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if constant.any() or failed.any():
        raise ValueError("features do not vary: are all images the same, or is the rate too high?")
    return mean, torch.linalg.solve_triangular(factor, identity, upper=False)


# ---- 3. Detector -------------------------------------------------------------------------------

MAP_RIDGE = 0.1  # fraction of the mean variance that is added to each variance of a map (ours)


class GaussianAD(nn.Module):
    """A feature extractor, a Gaussian per level, and for the anomaly map a Gaussian per location.

    map_levels  levels of the anomaly map; by default those of stride 16, or closest to it (*ours*):
                5 and 6 for EfficientNet-B4, 11 and 14 for MobileNetV2. Their Gaussians take
                8 h w C² bytes, C being the total number of channels
    covariance  "full", "diagonal" or "identity": see `Gaussian.fit`

    Images are those that FeatureExtractor takes, all of one size. Methods raise ValueError for
    other images, too few of them, or what has not been fitted or calibrated."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        map_levels: Sequence[int] | None = None,
        covariance: str = "full",
    ) -> None:
        super().__init__()
        if covariance not in ("full", "diagonal", "identity"):
            raise ValueError(f"covariance is full, diagonal or identity, not {covariance!r}")
        if map_levels is None:
            octaves = {i: abs(math.log2(extractor.strides[i - 1] / 16)) for i in extractor.levels}
            map_levels = [i for i in octaves if octaves[i] == min(octaves.values())]
        self.map_levels = sorted(set(map(int, map_levels)))
        if not self.map_levels or not set(self.map_levels) <= set(extractor.levels):
            raise ValueError(f"map levels {map_levels} are not among {extractor.levels}")
        self.extractor, self.covariance = extractor, covariance
        self.pooled_gaussians = nn.ModuleList()  # one per level, once fitted
        self.map_gaussian: Gaussian | None = None
        self.image_size: list[int] | None = None  # [H, W] of the images it was fitted to
        self.source = "the detector"  # how messages name it: its file, once loaded
        self.register_buffer("held_out_scores", torch.zeros(0, 2, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """The pooled score sum_l d_l, with d_l the Mahalanobis distance of the spatial mean of
        level l: (B,) float64 (*earlier code*)."""
        return self._pooled_score(self._levels_of(images))

    def scores_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled score (B,) float64, as `forward`, and the anomaly map (B, H, W) float32.
        At each location the map is the distance of the joined map levels to that location's
        Gaussian, as in PaDiM (Defard et al. 2020), resized to the image bilinearly (*ours*)."""
        levels = self._levels_of(images)
        distances = self.map_gaussian.distance(self._joined(levels)).float().unsqueeze(1)
        maps = nn.functional.interpolate(distances, self.image_size, mode="bilinear").squeeze(1)
        return self._pooled_score(levels), maps

    def _levels_of(self, images: Tensor) -> list[Tensor]:
        """The feature maps of images of the size that the detector was fitted to."""
        if self.image_size != list(images.shape[-2:]):
            fitted = f"was fitted to {self.image_size}" if self.image_size else "is not fitted"
            raise ValueError(f"images of {list(images.shape[-2:])}, but the detector {fitted}")
        return self.extractor(images)

    def _pooled_score(self, levels: list[Tensor]) -> Tensor:
        pairs = zip(self.pooled_gaussians, levels, strict=True)
        return sum(gaussian.distance(x.mean((-2, -1))) for gaussian, x in pairs)

    def _joined(self, levels: list[Tensor]) -> Tensor:
        """The map levels, resized to the first of them and joined: (B, h, w, C)."""
        chosen = [x for i, x in zip(self.extractor.levels, levels) if i in self.map_levels]
        size = chosen[0].shape[-2:]
        resized = [nn.functional.interpolate(x, size, mode="bilinear") for x in chosen]
        return torch.cat(resized, 1).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fit(self, batches: Iterable) -> GaussianAD:
        """Fit all Gaussians to at least three normal images: batches of images, or of (images,
        label). Returns self. Discards an earlier calibration. Holds the features of all images
        meanwhile: 1.3 MB each for EfficientNet-B4 at 380 px."""
        self._fit(self._features_of(batches))
        self.held_out_scores = self.held_out_scores[:0]
        return self

    @torch.no_grad()
    def fit_and_calibrate(self, batches: Iterable, held_out: Tensor) -> GaussianAD:
        """Fit to normal images, calibrate on those held out (N, 3, H, W), then fit to both. The
        last fit makes better Gaussians, so thresholds err slightly on the high side (*ours*)."""
        features = self._features_of(batches)
        self._fit(features)
        self.calibrate(held_out.split(16))
        self._fit(features + self._features_of(held_out.split(16)))
        return self

    def _features_of(self, batches: Iterable) -> list[list[Tensor]]:
        """For each batch, the spatial mean of every level, then the joined map levels."""
        features = []
        for images in images_of(batches):
            self.image_size = list(images.shape[-2:])
            levels = self.extractor(images)
            features.append([*(x.mean((-2, -1)) for x in levels), self._joined(levels)])
        return features

    def _fit(self, features: list[list[Tensor]]) -> None:
        *pooled, joined = (torch.cat(batches) for batches in zip(*features))
        gaussians = [Gaussian.fit(samples, covariance=self.covariance) for samples in pooled]
        self.pooled_gaussians = nn.ModuleList(gaussians)
        ridge = MAP_RIDGE * joined.var(0, correction=0).mean().item()
        self.map_gaussian = Gaussian.fit(joined.movedim(0, -2), ridge, self.covariance)

    @torch.no_grad()
    def calibrate(self, batches: Iterable) -> GaussianAD:
        """Store the pooled score and the maximum of the map, (N, 2), of at least three held-out
        normal images, for `anomaly_score` and `threshold`. Returns self."""
        scores = torch.cat([image_scores(*self.scores_and_maps(x)) for x in images_of(batches)])
        if len(scores) < 3 or not (scores.std(0) > 0).all():  # NaN is not above 0 either
            raise ValueError("calibration needs at least three held-out images that differ")
        self.held_out_scores = scores
        return self

    def anomaly_score(self, scores: Tensor, maps: Tensor) -> Tensor:
        """The score used for ranking and decisions, (B,) float64, from what `scores_and_maps`
        returns: the pooled score plus the maximum of the map, each standardised over held-out
        normal images (*ours*)."""
        return self._standardised(image_scores(scores, maps))

    def threshold(self, false_alarms: float = 0.05) -> float:
        """Threshold that a fraction `false_alarms`, in (0, 1), of the anomaly scores of normal
        images is expected to exceed."""
        return tail_quantile(self._standardised(self.held_out_scores), 1 - false_alarms)

    def _standardised(self, scores: Tensor) -> Tensor:
        if not len(self.held_out_scores):
            raise ValueError("not calibrated; after fine_tune, load the last detector kept")
        mean, std = self.held_out_scores.mean(0), self.held_out_scores.std(0)
        anomaly_scores = ((scores - mean) / std).sum(1)
        if not torch.compiler.is_compiling() and not anomaly_scores.isfinite().all():
            raise ValueError(f"scores are not finite: {self.source} or an image holds NaN")
        return anomaly_scores

    def save(self, path: str | Path, **more: object) -> None:
        """Save the detector, with `more` plain content, atomically. Raises OSError."""
        names = ("map_levels", "covariance", "image_size")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"backbone": self.extractor.backbone, "levels": self.extractor.levels}
        save_plain({**more, "detector": settings, "state": self.state_dict()}, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        extractor: FeatureExtractor | None = None,
    ) -> GaussianAD:
        """Rebuild what `save` wrote, on `device`. For your own network, pass an extractor built the
        same way. Nothing is downloaded, and no code in the file is run. Raises OSError if it cannot
        be read, ValueError if it holds no such detector."""
        return detector_from(load_plain(path), path, extractor, cls).to(device)


# ---- 4. Validator: when does fine-tuning begin to forget? --------------------------------------
# An augmentation takes uint8 images (B, 3, S, S), returns the same number of them, and draws from
# torch's default generator, as torchvision's transforms do.


def cutout(images: Tensor) -> Tensor:
    """Fill a square with the image's mean colour (DeVries and Taylor 2017): see `_squares`."""
    return torch.where(_squares(images), mean_colour(images), images)


def scar(images: Tensor) -> Tensor:
    """Fill a rectangle at any angle, 10 to 35 % of the side long and 0.8 to 2.5 % wide, with the
    image's mean colour or half of it (*ours*)."""
    half, mean = torch.rand(len(images), 1, 1, 1) < 0.5, mean_colour(images)
    length = torch.empty(len(images)).uniform_(0.10, 0.35)
    width = torch.empty(len(images)).uniform_(0.008, 0.025)
    angle = torch.empty(len(images)).uniform_(0, math.pi)
    inside = rectangles(images, length, width, angle)
    return torch.where(inside, torch.where(half, mean, mean // 2), images)


BLANKS = {"cutout": cutout, "scar": scar}  # the default: local, as defects are
OPACITIES = (1.0, 0.5, 0.25)  # the AUROC of opaque ones saturates; faint ones tell (ours)


def _squares(images: Tensor) -> Tensor:
    """Squares of 0.2 to 10 % of the image, log-uniform, cut at the border. Larger ones are too
    easy: even the frozen network detects them (*ours*)."""
    log_area = torch.empty(len(images)).uniform_(math.log(0.002), math.log(0.1))
    side = log_area.exp().sqrt()
    return rectangles(images, side, side, torch.zeros(len(images)))


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    aurocs: dict[str, float]  # of each augmentation, the mean over opacities
    influence: Tensor = field(repr=False)  # (N,) how much each held-out image moves their mean

    @property
    def auroc(self) -> float:
        """The mean over augmentations, in [0, 1]."""
        return fmean(self.aurocs.values())

    def gain_over(self, other: Validation) -> tuple[float, float]:
        """The gain in AUROC over another validation on the same images, and its standard error."""
        difference = self.influence - other.influence
        return self.auroc - other.auroc, difference.std().item() / math.sqrt(len(difference))


class AugmentationValidator:
    """Detects the onset of forgetting without an anomalous image. The idea is from the *abstract*
    (augmentations used for vicinal risk minimisation), the details are *ours*.

    Held-out normal images x_i should score low, their augmented versions x̃_j high. With C_ij = 1 if
    x̃_j scores above x_i, ½ if they tie and 0 if not, the AUROC is the mean of C. The influence of
    image i is the mean of row i plus the mean of the columns of its own versions, less twice the
    AUROC; the standard error is the standard deviation of the influences over √N (DeLong et al.
    1988; for clusters Obuchowski 1997).

    images          (N, 3, S, S) uint8 on the CPU: at least three held-out normal images
    seed            of the augmented images, which are drawn once
    n_augmented     how many per augmentation and opacity, rounded up to a multiple of N
    augmentations   functions by name, such as AUGMENTATIONS, each applied at all OPACITIES"""

    def __init__(
        self,
        images: Tensor,
        seed: int = 0,
        n_augmented: int = 64,
        augmentations: dict[str, Callable[[Tensor], Tensor]] = BLANKS,
    ) -> None:
        if len(images) < 3 or images.dtype != torch.uint8:
            raise ValueError("the validator needs at least three held-out images, uint8")
        self.normal, self.augmented = images, {}
        opacities = OPACITIES * math.ceil(n_augmented / len(images))
        with seeded(seed):
            for name, augment in augmentations.items():
                versions = [blend(images, augment(images), opacity) for opacity in opacities]
                self.augmented[name] = torch.cat(versions)

    @torch.no_grad()
    def __call__(self, score: Callable[[Tensor], Tensor], batch_size: int = 16) -> Validation:
        """Validate a function that maps images (B, 3, S, S) to scores (B,), such as a detector.
        Raises ValueError for scores that are not finite."""
        scores_of = lambda images: torch.cat([score(x).cpu() for x in images.split(batch_size)])
        normal, aurocs, influences = scores_of(self.normal), {}, []
        for name, images in self.augmented.items():
            augmented = scores_of(images).view(1, -1, len(normal))  # (1, versions, N)
            if not (normal.isfinite().all() and augmented.isfinite().all()):
                raise ValueError("the scores of held-out images are not finite")
            difference = augmented - normal[:, None, None]
            C = (difference > 0).double() + 0.5 * (difference == 0)
            aurocs[name] = C.mean().item()
            influences.append(C.mean((1, 2)) + C.mean((0, 1)) - 2 * C.mean())
        return Validation(aurocs, torch.stack(influences).mean(0))


# ---- 5. Fine-tuning ----------------------------------------------------------------------------

FIRST_CHECK = 32  # steps: before, the features are unsettled, and a check misleads


@dataclass(frozen=True)
class Check:
    """What a check found."""

    step: int
    kept: bool  # the best so far; the detector is then fitted to all images and calibrated
    loss: float | None  # mean over the steps since the previous check; None at step 0
    validation: Validation
    gain: float | None  # of the AUROC over the last check that was kept; None at step 0
    standard_error: float | None  # of the gain
    state: dict = field(repr=False)  # plain tensors and numbers, with which `fine_tune` resumes


def schedule(steps: int) -> list[int]:
    """The steps of the checks: 0, 32, 64, 128, … and the last."""
    return sorted({0, steps, *(FIRST_CHECK << k for k in range(40) if FIRST_CHECK << k < steps)})


def fine_tune(
    detector: GaussianAD,
    batches: Iterable,
    held_out: Tensor,
    steps: int = 512,
    lr: float = 1e-4,
    patience: int = 3,
    seed: int = 0,
    state: dict | None = None,
    augmentations: dict[str, Callable[[Tensor], Tensor]] = BLANKS,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[Check]:
    """Fine-tune a detector on normal images; yield a check at each step of the `schedule`.

    The loss is the distance of normal images to the estimated Gaussian (*abstract*): the Gaussian
    of the pre-trained features, held fixed. Each check fits Gaussians to the current features. It
    is kept if the validator's AUROC has gained more than one standard error over the last one kept
    (after the one-standard-error rule, Breiman et al. 1984). The detector is then the best so far:
    save it before the next check, as training goes on from there. After `patience` checks in a row
    that are not kept it ends. The rule, and Adam on all parameters, are *ours*.

    batches     images or (images, label): a DataLoader that shuffles, or a list; no iterator, as
                it is read from its start after each check
    held_out    (N, 3, H, W) uint8, normal, not among the batches
    steps       maximum; 0 only fits and validates the frozen network
    state       of an earlier check, to resume from it, bit-identically on a CPU, with the same
                arguments
    on_step     called after each step with its number and loss

    Raises ValueError for invalid arguments, or when features are no longer finite or varying."""
    if steps < 0 or patience < 1 or not 0 <= lr < math.inf:
        raise ValueError("steps and lr must be finite and at least 0, and patience at least 1")
    validator = AugmentationValidator(held_out, seed, augmentations=augmentations)
    optimizer = torch.optim.Adam(detector.parameters(), lr=lr)
    pretrained, done, best, checks_since_best, remaining = None, 0, None, 0, schedule(steps)
    if state is not None:
        pretrained, done, best, checks_since_best = restore(detector, optimizer, state)
        remaining = [step for step in remaining if step > done]

    for step in remaining:
        if checks_since_best == patience:
            return
        with seeded(seed + step):
            detector.pooled_gaussians, losses = pretrained, []
            endless = chain.from_iterable(images_of(batches) for _ in count())
            for images in islice(endless, step - done):
                optimizer.zero_grad()
                loss = detector(images).mean()  # the pooled score; the Gaussians are buffers
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                on_step(done + len(losses), losses[-1])
            detector.fit(batches)
            if step == 0:
                pretrained = detector.pooled_gaussians  # fit makes new ones, so these stay fixed
            validation = validator(detector)
            gain, error = validation.gain_over(best) if best else (None, None)
            kept = best is None or gain > error
            if kept:
                detector.fit_and_calibrate(batches, held_out)
        done, best = step, validation if kept else best
        checks_since_best = 0 if kept else checks_since_best + 1
        state = snapshot(detector, optimizer, pretrained, done, vars(best), checks_since_best)
        loss = fmean(losses) if losses else None
        yield Check(step, kept, loss, validation, gain, error, state)


# ---- 6. Metrics --------------------------------------------------------------------------------


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(anomalous = normal) / 2, in [0, 1].
    Scores and labels have the same shape; labels are 1 for anomalous, 0 for normal (scikit-learn
    takes labels first). Exact with ties, as pairs are counted in integers. Raises ValueError for
    NaN, other labels, or a missing class."""
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    binary = ((labels == 0) | (labels == 1)).all()
    if scores.shape != labels.shape or scores.isnan().any() or not binary:
        raise ValueError("AUROC needs one label, 0 or 1, for each score, and no NaN")
    anomalous = scores.masked_select(labels == 1)  # indexing would take twice the memory
    normal = scores.masked_select(labels == 0).sort()[0]
    if not len(anomalous) or not len(normal):
        raise ValueError(f"AUROC needs both classes: {len(normal)} normal, {len(anomalous)} not")
    below = torch.searchsorted(normal, anomalous).sum()
    not_above = torch.searchsorted(normal, anomalous, right=True).sum()
    return (below + not_above).item() / (2 * len(anomalous) * len(normal))


def aupro(maps: Tensor, masks: Tensor, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, over that rate: [0, 1].

    Each value of the maps is a threshold; pixels at or above it are detected. PRO is the mean
    detected fraction of each true region, FPR that of normal pixels (Bergmann et al. 2021, "The
    MVTec Anomaly Detection Dataset", IJCV); the curve is linear between thresholds. So an anomalous
    pixel becomes detected as the FPR f rises from f₀ to f₁, the fractions of normal pixels above
    it, and at or above it; in between it counts as (f - f₀) / (f₁ - f₀). The area under this has a
    closed form. It is averaged over the pixels of each region, then over regions.

    maps, masks (N, H, W); masks are 1 where anomalous, regions 8-connected. Raises ValueError for
    NaN, other shapes, masks or limits, and without anomalous or normal pixels."""
    binary = ((masks == 0) | (masks == 1)).all()
    if maps.ndim != 3 or maps.shape != masks.shape or maps.isnan().any() or not binary:
        raise ValueError("AU-PRO needs maps without NaN and masks of 0 and 1, both (N, H, W)")
    anomalous = maps.masked_select(masks == 1)
    normal = maps.masked_select(masks == 0).sort()[0]
    if not len(anomalous) or not len(normal) or not 0 < fpr_limit <= 1:
        raise ValueError("AU-PRO needs anomalous and normal pixels, and a limit in (0, 1]")
    f0 = 1 - torch.searchsorted(normal, anomalous, right=True).double() / len(normal)
    f1 = 1 - torch.searchsorted(normal, anomalous).double() / len(normal)
    rising = (fpr_limit - f0).clamp(min=0).minimum(f1 - f0)  # how far of [f₀, f₁] is in the limit
    triangle = torch.where(f1 > f0, rising.square() / (2 * (f1 - f0)), 0)
    area = triangle + (fpr_limit - f1).clamp(min=0)
    labels = [label_regions(mask == 1)[mask == 1] for mask in masks]
    weight = 1 / torch.cat([x.bincount()[x] for x in labels if len(x)]).double()  # 1 / region size
    return ((weight * area).sum() / weight.sum() / fpr_limit).item()


# ======== End of the method. The rest is what a program needs around it. ========================

# ---- 7. Helpers of the method ------------------------------------------------------------------


def cutmix(images: Tensor) -> Tensor:
    """Paste a square of another image at the same place (Yun et al. 2019): see `_squares`."""
    return torch.where(_squares(images), images.roll(1, 0), images)


def mixup(images: Tensor, alpha: float = 1.0) -> Tensor:
    """x̃_i = λ x_i + (1 - λ) x_j with λ ~ Beta(α, α) for each image (Zhang et al. 2018)."""
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1, 1, 1))
    return blend(images.roll(1, 0), images, weight)


def augmix(images: Tensor) -> Tensor:
    """A mixture of chains of random operations (Hendrycks et al. 2020): torchvision's AugMix."""
    return torch.stack([v2.AugMix()(image) for image in images])


AUGMENTATIONS = {**BLANKS, "cutmix": cutmix, "mixup": mixup, "augmix": augmix}  # for the ablation


def check_images(images: Tensor) -> None:
    """ValueError unless images are (B, 3, H, W), uint8 or floating-point in [0, 1]."""
    known = images.is_floating_point() or images.dtype == torch.uint8
    if not known or images.ndim != 4 or images.shape[1] != 3:
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(f"images must be (B, 3, H, W), uint8 or in [0, 1], not {found}")
    if images.dtype == torch.uint8 or torch.compiler.is_compiling():
        return
    if not (images.min() >= 0 and images.max() <= 1):  # or NaN
        raise ValueError("floating-point images must be in [0, 1], not normalised yet")


def images_of(batches: Iterable) -> Iterator[Tensor]:
    """The images of batches, which are images or (images, label). ValueError if there are none, or
    if their sizes differ."""
    size = None
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        size = size or images.shape[-2:]
        if images.shape[-2:] != size:
            raise ValueError(f"images of {list(size)} and {list(images.shape[-2:])}: resize them")
        yield images
    if size is None:
        raise ValueError("there are no images; pass a list or a DataLoader, not an iterator")


def image_scores(scores: Tensor, maps: Tensor) -> Tensor:
    """The pooled score and the maximum of the map, (B, 2)."""
    return torch.stack([scores, maps.amax((-2, -1)).double()], 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator for the block; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mean_colour(images: Tensor) -> Tensor:
    """The mean colour of each image: (B, 3, H, W) to (B, 3, 1, 1)."""
    return images.float().mean((-2, -1), keepdim=True).round().to(images.dtype)


def rectangles(images: Tensor, length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """The mask of a rectangle in each image, at a random place, (B, 1, H, W) bool. Length and width
    (B,) are fractions of the image's sides."""
    n, _, h, w = images.shape
    y = ((torch.arange(h) + 0.5) / h - torch.rand(n, 1))[:, :, None]
    x = ((torch.arange(w) + 0.5) / w - torch.rand(n, 1))[:, None, :]
    length, width, angle = (of[:, None, None] for of in (length, width, angle))
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return ((along.abs() < length / 2) & (across.abs() < width / 2)).unsqueeze(1)


def blend(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """a + weight (b - a), rounded to the dtype of a."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    return torch.lerp(a.float(), b.float(), weight).round().to(a.dtype)


def snapshot(
    detector: GaussianAD, optimizer: torch.optim.Adam, pretrained: nn.ModuleList, *rest: object
) -> dict:
    """A copy of what `fine_tune` needs to resume, in plain tensors and numbers."""
    state = {"network": detector.extractor.state_dict(), "optimizer": optimizer.state_dict()}
    state["pretrained"] = [gaussian.state_dict() for gaussian in pretrained]
    return deepcopy({**state, "image_size": detector.image_size, "rest": rest})


def restore(detector: GaussianAD, optimizer: torch.optim.Adam, state: dict) -> tuple:
    """Undo `snapshot`: put network and optimiser back, and return the rest."""
    detector.extractor.load_state_dict(state["network"])
    optimizer.load_state_dict(deepcopy(state["optimizer"]))  # torch would go on in these tensors
    detector.image_size = state["image_size"]
    gaussians = [Gaussian(**tensors) for tensors in state["pretrained"]]
    pretrained = nn.ModuleList(gaussians).to(detector.extractor.mean.device)
    step, best, checks_since_best = state["rest"]
    return pretrained, step, Validation(**best), checks_since_best


def tail_quantile(scores: Tensor, quantile: float) -> float:
    """The estimated quantile, in (0, 1), of future scores, given some scores (N,).

    If too few scores lie beyond it, the tail is taken to be exponential (*ours*). Let u be the
    (k+1)-th largest score, with k a fifth of N, but 2 to 10, and E the sum of what the k largest
    exceed it by. A future score exceeds u with probability p = (k + 1) / (N + 1), and then u + y E
    with probability (1 + y)^-k; so the quantile is u + E ((p / (1 - quantile))^(1/k) - 1). Raises
    ValueError for no scores, NaN, or a quantile out of range."""
    if not 0 < quantile < 1 or not len(scores) or scores.isnan().any():
        raise ValueError("a quantile in (0, 1) needs at least one score, and no NaN")
    n, scores = len(scores), scores.double().sort(descending=True)[0]
    k = min(max(2, n // 5), 10, n - 1)
    if k == 0 or n * (1 - quantile) >= k:
        return float(np.quantile(scores.cpu(), quantile, method="weibull"))
    excess = (scores[:k] - scores[k]).sum()
    p = (k + 1) / (n + 1)
    return (scores[k] + excess * ((p / (1 - quantile)) ** (1 / k) - 1)).item()


def label_regions(mask: Tensor) -> Tensor:
    """Number the 8-connected regions of a mask (H, W) bool: (H, W) int64, 0 where normal, else 1 +
    the index of the region's last pixel. Each pixel starts with its own number. It takes the
    largest one among its neighbours, then the one that the pixel of that number has, which about
    doubles its reach, until nothing changes."""
    pointer = torch.arange(1.0, mask.numel() + 1, dtype=torch.float64, device=mask.device)
    pointer = pointer.view(mask.shape) * mask  # float64, as max_pool2d takes no integers
    while True:
        furthest = nn.functional.max_pool2d(pointer[None], 3, stride=1, padding=1)[0] * mask
        further = furthest.flatten()[(furthest.long() - 1).clamp(min=0)] * mask
        if torch.equal(further, pointer):
            return pointer.long()
        pointer = further


# ---- 8. Networks of torchvision ----------------------------------------------------------------

BACKBONES = tuple(models.list_models(models, ["efficientnet_*", "mobilenet_*", "*resne*"]))


def named_stages(backbone: str, weights: str | Path) -> tuple[list[nn.Module], list, list]:
    """The stages of a network, and the mean and std of its training images, given its name or its
    Python file. For arguments and errors see FeatureExtractor."""
    if backbone.endswith(".py"):
        own = runpy.run_path(backbone)
        if not {"stages", "mean", "std"} <= own.keys():
            raise ValueError(f"{backbone} must define stages, mean and std")
        return own["stages"], own["mean"], own["std"]
    network = torchvision_network(backbone, weights).eval()
    if isinstance(network, models.ResNet):
        stem = nn.Sequential(network.conv1, network.bn1, network.relu)
        layer1 = nn.Sequential(network.maxpool, network.layer1)
        stages = [stem, layer1, network.layer2, network.layer3, network.layer4]
    else:
        stages = list(network.features)
    fold_batch_norm(nn.ModuleList(stages))
    preset = models.get_model_weights(backbone)["IMAGENET1K_V1"].transforms()
    return stages, preset.mean, preset.std


@torch.no_grad()
def torchvision_network(backbone: str, weights: str | Path) -> nn.Module:
    """A network of torchvision's; for arguments and errors see FeatureExtractor."""
    if backbone not in BACKBONES:
        names = get_close_matches(backbone, BACKBONES) or BACKBONES
        raise ValueError(f"no backbone {backbone!r}; did you mean {', '.join(names)}?")
    try:
        pretrained = "IMAGENET1K_V1" if weights == "imagenet" else None
        network = models.get_model(backbone, weights=pretrained)
    except Exception as error:  # no network, or a broken download
        raise ConnectionError(
            f"no ImageNet weights of {backbone} ({error}): give --weights the path of a state "
            f"dict; a broken download is in {torch.hub.get_dir()}/checkpoints: delete it"
        ) from error
    if weights == "random":  # without statistics in batch norm, features would vanish with depth
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the last batch
        network.train()(torch.rand(8, 3, 64, 64))
    elif weights != "imagenet":
        _load_weights(network, backbone, weights)
    return network


def _load_weights(network: nn.Module, backbone: str, path: str | Path) -> None:
    """Load a state dict, which may be nested in a checkpoint and may lack the classifier."""
    state = load_plain(path)
    state = state.get("state_dict", state.get("model", state))
    unneeded = re.compile(r"(classifier|fc)\.|.*num_batches_tracked")
    try:
        state = {key: x for key, x in state.items() if not unneeded.match(key)}
        wrong = sum(network.load_state_dict(state, strict=False), [])
    except (AttributeError, RuntimeError) as error:  # no tensors by name, or of other shapes
        wrong = str(error).splitlines()[-1:]
    if wrong := [key for key in wrong if not unneeded.match(key)]:
        raise ValueError(f"{path} is not a state dict of {backbone}: see {wrong[0].strip()}")


@torch.no_grad()
def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: w ← w γ / σ, b ← (b - μ) γ / σ + β. For
    modules in evaluation mode whose children run in their order. The features stay the same, and
    training is up to a third faster (*ours*). It also changes, as Adam then steps on w γ / σ: fold
    your own network, too, if it is to train like the same one given by name."""
    for (name, layer), (next_name, following) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and type(following) is nn.BatchNorm2d:
            folded = fuse_conv_bn_eval(layer, following)
            setattr(module, name, folded.requires_grad_())  # torch forgets this
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


# ---- 9. Images and data sets in the MVTec AD layout --------------------------------------------

NORMAL = "good"  # MVTec AD's name for the folder of normal images


class Sample(NamedTuple):
    """One image of a data set in the MVTec AD layout."""

    path: Path
    defect: str  # the name of its folder; "good" for a normal image
    mask: Path | None  # of the defect, if there is one


def list_categories(root: str | Path) -> list[str]:
    """The folders in `root` that have a train or test folder; ValueError if there are none."""
    root = Path(root)
    folders = [*root.glob("[!.]*/train/"), *root.glob("[!.]*/test/")]
    if not folders:
        itself = any((root / split).is_dir() for split in ("train", "test"))
        parent = root.resolve().parent if itself else "the folder above <category>/train/good"
        raise ValueError(f"no categories in {root}; try --data {parent}")
    return sorted({folder.parent.name for folder in folders})


def list_samples(root: str | Path, category: str, split: str) -> list[Sample]:
    """The images of `root/category/split/<defect>`, "train" (only "good") or "test", sorted. Masks
    mirror the image paths under `root/category/ground_truth`, named `<stem>_mask` or `<stem>`, each
    an image or a folder of several. Raises ValueError if there are no images."""
    names = {unicodedata.normalize("NFC", name): name for name in list_categories(root)}
    if (category := unicodedata.normalize("NFC", category)) not in names:
        raise ValueError(f"no category {category!r} in {root}; there are: {', '.join(names)}")
    home, truth = (Path(root, names[category], folder) for folder in (split, "ground_truth"))
    samples = []
    for folder in sorted(home.glob("[!.]*/")):
        defect = NORMAL if folder.name.lower() == NORMAL else folder.name
        if split == "train" and defect != NORMAL:
            continue
        if defect.lower() in ("ok", "normal", "no_defect"):
            warnings.warn(f"{folder} is treated as a defect class: normal is called {NORMAL!r}")
        masks = {path.with_suffix(""): path for path in walk(truth / folder.name)[0]}
        for path in list_images([folder]):
            stem = truth / path.relative_to(home).with_suffix("")
            stems = (stem.with_name(f"{stem.name}_mask"), stem)
            found = [*(masks[x] for x in stems if x in masks), *filter(Path.is_dir, stems), None]
            samples.append(Sample(path, defect, found[0]))
    if not samples:
        raise ValueError(f"no images in {home / NORMAL}, where {split} images are expected")
    return samples


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """All images among the given files and folders, at any depth and not hidden; each real file
    once. Warns of files that are skipped. Raises ValueError for a path without images."""
    images = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        found, skipped = ([path], []) if path.is_file() else walk(path)
        kinds = ", ".join(sorted({x.suffix for x in skipped}))
        others = f"{len(skipped)} files that cannot be read as images ({kinds})"
        if not found:
            hint = f"but {others}: convert them" if skipped else "which is empty"
            raise ValueError(f"no images in {path}, {hint}")
        if skipped:
            warnings.warn(f"{path}: skipped {others}, such as {skipped[0].name}")
        for file in found:
            images.setdefault(os.path.realpath(file), file)
    return list(images.values())


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """All visible files below a folder: images, by suffix, and others, as well as what cannot be
    read or followed; sorted. Links are followed, but each real folder is visited once."""
    images, others, visited = [], [], set()
    fail = lambda error: others.append(Path(error.filename))
    kinds = Image.registered_extensions()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        new = os.path.realpath(place) not in visited
        visited.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        for path in (Path(place, name) for name in names if new and name[0] != "."):
            known = kinds.get(path.suffix.lower()) in Image.OPEN and path.is_file()
            (images if known else others).append(path)
    return sorted(images), sorted(others)


def hold_out(samples: Sequence, seed: int = 0) -> tuple[list, list]:
    """Normal samples, shuffled by `seed`: (those to fit, those held out). A fifth is held out, but
    at least 16, or half if that is less (*ours*). Raises ValueError for fewer than six."""
    n = len(samples)
    if n < 6:
        raise ValueError(f"too few normal images: {n}, at least 6 are needed")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    first = min(max(math.ceil(n / 5), 16), n // 2)
    return [samples[i] for i in shuffled[first:]], [samples[i] for i in shuffled[:first]]


def load_images(paths: Sequence[str | Path], size: int, workers: int = 2) -> Tensor:
    """`load_image` of each, (N, 3, size, size) uint8, in threads, as Pillow releases the GIL."""
    with ThreadPoolExecutor(workers) as pool:
        return torch.stack(list(pool.map(lambda path: load_image(path, size), paths)))


def load_image(path: str | Path, size: int | Sequence[int]) -> Tensor:
    """Read an image as RGB, rotated as EXIF says, resized without cropping to a square (*earlier
    code*) or to (H, W): (3, H, W) uint8. Transparent pixels are composited onto black. Raises
    ValueError with the file's name."""
    height, width = (size, size) if isinstance(size, int) else size
    with opened(path) as file:
        deep = file.deep
        if file.mode[0] in "IF":  # Pillow's own conversion would clip
            values = np.asarray(file)
            if file.mode == "F" or values.min() < 0 or values.max() >= 2**16:
                raise ValueError("its pixels are not from 0 to 65535: convert it to 8 bits")
            file = Image.fromarray((values // 257).astype(np.uint8))
        if file.has_transparency_data:
            layer = file.convert("RGBA")
            file = Image.alpha_composite(Image.new("RGBA", file.size, "black"), layer)
        image = file.convert("RGB")
        if deep and max(high for _, high in image.getextrema()) < 64:
            raise ValueError("most of the 16-bit range is unused: convert all images to 8 bits")
        return F.pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))


def load_mask(
    path: str | Path, size: int | Sequence[int], image: str | Path | None = None
) -> Tensor:
    """Read where a defect is: (size, size) or (H, W) bool, True if any source pixel is defective.

    A source pixel is defective if it is opaque and any channel, or its palette index, is not 0. If
    there is none, but some are transparent, all opaque ones are. The masks in a folder are merged.
    Raises ValueError with the file's name, also if its aspect ratio differs from `image`'s."""
    if Path(path).is_dir():
        return torch.stack([load_mask(file, size, image) for file in list_images([path])]).any(0)
    with opened(image or path) as file:
        (w, h) = file.size
    with opened(path) as mask:
        if abs(mask.width * h - mask.height * w) > max(mask.width + mask.height, w + h):
            raise ValueError(f"the mask is {mask.width} x {mask.height}, the image {w} x {h}")
        values = np.atleast_3d(np.asarray(mask))
        defect = (values[..., :-1] if mask.mode[-1] in "Aa" else values).any(-1)
        if mask.has_transparency_data:
            opaque = np.asarray(mask.convert("RGBA"))[..., 3] > 0
            defect = defect & opaque if opaque.all() or (defect & opaque).any() else opaque
    defect = torch.from_numpy(defect.astype(np.float32))
    return nn.functional.adaptive_max_pool2d(defect[None], size)[0] > 0


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file, rotated as its EXIF says. Errors while it is open name it, as ValueErrors."""
    try:
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                raise ValueError(f"it holds {file.n_frames} pictures: save the right one alone")
            file.deep = file.mode[0] in "IF" or ";16" in str(file.tile)  # more than 8 bits
            with suppress(Exception):  # an unreadable orientation is ignored
                ImageOps.exif_transpose(file, in_place=True)
            yield file
    except MemoryError:
        raise
    except Exception as error:  # decoders may raise anything on a broken file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        advice = "" if type(error) is ValueError else "; repair or remove it"
        raise ValueError(f"cannot read {path}: {reason}{advice}") from error


# ---- 10. Files, devices, errors ----------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device for "cpu", "cuda" (ValueError without one) or "auto", a GPU if there is one.
    Switches TF32 off for the whole process: its rounding would drown the directions of least
    variance, which dominate the scores."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; use the CPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def detector_from(
    content: dict,
    path: str | Path,
    extractor: FeatureExtractor | None = None,
    kind: type[GaussianAD] = GaussianAD,
) -> GaussianAD:
    """The detector in the content of a file that `GaussianAD.save` wrote: see `GaussianAD.load`."""
    try:
        settings, state = content["detector"], content["state"]
        if extractor is None and settings["backbone"] not in BACKBONES:
            raise ValueError(f"{path} is of your own network: give its extractor (--backbone)")
        if extractor is None:
            with seeded(0):  # random weights, replaced below
                extractor = FeatureExtractor(settings["backbone"], settings["levels"], "random")
        if extractor.levels != settings["levels"]:
            raise ValueError(f"{path} has the levels {settings['levels']}, not those given")
        detector = kind(extractor, settings["map_levels"], settings["covariance"])
        detector.image_size, detector.source = settings["image_size"], str(path)
        detector.held_out_scores = state["held_out_scores"]
        names = [*(f"pooled_gaussians.{i}" for i in range(len(extractor.levels))), "map_gaussian"]
        pairs = ((state[f"{name}.mean"], state[f"{name}.whitening"]) for name in names)
        *pooled, detector.map_gaussian = (Gaussian(*pair) for pair in pairs)
        detector.pooled_gaussians = nn.ModuleList(pooled)
        detector.load_state_dict(state)
    except (LookupError, TypeError, RuntimeError) as error:  # missing, or of another kind
        raise ValueError(f"{path} holds no detector of this version and network") from error
    return detector


def load_plain(path: str | Path) -> dict:
    """Read a dict of tensors and settings onto the CPU; no code in the file is run. Raises OSError
    if it cannot be read, ValueError if it holds anything but a dict."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the unpickler may raise anything on other files
        raise ValueError(f"{path} is not a file saved by torch.save; remove it") from error
    if damaged:  # which torch.load does not notice
        raise ValueError(f"{path} is damaged: remove it, or give another")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def save_plain(content: dict, path: str | Path) -> None:
    """Write tensors and settings atomically to `path`. Raises OSError; the old file then stays."""
    buffer = io.BytesIO()  # given a path, torch.save hides the error of the disk
    torch.save(content, buffer)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getbuffer())


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside `path` that replaces it when the block ends without an error: readers never see
    a part of a file, even if the run is killed."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
