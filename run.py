"""Train PatchVAE, or the beta-VAE that it is compared with, on images without labels.

    python run.py --dataset shapes --num-epochs 8 --img-per-epoch 5000 --lr 1e-3 --scale 4 --beta-v 2
    python run.py --dataset folder --data-folder my/images --output-folder mine --lr 1e-3 --beta-v 2
"""

import math
import os
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

import modules
from datasets import normalisation, open_split
from utils import checkpoints, console, grids, loop, options, ranks, runtime, tracking

ACTIVE = 0.01  # variance over images above which a latent is in use (Burda et al. 2016, section 5.2)
COUNTS = ("_in_use", "_above_half")  # how the names of figures that count parts end
UNITS = {"patchy": "parts", "vae": "latents"}  # what can be in use
SHOWN = 12  # images in the pictures of every epoch
# Options that a resumed run may change: they do not touch its figures.
FREE = ("data_folder", "output_folder", "workers", "cache", "cache_folder", "no_cuda")
FREE += ("num_epochs", "save_interval", "save_minutes")
# Options that --evaluate takes from the model file, as the training had them, unless they are given.
TESTED_WITH = ("batch_size", "beta_a", "beta_v", "target", "recon_mask")
CONTENTS = ("args.json", "model.pt", "checkpoints", "logs", "images", "metrics.jsonl")  # of the output folder


def build_parser():
    parser = console.Parser(description=__doc__)
    options.add_data_options(parser)
    model = options.add_model_options(parser)
    model.add_argument(
        "--arch", default="patchy", choices=modules.ARCHS,
        help="patchy: PatchVAE; vae: the beta-VAE with the same encoder and decoder (default: %(default)s)",
    )
    model.add_argument(
        "--py", type=console.above(0, 1), metavar="P",
        help="prior probability that a part occurs in a cell (default: 1/N)"
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--beta-a", "--beta-app", type=console.real(0), default=1.0, metavar="X",
        help="weight of the appearance's KL term; the beta of --arch vae (default: %(default)s)",
    )
    loss.add_argument(
        "--beta-v", "--beta-occ", type=console.real(0), default=10.0, metavar="X",
        help="weight of the occurrence's KL term; lower it if the parts stay near their prior (default: %(default)s)",
    )
    loss.add_argument(
        "--target", default="image", choices=("image", "edges"),
        help="what is reconstructed: the image, or where it has edges; colour pays in the first and parts divide by "
        "it, in the second only local shape pays (default: %(default)s)",
    )
    loss.add_argument(
        "--recon-mask", choices=("edge",),
        help="weigh every pixel's error by the edges in its cell (default: all alike)"
    )
    loss.add_argument(
        "--temp", type=console.above(0), default=1.0, metavar="T",
        help="temperature of the occurrence samples at the start (default: %(default)s)",
    )
    loss.add_argument(
        "--anneal", type=console.real(0), default=3e-5, metavar="X",
        help="every 1000 steps the temperature shrinks by exp(-X * step); 0 keeps it (default: %(default)s)",
    )
    loss.add_argument(
        "--min-temp", type=console.above(0), default=0.1, metavar="T",
        help="but never below this (default: %(default)s)"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--num-epochs", type=console.whole(1), default=30, metavar="K", help="(default: %(default)s)")
    training.add_argument(
        "--img-per-epoch", type=console.whole(1), default=50_000, metavar="K",
        help="images of one epoch, in whole batches, whatever the data set's size (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size", type=console.whole(1), default=128, metavar="K",
        help="images of one step (default: %(default)s)"
    )
    training.add_argument(
        "--lr", type=console.above(0), default=1e-4, metavar="X",
        help="Adam's learning rate; 1e-3 learns faster in short runs (default: %(default)s)",
    )
    training.add_argument(
        "--hide", type=console.real(0, 0.95), default=0.0, metavar="P",
        help="share of an image, in squares of half a cell, that the encoder is not shown in training and that has to "
        "be reconstructed all the same: its features then recognise better, e.g. with 0.5 (default: %(default)s)",
    )
    training.add_argument(
        "--grey", type=console.real(0, 1), default=0.0, metavar="P",
        help="likewise: share of the images that it is shown without colour (default: %(default)s)",
    )
    training.add_argument(
        "--pretrained", metavar="FILE", help="a model.pt to start from; it knows its own model options"
    )
    training.add_argument(
        "--seed", type=console.seed, default=1, metavar="K",
        help="of weights, order and noise (default: %(default)s)"
    )
    options.add_speed_options(training)
    training.add_argument("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-folder", default="./scratch", metavar="DIR",
        help="where model.pt, logs/, images/ and checkpoints/ go (default: %(default)s)",
    )
    output.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on with the run of this folder or checkpoint (default: the output folder), with its options",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    output.add_argument(
        "--evaluate", action="store_true",
        help="do not train: test --pretrained (or the output folder's model.pt) and draw its pictures",
    )
    output.add_argument(
        "--log-interval", type=console.whole(1), default=50, metavar="K",
        help="steps between logged figures (default: %(default)s)"
    )
    output.add_argument(
        "--save-interval", type=console.whole(1), default=1, metavar="K",
        help="epochs between checkpoints (default: %(default)s)"
    )
    options.add_save_minutes(output)
    return parser


