"""Recognition: an encoder under a head, its features stored once where it is frozen, and probes that read them."""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

from utils import runtime
from utils.batches import TrainingOrder, flips, free_memory, free_on
from utils.runtime import RunError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation of the linear probe, the strongest first
NEIGHBOURS = 20
LARGEST = 9216  # numbers of an image that a probe reads: as many as AlexNet's convolutions leave
CUTS = ("conv1", "conv1-3", "conv1-5")  # the paper's names of the layers up to convolution block 1, 3, 5
_ENDS = {"alexnet": (3, 8, 13)} | dict.fromkeys(("pyramid", "patches"), (1, 3, 5))
_ENDS |= dict.fromkeys(("resnet", "resnet18", "resnet50"), (4, 6, 8))


def children_until(encoder_arch):
    """How many children of the encoder end with each of CUTS: a dict; a shallow encoder may have fewer."""
    return dict(zip(CUTS, _ENDS[encoder_arch]))


class Classifier(nn.Module):
    """An encoder, frozen as far as it is wanted, under a small head that names the class."""

    def __init__(self, encoder, feature_size, classes, grid=None, standardise=False):
        """`grid`: average the encoder's map down to grid×grid cells before it is flattened (feature_size = D·grid²).

        `standardise`: the head sees every feature with mean 0 and variance 1.
        """
        super().__init__()
        self.encoder, self.grid, self.frozen, self.feature_size = encoder, grid, 0, feature_size
        first = [nn.BatchNorm1d(feature_size, affine=False)] if standardise else []
        layers = nn.Dropout(), nn.Linear(feature_size, 512), nn.ReLU(), nn.Linear(512, classes)
        self.head = nn.Sequential(*first, *layers)
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        """x: B×C×H×W normalised pixels -> logits: B×classes."""
        return self.head(self.features(x))

    def features(self, x):
        """x: B×C×H×W -> what the head sees: B×feature_size."""
        f = self.encoder(x)  # B×D×h×w
        f = F.adaptive_avg_pool2d(f, self.grid) if self.grid else f
        return f.flatten(1)

    def freeze(self, children):
        """Freeze the first `children` children of the encoder: no gradient, no new running statistics."""
        self.frozen = children
        if self.only_head_trains and isinstance(self.head[0], nn.BatchNorm1d):
            self.head[0].momentum = None  # its input no longer changes: the mean over all batches, however few
        for child in self.frozen_children():
            child.requires_grad_(False)
        self.train(self.training)

    @property
    def only_head_trains(self):
        """Whether the whole encoder is frozen."""
        return self.frozen == len(self.encoder)

    def freeze_normalisation(self, fresh=()):
        """Keep scale and shift of the encoder's BatchNorm layers, but for those in its children `fresh`."""
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.BatchNorm2d) and name.split(".")[0] not in fresh:
                module.requires_grad_(False)

    def frozen_children(self):
        return list(self.encoder.children())[: self.frozen]

    def train(self, mode=True):
        """As in every module, but frozen children stay in evaluation mode."""
        super().train(mode)
        for child in self.frozen_children():
            child.eval()
        return self


@torch.no_grad()
def extract(encode, batches, batch_size, mirrored=False):
    """All images in order: features N×F float32 and labels N int64, on the CPU; `mirrored`: of their mirror images.

    Several processes share the work, and all get all.
    """
    own, start = runtime.share(len(batches)), 0
    features, labels = None, torch.empty(own.stop - own.start, dtype=torch.int64)
    for x, y in batches.in_order(batch_size):
        found = encode(x.flip(-1) if mirrored else x)  # B×F
        if features is None:
            features = torch.empty(len(labels), found.shape[1])
        part = slice(start, start + len(found))
        features[part], labels[part], start = found, y, part.stop
    return gather_rows(features, len(batches)), gather_rows(labels, len(batches))


def gather_rows(own, length):
    """This process's share of `length` rows -> all of them, in order, on every process: own×… -> length×…"""
    if runtime.count() == 1:
        return own
    rows = own.new_empty(length, *own.shape[1:])
    rows[runtime.share(length)] = own
    for number in range(runtime.count()):
        torch.distributed.broadcast(rows[runtime.share(length, number)], src=number)
    return rows


