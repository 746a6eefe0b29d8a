# SPDX-License-Identifier: MIT
"""Transfer Learning Gaussian Anomaly Detection by Fine-tuning Representations, in one module.

Rippel, Chavan, Lei and Merhof, IMPROVE 2022, arXiv 2108.04116. It reads from top to bottom:

    1. Features     φ_l, the feature map of an ImageNet network at level l
    2. Gaussian     N(μ, Σ) of normal features, Σ by Ledoit-Wolf shrinkage; Mahalanobis distance
    3. Detector     sum_l d_l of the spatial means of φ_l; anomaly map; a score that joins both
    4. Validator    tells when fine-tuning begins to forget, by augmented normal images
    5. Fine-tuning  the Mahalanobis loss, and one loop
    6. Metrics      AUROC and AU-PRO
    7. Data         images in the layout of MVTec AD; files, and the device

Docstrings name the source of a step: *abstract*, the paper's abstract (we could not read the rest);
*earlier code*, the authors' code of their IEEE TIM paper of 2021; *ours*, our own choice."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice, pairwise
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

# ---- 1. Features: the levels of an ImageNet network --------------------------------------------

# For each family of networks: the default levels, and those of them that make the anomaly map.
# Level i is torchvision's features[i - 1]; of a ResNet, 1 is the stem, 2 to 5 are layer1 to layer4.
# The defaults are the last level of each channel count from stride 16 on, as earlier ones respond
# to lighting (ours; earlier code: all levels); for the map, those of them with stride 16 (ours).
LEVELS = {
    "efficientnet_b": ([5, 6, 7, 8, 9], [5, 6]),
    "mobilenet_v2": ([11, 14, 17, 18, 19], [11, 14]),
    "resnet": ([4, 5], [4]),
    "wide_resnet": ([4, 5], [4]),
}


class FeatureExtractor(nn.Module):
    """The feature maps φ_l of images at several levels l of a network pre-trained on ImageNet.

    backbone    torchvision's name of a network of a family in LEVELS; or your own network, a list
                of modules applied in sequence, with its levels, map_levels, mean and std
    weights     only of torchvision's: "imagenet" (IMAGENET1K_V1, downloaded once), the path of a
                state dict, which may lack the classifier, or "random"
    levels      numbers of modules, from 1, ascending; map_levels, of one shape, make the map
    mean, std   of the channels of the network's training images, in [0, 1]

    The network stays in evaluation mode: batch norm and stochastic depth are fixed (*ours*). Raises
    ValueError for unknown names and levels and for weights of another network, OSError for none."""

    def __init__(
        self,
        backbone: str | Sequence[nn.Module] = "efficientnet_b4",
        weights: str | Path = "imagenet",
        levels: Sequence[int] | None = None,
        map_levels: Sequence[int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            family = next((x for x in LEVELS if backbone.startswith(x)), None)
            if family is None:
                raise ValueError(f"no backbone {backbone!r}: names begin with {', '.join(LEVELS)}")
            name, stages = backbone, torchvision_stages(backbone, weights)
            levels, map_levels = levels or LEVELS[family][0], map_levels or LEVELS[family][1]
        else:
            name, stages = None, list(backbone)
        self.levels, self.map_levels = list(map(int, levels)), list(map(int, map_levels))
        numbers = range(1, len(stages) + 1)
        for chosen, allowed in ((self.levels, numbers), (self.map_levels, self.levels)):
            if not chosen or chosen != sorted(set(chosen) & set(allowed)):
                raise ValueError(
                    f"levels {chosen} must be among {[*allowed]}, ascending, once each"
                )
        self.settings = {"backbone": name, "levels": self.levels, "map_levels": self.map_levels}
        self.stages = nn.ModuleList(stages[: self.levels[-1]]).eval()
        self.register_buffer("mean", torch.tensor(mean).float().view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).float().view(3, 1, 1))
        self.to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode, whatever `mode` a parent module is set to."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The feature maps (B, C_l, H_l, W_l), one per level, of RGB images (B, 3, H, W) uint8,
        which are moved to the network's device. Raises ValueError for other images."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W): {images.dtype}, {images.shape}")
        x = (images.to(self.mean.device) / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for level, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if level in self.levels:
                maps.append(x.clone())  # as your own network's next module may work in place
        return maps


@torch.no_grad()
def torchvision_stages(backbone: str, weights: str | Path) -> nn.ModuleList:
    """A network of torchvision's as modules that are applied in sequence, without classifier."""
    try:
        network = models.get_model(
            backbone, weights="IMAGENET1K_V1" if weights == "imagenet" else None
        )
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot download {backbone} ({error}): give --weights a file") from error
    if weights == "random":
        for module in network.modules():  # unmeasured, features shrink layer by layer
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # keeps the statistics of the last batch
        network.train()(torch.rand(8, 3, 64, 64))
    elif weights != "imagenet":
        with reading(weights, f"a state dict of {backbone}"):
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.classifier = network.fc = nn.Identity()  # it has one of the two: drop it
            state = {key: state[key] for key in state if not key.startswith(("classifier.", "fc."))}
            network.load_state_dict(state)
    if isinstance(network, models.ResNet):
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        stages = [stem, network.layer1, network.layer2, network.layer3, network.layer4]
    else:
        stages = network.features
    return fold_batch_norm(nn.ModuleList(stages).eval())


