"""Judge an encoder by recognition: train a small head on top of it, frozen or not, or a supervised network.

    python classifier.py --dataset shapes --arch patchy --pretrained scratch/model.pt --freeze -1 --epochs 10 --lr 0.01
    python classifier.py --dataset digits --arch resnet18 --epochs 12 --step 8 --lr 0.02 -b 64 --output-folder digits
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import modules
from datasets import DATA_SETS, open_split
from utils import checkpoints, console, features, loop, options, ranks, recognition, runtime, tracking

SUPERVISED = ("alexnet", "resnet18")  # whole networks; patchy and vae are the encoders that run.py trains
# Options that a resumed run may change: they do not touch its figures.
FREE = ("data_folder", "output_folder", "workers", "cache", "cache_folder", "epochs", "save_minutes", "no_cuda")
CHECKPOINTS = "checkpoints_classifier"  # the folder of the last three states; checkpoint.pt is the newest of them
CONTENTS = ("classifier_args.json", "checkpoint.pt", CHECKPOINTS, "best.pt", "classifier.jsonl", "logs_classifier")
CONTENTS += ("results.json", "per_class.csv", "confusion.png")  # of the output folder


def build_parser():
    parser = console.Parser(description=__doc__)
    options.add_data_options(parser)
    model = options.add_model_options(parser)
    model.add_argument(
        "--arch", default="alexnet", choices=(*SUPERVISED, *modules.ARCHS),
        help="alexnet, resnet18: the whole network; patchy, vae: the encoder that run.py trains (default: %(default)s)",
    )
    model.add_argument(
        "--pretrained", metavar="FILE",
        help="take the encoder's weights from this model.pt, which knows its model options; resnet18 takes what fits",
    )
    model.add_argument(
        "--random-init", action="store_true",
        help="keep the encoder's random weights, also under --freeze: the floor that training has to beat",
    )
    model.add_argument(
        "--freeze", type=freeze_type, default=0, metavar="K",
        help="freeze the encoder's first K children, or all (-1), or the paper's conv1, conv1-3, conv1-5 "
        "(default: %(default)s)",
    )
    probe = parser.add_argument_group("what to train")
    probe.add_argument(
        "--standardise", action="store_true",
        help="bring every feature to mean 0 and deviation 1 before the head, by the statistics of batches: features "
        "that are learned without labels differ much in scale",
    )
    probe.add_argument(
        "--linear", action="store_true",
        help="instead of the head: logistic regression on the features where --freeze ends, by default the last; maps "
        f"of more than {features.LARGEST:,} numbers are averaged down to that",
    )
    probe.add_argument(
        "--knn", action="store_true", help="instead of the head: a vote of the nearest training images, likewise"
    )
    probe.add_argument(
        "--label-fraction", type=console.above(0, 1), default=1.0, metavar="P",
        help="share of every class's training labels to use, e.g. 0.01 (default: all)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=console.whole(1), default=90, metavar="K", help="(default: %(default)s)")
    training.add_argument(
        "--step", type=console.whole(1), default=30, metavar="K",
        help="the learning rate falls to a tenth every K epochs (default: %(default)s)",
    )
    training.add_argument(
        "--start-epoch", type=console.whole(0), default=0, metavar="K",
        help="count the first K epochs as done; --resume knows by itself (default: %(default)s)",
    )
    training.add_argument(
        "-b", "--batch-size", type=console.whole(1), default=256, metavar="K",
        help="images of one step (default: %(default)s)"
    )
    training.add_argument(
        "--lr", type=console.above(0), default=0.1, metavar="X",
        help="SGD's learning rate at the start (default: %(default)s)"
    )
    training.add_argument(
        "--momentum", type=console.real(0, 1), default=0.9, metavar="X", help="of SGD (default: %(default)s)"
    )
    training.add_argument(
        "--wd", "--weight-decay", type=console.real(0), default=1e-4, metavar="X",
        help="weight decay (default: %(default)s)"
    )
    training.add_argument(
        "--seed", type=console.seed, default=1, metavar="K",
        help="of weights, order and dropout (default: %(default)s)"
    )
    options.add_speed_options(training)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-folder", default="./scratch", metavar="DIR",
        help="where best.pt, checkpoint.pt, results.json and the rest go (default: %(default)s)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the classifier that the output folder holds")
    output.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on with the run of this folder or checkpoint (default: the output folder), with its options",
    )
    output.add_argument(
        "-e", "--evaluate", action="store_true", help="only test: the output folder's best.pt, or --resume PATH"
    )
    output.add_argument(
        "-p", "--print-freq", type=console.whole(1), default=10, metavar="K",
        help="steps between logged figures (default: %(default)s)"
    )
    options.add_save_minutes(output)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    machine.add_argument("--gpu", type=console.whole(0), metavar="K", help="use this GPU (default: the first)")
    for name in ("--world-size", "--rank", "--dist-url", "--dist-backend"):
        machine.add_argument(name, metavar="X", help="accepted for old scripts and ignored")
    machine.add_argument("--multiprocessing-distributed", action="store_true", help="likewise")
    return parser


def freeze_type(text):
    """An argparse type: conv1, conv1-3, conv1-5 or a whole number from -1."""
    if text in modules.CUTS:
        return text
    try:
        return console.whole(-1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a whole number of -1 or more nor {', '.join(modules.CUTS)}"
        ) from None


def parse(argv):
    """The checked options, the content of the --pretrained file and that of the checkpoint to go on from (or None)."""
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    args.typed = {name: getattr(args, name) for name in given}
    options.settle_resume(args, CHECKPOINTS)
    if args.resume is not None or args.evaluate:
        return args, None, find_checkpoint(args, given)
    file = checkpoints.load(args.pretrained, checkpoints.MODEL) if args.pretrained else None
    arch = args.arch
    if arch in SUPERVISED:
        check_whole_network(args, given)
        given.discard("arch")  # it names this network, not the one in the file
    if file:
        options.follow_file(args, given, file["options"], args.pretrained, free=("size",))
    if arch in SUPERVISED:
        args.arch = args.encoder_arch = arch
        args.scale = modules.FIXED_STRIDE[arch]
    options.complete(args, given)
    if args.start_epoch >= args.epochs:
        raise console.UsageError(f"--start-epoch {args.start_epoch} leaves none of --epochs {args.epochs} to train")
    untrained = not (args.pretrained or args.random_init)
    if untrained and (args.freeze != 0 or args.linear or args.knn):
        flag = "--freeze" if args.freeze != 0 else "--linear" if args.linear else "--knn"
        raise console.UsageError(
            f"{flag} needs a trained encoder: give --pretrained FILE, or --random-init for the floor"
        )
    return args, file, None


def check_whole_network(args, given):
    """Refuse options of the encoder that this network has not, unless a model file is there to agree with them."""
    if args.pretrained:
        return
    scale = modules.FIXED_STRIDE[args.arch]
    if "scale" in given and args.scale != scale:
        raise console.UsageError(f"--scale {args.scale}: --arch {args.arch} is a whole network of scale {scale}")
    if "encoder_arch" in given and args.encoder_arch not in ("resnet", args.arch):
        raise console.UsageError(f"--encoder-arch {args.encoder_arch} contradicts --arch {args.arch}; leave one out")


def find_checkpoint(args, given):
    """The content of the checkpoint that --resume or --evaluate means; `args` follows it."""
    place = Path(args.resume or args.output_folder)
    folder = place.parent if place.is_file() or place.name == CHECKPOINTS else place
    folder = folder.parent if folder.name == CHECKPOINTS else folder
    if place.is_file() or args.evaluate:
        checkpoint = checkpoints.load(place if place.is_file() else folder / "best.pt", checkpoints.CLASSIFIER)
    else:
        checkpoint = checkpoints.newest(str(folder / CHECKPOINTS), checkpoints.CLASSIFIER)
    if not args.evaluate:
        options.own_folder(args, given, str(folder), CONTENTS[0])
    options.follow_run(args, given, checkpoint["args"], (*FREE, "batch_size") if args.evaluate else FREE)
    return checkpoint


@ranks.together
def main(argv=None):
    """Train, probe or evaluate as `argv` says; returns the figures, as results.json holds them: a dict."""
    args, file, checkpoint = parse(argv)
    if not args.evaluate:
        tracking.check_folder(args.output_folder, CONTENTS, args.overwrite, keep=checkpoint is not None)
    device = runtime.choose_device(args.no_cuda, args.gpu)
    args.precision = runtime.choose_precision(args.precision, device)  # kept: a resumed run must not change it
    sources = labelled_sources(args)
    classes = sources[0].classes
    *train, test = opened = options.open_batches(args, sources[1:] if args.evaluate else sources, device)
    torch.manual_seed(args.seed)
    model = runtime.channels_last(build_model(args, len(classes)).to(device))
    images = f"{options.count_images(opened)} of {len(classes)} classes"
    print(f"{args.dataset}: {images}, {args.size} px, {runtime.describe(device)}")
    if checkpoint:
        check_classes(checkpoint, classes)
        model.load_state_dict(checkpoint["model"])
    else:
        load = file and not args.random_init
        args.fresh = load_encoder(model, file["model"], args.pretrained) if load else []  # kept for --resume
    prepare_layers(args, model)
    if args.evaluate:
        figures, _, _ = evaluate(model, test, args.batch_size)
        print(f"test  {recognition.in_words(figures)}")
        return figures
    folder = tracking.prepare_folder(args.output_folder, CONTENTS, args.overwrite, keep=checkpoint is not None)
    if ranks.is_main():
        tracking.write_json(folder / "classifier_args.json", {**vars(args), **runtime.record()})
    judge = probe if args.linear or args.knn else fit
    results, scores, labels = judge(args, model, *train, test, folder, checkpoint)
    if ranks.is_main():
        recognition.write(args, folder, model.frozen, classes, results, scores, labels)
    return results


# ---------------------------------------------------------------------------------------------------- data and model


def labelled_sources(args):
    """The training images, as many as --label-fraction wants, and the test images: a tuple.

    Their labels mean the same classes. Raises RunError.
    """
    with ranks.main_first():
        train, test = (open_split(args.dataset, args.data_folder, split, args.size) for split in ("train", "test"))
    for source in (train, test):
        if source.labels is None:
            raise console.RunError(
                f"{args.data_folder}: images without classes; a classifier needs train/CLASS/* and val/CLASS/*, "
                    "or CLASS/*"
            )
    if test.classes != train.classes:
        number = {name: label for label, name in enumerate(train.classes)}
        unknown = sorted(test.classes[label] for label in np.unique(test.labels) if test.classes[label] not in number)
        if unknown:
            raise console.RunError(
                f"{args.data_folder}: test images of the class {unknown[0]}, which has no training images"
            )
        test.labels = np.array([number.get(name, -1) for name in test.classes])[test.labels]
    if len(train.classes) < 2:
        raise console.RunError(f"--dataset {args.dataset} has a single class; there is nothing to tell apart")
    if args.label_fraction < 1:
        train = train.subset(few_labels(train.labels, args.label_fraction, args.seed))
    return train, test


def few_labels(labels, fraction, seed):
    """Sorted positions of `fraction` of every class, rounded: an int array. Raises UsageError if a class gets none."""
    generator, chosen = np.random.default_rng(seed), []
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        count = round(fraction * len(members))
        if count == 0:
            least = 1 / np.bincount(labels)[np.unique(labels)].min()
            raise console.UsageError(
                f"--label-fraction {fraction:g} leaves a class without an image; use {least:.2g} or more"
            )
        chosen.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def build_model(args, classes):
    """A modules.Classifier with fresh weights."""
    encoder, channels = modules.build_encoder(args.encoder_arch, DATA_SETS[args.dataset].channels, args.scale, args.ngf)
    grid = 1 if args.arch in SUPERVISED else None
    cells = grid or (args.size // args.scale) ** 2
    return modules.Classifier(encoder, channels * cells, classes, grid, args.standardise)


def load_encoder(model, weights, path):
    """Take what fits from the weights of a whole model, and say so. Returns the encoder's children that stay fresh."""
    own = model.encoder.state_dict()
    saved = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    fitting = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise console.RunError(f"{path}: none of its encoder's {len(saved)} tensors fits this encoder; check --arch")
    model.encoder.load_state_dict(fitting, strict=False)
    fresh = list(dict.fromkeys(name.split(".")[0] for name in own if name not in fitting))
    print(
        f"loaded {len(fitting)} of {len(model.state_dict())} tensors from {path}; fresh: {', '.join([*fresh, 'head'])}"
    )
    return fresh


