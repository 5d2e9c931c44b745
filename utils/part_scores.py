"""How well parts agree with labels that are known: the metrics of utils/score.py, functions of numpy arrays.

Letters: M locations (cells or pixels), N parts, L labels. `maps`, M×N floats: how surely each part occurs at each
location, by any scale of its own. `labels`, M whole numbers below L, where 0 is the ground.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, roc_curve

SUREST = 50  # locations of a part that purity looks at


class Fitted(NamedTuple):
    """What is chosen on training images, to be scored on others."""

    part_of_label: np.ndarray  # L: the one part that is matched to each label, -1 for none
    label_of_part: np.ndarray  # N: the commonest label where the part is the strongest
    detects: np.ndarray  # N: the label that the part's map detects best
    threshold: float  # a location where no map reaches it is background


def majority(labels, cell, classes):
    """The commonest label of every cell of `cell`×`cell` pixels, the lowest of equals: B×H×W -> B×h×w."""
    images, height, width = labels.shape
    cells = labels.reshape(images, height // cell, cell, width // cell, cell)  # B×h×cell×w×cell
    counts = np.stack([(cells == label).sum(axis=(2, 4)) for label in range(classes)])  # L×B×h×w
    return counts.argmax(axis=0)


def fit(maps, labels, classes):
    """Everything that is fitted, on the maps M×N and labels M of training images with `classes` labels: Fitted."""
    table = contingency(maps.argmax(axis=1), labels, maps.shape[1], classes)
    parts, matched = linear_sum_assignment(overlap(table), maximize=True)
    part_of_label = np.full(classes, -1)
    part_of_label[matched] = parts
    detects, threshold = best_detected(maps, labels, classes), ground_threshold(maps, labels)
    return Fitted(part_of_label, table.argmax(axis=1), detects, threshold)


def contingency(found, labels, parts, classes):
    """How often each part meets each label: M and M whole numbers -> N×L counts."""
    return np.bincount(found * classes + labels, minlength=parts * classes).reshape(parts, classes)


def overlap(table):
    """Intersection over union of every row with every column of a table of counts; 0 where both are empty."""
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0, keepdims=True) - table
    return table / np.maximum(union, 1)


def best_detected(maps, labels, classes):
    """For each map the label whose average precision lies furthest above chance: N whole numbers."""
    return np.array([above_chance(*average_precision(scores, labels, classes)).argmax() for scores in maps.T])


def average_precision(scores, labels, classes):
    """Of scores M as a detector of each label, and of a random order: L floats twice, NaN for labels that do not occur.

    As scikit-learn's average_precision_score, equal scores included, but all labels with one sorting.
    """
    order = np.argsort(-scores)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equal scores
    hits = (labels[order, None] == np.arange(classes)).cumsum(axis=0)[ends]  # thresholds×L
    total = np.where(hits[-1] > 0, hits[-1], np.nan)
    gained = np.diff(hits, axis=0, prepend=0) / total  # recall from one threshold to the next
    return (gained * hits / (ends[:, None] + 1)).sum(axis=0), total / len(scores)


def above_chance(precision, chance):
    """Rescaled so that 0 is chance and 1 is perfect; labels that do not occur, or that are all there is, get 0."""
    return np.nan_to_num((precision - chance) / np.where(chance < 1, 1 - chance, np.inf))


def ground_threshold(maps, labels):
    """The strength of the strongest part that best tells figure from ground: the largest hit rate less false alarms."""
    if labels.min() > 0 or labels.max() == 0:
        return float(maps.min())
    false_alarms, hits, thresholds = roc_curve(labels > 0, maps.max(axis=1))
    return float(thresholds[1:][np.argmax((hits - false_alarms)[1:])])  # the first is infinite


def agreement(found, labels, where=None):
    """NMI (arithmetic mean) and adjusted Rand index of two labellings M and M, over the locations `where`.

    None each where the labels do not differ, as there is nothing to agree with.
    """
    if where is not None:
        found, labels = found[where], labels[where]
    if len(np.unique(labels)) < 2:
        return None, None
    return float(normalized_mutual_info_score(labels, found)), float(adjusted_rand_score(labels, found))


def mean_overlap(found, labels, fitted):
    """Mean over the labels that occur of the intersection over union with what stands for them: two numbers.

    First with the one part that is matched to each label (0 for a label without), then with all parts that vote for it.
    """
    classes = len(fitted.part_of_label)
    table = contingency(found, labels, len(fitted.label_of_part), classes)
    present, part = table.any(axis=0), fitted.part_of_label
    matched = np.where(part >= 0, overlap(table)[part, np.arange(classes)], 0)
    votes = np.zeros((classes, classes), int)
    np.add.at(votes, fitted.label_of_part, table)
    voted = np.diag(overlap(votes))
    return float(matched[present].mean()), float(voted[present].mean())


def detection(maps, labels, fitted):
    """Every map as a detector of the label it was chosen for: mean average precision, and the mean above chance."""
    classes, found = len(fitted.part_of_label), []
    for label, scores in zip(fitted.detects, maps.T):
        precision, chance = average_precision(scores, labels, classes)
        found.append([np.nan_to_num(precision)[label], above_chance(precision, chance)[label]])
    return np.mean(found, axis=0).tolist()


def purity(maps, labels, surest=SUREST):
    """Of the `surest` locations of each part, the share that has their commonest label: mean over the parts."""
    surest = min(surest, len(maps))
    top = np.argpartition(-maps, surest - 1, axis=0)[:surest]  # surest×N
    return float(np.mean([np.bincount(column).max() / surest for column in labels[top].T]))


def score(maps, labels, fitted):
    """All figures of held-out maps M×N against labels M: a dict of floats, None for what is undefined.

    `nmi`, `ari`, `miou_…`: of the strongest part per location; `fg_…`: over locations that are not ground;
    `bg_…`: where no map reaches the threshold, background counts as one more part.
    """
    found, figure = maps.argmax(axis=1), labels > 0
    with_ground = np.where(maps.max(axis=1) >= fitted.threshold, found + 1, 0)
    figures = dict(zip(("nmi", "ari"), agreement(found, labels)))
    figures |= zip(("fg_nmi", "fg_ari"), agreement(found, labels, figure))
    figures |= zip(("bg_nmi", "bg_ari"), agreement(with_ground, labels))
    figures |= zip(("miou_matched", "miou_voted"), mean_overlap(found, labels, fitted))
    figures |= zip(("ap", "ap_above_chance"), detection(maps, labels, fitted))
    return {**figures, f"purity_at_{SUREST}": purity(maps, labels)}
