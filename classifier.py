"""Judge an encoder by recognition: train a small head on top of it, frozen or not, or a supervised network.

    python classifier.py --dataset shapes --arch patchy --pretrained scratch/model.pt --freeze -1 --epochs 10 --lr 0.01
    python classifier.py --dataset digits --arch resnet18 --epochs 12 --step 8 --lr 0.02 -b 64 --output-folder digits
"""

import argparse
import copy
import os
import time
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

import modules
from datasets import DATA_SETS, open_split
from utils import batches, features, options, runtime, training
from utils.options import above, real, whole
from utils.runtime import RunError, UsageError

SUPERVISED = ("alexnet", "resnet18")  # whole networks; patchy and vae are the encoders that run.py trains
CHECKPOINTS = "checkpoints_classifier"  # the folder of the last three states
CONTENTS = ("classifier_args.json", CHECKPOINTS, "best.pt", "classifier.jsonl", "logs_classifier", "results.json")
CONTENTS += ("confusion.png",)  # of the output folder
NAMED, NUMBERED = 100, 25  # classes whose names, and whose figures, fit into confusion.png


class Run(training.Run):
    """The files of a classifier's training, which may lie beside those of run.py."""

    checkpoints, lines, logs, tag = CHECKPOINTS, "classifier.jsonl", "logs_classifier", "{name}/{split}"


def build_parser():
    parser = options.Parser(description=__doc__)
    options.add_data_options(parser)
    options.add_model_options(parser)
    parser.option("--arch", (*SUPERVISED, *modules.ARCHS), "alexnet", None,
                  "alexnet, resnet18: the whole network; patchy, vae: the encoder that run.py trains, as --pretrained "
                  "knows by itself")
    parser.option("--pretrained", options.model_file, None, "FILE",
                  "take the encoder's weights from this model.pt, which knows its model options; resnet18 takes what "
                  "fits")
    parser.switch("--random-init",
                  "keep the encoder's random weights, also under --freeze: the floor that training has to beat")
    parser.option("--freeze", freeze_type, 0, "K",
                  "freeze the encoder's first K children, or all (-1), or the paper's conv1, conv1-3, conv1-5")
    parser.section("what to train")
    parser.switch("--standardise",
                  "bring every feature to mean 0 and deviation 1 before the head, by the statistics of batches: "
                  "features that are learned without labels differ much in scale")
    parser.switch("--linear",
                  "instead of the head: logistic regression on the features where --freeze ends, by default the last; "
                  f"maps of more than {features.LARGEST:,} numbers are averaged down to that")
    parser.switch("--knn", "instead of the head: a vote of the nearest training images, likewise")
    parser.switch("--no-floor", "with --linear and --knn: do not judge random weights, too, which takes as long again")
    parser.option("--label-fraction", above(0, 1), 1.0, "P",
                  "share of every class's training labels to use, e.g. 0.01")
    parser.section("training")
    parser.option("--epochs --num-epochs", whole(1), 90, "K", "how long", free=True)
    parser.option("--step", whole(1), 30, "K", "the learning rate falls to a tenth every K epochs")
    parser.option("--start-epoch", whole(0), 0, "K", "count the first K epochs as done; --resume knows by itself")
    parser.option("-b --batch-size", whole(1), 256, "K", "images of one step")
    parser.option("--lr --learning-rate", above(0), 0.1, "X", "SGD's learning rate at the start")
    parser.option("--momentum", real(0, 1), 0.9, "X", "of SGD")
    parser.option("--wd --weight-decay", real(0), 1e-4, "X", "weight decay")
    parser.option("--seed", options.seed, 1, "K", "of weights, order and dropout")
    options.add_run_options(parser)
    parser.switch("-e --evaluate", "only test: the output folder's best.pt, or --resume PATH")
    parser.option("-p --print-freq", whole(1), 10, "K", "steps between logged figures")
    parser.option("--gpu", whole(0), None, "K", "use this GPU (default: the first)")
    for name in ("--world-size", "--rank", "--dist-url", "--dist-backend"):
        parser.option(name, str, None, "X", "accepted for old scripts and ignored")
    parser.switch("--multiprocessing-distributed", "likewise")
    return parser