def prepare_layers(args, model):
    """Freeze what --freeze names; keep BatchNorm's scale and shift where the encoder comes from a file."""
    names = [name for name, _ in model.encoder.named_children()]
    count = modules.children_until(args.encoder_arch).get(args.freeze, args.freeze)
    probing = args.linear or args.knn
    if count == -1 or probing and count == 0:
        count = len(names)
    if count > len(names):
        raise console.UsageError(
            f"--freeze {args.freeze}: this encoder ends with its child number {len(names)} ({', '.join(names)}); "
            "-1 freezes all"
        )
    random = [name for name in names[:count] if name in args.fresh]
    if random:
        remedy = "--arch patchy or vae" if probing else f"--freeze {names.index(random[0])}"
        raise console.UsageError(
            f"{args.pretrained} has no {random[0]} that fits, and it would be frozen with random weights; use {remedy}"
        )
    if args.pretrained and not args.random_init:
        model.freeze_normalisation(args.fresh)
    model.freeze(count)
    if probing:
        model.encoder = model.encoder[:count]  # a probe reads what is frozen
        if count < len(names):
            model.grid = None  # the average over the whole map belongs to a whole network
    weights = "pretrained" if args.pretrained and not args.random_init else "random"
    frozen = f"{names[0]} to {names[count - 1]}" if count else "nothing"
    print(f"{args.arch}: encoder {args.encoder_arch} with {weights} weights at the start, frozen: {frozen}")