@torch.no_grad()
def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it: w ← w γ / σ, b ← (b - μ) γ / σ + β.
    Features stay the same, a training step takes 0.7 of the time, and Adam then steps on w γ / σ
    (*ours*). Among the children each batch norm must follow its convolution. Returns `module`."""
    for (name, layer), (next_name, next_layer) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and type(next_layer) is nn.BatchNorm2d:
            setattr(module, name, fuse_conv_bn_eval(layer, next_layer).requires_grad_())  # b, too
            setattr(module, next_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)
    return module


# ---- 2. Gaussian: mean, Ledoit-Wolf covariance, Mahalanobis distance ---------------------------


def ledoit_wolf(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The shrunk covariance Σ (..., C, C) and the shrinkage b²/d² (...) in [0, 1] of samples
    (..., N, C), float64; leading dimensions are independent.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices"
    (*earlier code*). With y = x - mean, |y|² = yᵀy and ‖A‖² = tr(A Aᵀ) / C,

        S = sum y yᵀ / N,  m = tr(S) / C,  d² = ‖S - m I‖²
        b̄² = sum ‖y yᵀ - S‖² / N²,  where  sum ‖y yᵀ - S‖² = sum |y|⁴ / C - N ‖S‖²
        b² = min(b̄², d²),  Σ = (b²/d²) m I + (1 - b²/d²) S"""
    n, c = samples.shape[-2:]
    x = samples.double()
    y = x - x.mean(-2, keepdim=True)
    S = y.mT @ y / n
    m = S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mI = m * torch.eye(c, dtype=S.dtype, device=S.device)
    d2 = (S - mI).square().sum((-2, -1)) / c
    b_bar2 = (y.square().sum(-1).square().sum(-1) - n * S.square().sum((-2, -1))) / c / n**2
    b2 = b_bar2.clamp(min=0).minimum(d2)  # rounding can take it below 0
    shrinkage = torch.where(d2 > 0, b2 / d2, 0)
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
        """The Gaussian of at least three samples (..., N, C), with `ridge` added to each variance.
        Raises torch.linalg.LinAlgError if they do not vary, or are not finite.

        covariance  "full": Ledoit-Wolf (*earlier code*). For the ablation, "diagonal" keeps only
                    its variances, and "identity" replaces it, ridge and all: Euclidean distances"""
        if samples.ndim > 3:  # row by row, as the covariances of a whole map take much memory
            rows = [cls.fit(row, ridge, covariance) for row in samples]
            return cls(
                torch.stack([x.mean for x in rows]), torch.stack([x.whitening for x in rows])
            )
        sigma, _ = ledoit_wolf(samples)
        identity = torch.eye(samples.shape[-1], dtype=sigma.dtype, device=sigma.device)
        sigma = sigma + ridge * identity
        kinds = {"full": sigma, "diagonal": identity * sigma, "identity": identity.expand_as(sigma)}
        sigma = kinds[covariance]  # the last two are for the ablation
        factor, failed = torch.linalg.cholesky_ex(sigma)  # Σ = L Lᵀ, W = L⁻¹
        if failed.any() or not samples.isfinite().all():  # CUDA reports no failure for NaN
            raise torch.linalg.LinAlgError("features do not vary, or are not finite")
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
        return cls(samples.double().mean(-2), whitening)

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance d = √((x - μ)ᵀ Σ⁻¹ (x - μ)) = ‖W (x - μ)‖ of x (B, ..., C): (B, ...)
        float64, not squared (*earlier code*). Its gradient at x = μ is 0."""
        whitened = torch.einsum("...ij,b...j->b...i", self.whitening, x.double() - self.mean)
        return torch.linalg.vector_norm(whitened, dim=-1)


def sum_of_distances(pooled: Sequence[Tensor], gaussians: Sequence[Gaussian]) -> Tensor:
    """sum_l d_l (B,) float64, of `pooled` (B, C_l) to the Gaussian of level l (*earlier code*)."""
    return sum(gaussian.distance(x) for gaussian, x in zip(gaussians, pooled, strict=True))


# ---- 3. Detector -------------------------------------------------------------------------------

MAP_RIDGE = 0.1  # fraction of the mean variance that is added to each variance of a map (ours)
OUTLIER = 2.5  # times the median: held-out images that score more do not count (ours)


class GaussianAD(nn.Module):
    """A feature extractor, a Gaussian per level, and for the anomaly map a Gaussian per location.

    `fit` it to normal images, then `calibrate` it on others: RGB, (N, 3, S, S) uint8. ValueError
    for others, or another S than fitted. An image has three scores, higher if more anomalous:

    pooled score     sum_l d_l over the spatial means of the levels (*earlier code*); the one that
                     training minimises
    map maximum      of the anomaly map. At each location it is the distance of the map levels to
                     that location's Gaussian, as in PaDiM (Defard et al. 2020; *ours*)
    anomaly score    the sum of both, each standardised over held-out normal images (*ours*); the
                     one to rank and to decide by"""

    def __init__(self, extractor: FeatureExtractor, covariance: str = "full") -> None:
        super().__init__()
        self.extractor, self.covariance = deepcopy(extractor), covariance  # its own
        self.gaussians = nn.ModuleList()  # one per level
        self.map_gaussian: Gaussian | None = None  # one per location
        self.image_size: int | None = None  # S
        self.register_buffer("held_out_scores", torch.zeros(0, 2))  # pooled score, map maximum

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The spatial mean (B, C_l) of each level; the levels of the map, joined, (B, h, w, C)."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are not of the size fitted to, {self.image_size} px square")
        maps = dict(zip(self.extractor.levels, self.extractor(images), strict=True))
        joined = torch.cat([maps[level] for level in self.extractor.map_levels], 1)
        return [x.mean((-2, -1)) for x in maps.values()], joined.permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The pooled score, (B,) float64, differentiable."""
        return sum_of_distances(self.features(images)[0], self.gaussians)

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly score, pooled score and map maximum, (B, 3) float64, and the anomaly map, resized
        to the image bilinearly, (B, S, S) float32."""
        scores, maps = self._scores_and_maps(images)
        return torch.cat([self._anomaly_score(scores)[:, None], scores], 1), maps

    @torch.no_grad()
    def fit(self, images: Tensor, batch_size: int = 16) -> GaussianAD:
        """Fit all Gaussians to at least three normal images. Scores stay calibrated as before: for
        other images `calibrate` anew. Returns self. LinAlgError if features do not vary."""
        self.image_size = images.shape[-1]
        pooled, joined = zip(*map(self.features, images.split(batch_size)), strict=True)
        pooled = [torch.cat(batches) for batches in zip(*pooled, strict=True)]  # per level (N, C_l)
        self.gaussians = nn.ModuleList(Gaussian.fit(x, 0, self.covariance) for x in pooled)
        joined = torch.cat(joined)  # (N, h, w, C)
        ridge = MAP_RIDGE * joined.var(0, correction=0).mean().item()
        self.map_gaussian = Gaussian.fit(joined.movedim(0, -2), ridge, self.covariance)
        return self

    @torch.no_grad()
    def calibrate(self, held_out: Tensor, batch_size: int = 16) -> GaussianAD:
        """Store the scores of held-out normal images, for the anomaly score and `threshold`.
        Returns self. Raises ValueError unless three are no outliers, and differ. A later `fit` to
        all but `outliers` makes better Gaussians, but scores shift a little (*ours*)."""
        scores = [self._scores_and_maps(batch)[0] for batch in held_out.split(batch_size)]
        self.held_out_scores = torch.cat(scores)
        scores = self.held_out_scores[~self.outliers()]
        if len(scores) < 3:
            raise ValueError(f"{len(scores)} held-out images are no outliers: three are needed")
        if not (scores.std(0) > 0).all():  # nor is NaN above 0
            raise ValueError("the scores of held-out images do not differ, or are not finite")
        return self

    def outliers(self) -> Tensor:
        """Which held-out images, (N,) bool, exceed OUTLIER times the median in either score, as a
        black frame does: they would raise the threshold until defects pass."""
        return (self.held_out_scores / self.held_out_scores.median(0).values).amax(1) > OUTLIER

    def threshold(self, false_alarms: float = 0.05) -> float:
        """The anomaly score that a fraction `false_alarms` of normal images is expected to exceed:
        a quantile over N held-out images, no outliers. 1 / (N + 1) is the least it can attain."""
        scores = self._anomaly_score(self.held_out_scores[~self.outliers()])
        return float(np.quantile(scores.cpu(), 1 - false_alarms, method="weibull"))

    def _scores_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled, joined = self.features(images)
        maps = self.map_gaussian.distance(joined).float().unsqueeze(1)
        maps = nn.functional.interpolate(maps, images.shape[-2:], mode="bilinear").squeeze(1)
        maxima = maps.amax((-2, -1)).double()
        return torch.stack([sum_of_distances(pooled, self.gaussians), maxima], 1), maps

    def _anomaly_score(self, scores: Tensor) -> Tensor:
        held_out = self.held_out_scores[~self.outliers()]
        return ((scores - held_out.mean(0)) / held_out.std(0)).sum(1)

    def copy_from(self, other: GaussianAD) -> None:
        """Take over the weights and all that was fitted from a detector of the same network."""
        self.extractor.load_state_dict(other.extractor.state_dict())
        self.gaussians, self.map_gaussian = other.gaussians, other.map_gaussian
        self.held_out_scores, self.image_size = other.held_out_scores, other.image_size

    def save(self, path: str | Path) -> None:
        """Write the detector as tensors and settings; an old file stays until the new is whole."""
        content = {"settings": self.extractor.settings, "covariance": self.covariance}
        content |= {"image_size": self.image_size, "held_out_scores": self.held_out_scores}
        content["network"] = self.extractor.state_dict()
        content["gaussians"] = [gaussian.state_dict() for gaussian in self.gaussians]
        content["map_gaussian"] = self.map_gaussian.state_dict()
        torch.save(content, f"{path}.new")
        Path(f"{path}.new").replace(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        extractor: FeatureExtractor | None = None,
    ) -> GaussianAD:
        """Read what `save` wrote; no code in the file is run. For your own network, `extractor` is
        one built the same way. Raises OSError for no file, ValueError if it does not fit."""
        with reading(path, "a detector of this network and version: train it anew"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if extractor is None:
                with torch.device("meta"):  # shapes without values: the file has them
                    extractor = FeatureExtractor(weights="random", **saved["settings"])
                extractor.to_empty(device="cpu")
            elif extractor.settings != saved["settings"]:
                raise ValueError("the extractor has other levels")
            detector = cls(extractor, saved["covariance"])
            detector.extractor.load_state_dict(saved["network"])
            detector.gaussians = nn.ModuleList(Gaussian(**x) for x in saved["gaussians"])
            detector.map_gaussian = Gaussian(**saved["map_gaussian"])
            detector.held_out_scores = saved["held_out_scores"]
            detector.image_size = saved["image_size"]
        return detector.to(device)


# ---- 4. Validator: augmented normal images stand for anomalies ---------------------------------
# cutout, AugMix, cutmix and mixup are augmentations of vicinal risk minimisation (*abstract*; which
# ones is our reading). Each takes uint8 images (B, 3, S, S) and draws from torch's generator.


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
    """x̃_i = (1 - λ) x_i + λ x_j with λ ~ Beta(α, α) for each image (Zhang et al. 2018)."""
    weight = torch.distributions.Beta(alpha, alpha).sample((len(images), 1, 1, 1))
    return _blend(images, images.roll(1, 0), weight)


# The default (ours): two with sharp edges, and one that changes the whole image softly, as features
# that find edges better and better may already forget soft changes.
DEFAULT_AUGMENTATIONS = {"cutout": cutout, "scar": scar, "augmix": augmix}
AUGMENTATIONS = {**DEFAULT_AUGMENTATIONS, "cutmix": cutmix, "mixup": mixup}
OPACITIES = (1.0, 0.5, 0.25)  # opaque ones are soon told apart perfectly, faint ones are not (ours)


def _squares(images: Tensor) -> Tensor:
    """Squares of 0.2 to 10 % of the image, log-uniform, cut at the border. Larger ones are too
    easy: even the frozen network detects them (*ours*)."""
    side = torch.empty(len(images)).uniform_(math.log(0.002), math.log(0.1)).exp().sqrt()
    return _rectangles(images, side, side, torch.zeros(len(images)))


def _rectangles(images: Tensor, length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """The mask of a rectangle in each image, at a random place, (B, 1, S, S) bool. Length and width
    (B,) are fractions of the image's side."""
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
    """(1 - weight) a + weight b, rounded to the dtype of a."""
    return ((1 - weight) * a + weight * b).round().to(a.dtype)


