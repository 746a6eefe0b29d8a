# SPDX-License-Identifier: MIT
"""Transfer Learning Gaussian Anomaly Detection by Fine-tuning Representations, in one module.

Rippel, Chavan, Lei and Merhof, IMPROVE 2022, arXiv 2108.04116. The method comes first:

    1. Features     φ_l, the feature map of an ImageNet network at level l
    2. Gaussian     N(μ, Σ) of normal features, Σ by Ledoit-Wolf shrinkage; Mahalanobis distance
    3. Detector     pooled score sum_l d_l, d_l the distance of the spatial mean of φ_l; anomaly map
    4. Objective    the Mahalanobis loss; augmentations, and the validator that judges by them
    5. Fine-tuning  one loop, and 6. Metrics, AUROC and AU-PRO

Sections 7 to 10 are what a program needs around it. Docstrings name the source of a step:
*abstract*: the paper's abstract (we had no access to the rest); *earlier code*: the authors', for
their IEEE TIM paper of 2021; *ours*: our own choice."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import re
import runpy
import sys
import unicodedata
import warnings
import zipfile
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, count, islice, pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple

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
    levels      numbered from 1: level i is torchvision's `features[i - 1]`, of a ResNet the stem or
                a stage, of your own network a module. By default those of stride 16 or more, of
                neighbours of one shape only the last (*ours*; *earlier code*: all): 5 to 9 of
                EfficientNet-B4; 11, 14, 17, 18, 19 of MobileNetV2. Earlier ones respond to light
    weights     for torchvision's networks: "imagenet" (IMAGENET1K_V1, downloaded once), "random",
                or the path of a state dict, which may lack the classifier
    mean, std   for your own network: of the three channels of its training images, in [0, 1]

    The network stays in evaluation mode: batch norm and dropout are fixed (*ours*). Raises
    ValueError for invalid arguments, ConnectionError if ImageNet weights cannot be downloaded."""

    def __init__(
        self,
        backbone: str | Sequence[nn.Module] = "efficientnet_b4",
        levels: Sequence[int] | None = None,
        weights: str | Path = "imagenet",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, str) else None
        if isinstance(backbone, str):
            backbone, mean, std = named_stages(backbone, weights)
        self.stages = nn.ModuleList(backbone).eval()
        dtype = next((p.dtype for p in self.stages.parameters()), torch.float32)
        mean, std = torch.as_tensor(mean, dtype=dtype), torch.as_tensor(std, dtype=dtype)
        in_range = ((mean >= 0) & (mean <= 1)).all() and ((std > 0) & (std <= 1)).all()
        if mean.shape != (3,) or std.shape != (3,) or not in_range:
            raise ValueError("your own network needs 3 means in [0, 1] and 3 stds in (0, 1]")
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))
        shapes = self._shapes()
        self.strides = [224 / shape[-1] for shape in shapes]  # of level 1, 2, …
        if levels is None:
            pairs = enumerate(pairwise([*shapes, None]), start=1)  # a level and the next
            levels = [i for i, (a, b) in pairs if 224 / a[-1] > 12 and a != b] or [len(shapes)]
        self.levels = sorted(set(map(int, levels)))
        if not self.levels or self.levels[0] < 1 or self.levels[-1] > len(shapes):
            raise ValueError(f"this network has the levels 1 to {len(shapes)}, not {levels}")
        self.stages = self.stages[: self.levels[-1]]
        self.to(memory_format=torch.channels_last).eval()  # 1.6 times faster on a CPU

    @torch.no_grad()
    def _shapes(self) -> list[torch.Size]:
        """The shape (C, H, W) of every level, found with a normalised ramp of 224 px."""
        maps = [torch.linspace(-2, 2, 3 * 224**2, dtype=self.mean.dtype).view(1, 3, 224, 224)]
        for level, stage in enumerate(self.stages, start=1):
            before = maps[-1].clone()
            maps.append(apply_stage(stage, level, maps[-1]))
            if not torch.allclose(maps[-2], before, 0, 0, equal_nan=True):  # level - 1 is lost
                raise ValueError(f"module {level} changes its input in place: set inplace=False")
            if not isinstance(maps[-1], Tensor) or maps[-1].ndim != 4:
                raise ValueError(f"module {level} must return feature maps (B, C, H, W)")
        return [x.shape[1:] for x in maps[1:]]

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
        with full_precision():
            for level, stage in enumerate(self.stages, start=1):
                x = apply_stage(stage, level, x)
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
    mI = m * torch.eye(c, dtype=S.dtype, device=S.device)
    d2 = (S - mI).square().sum((-2, -1)) / c
    b2 = (y.square().sum(-1).square().sum(-1) - n * S.square().sum((-2, -1))) / c / n**2
    shrinkage = torch.where(d2 > 0, b2.clamp(min=0).minimum(d2) / d2, 0)
    weight = shrinkage[..., None, None]
    return weight * mI + (1 - weight) * S, shrinkage


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
                    its variances, and "identity" replaces Σ, ridge and all: Euclidean distances

        Raises ValueError for fewer than three samples, or if they are not finite or do not vary."""
        *shape, n, c = samples.shape
        if n < 3:  # with two, the shrinkage is 0 and Σ is singular
            raise ValueError(f"a Gaussian needs at least three samples, not {n}")
        if not samples.isfinite().all():
            raise ValueError("features are not finite: lower the learning rate, or check weights")
        identity, fits = torch.eye(c, dtype=torch.float64, device=samples.device), []
        for x in samples.reshape(-1, n, c).split(32):  # bounds the memory that Σ takes
            mean, sigma = x.double().mean(-2), ledoit_wolf(x)[0] + ridge * identity
            variance = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
            rounding = torch.finfo(torch.float32).eps * mean  # of features; variance below is noise
            constant = variance <= rounding.square().mean(-1)
            kinds = {"full": sigma, "diagonal": sigma * identity}
            sigma = {**kinds, "identity": identity.expand_as(sigma)}[covariance]
            factor, failed = torch.linalg.cholesky_ex(sigma)  # Σ = L Lᵀ, W = L⁻¹
            if constant.any() or failed.any():
                raise ValueError("features do not vary: are images the same, or is lr too high?")
            fits.append((mean, torch.linalg.solve_triangular(factor, identity, upper=False)))
        mean, whitening = (torch.cat(parts) for parts in zip(*fits))
        return cls(mean.view(*shape, c), whitening.view(*shape, c, c))

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance d = √((x - μ)ᵀ Σ⁻¹ (x - μ)) = ‖W (x - μ)‖ of x (B, ..., C): (B, ...)
        float64, not squared (*earlier code*). Its gradient at x = μ is 0."""
        centred = x.to(self.mean.dtype) - self.mean
        whitened = torch.einsum("...ij,b...j->b...i", self.whitening, centred)
        return torch.linalg.vector_norm(whitened, dim=-1)