def check_classes(checkpoint, classes):
    """Refuse images whose classes, a list of names, are not those of a classifier's checkpoint."""
    known = checkpoint.get("class_names", classes)  # older ones have but their number
    if checkpoint["classes"] != len(classes) or known != classes:
        differ = next((f" ({one} there, {other} here)" for one, other in zip(known, classes) if one != other), "")
        raise console.RunError(
            f"the checkpoint knows {checkpoint['classes']} classes, the data have {len(classes)}{differ}; "
            "check --dataset and --data-folder"
        )


# ---------------------------------------------------------------------------------------------------- the head


def fit(args, model, train, test, folder, checkpoint=None):
    """Train, test after every epoch, keep the best by test accuracy and the last.

    Returns the results, and of the best model the scores (N×classes) and labels (N) of the test images.
    """
    classes = train.source.classes
    network, train, test = skip_frozen_encoder(args, model, train, test)
    optimizer = build_optimizer(args, model)
    batch_size = min(args.batch_size, len(train))
    options.check_batch(batch_size, cells=1)
    progress = loop.Progress(steps_per_epoch=math.ceil(len(train) / batch_size))
    progress.step = args.start_epoch * progress.steps_per_epoch
    progress.tested = args.start_epoch
    if checkpoint:
        loop.restore(checkpoint, optimizer, progress, folder / CHECKPOINTS, len(train))
    last_step = args.epochs * progress.steps_per_epoch
    stream = train.training(batch_size, args.seed, progress.step + 1, last_step)
    parallel = runtime.compiled(ranks.parallel(network), args.compile)
    content = {"kind": checkpoints.CLASSIFIER, "classes": len(classes), "class_names": classes}
    content |= {"model": model, "optimizer": optimizer, "images": len(train)}
    with (
        tracking.Tracker(folder, "classifier.jsonl", "logs_classifier", progress.step, progress.owes_test) as tracker,
        loop.Keeper(folder / CHECKPOINTS, args, progress, tracker, folder / "checkpoint.pt", **content) as keeper,
    ):
        if progress.owes_test:
            finish_epoch(args, network, test, progress, tracker, keeper)
            keeper.after_step(regular=True)
        parallel.train()
        for x, labels in loop.bar(stream, "steps", last_step, progress.step):
            progress.step += 1
            train_step(args, parallel, optimizer, x, labels, batch_size, progress)
            if progress.epoch_ends or progress.step_in_epoch % args.print_freq == 0:
                means, _ = progress.close_window()
                tracker.event("train", epoch=progress.epoch, step=progress.step, **means)
            if progress.epoch_ends:
                finish_epoch(args, network, test, progress, tracker, keeper)
                parallel.train()
            keeper.after_step(regular=progress.epoch_ends)
        model.load_state_dict(checkpoints.load(folder / "best.pt", checkpoints.CLASSIFIER)["model"])
        _, scores, labels = evaluate(network, test, args.batch_size)
        tracker.picture("confusion", last_step, recognition.confusion_picture(scores, labels), "confusion.png")
    return {"best": progress.best, "last": progress.last}, scores, labels