def freeze_type(text):
    """An argparse type: conv1, conv1-3, conv1-5 or a whole number from -1."""
    if text in features.CUTS:
        return text
    try:
        return whole(-1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a whole number of -1 or more nor {', '.join(features.CUTS)}"
        ) from None


def parse(argv):
    """The Settings, the content of the --pretrained file and that of the checkpoint to go on from (or None)."""
    parser = build_parser()
    typed, file = parser.typed(argv), None
    values = options.merge(parser.defaults, {}, typed)
    checkpoint, folder = find_checkpoint(values)
    if checkpoint:
        parser.free |= {"batch_size"} if values["evaluate"] else set()
        values = options.follow_run(parser, checkpoint["args"], typed) | {"output_folder": folder}
        return options.Settings(**values), None, checkpoint
    if values["pretrained"]:
        file = training.load(values["pretrained"], training.MODEL)
        values["arch"] = typed.get("arch", file["options"]["arch"])
    arch, contradicted = values["arch"], [name for name in options.DESCRIBED if name != "size"]
    if arch in SUPERVISED:
        contradicted.remove("arch")  # it names this network, not the one in the file
        if not file:
            check_whole_network(arch, typed)
    if file:
        values = options.follow_model(parser, file, values["pretrained"], typed, contradicted)
    if arch in SUPERVISED:
        values |= {"arch": arch, "encoder_arch": arch, "scale": modules.FIXED_STRIDE[arch]}
    values = {**options.complete(values, typed), "fresh": ()}
    check(values)
    return options.Settings(**values), file, None


def check(values):
    """Raises UsageError for options that exclude each other."""
    if values["start_epoch"] >= values["epochs"]:
        raise UsageError(f"--start-epoch {values['start_epoch']} leaves none of --epochs {values['epochs']} to train")
    if values["no_cuda"] and values["gpu"] is not None:
        raise UsageError(f"--no-cuda leaves no GPU {values['gpu']} to use; drop it or --gpu")
    wanting = [flag for flag in ("freeze", "linear", "knn") if values[flag] not in (0, False)]
    if wanting and not (values["pretrained"] or values["random_init"]):
        raise UsageError(
            f"--{wanting[0]} needs a trained encoder: give --pretrained FILE, or --random-init for the floor"
        )


def check_whole_network(arch, typed):
    """Refuse options of the encoder that this network has not."""
    scale = modules.FIXED_STRIDE[arch]
    if typed.get("scale", scale) != scale:
        raise UsageError(f"--scale {typed['scale']}: --arch {arch} is a whole network of scale {scale}")
    if typed.get("encoder_arch", arch) not in ("resnet", arch):
        raise UsageError(f"--encoder-arch {typed['encoder_arch']} contradicts --arch {arch}; leave one out")


def find_checkpoint(values):
    """The content of the checkpoint that --resume or --evaluate means, and the run's folder; None twice for neither."""
    place = values["output_folder"] if values["resume"] in (None, False, "auto") else values["resume"]
    if values["evaluate"]:
        path = place if os.path.isfile(place) else os.path.join(place, "best.pt")
        return training.load(path, training.CLASSIFIER), values["output_folder"]
    if values["resume"] is None:
        return None, None
    return training.find_run(values, CONTENTS, training.CLASSIFIER)[::-1]