# ---- 3. Detector -------------------------------------------------------------------------------

MAP_RIDGE = 0.1  # fraction of the mean variance that is added to each variance of a map (ours)
OUTLIER = 2.5  # times the median: held-out images that score more are left out (ours)


class GaussianAD(nn.Module):
    """A feature extractor, a Gaussian per level, and for the anomaly map a Gaussian per location.

    map_levels  levels of the anomaly map; by default those of stride 16, or closest to it (*ours*):
                5 and 6 for EfficientNet-B4, 11 and 14 for MobileNetV2. Their Gaussians take
                8 h w C² bytes, C being the total number of channels
    covariance  "full", "diagonal" or "identity": see `Gaussian.fit`

    `fit` it to normal images, then `calibrate` it on others. Images are those that FeatureExtractor
    takes, all of one size. Raises ValueError for other images, and before it is fitted or
    calibrated."""

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
            away = {i: abs(math.log2(extractor.strides[i - 1] / 16)) for i in extractor.levels}
            map_levels = [i for i in away if away[i] == min(away.values())]
        self.map_levels = sorted(set(map(int, map_levels)))
        if not self.map_levels or not set(self.map_levels) <= set(extractor.levels):
            raise ValueError(f"map levels {map_levels} are not among {extractor.levels}")
        self.extractor, self.covariance = extractor, covariance
        self.gaussians = nn.ModuleList()  # once fitted, one per level and one for the map
        self.image_size: list[int] | None = None  # [H, W] of the images it was fitted to
        self.register_buffer("held_out_scores", torch.zeros(0, 2, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """The pooled score sum_l d_l, with d_l the Mahalanobis distance of the spatial mean of
        level l: (B,) float64 (*earlier code*)."""
        return self._pooled_score(self._features(images))

    def scores_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled score (B,) float64, as `forward`, and the anomaly map (B, H, W) float32.
        At each location the map is the distance of the joined map levels to that location's
        Gaussian, as in PaDiM (Defard et al. 2020), resized to the image bilinearly (*ours*)."""
        features = self._features(images)
        return self._pooled_score(features), self._maps(features)

    def _features(self, images: Tensor) -> list[Tensor]:
        """The spatial mean of each level, (B, C_l), and last the map levels, resized to the first
        of them and joined, (B, h, w, C)."""
        maps, size = self.extractor(images), list(images.shape[-2:])
        chosen = [x for i, x in zip(self.extractor.levels, maps) if i in self.map_levels]
        h, w = chosen[0].shape[-2:]
        resized = [nn.functional.interpolate(x, (h, w), mode="bilinear") for x in chosen]
        joined = torch.cat(resized, 1).permute(0, 2, 3, 1)
        if self.image_size is None:  # the first batch of a fit
            self.image_size = size
            if (size_gb := 8e-9 * h * w * joined.shape[-1] ** 2) >= 1:
                warnings.warn(f"the map's Gaussians take {size_gb:.1f} GB: choose other map levels")
        if self.image_size != size:
            raise ValueError(f"images of {size} after those of {self.image_size}: resize them")
        return [*(x.mean((-2, -1)) for x in maps), joined]

    def _pooled_score(self, features: list[Tensor]) -> Tensor:
        if not self.gaussians:
            raise ValueError("the detector is not fitted")
        return sum(gaussian.distance(x) for gaussian, x in zip(self.gaussians, features[:-1]))

    def _maps(self, features: list[Tensor]) -> Tensor:
        distances = self.gaussians[-1].distance(features[-1]).float().unsqueeze(1)
        return nn.functional.interpolate(distances, self.image_size, mode="bilinear").squeeze(1)

    def fit(self, batches: Iterable) -> GaussianAD:
        """Fit all Gaussians to at least three normal images: batches of images, or of (images,
        label). Returns self. Meanwhile features are held, of EfficientNet-B4 0.7 MB an image."""
        self.image_size = None
        self.gaussians = self._gaussians_of(self._features_of(batches))
        return self

    def calibrate(self, held_out: Tensor, batch_size: int = 16) -> GaussianAD:
        """Store the scores of at least three held-out normal images (N, 3, H, W), for
        `anomaly_score` and `threshold`. Returns self. `fit` keeps them: a fit to all images
        afterwards makes better Gaussians, and thresholds slightly on the high side. An image whose
        pooled score or maximum of the map is over OUTLIER times the median, such as a black frame,
        is left out with a warning, as it would decide mean, deviation and tail, and defects would
        pass (a later fit should lack it, too). On seventeen clean sets one image was (*ours*)."""
        check_images(held_out)
        warn_of_outliers(self._calibrate(self._features_of(held_out.split(batch_size))))
        return self

    @torch.no_grad()
    def _features_of(self, batches: Iterable) -> list[Tensor]:
        parts = [self._features(images) for images in images_of(batches)]
        return [torch.cat(features) for features in zip(*parts)]

    @torch.no_grad()
    def _gaussians_of(self, features: list[Tensor]) -> nn.ModuleList:
        """A Gaussian of each of some features (N, ..., C)."""
        gaussians = nn.ModuleList()
        for x in features:
            ridge = MAP_RIDGE * x.var(0, correction=0).mean().item() if x.ndim == 4 else 0.0
            gaussians.append(Gaussian.fit(x.movedim(0, -2), ridge, self.covariance))
        return gaussians

    @torch.no_grad()
    def _calibrate(self, features: list[Tensor]) -> dict[int, float]:
        """`calibrate` on features. Returns the outliers: number of the image → score / median."""
        pooled = self._pooled_score(features)
        pieces = zip(*(x.split(16) for x in features))  # bounds the memory that maps take
        maxima = torch.cat([self._maps(piece).amax((-2, -1)) for piece in pieces])
        scores = torch.stack([pooled, maxima.double()], 1)
        over_median = (scores / scores.median(0).values).amax(1)
        usual = scores[over_median <= OUTLIER]
        if len(usual) < 3 or not (usual.std(0) > 0).all():  # NaN is not above 0 either
            left = f"{len(usual)} of {len(scores)} are no outliers"
            raise ValueError(
                f"calibration needs at least three held-out images that differ: {left}"
            )
        self.held_out_scores = usual
        return {i: x for i, x in enumerate(over_median.tolist()) if x > OUTLIER}

    def anomaly_score(self, scores: Tensor, maps: Tensor) -> Tensor:
        """The score used for ranking and decisions, (B,) float64, from what `scores_and_maps`
        returns: the pooled score plus the maximum of the map, each standardised over held-out
        normal images (*ours*)."""
        return self._standardised(torch.stack([scores, maps.amax((-2, -1)).double()], 1))

    def threshold(self, false_alarms: float = 0.05) -> float:
        """Threshold that a fraction `false_alarms`, in (0, 1), of the anomaly scores of normal
        images is expected to exceed."""
        return tail_quantile(self._standardised(self.held_out_scores), 1 - false_alarms)

    def _standardised(self, scores: Tensor) -> Tensor:
        if not len(self.held_out_scores):
            raise ValueError("the detector is not calibrated")
        mean, std = self.held_out_scores.mean(0), self.held_out_scores.std(0)
        anomaly_scores = ((scores - mean) / std).sum(1)
        if not torch.compiler.is_compiling() and not anomaly_scores.isfinite().all():
            raise ValueError("scores are not finite: the detector or an image holds NaN")
        return anomaly_scores

    def get_state(self) -> dict:
        """The network's weights and all that was fitted, in plain tensors and numbers."""
        state = {"network": self.extractor.state_dict(), "image_size": self.image_size}
        state["gaussians"] = [gaussian.state_dict() for gaussian in self.gaussians]
        return {**state, "held_out_scores": self.held_out_scores}

    def set_state(self, state: dict) -> None:
        """Take over what `get_state` of another detector of the same network returned."""
        self.extractor.load_state_dict(state["network"])
        self.gaussians = nn.ModuleList(Gaussian(**tensors) for tensors in state["gaussians"])
        self.held_out_scores, self.image_size = state["held_out_scores"], state["image_size"]

    def save(self, path: str | Path) -> None:
        """Save the detector atomically. Raises OSError; the old file then stays."""
        settings = {"backbone": self.extractor.backbone, "levels": self.extractor.levels}
        settings |= {"map_levels": self.map_levels, "covariance": self.covariance}
        save_plain(settings | self.get_state(), path)

    @staticmethod
    def load(
        path: str | Path | BinaryIO,
        device: torch.device | str = "cpu",
        extractor: FeatureExtractor | None = None,
    ) -> GaussianAD:
        """Rebuild what `save` wrote, on `device`, from a path or an open file. For your own
        network, pass an extractor built the same way. Nothing is downloaded, and no code in the
        file is run. Raises OSError if it cannot be read, ValueError if it holds no detector."""
        name = path if isinstance(path, str | Path) else getattr(path, "name", "the file")
        return read_detector(load_plain(path), name, extractor).to(device)


def tail_quantile(scores: Tensor, quantile: float) -> float:
    """The estimated quantile, in (0, 1), of future scores, given some scores (N,).

    If too few scores lie beyond it, the tail is taken to be exponential (*ours*). Let u be the
    (k+1)-th largest score, with k a fifth of N, but 2 to 10, and E the sum of what the k largest
    exceed it by. A future score exceeds u with probability p = (k + 1) / (N + 1), and then u + y E
    with probability (1 + y)^-k; so the quantile is u + y E with y = (p / (1 - quantile))^(1/k) - 1.
    Raises ValueError for no scores, NaN, or a quantile out of range."""
    if not 0 < quantile < 1 or not len(scores) or scores.isnan().any():
        raise ValueError("a quantile in (0, 1) needs at least one score, and no NaN")
    n, scores = len(scores), scores.double().sort(descending=True)[0]
    k = min(max(2, n // 5), 10, n - 1)
    if n * (1 - quantile) >= k:
        return float(np.quantile(scores.cpu(), quantile, method="weibull"))
    y = ((k + 1) / (n + 1) / (1 - quantile)) ** (1 / k) - 1
    return (scores[k] + y * (scores[:k] - scores[k]).sum()).item()


# ---- 4. The objective, and what judges it: augmentations ---------------------------------------


def mahalanobis_loss(detector: GaussianAD, images: Tensor) -> Tensor:
    """The training objective (*abstract*): the mean pooled score of normal images (B, 3, H, W),

        sum_x sum_l √((φ_l(x) - μ_l)ᵀ Σ_l⁻¹ (φ_l(x) - μ_l)) / B,

    φ_l(x) being spatial means. Only the network has gradients; `fine_tune` sets μ_l and Σ_l."""
    return detector(images).mean()


# cutout, AugMix, cutmix and mixup are augmentations of vicinal risk minimisation (*abstract*; which
# ones is our reading), scar is *ours*. Each takes uint8 images (B, 3, S, S), returns as many, and
# draws from torch's default generator, as torchvision's transforms do.


def cutout(images: Tensor) -> Tensor:
    """Fill a square with the image's mean colour (DeVries and Taylor 2017): see `_squares`."""
    return torch.where(_squares(images), _mean_colour(images), images)


def scar(images: Tensor) -> Tensor:
    """Fill a rectangle at any angle, 10 to 35 % of the side long and 0.8 to 2.5 % wide, with the
    image's mean colour or half of it (*ours*)."""
    half, mean = torch.rand(len(images), 1, 1, 1) < 0.5, _mean_colour(images)
    length = torch.empty(len(images)).uniform_(0.10, 0.35)
    width = torch.empty(len(images)).uniform_(0.008, 0.025)
    angle = torch.empty(len(images)).uniform_(0, math.pi)
    inside = _rectangles(images, length, width, angle)
    return torch.where(inside, torch.where(half, mean, mean // 2), images)


def augmix(images: Tensor) -> Tensor:
    """A mixture of chains of random operations (Hendrycks et al. 2020): torchvision's AugMix."""
    return torch.stack([v2.AugMix()(image) for image in images])


def cutmix(images: Tensor) -> Tensor:
    """Paste a square of another image at the same place (Yun et al. 2019): see `_squares`."""
    return torch.where(_squares(images), images.roll(1, 0), images)


def mixup(images: Tensor, alpha: float = 1.0) -> Tensor:
    """x̃_i = λ x_i + (1 - λ) x_j with λ ~ Beta(α, α) for each image (Zhang et al. 2018)."""
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1, 1, 1))
    return _blend(images.roll(1, 0), images, weight)


# The default (ours): two with sharp edges, and one that changes the whole image softly, as features
# that find edges better and better may already forget soft changes.
DEFAULT_AUGMENTATIONS = {"cutout": cutout, "scar": scar, "augmix": augmix}
AUGMENTATIONS = {**DEFAULT_AUGMENTATIONS, "cutmix": cutmix, "mixup": mixup}
OPACITIES = (1.0, 0.5, 0.25)  # the AUROC of opaque ones saturates; faint ones tell (ours)


def _squares(images: Tensor) -> Tensor:
    """Squares of 0.2 to 10 % of the image, log-uniform, cut at the border. Larger ones are too
    easy: even the frozen network detects them (*ours*)."""
    side = torch.empty(len(images)).uniform_(math.log(0.002), math.log(0.1)).exp().sqrt()
    return _rectangles(images, side, side, torch.zeros(len(images)))


def _rectangles(images: Tensor, length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """The mask of a rectangle in each image, at a random place, (B, 1, H, W) bool. Length and width
    (B,) are fractions of the image's sides."""
    n, _, h, w = images.shape
    each = (n, 1, 1, 1)
    y = (torch.arange(h).view(h, 1) + 0.5) / h - torch.rand(each)
    x = (torch.arange(w) + 0.5) / w - torch.rand(each)
    cos, sin = angle.cos().view(each), angle.sin().view(each)
    along, across = (x * cos + y * sin).abs(), (y * cos - x * sin).abs()
    return (along < length.view(each) / 2) & (across < width.view(each) / 2)


def _mean_colour(images: Tensor) -> Tensor:
    return images.float().mean((-2, -1), keepdim=True).round().to(images.dtype)


def _blend(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """a + weight (b - a), rounded to the dtype of a."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    return torch.lerp(a.float(), b.float(), weight).round().to(a.dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator for the block; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


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
    image i is the mean of row i plus that of the columns of its own versions, less twice the AUROC;
    the standard error is the standard deviation of the influences over √N (DeLong et al. 1988; for
    clusters Obuchowski 1997).

    images          (N, 3, S, S) uint8 on the CPU: at least three held-out normal images
    seed            of the augmented images, which are drawn once
    n_augmented     how many per augmentation and opacity, rounded up to a multiple of N
    augmentations   functions by name, such as AUGMENTATIONS, each applied at all OPACITIES"""

    def __init__(
        self,
        images: Tensor,
        seed: int = 0,
        n_augmented: int = 64,
        augmentations: dict[str, Callable[[Tensor], Tensor]] = DEFAULT_AUGMENTATIONS,
    ) -> None:
        check_images(images)
        if len(images) < 3 or images.dtype != torch.uint8:
            raise ValueError("the validator needs at least three held-out images, uint8")
        self.normal, self.augmented = images, {}
        rounds = range(math.ceil(n_augmented / len(images)))
        with seeded(seed):
            for name, augment in augmentations.items():
                opacities = [opacity for _ in rounds for opacity in OPACITIES]
                versions = [_blend(images, augment(images), opacity) for opacity in opacities]
                self.augmented[name] = torch.cat(versions)

    @torch.no_grad()
    def __call__(
        self, score: Callable[[Tensor], Tensor], batch_size: int = 16, normal: Tensor | None = None
    ) -> Validation:
        """Validate a function that maps images (B, 3, S, S) to scores (B,), such as a detector.
        `normal` are its scores of the held-out images, where they are known. Raises ValueError for
        scores that are not finite."""

        def scores_of(images: Tensor) -> Tensor:
            return torch.cat([score(x).cpu() for x in images.split(batch_size)])

        normal = scores_of(self.normal) if normal is None else normal.cpu()
        aurocs, influences = {}, []
        for name, images in self.augmented.items():
            augmented = scores_of(images)
            if not (normal.isfinite().all() and augmented.isfinite().all()):
                raise ValueError("the scores of held-out images are not finite")
            C = (augmented - normal[:, None]).sign().double() / 2 + 0.5  # (N, versions)
            own = C.mean(0).view(-1, len(normal)).mean(0)  # versions are in the order of the images
            aurocs[name] = C.mean().item()
            influences.append(C.mean(1) + own - 2 * C.mean())
        return Validation(aurocs, torch.stack(influences).mean(0))


# ---- 5. Fine-tuning ----------------------------------------------------------------------------

FIRST_CHECK = 32  # steps: after fewer the features are unsettled, and a check misleads


@dataclass(frozen=True)
class Check:
    """What one check of fine-tuning measured."""

    step: int
    kept: bool  # the detector is now that of this step
    loss: float | None  # mean over the steps since the previous check; None at step 0
    validation: Validation
    gain: float | None  # of the AUROC over the last check that was kept; None at step 0
    standard_error: float | None  # of the gain
    state: dict = field(repr=False)  # plain tensors and numbers, with which `fine_tune` resumes


def fine_tune(
    detector: GaussianAD,
    batches: Iterable,
    held_out: Tensor,
    steps: int = 512,
    lr: float = 1e-4,
    patience: int = 3,
    seed: int = 0,
    batch_size: int = 16,
    state: dict | None = None,
    augmentations: dict[str, Callable[[Tensor], Tensor]] = DEFAULT_AUGMENTATIONS,
    names: Sequence[object] = (),
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[Check]:
    """Fine-tune a detector on normal images; yield a check at steps 0, 32, 64, 128, … and the last.

    The loss is the distance of normal images to the estimated Gaussian (*abstract*): that of the
    pre-trained features, held fixed. Each check fits Gaussians to the current features. It is kept
    if the validator's AUROC gained more than one standard error over the last one kept (after the
    one-standard-error rule, Breiman et al. 1984); the first, of the frozen network, always is.
    After `patience` checks in a row that are not kept it ends. Rule and Adam are *ours*.

    A copy is trained. At each check, at the end and after an error the detector is that of the last
    check kept, calibrated on the held-out images and then fitted to all, but for outliers.

    batches     images or (images, label): a DataLoader that shuffles, or a list; no iterator, as
                it is read from its start after each check
    held_out    (N, 3, H, W) uint8, normal, not among the batches
    steps       maximum; 0 only fits and validates the frozen network
    batch_size  of held-out and augmented images
    state       of an earlier check, to resume from it, bit-identically on a CPU, with the same
                arguments and the detector as it was then
    names       of the held-out images, for warnings of outliers
    on_step     called after each step with its number and loss

    Raises ValueError for invalid arguments, or when features are no longer finite or varying."""
    if steps < 0 or patience < 1 or not 0 <= lr < math.inf:
        raise ValueError("steps and lr must be finite and at least 0, and patience at least 1")
    validator = AugmentationValidator(held_out, seed, augmentations=augmentations)
    tuned = GaussianAD(deepcopy(detector.extractor), detector.map_levels, detector.covariance)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=lr)
    pretrained = last_kept = None  # the Gaussians, the validation
    done, not_kept, warned = 0, 0, set()  # steps; checks since the last one kept; outliers
    if state is not None:
        tuned.set_state(state)
        pretrained = tuned.gaussians.to(tuned.extractor.mean.device)
        optimizer.load_state_dict(deepcopy(state["optimizer"]))  # Adam would write to its tensors
        last_kept = Validation(**state["last_kept"])
        done, not_kept = state["step"], state["not_kept"]

    while last_kept is None or (done < steps and not_kept < patience):
        step = 0 if last_kept is None else min(max(FIRST_CHECK, 2 * done), steps)
        losses = []
        with seeded(seed + step), torch.enable_grad(), full_precision():
            endless = chain.from_iterable(images_of(batches) for _ in count())
            for images in islice(endless, step - done):
                optimizer.zero_grad()
                loss = mahalanobis_loss(tuned, images)  # to the Gaussians `pretrained`
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                on_step(done + len(losses), losses[-1])

            features = tuned._features_of(batches)
            held_out_features = tuned._features_of(held_out.split(batch_size))
            tuned.gaussians = tuned._gaussians_of(features[:-1])
            if step == 0:
                pretrained = tuned.gaussians
            validation = validator(tuned, batch_size, tuned._pooled_score(held_out_features))
            gain, error = validation.gain_over(last_kept) if last_kept else (None, None)
            kept = last_kept is None or gain > error
            not_kept += 1
            if kept:
                last_kept, not_kept = validation, 0
                tuned.gaussians = tuned.gaussians + tuned._gaussians_of(features[-1:])
                outliers = tuned._calibrate(held_out_features)
                usual = [i for i in range(len(held_out)) if i not in outliers]
                pairs = zip(features, held_out_features)
                tuned.gaussians = tuned._gaussians_of([torch.cat([x, y[usual]]) for x, y in pairs])
                detector.set_state(tuned.get_state())
                warn_of_outliers({i: outliers[i] for i in outliers if i not in warned}, names)
                warned |= outliers.keys()

        done = step
        tuned.gaussians = pretrained  # the target of all steps: held fixed
        state = {"step": step, "last_kept": vars(last_kept), "not_kept": not_kept}
        state |= {"optimizer": optimizer.state_dict(), **tuned.get_state()}
        mean_loss = fmean(losses) if losses else None
        yield Check(step, kept, mean_loss, validation, gain, error, deepcopy(state))


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
    maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
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


# ======== End of the method. The rest is what a program needs around it. ========================

# ---- 7. Input, precision, devices --------------------------------------------------------------


def check_images(images: Tensor) -> None:
    """ValueError unless images are a tensor (B, 3, H, W), uint8 or floating-point in [0, 1]."""
    shape = list(getattr(images, "shape", ()))
    valid = isinstance(images, Tensor) and len(shape) == 4 and shape[0] > 0 and shape[1] == 3
    valid = valid and (images.is_floating_point() or images.dtype == torch.uint8)
    if valid and images.is_floating_point() and not torch.compiler.is_compiling():
        valid = images.min() >= 0 and images.max() <= 1  # neither normalised yet nor NaN
    if not valid:
        found = f"{getattr(images, 'dtype', type(images).__name__)} of shape {shape}"
        raise ValueError(f"images must be a tensor (B, 3, H, W), uint8 or in [0, 1], not {found}")


def apply_stage(stage: nn.Module, level: int, x: Tensor) -> Tensor:
    """stage(x); ValueError if it cannot take it, such as an image that is too small."""
    try:
        return stage(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"module {level} cannot take {list(x.shape)}: {error}") from error


def images_of(batches: Iterable) -> Iterator[Tensor]:
    """The images of batches, which are images or (images, label); ValueError if there are none."""
    batch = None
    for batch in batches:
        yield batch[0] if isinstance(batch, tuple | list) else batch
    if batch is None:
        raise ValueError("there are no images; pass a list or a DataLoader, not an iterator")


def warn_of_outliers(outliers: dict[int, float], names: Sequence[object] = ()) -> None:
    """Warn of held-out images that calibration left out, by name or by number."""
    for i, times in outliers.items():
        image = names[i] if names else f"image {i}"
        scores = f"scores {times:.1f} times the median of held-out images"
        warnings.warn(f"held-out {image} {scores} and is left out of thresholds: is it normal?")


_cudnn, _mkldnn = torch.backends.cudnn, torch.backends.mkldnn
PRECISIONS = (torch.backends.cuda.matmul, _cudnn.conv, _mkldnn.matmul, _mkldnn.conv)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in full float32 in this block, whatever torch is set to: rounding to TF32 or bfloat16
    would drown the directions of least variance, which dominate the scores. The settings are those
    of the process: if you score in several threads, call `pick_device` once, first."""
    with ExitStack() as stack:
        for setting in PRECISIONS:
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"
        yield


def pick_device(name: str = "auto") -> torch.device:
    """The device for "cpu", "cuda" (ValueError without one) or "auto", a GPU if there is one.
    Switches TF32 off for the whole process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; use the CPU")
    # The old switches, too: torch raises an error where somebody reads one that contradicts.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for setting in PRECISIONS:
        setting.fp32_precision = "ieee"
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


# ---- 8. Networks -------------------------------------------------------------------------------

BACKBONES = tuple(models.list_models(models, ["efficientnet_*", "mobilenet_*", "*resne*"]))


def named_stages(backbone: str, weights: str | Path) -> tuple[Sequence[nn.Module], list, list]:
    """The stages of a network, and the mean and std of its training images, given its name or its
    Python file. For arguments and errors see FeatureExtractor."""
    if backbone.endswith(".py"):
        return stages_of_file(backbone)
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


def stages_of_file(path: str) -> tuple[Sequence[nn.Module], list, list]:
    """The `stages`, `mean` and `std` that a Python file defines; it may import its neighbours."""
    path_before, modules_before = list(sys.path), set(sys.modules)
    folder = Path(path).resolve().parent
    sys.path.insert(0, str(folder))
    try:
        defined = runpy.run_path(path)
        return list(nn.ModuleList(defined["stages"])), defined["mean"], defined["std"]
    except (Exception, SystemExit) as error:  # whatever the file raises
        reason = f"{type(error).__name__}: {error}"
        advice = "it must define stages, mean and std"
        raise ValueError(f"cannot run {path}: {reason}; {advice}") from error
    finally:
        sys.path[:] = path_before
        for name in sys.modules.keys() - modules_before:  # another file may have its own model.py
            if folder in Path(getattr(sys.modules[name], "__file__", None) or "").parents:
                del sys.modules[name]


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
        reason = f"no ImageNet weights of {backbone} in {torch.hub.get_dir()} ({error})"
        raise ConnectionError(f"{reason}: give --weights the path of a state dict") from error
    if weights == "random":  # without statistics in batch norm, features would vanish with depth
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the last batch
        network.train()(torch.rand(8, 3, 64, 64))
    elif weights != "imagenet":
        load_weights(network, weights)
    return network


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a state dict, or the part of a checkpoint that fits best; names may begin with "module."
    or "model.", and the classifier may be missing. ValueError if it is not the network's."""
    content, expected = load_plain(path), network.state_dict().keys()
    prefix, unneeded = r"^((module|model)\.)+", r"(classifier|fc)\.|.*num_batches_tracked"
    states = [
        {re.sub(prefix, "", str(name)): x for name, x in part.items()}
        for part in (content, *content.values())
        if isinstance(part, dict)
    ]
    state = max(states, key=lambda state: len(state.keys() & expected))
    needed = {name: x for name, x in state.items() if not re.match(unneeded, name)}
    try:
        missing, unexpected = network.load_state_dict(needed, strict=False)
        wrong = [name for name in missing + unexpected if not re.match(unneeded, name)]
    except (AttributeError, RuntimeError) as error:  # no tensors, or of other shapes
        wrong = str(error).splitlines()[-1:]
    if wrong:
        found = ", ".join(list(state)[:3]) or "nothing"
        raise ValueError(f"{path} does not fit the network: see {wrong[0].strip()}; it has {found}")


@torch.no_grad()
def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: w ← w γ / σ, b ← (b - μ) γ / σ + β. For
    modules in evaluation mode whose children run in their order. The features stay the same, and
    training is up to a third faster (*ours*). It also changes a little, as Adam steps on w γ / σ:
    fold your own network's, too, if you compare it with torchvision's."""
    for (name, layer), (next_name, following) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and type(following) is nn.BatchNorm2d:
            folded = fuse_conv_bn_eval(layer, following)
            setattr(module, name, folded.requires_grad_())  # torch returns it frozen
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


# ---- 9. Images and data sets in the MVTec AD layout --------------------------------------------

NORMAL = "good"  # MVTec AD's name for the folder of normal images
FOLDERS = ("train", "test", "ground_truth")  # of a category
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
    home, truth = Path(root, names[category], split), Path(root, names[category], "ground_truth")
    samples = []
    for folder in sorted(home.glob("[!.]*/")):
        defect = NORMAL if folder.name.lower() == NORMAL else folder.name
        if split == "train" and defect != NORMAL:
            continue
        if defect.lower() in ("ok", "normal", "no_defect"):
            warnings.warn(f"{folder} is treated as a defect class: normal is called {NORMAL!r}")
        if split == "test" and not any(walk(folder)):
            warnings.warn(f"{folder} is empty and left out")
            continue
        masks = {path.with_suffix(""): path for path in walk(truth / folder.name)[0]}
        for path in list_images([folder]):
            stem = truth / path.relative_to(home).with_suffix("")
            places = (stem.with_name(f"{stem.name}_mask"), stem)
            place = next((x for x in places if x in masks or x.is_dir()), None)
            samples.append(Sample(path, defect, masks.get(place, place)))
    if not samples:
        raise ValueError(f"no images in {home / NORMAL}, where {split} images are expected")
    masked = [sample.mask for sample in samples if sample.mask]
    if shared := len(masked) - len(set(masked)):
        warnings.warn(f"{category}: {shared} images share the mask of another of the same name")
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
    images, others, visited, errors = [], [], set(), []
    kinds = Image.registered_extensions()
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (Path(place, name) for name in names if name[0] != "."):
            known = kinds.get(path.suffix.lower()) in Image.OPEN and path.is_file()
            (images if known else others).append(path)
    return sorted(images), sorted([*others, *(Path(error.filename) for error in errors)])


def hold_out(samples: Sequence, seed: int = 0) -> tuple[list, list]:
    """Normal samples, shuffled by `seed`: (those to fit, those held out). A fifth is held out, but
    at least 16, or half if that is less (*ours*). Raises ValueError for fewer than six."""
    n = len(samples)
    if n < 6:
        raise ValueError(f"too few normal images: {n}, at least 6 are needed")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    first = min(max(math.ceil(n / 5), 16), n // 2)
    return [samples[i] for i in shuffled[first:]], [samples[i] for i in shuffled[:first]]


def load_images(
    paths: str | Path | Sequence[str | Path], size: int, workers: int | None = None
) -> Tensor:
    """`load_image` of each, (N, 3, size, size) uint8, in threads, by default one per core: Pillow
    releases the GIL. ValueError without paths."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("no images to load: give at least one path")
    with ThreadPoolExecutor(workers or CORES) as pool:
        return torch.stack(list(pool.map(lambda path: load_image(path, size), paths)))


def load_image(path: str | Path, size: int | Sequence[int]) -> Tensor:
    """Read an image as RGB, rotated as EXIF says, resized without cropping to a square (*earlier
    code*) or to (H, W): (3, H, W) uint8. Transparent pixels are composited onto black. Raises
    ValueError with the file's name."""
    height, width = (size, size) if isinstance(size, int) else size
    image = open_image(path)
    deep = image.info["deep"]
    if image.mode[0] in "IF":  # Pillow's own conversion would clip
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise ValueError(f"{path} has pixels beyond 0 to 65535: convert it to 8 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert("RGB")
    if deep and max(high for _, high in image.getextrema()) < 64:
        raise ValueError(f"{path} uses little of its 16 bits: convert all images to 8 bits")
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
    mask = open_image(path)
    w, h = open_image(image, decode=False).size if image else mask.size
    if abs(mask.width * h - mask.height * w) > max(mask.width + mask.height, w + h):
        raise ValueError(f"{path}: the mask is {mask.width} x {mask.height}, the image {w} x {h}")
    values = np.atleast_3d(np.asarray(mask))
    defect = (values[..., :-1] if mask.mode[-1] in "Aa" else values).any(-1)
    if mask.has_transparency_data:
        opaque = np.asarray(mask.convert("RGBA"))[..., 3] > 0
        defect = defect & opaque if opaque.all() or (defect & opaque).any() else opaque
    defect = torch.from_numpy(defect.astype(np.float32))
    return nn.functional.adaptive_max_pool2d(defect[None], size)[0] > 0


def open_image(path: str | Path, decode: bool = True) -> Image.Image:
    """An image file, rotated as its EXIF says; its `info` tells if it has more than 8 bits. Without
    `decode` for its size only. ValueError that names it if it cannot be read."""
    try:
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                raise ValueError(f"it holds {file.n_frames} pictures: save the right one alone")
            file.info["deep"] = file.mode[0] in "IF" or ";16" in str(file.tile)
            if decode:
                file.load()
            with suppress(Exception):  # an orientation that cannot be read is none
                ImageOps.exif_transpose(file, in_place=True)
            return file
    except MemoryError:
        raise
    except Exception as error:  # decoders may raise anything on a broken file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        told = type(error) is ValueError or getattr(error, "errno", None)  # what is wrong
        advice = "" if told else "; save it again, or leave it out"
        raise ValueError(f"cannot read {path}: {reason}{advice}") from error


# ---- 10. Files, and what both scripts share ----------------------------------------------------


def read_detector(
    content: dict, name: str | Path, extractor: FeatureExtractor | None
) -> GaussianAD:
    """The detector in the content of the file `name`: see `GaussianAD.load`."""
    try:
        if extractor is None:
            if content["backbone"] not in BACKBONES:
                raise ValueError(f"{name} is of your own network: give its extractor (--backbone)")
            with seeded(0):  # random weights, replaced below
                extractor = FeatureExtractor(content["backbone"], content["levels"], "random")
        if extractor.levels != content["levels"]:
            raise ValueError(f"{name} has the levels {content['levels']}, not those given")
        detector = GaussianAD(extractor, content["map_levels"], content["covariance"])
        detector.set_state(content)
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:  # of another kind
        raise ValueError(f"{name} holds no detector of this version and network") from error
    return detector


def load_plain(path: str | Path | BinaryIO) -> dict:
    """Read a dict of tensors and settings onto the CPU; no code in the file is run. Raises OSError
    if it cannot be read, ValueError if it holds anything else."""
    if isinstance(path, str | Path):
        with open(path, "rb") as file:
            return load_plain(file)
    name, packed = getattr(path, "name", "the file"), zipfile.is_zipfile(path)
    try:
        if packed and zipfile.ZipFile(path).testzip():  # which torch.load does not notice
            raise zipfile.BadZipFile
        path.seek(0)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler may raise anything on other files
        reason = "was not written by torch.save, or is damaged: give another"
        damaged = isinstance(error, zipfile.BadZipFile)
        if (packed and not damaged) or "Unsupported global" in str(error):
            reason = "holds more than tensors: save its state_dict()"
        raise ValueError(f"{name} {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a dict of tensors")
    return content


def save_plain(content: dict, path: str | Path) -> None:
    """Write tensors and settings atomically to `path`. Raises OSError; the old file then stays."""
    buffer = io.BytesIO()  # given a path, torch.save hides the error of the disk
    torch.save(content, buffer)
    with replacing(path) as new:
        new.write_bytes(buffer.getbuffer())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path for a file or folder that takes the place of `path` when the block ends without an
    error: readers never see a part of it, even if the run is killed."""
    path = Path(path)
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            new = Path(folder, "new")
            yield new
            for attempt in count():
                try:
                    os.replace(new, path)
                    break
                except OSError as error:  # a folder has to be moved away first
                    if not path.is_dir() and error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                with suppress(FileNotFoundError):  # another run has moved it
                    os.replace(path, Path(folder, str(attempt)))
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            error.filename = str(path)
        raise


def digest(path: Path) -> str:
    """SHA-256 of the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def category_names(given: Sequence[str], data: Path | None) -> list[str]:
    """The categories that --category names, each once; "all" are those in `data`."""
    names = list_categories(data) if data and "all" in given else given
    names = dict.fromkeys(unicodedata.normalize("NFC", name.rstrip("/\\")) for name in names)
    if wrong := [name for name in names if not name or Path(name).name != name]:
        raise ValueError(f"--category {wrong[0]!r} is not the name of a folder")
    return list(names)


def check_run(run: Path, read: Iterable[Path]) -> None:
    """ValueError if a run lies in a folder whose images are read, as it would read its pictures, or
    if what is read lies in the run's results, as they are replaced."""
    run = run.resolve()
    for path in map(Path.resolve, read):
        if path in (run, *run.parents):
            raise ValueError(f"{run} lies in {path}, whose images are read: give other --runs")
        if {run / "results", run / "scored"} & {path, *path.parents}:
            raise ValueError(f"{path} lies in results of {run}, which are replaced: move it first")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a program's description and shows defaults, where there are any."""

    def _get_help_string(self, action: Action) -> str:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


def progress(line: str) -> None:
    """Rewrite the last line of a terminal; elsewhere nothing is shown."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def say(*lines: object) -> None:
    """Print lines; it is no error if nobody reads on, as in `| head`."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception, where: object = "") -> None:
    """Print an error that a user can fix as one line; raise others again, for their traceback."""
    message = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate mem" in message:
        message = "out of memory: use smaller batches or images"
    elif not isinstance(error, (ValueError, OSError, Warning)):
        raise error
    elif isinstance(error, OSError) and error.filename:
        message = f"{error.strerror}: {error.filename}: check this path, or give another"
    line = " ".join(f"{where}: {message}".removeprefix(": ").split())  # names may hold line breaks
    progress("")
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")


def run_program(main: Callable[[], int]) -> None:
    """Run a script: what a user can fix ends in one line and exit code 2."""
    script = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{script}: {' '.join(str(message).split())}\n"
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot print
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print_error(error)
        sys.exit(2)