def build_optimizer(args, model):
    """SGD on what is not frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.wd)


def skip_frozen_encoder(args, model, train, test):
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
        features.StoredFeatures(model, batches, args.batch_size, mirror)
        for batches, mirror in ((train, train.flip), (test, False))
    ]
    seconds = time.perf_counter() - started
    both = ", plain and mirrored" if views == 2 else ""
    print(f"every image is encoded{both} ({needed / 2**20:.0f} MiB, {seconds:.1f} s): the head trains on that")
    return model.head, *stored


def learning_rate_at(epoch, start, step):
    """The learning rate of epoch 1, 2, …: a tenth every `step` epochs."""
    return start * 0.1 ** ((epoch - 1) // step)


def train_step(args, network, optimizer, x, labels, batch_size, progress):
    """One optimiser step on this process's share of a batch, what `network` takes and B labels, added to the means.

    `network` has to be in training mode.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(progress.epoch, args.lr, args.step)
    runtime.seed_step(args.seed, progress.step, x.device)
    optimizer.zero_grad()
    with runtime.autocast(args.precision, x.device):
        logits = network(x).float()  # B×classes
    loss = F.cross_entropy(logits, labels, reduction="none")
    ranks.batch_mean(loss, batch_size).backward()
    optimizer.step()
    progress.window_means.add({"loss": loss, "top1": 100.0 * (logits.argmax(1) == labels)})
    progress.watch.images += batch_size