@runtime.together
def main(argv=None):
    """Train, probe or evaluate as `argv` says; returns the figures, as results.json holds them: a dict."""
    settings, file, checkpoint = parse(argv)
    goes_on = checkpoint is not None
    if not settings.evaluate:
        training.check_folder(settings.output_folder, CONTENTS, settings.overwrite, goes_on)  # before hours of decoding
    device = runtime.choose_device(settings.no_cuda, settings.gpu)
    settings = settings.changed(precision=runtime.choose_precision(settings.precision, device))
    sources = labelled_sources(settings)
    classes = sources[0].classes
    opened = batches.open_batches(settings, sources[1:] if settings.evaluate else sources, device)
    train, test = (None, *opened)[-2:]  # --evaluate opens the test alone
    torch.manual_seed(settings.seed)
    model = runtime.channels_last(build_model(settings, len(classes)).to(device))
    images = f"{batches.count_images(train, test)} of {len(classes)} classes"
    print(f"{settings.dataset}: {images}, {settings.size} px, {runtime.describe(device)}")
    untrained = copy.deepcopy(model.encoder)
    if checkpoint:
        check_classes(checkpoint, classes)
        model.load_state_dict(checkpoint["model"])
    elif file and not settings.random_init:
        settings = settings.changed(fresh=load_encoder(model, file["model"], settings.pretrained))
    prepare_layers(settings, model)
    if settings.evaluate:
        found, _, _ = evaluate(model, test.in_order(settings.batch_size), len(test))
        print(f"test  {in_words(found)}")
        return found
    if not (settings.linear or settings.knn):
        options.check_batch(min(settings.batch_size, len(train)), cells=1)
    folder = training.prepare_folder(settings.output_folder, CONTENTS, settings.overwrite, goes_on)
    if runtime.is_main():
        runtime.write_json(folder / "classifier_args.json", {**vars(settings), **runtime.record()})
    if settings.linear or settings.knn:
        results, scores, labels = probe(settings, model, untrained, train, test)
    else:
        results, scores, labels = fit(settings, model, train, test, folder, checkpoint)
    if runtime.is_main():
        write(settings, folder, model.frozen, classes, results, scores, labels)
    return results


# ---------------------------------------------------------------------------------------------------- data and model


def labelled_sources(settings):
    """The training images, as many as --label-fraction wants, and the test images: a tuple.

    Their labels mean the same classes. Raises RunError.
    """
    place = settings.dataset, settings.data_folder
    with runtime.main_first():
        train, test = (open_split(*place, split, settings.size) for split in ("train", "test"))
    for source in (train, test):
        if source.labels is None:
            raise RunError(f"{settings.data_folder}: images without classes; a classifier needs train/CLASS/* and "
                           "val/CLASS/*, or CLASS/*")
    unknown = np.unique(test.labels[test.labels >= len(train.classes)])
    if len(unknown):
        raise RunError(
            f"{settings.data_folder}: test images of the class {test.classes[unknown[0]]}, which has no training images"
        )
    if len(train.classes) < 2:
        raise RunError(f"--dataset {settings.dataset} has a single class; there is nothing to tell apart")
    if settings.label_fraction < 1:
        train = train.subset(few_labels(train.labels, settings.label_fraction, settings.seed))
    return train, test


