"""What a classifier is judged by, and what it leaves: accuracy, results.json, per_class.csv, the confusion matrix."""

import csv

import sklearn.metrics
import torch

from utils import grids, runtime, tracking

# What results.json says of how the figures came about: always, and where a head or a network was trained.
PROTOCOL = ("arch", "encoder_arch", "scale", "pretrained", "random_init", "label_fraction", "freeze")
TRAINED_WITH = ("standardise", "epochs", "step", "lr", "momentum", "wd", "batch_size", "precision")


def accuracy(scores, labels):
    """Percentages of labels (N) that have the highest score of N×classes, or one of the five highest."""
    shares = {"top1": (scores.argmax(1) == labels).double().mean().item() * 100}
    if scores.shape[1] > 5:
        shares["top5"] = (scores.topk(5, dim=1).indices == labels[:, None]).any(1).double().mean().item() * 100
    return shares


def in_words(figures):
    words = {"loss": "loss {:.3f}", "top1": "top-1 {:.2f}", "top5": "top-5 {:.2f}"}
    return "  ".join(words[name].format(figures[name]) for name in words if name in figures)


def write(args, folder, frozen, classes, results, scores, labels):
    """results.json and per_class.csv, and the last words on the console."""
    names = PROTOCOL + (() if args.linear or args.knn else TRAINED_WITH)
    protocol = {name: getattr(args, name) for name in names} | {"frozen_children": frozen}
    data = {name: getattr(args, name) for name in ("dataset", "data_folder", "size", "inet")}
    content = {
        "protocol": protocol,
        "data": {**data, "classes": len(classes), "test_images": len(labels)},
        "seed": args.seed,
    }
    hits, images = (
        torch.bincount(part, minlength=len(classes)) for part in (labels[scores.argmax(1) == labels], labels)
    )
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "correct", "accuracy"])
        for name, right, count in zip(classes, hits.tolist(), images.tolist()):
            writer.writerow([name, count, right, f"{100 * right / count:.2f}" if count else ""])
    tracking.write_json(folder / "results.json", {**results, **content, **runtime.record()})  # last: all else is there
    if "best" in results:
        best = results["best"]
        print(f"best (chosen on these test images, so a little flattered): epoch {best['epoch']}  {in_words(best)}")
        print(f"last: epoch {results['last']['epoch']}  {in_words(results['last'])}")
    of = "knn" if args.knn else "linear" if args.linear else "the best epoch"
    print(f"results.json, and of {of} per_class.csv and confusion.png, are in {tracking.relative(folder)}")


def confusion_picture(scores, labels):
    """Rows: true classes, columns: predicted ones, each row's shares as heat: a PIL image."""
    matrix = sklearn.metrics.confusion_matrix(labels, scores.argmax(1), labels=range(scores.shape[1]), normalize="true")
    return grids.matrix(matrix)
