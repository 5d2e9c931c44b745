"""Features of a frozen encoder: computed once, stored, and read by linear and nearest-neighbour probes."""

import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from utils import ranks
from utils.batches import TrainingOrder, flips
from utils.cache import free_memory, free_on
from utils.console import RunError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation of the linear probe, the strongest first
NEIGHBOURS = 20
LARGEST = 9216  # numbers of an image that a probe reads: as many as AlexNet's convolutions leave


@torch.no_grad()
def extract(encode, batches, batch_size, mirrored=False):
    """All images in order: features N×F float32 and labels N int64, on the CPU; `mirrored`: of their mirror images.

    Several processes share the work, and all get all.
    """
    own, start = ranks.share(len(batches)), 0
    features, labels = None, torch.empty(own.stop - own.start, dtype=torch.int64)
    for x, y in batches.in_order(batch_size):
        found = encode(x.flip(-1) if mirrored else x)  # B×F
        if features is None:
            features = torch.empty(len(labels), found.shape[1])
        part = slice(start, start + len(found))
        features[part], labels[part], start = found, y, part.stop
    return ranks.gather_rows(features, len(batches)), ranks.gather_rows(labels, len(batches))


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
        order, own = TrainingOrder(len(self), batch_size, seed, first_step, last_step), ranks.share(batch_size)
        for step, indices in zip(order.steps, order):
            indices = torch.from_numpy(indices[own]).to(self.plain.device, non_blocking=True)
            features = self.plain[indices]
            if self.mirrored is not None:
                mirrored = flips(seed, step, batch_size)[own, None].to(self.plain.device, non_blocking=True)
                features = torch.where(mirrored, self.mirrored[indices], features)
            yield features.to(self.device), self.labels[indices].to(self.device)

    def in_order(self, batch_size):
        """Yields (features: B×F, labels: B): every image once, or of several processes this one's share of them."""
        own = ranks.share(len(self))
        for start in range(own.start, own.stop, batch_size):
            part = slice(start, min(start + batch_size, own.stop))
            yield self.plain[part].to(self.device), self.labels[part].to(self.device)


def fits_in_memory(images, feature_size):
    """Whether images×feature_size float32 fit into half of the memory that is free, and the bytes that they take."""
    needed = images * feature_size * 4
    lacks = torch.tensor(int(needed * ranks.local_count() >= free_memory() / 2))
    return not ranks.largest(lacks), needed  # of several processes, where it fits for all


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
    accuracy, probe = {}, LogisticRegression(max_iter=100, warm_start=True)  # each strength starts from the one before
    for strength in STRENGTHS:
        _fit(probe, strength, x[fit_part], train_labels[fit_part])
        accuracy[strength] = probe.score(x[held_part], train_labels[held_part])
    strength = max(accuracy, key=accuracy.get)
    probe.warm_start = len(np.unique(train_labels[fit_part])) == (counts > 0).sum()  # it knows all classes by now
    _fit(probe, strength, x, train_labels)
    return spread(probe.decision_function(test_x), probe.classes_, classes), {
        "C": strength,
        "held_out_accuracy": accuracy[strength],
    }


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
    """Scores of the classes `seen` in training -> N×classes, the lowest score for the others."""
    if scores.ndim == 1:  # two classes: scikit-learn scores the second
        scores = np.stack([-scores, scores], axis=1)
    wide = np.full((len(scores), classes), -np.inf)
    wide[:, seen] = scores
    return wide