def few_labels(labels, fraction, seed):
    """Sorted positions of `fraction` of every class, rounded: an int array. Raises UsageError if a class gets none."""
    generator, chosen = np.random.default_rng(seed), []
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        count = round(fraction * len(members))
        if count == 0:
            least = 1 / np.bincount(labels)[np.unique(labels)].min()
            raise UsageError(
                f"--label-fraction {fraction:g} leaves a class without an image; use {least:.2g} or more"
            )
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def build_model(settings, classes):
    """A features.Classifier with fresh weights."""
    channels, grid = DATA_SETS[settings.dataset].channels, 1 if settings.arch in SUPERVISED else None
    encoder, maps = modules.build_encoder(settings.encoder_arch, channels, settings.scale, settings.ngf)
    cells = grid or (settings.size // settings.scale) ** 2
    return features.Classifier(encoder, maps * cells, classes, grid, settings.standardise)


def load_encoder(model, weights, path):
    """Take what fits from the weights of a whole model, and say so. Returns the encoder's children that stay fresh."""
    own = model.encoder.state_dict()
    saved = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    fitting = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise RunError(f"{path}: none of its encoder's {len(saved)} tensors fits this encoder; check --arch")
    model.encoder.load_state_dict(fitting, strict=False)
    fresh = list(dict.fromkeys(name.split(".")[0] for name in own if name not in fitting))
    print(
        f"loaded {len(fitting)} of {len(model.state_dict())} tensors from {path}; fresh: {', '.join([*fresh, 'head'])}"
    )
    return fresh


def prepare_layers(settings, model):
    """Freeze what --freeze names; keep BatchNorm's scale and shift where the encoder comes from a file."""
    names = [name for name, _ in model.encoder.named_children()]
    count = features.children_until(settings.encoder_arch).get(settings.freeze, settings.freeze)
    if count in features.CUTS:
        raise UsageError(f"--freeze {count}: this encoder has no such layer; give a number, or -1 for all")
    probing = settings.linear or settings.knn
    if count == -1 or probing and count == 0:
        count = len(names)
    if count > len(names):
        raise UsageError(
            f"--freeze {settings.freeze}: this encoder ends with its child number {len(names)} ({', '.join(names)}); "
            "-1 freezes all"
        )
    random = [name for name in names[:count] if name in settings.fresh]
    if random:
        remedy = "--arch patchy or vae" if probing else f"--freeze {names.index(random[0])}"
        raise UsageError(f"{settings.pretrained} has no {random[0]} that fits, and it would be frozen with random "
                         f"weights; use {remedy}")
    if settings.pretrained and not settings.random_init:
        model.freeze_normalisation(settings.fresh)
    model.freeze(count)
    if probing:
        model.encoder = model.encoder[:count]  # a probe reads what is frozen
        if count < len(names):
            model.grid = None  # the average over the whole map belongs to a whole network
    weights = "pretrained" if settings.pretrained and not settings.random_init else "random"
    frozen = f"{names[0]} to {names[count - 1]}" if count else "nothing"
    print(f"{settings.arch}: encoder {settings.encoder_arch} with {weights} weights at the start, frozen: {frozen}")


def check_classes(checkpoint, classes):
    """Refuse images whose classes, a list of names, are not those of a classifier's checkpoint."""
    known = checkpoint["class_names"]
    if known != classes:
        differ = next((f" ({one} there, {other} here)" for one, other in zip(known, classes) if one != other), "")
        raise RunError(
            f"the checkpoint knows {len(known)} classes, the data have {len(classes)}{differ}; "
            "check --dataset and --data-folder"
        )


# ---------------------------------------------------------------------------------------------------- the head


def fit(settings, model, train, test, folder, checkpoint=None):
    """Train, test after every epoch, keep the best by test accuracy and the last.

    Returns the results, and of the best model the scores (N×classes) and labels (N) of the test images.
    """
    classes = train.source.classes
    network, train, test = skip_frozen_encoder(settings, model, train, test)
    optimizer = build_optimizer(settings, model)
    batch_size = min(settings.batch_size, len(train))
    content = {"kind": training.CLASSIFIER, "model": model, "optimizer": optimizer}
    content |= {"class_names": classes, "images": len(train)}
    with Run(
        folder, settings, content, checkpoint, batch_size=batch_size, images=len(train), epochs=settings.epochs,
        epochs_done=settings.start_epoch, log_interval=settings.print_freq,
    ) as run:
        parallel = runtime.compiled(runtime.parallel(network), settings.compile).train()
        stream = train.training(batch_size, settings.seed, run.step + 1, run.last_step)
        for step, (x, labels) in run.steps(stream, partial(finish_epoch, settings, network, test, run)):
            lr = learning_rate_at(run.epoch, settings.lr, settings.step)
            run.add(train_step(settings, parallel, optimizer, x, labels, step, lr, batch_size), learning_rate=lr)
        model.load_state_dict(training.load(folder / "best.pt", training.CLASSIFIER)["model"])
        _, scores, labels = evaluate(network, test.in_order(settings.batch_size), len(test))
    return {"best": run.best, "last": run.last}, scores, labels


def build_optimizer(settings, model):
    """SGD on what is not frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, settings.lr, momentum=settings.momentum, weight_decay=settings.wd)


def skip_frozen_encoder(settings, model, train, test):
    """The network to train and its batches: the whole model, or, where all else is frozen, the head on features."""
    if not model.only_head_trains:
        return model, train, test
    views = 2 if train.flip else 1
    fits, needed = features.fits_in_memory(views * len(train) + len(test), model.feature_size)
    if not fits:
        print(f"stored features would take {needed / 2**30:.1f} GiB, more than memory has: every epoch encodes anew")
        return model, train, test
    started = time.perf_counter()
    stored = [
        features.StoredFeatures(model, batches, settings.batch_size, mirror)
        for batches, mirror in ((train, train.flip), (test, False))
    ]
    seconds = time.perf_counter() - started
    both = ", plain and mirrored" if views == 2 else ""
    print(f"every image is encoded{both} ({needed / 2**20:.0f} MiB, {seconds:.1f} s): the head trains on that")
    return model.head, *stored


def learning_rate_at(epoch, start, step):
    """The learning rate of epoch 1, 2, …: a tenth every `step` epochs."""
    return start * 0.1 ** ((epoch - 1) // step)


def train_step(settings, network, optimizer, x, labels, step, lr, batch_size):
    """One optimiser step on this process's share of a batch, what `network` takes and B labels.

    Returns loss and accuracy, a dict of vectors of B. `network` has to be in training mode.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    runtime.seed_step(settings.seed, step, x.device)
    optimizer.zero_grad()
    with runtime.autocast(settings.precision, x.device):
        logits = network(x).float()  # B×classes
    loss = F.cross_entropy(logits, labels, reduction="none")
    runtime.batch_mean(loss, batch_size).backward()
    optimizer.step()
    return {"loss": loss, "top1": 100.0 * (logits.argmax(1) == labels)}


def finish_epoch(settings, network, test, run):
    """Test, report, keep the best classifier."""
    found, _, _ = evaluate(network, test.in_order(settings.batch_size), len(test))
    improved = run.best is None or found["top1"] > run.best["top1"]
    run.note_test(found, improved)
    lr = learning_rate_at(run.epoch, settings.lr, settings.step)
    words = f"train {in_words(run.since_epoch.read())}  test {in_words(found)}  lr {lr:g}"
    tqdm.write(f"epoch {run.epoch}/{settings.epochs}  {words}  {run.speed:.0f} images/s")
    run.scalars({f"{name}/test": value for name, value in found.items()})
    if improved:
        content = run.checkpoint()
        if runtime.is_main():
            training.save(run.folder / "best.pt", content)


def evaluate(network, stream, images):
    """Figures over the `images` test images of `stream`: loss, top1, of more than five classes top5.

    Returns them, a dict of floats, the scores N×classes, and the labels N.
    """
    runtime.share_statistics(network)
    with training.evaluating(network):
        found = [(network(x).cpu(), labels.cpu()) for x, labels in stream]
    scores, labels = (features.gather_rows(torch.cat(parts), images) for parts in zip(*found))
    return {"loss": F.cross_entropy(scores, labels).item(), **features.accuracy(scores, labels)}, scores, labels


def in_words(found):
    words = {"loss": "loss {:.3f}", "top1": "top-1 {:.2f}", "top5": "top-5 {:.2f}"}
    return "  ".join(words[name].format(found[name]) for name in words if name in found)


# ---------------------------------------------------------------------------------------------------- probes


def probe(settings, model, untrained, train, test):
    """Linear and nearest-neighbour probes on frozen features: the results, the last probe's scores, the labels.

    Beside them stands what the `untrained` encoder scores, and the commonest class. Of several processes all encode,
    and rank 0 fits; the others return nothing. There is nothing to go on from.
    """
    found = encode_all(settings, model, train, test)
    floors = {"commonest_class": 100 * np.bincount(test.source.labels).max() / len(test)}
    wants_floor = not (settings.random_init or settings.no_floor)
    if wants_floor:
        model.encoder = untrained[: len(model.encoder)]
        random = encode_all(settings, model, train, test)
    if not runtime.is_main():
        return None, None, None
    results, classes = {}, len(train.source.classes)
    for name, fit_and_score in (("linear", features.linear_probe), ("knn", features.neighbour_probe)):
        if getattr(settings, name):
            started = time.perf_counter()
            scores, chosen = fit_and_score(*found[:3], classes, settings.seed)
            seconds = time.perf_counter() - started
            if wants_floor:
                floor, _ = fit_and_score(*random[:3], classes, settings.seed)
                floors["random_weights"] = features.accuracy(floor, found[3])["top1"]
            chosen["features"], shares = found[0].shape[1], features.accuracy(scores, found[3])
            results[name] = {**shares, **chosen, "floors": dict(floors), "seconds": seconds}
            beside = ", ".join(f"{floor.replace('_', ' ')} {value:.2f}" for floor, value in floors.items())
            print(f"{name}  {in_words(results[name])}  (floors: {beside})  {chosen}")
    return results, scores, found[3]


def encode_all(settings, model, train, test):
    """What a probe reads: training features N×F and labels N, test features (arrays), test labels (a tensor).

    Large maps, as those after the first layers, are averaged down to what a probe can be fitted to.
    """
    model.eval()
    model.grid = model.grid or features.coarser_grid(model.encoder(test.examples(1)))
    x, labels = features.extract(model.features, train, settings.batch_size)
    test_x, test_labels = features.extract(model.features, test, settings.batch_size)
    return x.numpy(), labels.numpy(), test_x.numpy(), test_labels


# ---------------------------------------------------------------------------------------------------- what is left


def write(settings, folder, frozen, classes, results, scores, labels):
    """confusion.png, results.json, and the last words on the console."""
    is_probe = settings.linear or settings.knn
    taken_for = confusion_matrix(labels, scores.argmax(1), labels=range(len(classes)), normalize="true")
    draw_confusion(taken_for, classes, folder / "confusion.png")
    images, shares = np.bincount(labels, minlength=len(classes)).tolist(), (100 * taken_for.diagonal()).tolist()
    content = {
        **results,
        "per_class": [  # of the last probe or of the best epoch
            {"class": name, "images": count, "top1": share if count else None}
            for name, count, share in zip(classes, images, shares)
        ],
        "test_images": len(labels),
        "frozen_children": frozen,
        "options": vars(settings),
        **runtime.record(),
    }
    runtime.write_json(folder / "results.json", content)  # last: all else is there
    if not is_probe:
        best, last = results["best"], results["last"]
        print(f"best (chosen on these test images, so a little flattered): epoch {best['epoch']}  {in_words(best)}")
        print(f"last: epoch {last['epoch']}  {in_words(last)}")
    of = "knn" if settings.knn else "linear" if settings.linear else "the best epoch"
    print(f"results.json, and confusion.png of {of}, are in {runtime.relative(folder)}")


def draw_confusion(matrix, names, path):
    """How often each true class (row) is taken for each class (column), shares from 0 to 1, as the PNG file `path`."""
    from matplotlib.figure import Figure  # takes a while: only who has trained waits

    count, step = len(names), -(-len(names) // NAMED)
    figure = Figure((5 + count / 5, 4 + count / 5) if count < NAMED else (20, 19), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="Reds", vmin=0, vmax=1, interpolation="nearest")
    ticks = range(0, count, step), [name[:24] for name in names[::step]]
    axes.set_xticks(*ticks, rotation=90, parse_math=False)
    axes.set_yticks(*ticks, parse_math=False)
    axes.set(xlabel="class that the classifier names", ylabel="true class")
    figure.colorbar(image, label="share of the true class's images")
    for (row, column), share in np.ndenumerate(matrix if count <= NUMBERED else np.zeros((0, 0))):
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=colour)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may have letters that the font lacks
        runtime.write(path, lambda file: figure.savefig(file, format="png"))


if __name__ == "__main__":
    runtime.start(main)