def coarser_grid(f):
    """How many cells a side the map f, B×D×h×w, may keep, so that a probe reads at most LARGEST numbers: int or None.

    None where all may stay. Source: Goyal, Mahajan, Gupta, Misra, "Scaling and Benchmarking Self-Supervised Visual
    Representation Learning" (2019), whose probes average over cells likewise.
    """
    channels, height, width = f.shape[1:]
    return max(1, math.isqrt(LARGEST // channels)) if channels * height * width > LARGEST else None


class StoredFeatures:
    """The batches of `batches` as `model` encodes them; `mirror`: also those of the mirrored images."""

    def __init__(self, model, batches, batch_size, mirror=False):
        model.eval()
        self.device = batches.device
        self.plain, self.labels = extract(model.features, batches, batch_size)  # N×F, N
        self.mirrored = extract(model.features, batches, batch_size, mirrored=True)[0] if mirror else None
        tables = [table for table in (self.plain, self.mirrored) if table is not None]
        if self.device.type == "cuda" and sum(table.nbytes for table in tables) <= free_on(self.device) / 4:
            self.plain, self.labels = self.plain.to(self.device), self.labels.to(self.device)
            self.mirrored = self.mirrored.to(self.device) if mirror else None

    def __len__(self):
        return len(self.labels)

    def training(self, batch_size, seed, first_step, last_step):
        """Yields (features: B×F, labels: B) for each step, of the very images that Batches.training would give."""
        order = TrainingOrder(np.arange(len(self)), batch_size, seed, first_step, last_step)
        for step, indices in zip(order.steps, order):
            indices = torch.from_numpy(indices).to(self.plain.device, non_blocking=True)
            features = self.plain[indices]
            if self.mirrored is not None:
                mirrored = flips(seed, step, batch_size)[order.own, None].to(self.plain.device, non_blocking=True)
                features = torch.where(mirrored, self.mirrored[indices], features)
            yield features.to(self.device), self.labels[indices].to(self.device)

    def in_order(self, batch_size):
        """Yields (features: B×F, labels: B): every image once, or of several processes this one's share of them."""
        own = runtime.share(len(self))
        for start in range(own.start, own.stop, batch_size):
            part = slice(start, min(start + batch_size, own.stop))
            yield self.plain[part].to(self.device), self.labels[part].to(self.device)


def fits_in_memory(images, feature_size):
    """Whether images×feature_size float32 fit into half of the memory that is free, and the bytes that they take."""
    needed = images * feature_size * 4
    lacks = torch.tensor(int(needed * runtime.local_count() >= free_memory() / 2))
    return not runtime.largest(lacks), needed  # of several processes, where it fits for all


def linear_probe(train_features, train_labels, test_features, classes, seed):
    """Logistic regression on standardised features: scores N×classes for the test features, and its settings.

    The regularisation is the one that does best on a held-out tenth of the training data; then all are fitted.
    """
    scaler = StandardScaler().fit(train_features)
    x, test_x = scaler.transform(train_features), scaler.transform(test_features)
    counts = np.bincount(train_labels)
    stratify = train_labels if counts[counts > 0].min() > 1 and len(x) >= 10 * (counts > 0).sum() else None
    fit_part, held_part = train_test_split(np.arange(len(x)), test_size=0.1, random_state=seed, stratify=stratify)
    if len(np.unique(train_labels[fit_part])) < 2:
        raise RunError("too few labelled images for --linear: two classes need two images each; raise --label-fraction")
    held_out, probe = {}, LogisticRegression(max_iter=100, warm_start=True)  # each strength starts from the one before
    for strength in STRENGTHS:
        _fit(probe, strength, x[fit_part], train_labels[fit_part])
        held_out[strength] = probe.score(x[held_part], train_labels[held_part])
    strength = max(held_out, key=held_out.get)
    probe.warm_start = len(np.unique(train_labels[fit_part])) == (counts > 0).sum()  # it knows all classes by now
    _fit(probe, strength, x, train_labels)
    scores = spread(probe.decision_function(test_x), probe.classes_, classes)
    return scores, {"C": strength, "held_out_accuracy": held_out[strength]}


def _fit(probe, strength, x, labels):
    with warnings.catch_warnings():
        # An early stop regularises too, and the held-out tenth judges it like any other setting.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # few images a class look like regression
        probe.set_params(C=strength).fit(x, labels)


def neighbour_probe(train_features, train_labels, test_features, classes, seed=None):
    """Votes of the nearest training images by cosine: scores N×classes for the test features, and its settings."""
    scaler = StandardScaler().fit(train_features)
    x, test_x = (normalize(scaler.transform(features)) for features in (train_features, test_features))
    k = min(NEIGHBOURS, len(x))
    probe = KNeighborsClassifier(k).fit(x, train_labels)  # of unit vectors: the order of distances is that of cosines
    return spread(probe.predict_proba(test_x), probe.classes_, classes), {"neighbours": k}


def spread(scores, seen, classes):
    """Scores of the classes `seen` in training -> a tensor N×classes, the lowest score for the others."""
    if scores.ndim == 1:  # two classes: scikit-learn scores the second
        scores = np.stack([-scores, scores], axis=1)
    wide = np.full((len(scores), classes), -np.inf)
    wide[:, seen] = scores
    return torch.from_numpy(wide)


def accuracy(scores, labels):
    """Percentages of the labels, N, that have the highest score of N×classes, or one of the five highest: a dict."""
    shares = {"top1": (scores.argmax(1) == labels).double().mean().item() * 100}
    if scores.shape[1] > 5:
        shares["top5"] = (scores.topk(5, dim=1).indices == labels[:, None]).any(1).double().mean().item() * 100
    return shares