class AugmentationValidator:
    """Detects the onset of forgetting without an anomalous image. The idea is from the *abstract*
    (augmentations used for vicinal risk minimisation), the details are *ours*: held-out normal
    images should score low, augmented versions of them high.

    images          (N, 3, S, S) uint8 on the CPU: held-out normal images
    augmentations   functions by name, such as AUGMENTATIONS, each applied at all OPACITIES
    n_augmented     versions per augmentation and opacity, rounded up to a multiple of N
    seed            of the versions, which are drawn once"""

    def __init__(
        self,
        images: Tensor,
        augmentations: dict[str, Callable[[Tensor], Tensor]] = DEFAULT_AUGMENTATIONS,
        n_augmented: int = 64,
        seed: int = 0,
    ) -> None:
        self.images, self.versions = images, {}
        with torch.random.fork_rng(devices=[]):  # torch's generator is afterwards as it was before
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            for name, augment in augmentations.items():
                opacities = [*OPACITIES] * math.ceil(n_augmented / len(images))
                versions = [_blend(images, augment(images), opacity) for opacity in opacities]
                self.versions[name] = torch.cat(versions)

    @torch.no_grad()
    def __call__(self, score: Callable[[Tensor], Tensor], batch_size: int = 16) -> Tensor:
        """How well `score`, a function of images (B, 3, S, S) such as a detector, tells held-out
        images from versions: for each augmentation a pseudo-value per held-out image, (A, N). Their
        mean is the AUROC, and their standard deviation over √N is its standard error.

        With C_ij = 1 if version j scores above image i, ½ if they tie and 0 if not, the AUROC is
        the mean of C, and that of image i is the mean of row i plus the mean of the columns of
        its own versions, less the AUROC (DeLong et al. 1988; for clusters Obuchowski 1997)."""

        def scores_of(images: Tensor) -> Tensor:
            return torch.cat([score(batch).cpu() for batch in images.split(batch_size)])

        held_out, values = scores_of(self.images)[:, None], []
        for versions in self.versions.values():
            C = (scores_of(versions) - held_out).sign() / 2 + 0.5  # (N, K N): image i, version j
            own = C.mean(0).view(-1, len(held_out)).mean(0)  # version k N + i is of image i
            values.append(C.mean(1) + own - C.mean())
        return torch.stack(values)