def parse(argv):
    """The checked options, the content of the model file they name, and of the checkpoint to go on from (or None)."""
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    args.typed = {name: getattr(args, name) for name in given}
    options.settle_resume(args, "checkpoints")
    if args.resume is not None:
        return args, None, find_checkpoint(args, given)
    if args.evaluate and args.pretrained is None:
        args.pretrained = os.path.join(args.output_folder, "model.pt")
    file = checkpoints.load(args.pretrained, checkpoints.MODEL) if args.pretrained else None
    if args.evaluate:
        options.follow_data(args, given, file["args"])
        for name in TESTED_WITH:
            if name not in given:
                setattr(args, name, file["args"].get(name, getattr(args, name)))  # older files know fewer
    if file:
        options.follow_file(args, given, file["options"], args.pretrained)
    options.complete(args, given)
    args.py = prior(args)
    own = os.path.realpath(os.path.join(args.output_folder, "model.pt"))
    if args.overwrite and args.pretrained and os.path.realpath(args.pretrained) == own:
        raise console.UsageError(f"--overwrite would delete {args.pretrained} first; give another --output-folder")
    if args.target == "edges" and args.recon_mask:
        raise console.UsageError("--target edges has edges alone to reconstruct; drop --recon-mask or the target")
    if args.min_temp > args.temp:
        raise console.UsageError(f"--min-temp {args.min_temp:g} is above --temp {args.temp:g}; swap them or drop one")
    return args, file, None


def find_checkpoint(args, given):
    """The content of the checkpoint that --resume means; `args` follows it."""
    place = Path(args.resume or args.output_folder)
    if place.is_file():
        checkpoint, folder = checkpoints.load(place, checkpoints.TRAINING), place.resolve().parent.parent
    else:
        folder = place.parent if place.name == "checkpoints" else place
        checkpoint = checkpoints.newest(str(folder / "checkpoints"), checkpoints.TRAINING)
    options.own_folder(args, given, str(folder), CONTENTS[0])
    options.follow_run(args, given, checkpoint["args"], FREE)
    return checkpoint


def prior(args):
    """The prior probability of a part: --py, or 1/N."""
    py = 1 / args.num_parts if args.py is None else args.py
    if py == 1 and args.arch == "patchy" and not args.categorical:
        raise console.UsageError("--py must lie below 1, and a single part has no default; give one, e.g. --py 0.5")
    return py