def finish_epoch(args, network, test, progress, tracker, keeper):
    """Test, report, keep the best classifier."""
    tested = keeper.test(evaluate, network, test, args.batch_size)
    if tested is None:  # a signal came; the run that goes on tests again
        return
    progress.last = {"epoch": progress.epoch, **tested[0]}
    report(args, progress, tracker)
    improved = progress.best is None or progress.last["top1"] > progress.best["top1"]
    progress.best = progress.last if improved else progress.best
    progress.close_epoch()
    if improved:
        content = keeper.content()
        if ranks.is_main():
            checkpoints.save(tracker.folder / "best.pt", content)


@torch.no_grad()
def evaluate(network, test, batch_size, heed=iter):
    """Every test image once: figures (loss, top1 and, of more than five classes, top5), scores N×classes, labels N."""
    ranks.share_statistics(network)
    network.eval()
    batches = [(network(x).cpu(), labels.cpu()) for x, labels in heed(test.in_order(batch_size))]
    scores, labels = (ranks.gather_rows(torch.cat(parts), len(test)) for parts in zip(*batches))
    return {"loss": F.cross_entropy(scores, labels).item(), **recognition.accuracy(scores, labels)}, scores, labels


def report(args, progress, tracker):
    """An epoch on the console, in classifier.jsonl and in TensorBoard."""
    means, last, step = progress.epoch_means.read(), progress.last, progress.step
    state = {
        "learning_rate": learning_rate_at(progress.epoch, args.lr, args.step),
        "images_per_second": progress.speed,
    }
    words = f"train {recognition.in_words(means)}  test {recognition.in_words(last)}  lr {state['learning_rate']:g}"
    tqdm.write(f"epoch {last['epoch']}/{args.epochs}  {words}  {state['images_per_second']:.0f} images/s")
    tracker.event("test", step=step, train=means, **state, **last)
    figures = {f"{name}/train": value for name, value in means.items()}
    figures |= {f"{name}/test": value for name, value in last.items() if name != "epoch"}
    tracker.scalars(step, {**figures, **state})


# ---------------------------------------------------------------------------------------------------- probes


def probe(args, model, train, test, folder, checkpoint=None):
    """Linear and nearest-neighbour probes on frozen features: the results, the last probe's scores, the labels.

    Large maps, as those after the first layers, are averaged down to what a probe can be fitted to. Of several
    processes all encode, and rank 0 fits; the others return nothing. There is nothing to go on from.
    """
    model.eval()
    model.grid = model.grid or features.coarser_grid(model.encoder(test.examples(1)))
    x, labels = features.extract(model.features, train, args.batch_size)
    test_x, test_labels = features.extract(model.features, test, args.batch_size)
    if not ranks.is_main():
        return None, None, None
    kinds = {"linear": args.linear and features.linear_probe, "knn": args.knn and features.neighbour_probe}
    results = {}
    for name, fit_and_score in kinds.items():
        if fit_and_score:
            started = time.perf_counter()
            scores, settings = fit_and_score(
                x.numpy(), labels.numpy(), test_x.numpy(), len(train.source.classes), args.seed
            )
            scores, seconds = torch.from_numpy(scores), time.perf_counter() - started
            settings["features"] = x.shape[1]
            results[name] = {**recognition.accuracy(scores, test_labels), **settings, "seconds": seconds}
            print(f"{name}  {recognition.in_words(results[name])}  {settings}")
    recognition.confusion_picture(scores, test_labels).save(folder / "confusion.png")
    return results, scores, test_labels


if __name__ == "__main__":
    console.run(main)