# ---- 5. Fine-tuning ----------------------------------------------------------------------------

FIRST_CHECK = 32  # steps: after fewer the features are unsettled, and a check misleads


class Check(NamedTuple):
    """What one check of fine-tuning measured."""

    step: int
    loss: float | None  # mean over the steps since the last check; None at step 0
    aurocs: dict[str, float]  # of each augmentation, in [0, 1]
    gain: float | None  # of their mean over that of the last check kept; None at step 0
    standard_error: float | None  # of the gain; None at step 0
    kept: bool  # the detector is now that of this step


def mahalanobis_loss(pooled: Sequence[Tensor], target: Sequence[Gaussian]) -> Tensor:
    """The training objective (*abstract*): the mean distance of normal images to a fixed Gaussian,

        sum_x sum_l √((φ̄_l(x) - μ_l)ᵀ Σ_l⁻¹ (φ̄_l(x) - μ_l)) / B,

    where `pooled` holds φ̄_l(x), the spatial means (B, C_l), and `target` holds μ_l and Σ_l."""
    return sum_of_distances(pooled, target).mean()


def fine_tune(
    detector: GaussianAD,
    normal: Tensor,
    held_out: Tensor,
    steps: int = 512,
    lr: float = 1e-4,
    batch_size: int = 16,
    patience: int = 3,
    seed: int = 0,
    augmentations: dict[str, Callable[[Tensor], Tensor]] = DEFAULT_AUGMENTATIONS,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[Check]:
    """Fine-tune a detector, but only while iterated: yields checks at steps 0, 32, 64, … and last.

    The loss is the distance of normal images to the estimated Gaussian (*abstract*): that of the
    pre-trained features, held fixed (*ours*). Each check fits Gaussians to the current features. It
    is kept if its mean AUROC, of held-out images against augmented ones, exceeds that of the last
    one kept by more than one standard error of this gain (Breiman et al. 1984). The frozen network,
    at step 0, always is. Training ends after `patience` checks in a row that are not (*ours*).

    A copy is trained: `detector` is always that of the last check kept, calibrated on the held-out
    images and then fitted to all images but outliers, also after an error.

    normal, held_out    images (N, 3, S, S) uint8 on the CPU, disjoint
    steps               at most; 0 only fits and validates the frozen network
    on_step             called after each step with its number and loss"""
    validator = AugmentationValidator(held_out, augmentations, seed=seed)
    tuned = deepcopy(detector).fit(normal, batch_size)
    target = tuned.gaussians  # of the pre-trained features: held fixed, as `fit` makes new ones
    optimizer = torch.optim.Adam(tuned.parameters(), lr)  # the network's: μ and W are buffers
    batches = shuffled(normal, batch_size, seed)
    step, not_kept = 0, 0
    kept_values = mean_loss = gain = error = None  # at step 0
    while True:
        values = validator(tuned, batch_size)  # (A, N)
        if kept_values is not None:
            gains = (values - kept_values).mean(0)  # (N,), paired; mean over augmentations
            gain, error = gains.mean().item(), gains.std().item() / math.sqrt(len(gains))
        kept = kept_values is None or gain > error
        not_kept = 0 if kept else not_kept + 1
        if kept:
            kept_values = values
            tuned.calibrate(held_out, batch_size)
            tuned.fit(torch.cat([normal, held_out[~tuned.outliers().cpu()]]), batch_size)
            detector.copy_from(tuned)  # `tuned` is fitted to `normal` again before its next check
        aurocs = dict(zip(augmentations, values.mean(1).tolist(), strict=True))
        yield Check(step, mean_loss, aurocs, gain, error, kept)
        if step >= steps or not_kept == patience:
            return

        next_check, losses = min(max(FIRST_CHECK, 2 * step), steps), []
        for images in islice(batches, next_check - step):
            step += 1
            loss = mahalanobis_loss(tuned.features(images)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            on_step(step, losses[-1])
        mean_loss = fmean(losses)
        tuned.fit(normal, batch_size)


def shuffled(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of images without end, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(images), generator=generator).split(batch_size):
            yield images[indices]


# ---- 6. Metrics --------------------------------------------------------------------------------


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(anomalous = normal) / 2, in [0, 1].
    Labels, of the same shape, are True or 1 where anomalous (scikit-learn has them first). Exact
    with ties, as pairs are counted in integers. ValueError for NaN or a missing class."""
    labels = labels.bool()  # integers would be taken as indices
    if labels.shape != scores.shape or scores.isnan().any() or labels.all() or not labels.any():
        raise ValueError("AUROC needs a label for each score, both classes, and no NaN")
    anomalous, normal = scores[labels], scores[~labels].sort()[0]
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

    maps, masks (N, H, W); masks are True or 1 where anomalous, regions 8-connected; fpr_limit in
    (0, 1]. Raises ValueError for NaN, other shapes or a missing class."""
    masks = masks.bool()
    if masks.shape != maps.shape or maps.isnan().any() or masks.all() or not masks.any():
        raise ValueError("AU-PRO needs maps and masks of one shape, both classes, and no NaN")
    anomalous, normal = maps[masks], maps[~masks].sort()[0]
    f0 = 1 - torch.searchsorted(normal, anomalous, right=True).double() / len(normal)
    f1 = 1 - torch.searchsorted(normal, anomalous).double() / len(normal)
    rising = (fpr_limit - f0).clamp(min=0).minimum(f1 - f0)  # how far of [f₀, f₁] is in the limit
    triangle = torch.where(f1 > f0, rising.square() / (2 * (f1 - f0)), 0)
    area = triangle + (fpr_limit - f1).clamp(min=0)
    regions = [label_regions(mask)[mask] for mask in masks]  # of each pixel, in the order of `area`
    weight = 1 / torch.cat([x.bincount()[x] for x in regions if len(x)]).double()  # 1 / region size
    return ((weight * area).sum() / weight.sum() / fpr_limit).item()


def label_regions(mask: Tensor) -> Tensor:
    """Number the 8-connected regions of a mask (H, W) bool: (H, W) int64, 0 where normal, else 1 +
    the index of the region's last pixel. Each pixel starts with its own number, takes its
    neighbours' largest, then that pixel's number (pointer jumping), until nothing changes."""
    number = torch.arange(1.0, mask.numel() + 1, dtype=torch.float64, device=mask.device)
    number = number.view(mask.shape) * mask  # float64, as max_pool2d takes no integers
    while True:
        largest = nn.functional.max_pool2d(number[None], 3, stride=1, padding=1)[0] * mask
        jumped = largest.flatten()[(largest.long() - 1).clamp(min=0)] * mask  # pixel k has k + 1
        if torch.equal(jumped, number):
            return number.long()
        number = jumped


# ---- 7. Data: images in the layout of MVTec AD; files, and the device --------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class Sample(NamedTuple):
    """One image of a data set in the layout of MVTec AD."""

    path: Path
    defect: str  # the name of its folder; "good" for a normal image
    mask: Path | None  # of the defect, if there is one


def list_categories(root: str | Path) -> list[str]:
    """The folders in `root` that have a folder `train`, sorted; ValueError if there are none."""
    names = sorted(path.parent.name for path in Path(root).glob("*/train"))
    if not names:
        raise ValueError(f"there is no <category>/train in {root}")
    return names


def list_samples(root: str | Path, category: str, split: str) -> list[Sample]:
    """The images of `root/category/split/<defect>/`, sorted; ValueError if there are none. A mask
    is `root/category/ground_truth/<defect>/<stem>_mask.png`."""
    home = Path(root, category)
    paths = sorted(x for x in home.glob(f"{split}/*/*") if x.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"there are no images in {home / split}/*/, such as {split}/good/")
    masks = [home / "ground_truth" / x.parent.name / f"{x.stem}_mask.png" for x in paths]
    pairs = zip(paths, masks, strict=True)
    return [Sample(x, x.parent.name, mask if mask.exists() else None) for x, mask in pairs]


def list_images(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The given files, and the images below given folders, sorted; ValueError for empty folders."""
    images = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        below = sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES)
        if path.is_dir() and not below:
            raise ValueError(f"there are no images in {path}")
        images += below if path.is_dir() else [path]
    return images


def hold_out(samples: Sequence, seed: int = 0) -> tuple[list, list]:
    """Normal samples, shuffled by `seed`: (those to fit, those held out). A fifth is held out, but
    at least 16, or half if that is less (*ours*). Raises ValueError for fewer than six."""
    if len(samples) < 6:
        raise ValueError(f"there are {len(samples)} normal images: at least 6 are needed")
    n = min(max(math.ceil(len(samples) / 5), 16), len(samples) // 2)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[i] for i in order[n:]], [samples[i] for i in order[:n]]


def load_image(path: str | Path, size: int) -> Tensor:
    """An image as RGB, turned as EXIF says, resized to a square without cropping (*earlier code*):
    (3, S, S) uint8. ValueError that names the file if it cannot be read, or has more bits."""
    image = _open_image(path, "RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_images(paths: Sequence[str | Path], size: int) -> Tensor:
    """`load_image` of each, in threads, as Pillow releases the GIL: (N, 3, S, S) uint8."""
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda path: load_image(path, size), paths)))


def load_mask(path: str | Path | None, size: int) -> Tensor:
    """Where a defect is, (S, S) bool: True if any pixel of the file there is not black; False for
    no path. ValueError that names the file if it cannot be read, or has transparent pixels."""
    if path is None:
        return torch.zeros(size, size, dtype=torch.bool)
    pixels = np.array(_open_image(path, "RGBA"))
    if (pixels[..., 3] < 255).any():  # their colour means nothing: it may be white
        raise ValueError(f"the mask {path} has transparent pixels: save it in black and white")
    defective = torch.from_numpy(pixels[..., :3].any(-1)).float()
    return nn.functional.adaptive_max_pool2d(defective[None], size)[0] > 0


def _open_image(path: str | Path, mode: str) -> Image.Image:
    with reading(path, "an image of at most 8 bits per channel"), Image.open(path) as image:
        if image.mode[0] in "IF" or ";16" in str(image.tile):  # the latter: RGB of 16 bits
            raise ValueError("Pillow would clip it")
        return ImageOps.exif_transpose(image).convert(mode)


@contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """A block that reads a file. Whatever torch or Pillow raise because it is damaged or holds
    something else becomes a ValueError that names it; an OSError that names it stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path} is damaged, or is not {expected}") from error


def pick_device(name: str = "auto") -> torch.device:
    """The device "cpu" or "cuda"; "auto" is a GPU if there is one. Under torchrun each process has
    its own. ValueError if torch sees no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: use the CPU")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