@ranks.together
def main(argv=None):
    """Train, or evaluate, as `argv` says; returns the best test figures: a dict of floats."""
    args, file, checkpoint = parse(argv)
    splits = ("test",) if args.evaluate else ("unlabelled", "test")
    if not args.evaluate:
        options.check_batch(min(args.batch_size, args.img_per_epoch), (args.size // args.scale) ** 2)
        tracking.check_folder(args.output_folder, CONTENTS, args.overwrite, keep=checkpoint is not None)
    device = runtime.choose_device(args.no_cuda)
    args.precision = runtime.choose_precision(args.precision, device)  # kept: a resumed run must not change it
    with ranks.main_first():
        sources = [open_split(args.dataset, args.data_folder, split, args.size) for split in splits]
    *train, test = opened = options.open_batches(args, sources, device)
    described = options.describe_model(args)
    torch.manual_seed(args.seed)
    model = runtime.channels_last(modules.build_model(described).to(device))
    if file or checkpoint:
        model.load_state_dict((file or checkpoint)["model"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.dataset}: {options.count_images(opened)}, {args.size} px, {runtime.describe(device)}")
    print(f"{args.arch}: {parameters:,} parameters, encoder {args.encoder_arch}, {bottleneck(args)}")
    if args.evaluate:
        return evaluate_only(args, model, test)
    folder = tracking.prepare_folder(args.output_folder, CONTENTS, args.overwrite, keep=checkpoint is not None)
    if ranks.is_main():
        tracking.write_json(folder / "args.json", {**vars(args), **runtime.record()})
    return fit(args, described, model, *train, test, folder, checkpoint)


def fit(args, described, model, train, test, folder, checkpoint=None):
    """The whole training. Returns the best test figures."""
    optimizer = build_optimizer(args, model)
    batch_size = min(args.batch_size, args.img_per_epoch)
    progress = loop.Progress(steps_per_epoch=math.ceil(args.img_per_epoch / batch_size))
    if checkpoint:
        loop.restore(checkpoint, optimizer, progress, folder / "checkpoints", len(train))
    last_step = args.num_epochs * progress.steps_per_epoch
    # Order, mirroring and noise are functions of (seed, step): the step is all that has to be remembered of them.
    stream = train.training(batch_size, args.seed, progress.step + 1, last_step)
    network = runtime.compiled(ranks.parallel(model), args.compile)
    content = {"kind": checkpoints.TRAINING, "model": model, "optimizer": optimizer, "images": len(train)}
    with (
        tracking.Tracker(folder, step=progress.step, owes_test=progress.owes_test) as tracker,
        loop.Keeper(folder / "checkpoints", args, progress, tracker, **content) as keeper,
    ):
        if progress.owes_test:
            finish_epoch(args, described, model, test, progress, tracker, keeper)
            keeper.after_step(regular=True)
        network.train()
        for x, _ in loop.bar(stream, "steps", last_step, progress.step):  # B×C×H×W
            progress.step += 1
            train_step(args, network, optimizer, x, batch_size, progress)
            if progress.epoch_ends or progress.step_in_epoch % args.log_interval == 0:
                log_training(args, progress, tracker)
            if progress.epoch_ends:
                finish_epoch(args, described, model, test, progress, tracker, keeper)
                network.train()
            is_saved_epoch = progress.epoch_ends and progress.epoch % args.save_interval == 0
            keeper.after_step(regular=is_saved_epoch or progress.step == last_step)
        tracker.event("end", **progress.best)
        tracker.options(vars(args), {f"best/{name}": value for name, value in progress.best.items()})
    say_farewell(args, progress.first, progress.best, folder, train.source)
    return progress.best


def build_optimizer(args, model):
    """Adam as the paper has it."""
    return torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)


def train_step(args, model, optimizer, x, batch_size, progress):
    """One optimiser step on x: B×C×H×W, this process's share of the batch, and its loss terms added to the means.

    `model` has to be in training mode.
    """
    temperature = modules.temperature_at(progress.step, args.temp, args.anneal, args.min_temp)
    temperature = torch.full((), temperature, device=x.device)  # a number would be compiled in
    runtime.seed_step(args.seed, progress.step, x.device)
    optimizer.zero_grad()
    shown = modules.damage(x, args.hide, args.grey, args.scale // 2)  # B×C×H×W
    with runtime.autocast(args.precision, x.device):
        output = model(shown, temperature)
    terms = loss(args, x, output)
    ranks.batch_mean(terms["total"], batch_size).backward()
    optimizer.step()
    progress.window_means.add(terms)
    progress.watch.images += batch_size


def loss(args, x, output):
    """The loss terms of a batch as the options weigh them: a dict of vectors of length B."""
    cell = args.scale if args.recon_mask == "edge" else None
    return modules.loss_terms(target_of(args, x), output, args.beta_a, args.beta_v, cell)


def target_of(args, x):
    """What --target wants reconstructed of x: B×C×H×W -> B×C×H×W."""
    return modules.reconstruction_target(x, args.target, *normalisation(x.shape[1], args.inet))


@torch.no_grad()
def evaluate(args, model, test, heed=iter):
    """Mean loss terms over the test images, each seen once, without sampling, and two counts of parts.

    In use: a latent of the part varies over images. Above half: the part surely occurs in some cell of some image.
    """
    ranks.share_statistics(model)
    model.eval()
    means, moments, surest = tracking.Means(), 0, []
    for x, _ in heed(test.in_order(args.batch_size)):
        output = model(x)
        means.add(loss(args, x, output))
        if output.posterior.occurrence is not None:
            surest.append(output.posterior.occurrence.amax(dim=(0, 2, 3)))  # of each part
        latents = posterior_means(output.posterior).double()  # B×parts×latents of a part
        moments = moments + torch.stack([latents.sum(0), latents.square().sum(0)])
    mean, mean_square = ranks.total(moments) / len(test)
    active = (mean_square - mean.square()).amax(dim=1) > ACTIVE
    figures = {**means.read(), f"{UNITS[args.arch]}_in_use": int(active.sum())}
    if surest:
        figures["parts_above_half"] = int((ranks.largest(torch.stack(surest).amax(dim=0)) > 0.5).sum())
    return figures


def posterior_means(posterior):
    """What the encoder says of each part, appearance and places: B×N×(d + h·w); the VAE's latents: B×(N·d)×1."""
    if posterior.occurrence is None:
        return posterior.mean.flatten(1)[:, :, None]
    return torch.cat([posterior.mean, posterior.occurrence.flatten(2)], dim=2)


def log_training(args, progress, tracker):
    """The means since the last call, in metrics.jsonl and TensorBoard."""
    means, speed = progress.close_window()
    temperature = modules.temperature_at(progress.step, args.temp, args.anneal, args.min_temp)
    state = {"temperature": temperature, "learning_rate": args.lr, "images_per_second": speed}
    tracker.event("train", epoch=progress.epoch, step=progress.step, **means, **state)
    tracker.scalars(progress.step, {**{f"loss/train/{name}": value for name, value in means.items()}, **state})


def finish_epoch(args, described, model, test, progress, tracker, keeper):
    """Test, report, keep the best model, draw."""
    figures = keeper.test(evaluate, args, model, test)
    if figures is None:  # a signal came; the run that goes on tests again
        return
    train_terms = progress.epoch_means.read()
    progress.first = progress.first or figures
    if progress.best is None or figures["total"] < progress.best["total"]:
        progress.best = {**figures, "epoch": progress.epoch}
        content = {"options": described, "args": vars(args), "epoch": progress.epoch, "test": figures}
        content["model"] = model.state_dict()
        if ranks.is_main():
            checkpoints.save(tracker.folder / "model.pt", {"kind": checkpoints.MODEL, **content})
    tracker.event("test", epoch=progress.epoch, step=progress.step, **figures, train_mean=train_terms)
    tags = {name: name if name.endswith(COUNTS) else f"loss/test/{name}" for name in figures}
    tracker.scalars(progress.step, {tags[name]: value for name, value in figures.items()})
    for name, picture in draw_pictures(args, model, test).items() if ranks.is_main() else ():
        tracker.picture(name, progress.step, picture, f"images/{name}_epoch_{progress.epoch:03d}.png")
    losses = f"train {in_words(args, train_terms)}  test {in_words(args, figures)}"
    tqdm.write(
        f"epoch {progress.epoch}/{args.num_epochs}  {losses}  {in_use(args, figures)}  {progress.speed:.0f} images/s"
    )
    progress.close_epoch()


def in_words(args, terms):
    """The raw terms with their weights, and their total, in a line."""
    weight = {"kl_app": f"{args.beta_a:g}x", "kl_occ": f"{args.beta_v:g}x"}
    shown = {name: value for name, value in terms.items() if not name.endswith((*COUNTS, "_weighted"))}
    return " ".join(f"{name} {weight.get(name, '')}{value:.1f}" for name, value in shown.items())


def bottleneck(args):
    """The bottleneck in words."""
    cells = args.size // args.scale
    if args.arch == "vae":
        return f"one vector of {args.num_parts * args.hidden_size} latents"
    return f"{args.num_parts} parts of size {args.hidden_size} on {cells}x{cells} cells"


def in_use(args, figures):
    """How much of the bottleneck says something about the image, in words."""
    unit = UNITS[args.arch]
    total = args.num_parts * (args.hidden_size if unit == "latents" else 1)
    sure = f", {figures['parts_above_half']} above one half" if "parts_above_half" in figures else ""
    return f"{figures[f'{unit}_in_use']} of {total} {unit} in use{sure}"


@torch.no_grad()
def draw_pictures(args, model, test):
    """PIL grids by name: reconstructions, where the parts occur (if there are parts), samples from the prior."""
    model.eval()
    x = test.examples(SHOWN)  # SHOWN×C×H×W
    mean, std = test.mean.flatten().tolist(), test.std.flatten().tolist()
    output = model(x)
    rows = [x, output.reconstruction] if args.target == "image" else [x, target_of(args, x), output.reconstruction]
    originals, *_, copies = rows = [list(grids.to_rgb(images, mean, std)) for images in rows]
    pictures = {"reconstructions": grids.grid(rows)}
    if output.posterior.occurrence is not None:
        pictures["occurrence"] = grids.occurrence_grid(originals, copies, output.posterior.occurrence.cpu().numpy())
    runtime.seed_step(args.seed, 0, x.device)  # the same draws after every epoch
    drawn = list(grids.to_rgb(model.draw(2 * SHOWN, x.device), mean, std))
    return {**pictures, "samples": grids.grid([drawn[:SHOWN], drawn[SHOWN:]])}


def evaluate_only(args, model, test):
    """Test the model and leave its pictures in the output folder's evaluated/."""
    figures = evaluate(args, model, test)
    if not ranks.is_main():
        return figures
    folder = Path(args.output_folder, "evaluated")
    for name, picture in draw_pictures(args, model, test).items():
        grids.save(picture, str(folder / f"{name}.png"))
    print(f"test  {in_words(args, figures)}  {in_use(args, figures)}")
    print(f"its pictures are in {tracking.relative(folder)}")
    return figures


def say_farewell(args, first, best, folder, source):
    """What was learned, and what to do next with the images of `source`."""
    place = tracking.relative(folder)
    before = f"epoch 1: {first['recon']:.1f}, total {first['total']:.1f}"
    print(f"best epoch {best['epoch']}: reconstruction error {best['recon']:.1f}, total {best['total']:.1f} ({before})")
    print(f"{in_use(args, best)}; the model is {place}/model.pt, the pictures are in {place}/images")
    if not best[f"{UNITS[args.arch]}_in_use"]:
        print("nothing is in use yet: train longer, with a higher --lr such as 1e-3 or a lower --beta-v such as 2")
    print(f"next: tensorboard --logdir {shlex.quote(place)}/logs")
    if source.labels is not None and len(source.classes) > 1:
        data = f"--dataset {args.dataset} --data-folder {shlex.quote(args.data_folder)}"
        encoder = f"--arch {args.arch} --pretrained {shlex.quote(place)}/model.pt --freeze -1 --epochs 10 --lr 0.01"
        print(f"      python classifier.py {data} {encoder} --output-folder {shlex.quote(place)}")


if __name__ == "__main__":
    console.run(main)
