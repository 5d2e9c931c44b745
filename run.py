"""Train PatchVAE, or the beta-VAE that it is compared with, on images without labels.

    python run.py --dataset shapes --num-epochs 8 --img-per-epoch 5000 --lr 1e-3 --scale 4 --beta-v 2
    python run.py --dataset folder --data-folder my/images --output-folder mine --lr 1e-3 --beta-a 0.1 --beta-v 0.1
"""

import os
import shlex
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import modules
from datasets import normalisation, open_split
from utils import batches, figures, options, runtime, training
from utils.options import above, real, whole
from utils.runtime import UsageError

ACTIVE = 0.01  # variance over images above which a latent is in use (Burda et al. 2016, section 5.2)
UNITS = {"patchy": "parts", "vae": "latents"}  # what can be in use
SHOWN = 12  # images in the pictures of every epoch
# Options that --evaluate takes from the model file, as the training had them, unless they are given.
TESTED_WITH = ("batch_size", "beta_a", "beta_v", "target", "recon_mask")
CONTENTS = ("args.json", "checkpoints", "model.pt", "logs", "images", "metrics.jsonl")  # of the output folder


def build_parser():
    parser = options.Parser(description=__doc__)
    options.add_data_options(parser)
    options.add_model_options(parser)
    parser.option("--arch", modules.ARCHS, "patchy", None,
                  "patchy: PatchVAE; vae: the beta-VAE with the same encoder and decoder")
    parser.option("--py", above(0, 1), None, "P", "prior probability that a part occurs in a cell (default: 1/N)")
    parser.option("--pretrained", options.model_file, None, "FILE",
                  "a model.pt to start from; it knows its own model options")
    parser.section("loss")
    parser.option("--beta-a --beta-app", real(0), 1.0, "X",
                  "weight of the appearance's KL term; the beta of --arch vae")
    parser.option("--beta-v --beta-occ", real(0), 10.0, "X",
                  "weight of the occurrence's KL term (of patchy); lower it if the parts stay near their prior")
    parser.option("--target", ("image", "edges"), "image", None,
                  "what is reconstructed: the image, or where it has edges; colour pays in the first and parts divide "
                  "by it, in the second only local shape pays")
    parser.option("--recon-mask", ("edge",), None, None,
                  "weigh every pixel's error by the edges in its cell (default: all alike)")
    parser.option("--temp", above(0), 1.0, "T", "temperature of the occurrence samples at the start")
    parser.option("--anneal", real(0), 3e-5, "X",
                  "after steps 1, 1001, 2001, … the temperature shrinks by exp(-X * step); 0 keeps it")
    parser.option("--min-temp", above(0), 0.1, "T", "but never below this")
    parser.section("training")
    parser.option("--num-epochs --epochs", whole(1), 30, "K", "how long", free=True)
    parser.option("--img-per-epoch", whole(1), 50_000, "K",
                  "images of one epoch, in whole batches, whatever the data set's size")
    parser.option("--batch-size", whole(1), 128, "K", "images of one step")
    parser.option("--lr --learning-rate", above(0), 1e-4, "X", "Adam's; 1e-3 learns faster in short runs")
    parser.option("--hide", real(0, 0.95), 0.0, "P",
                  "share of an image, in squares of half a cell, that the encoder is not shown in training and that "
                  "has to be reconstructed all the same: its features then recognise better, e.g. with 0.5")
    parser.option("--grey", real(0, 1), 0.0, "P", "likewise: share of the images that it is shown without colour")
    parser.option("--seed", options.seed, 1, "K", "of weights, order and noise")
    options.add_run_options(parser)
    parser.switch("--evaluate", "do not train: test --pretrained (or the output folder's model.pt), draw its pictures")
    parser.option("--log-interval", whole(1), 50, "K", "steps between logged figures")
    parser.option("--save-interval", whole(1), 1, "K", "epochs between checkpoints", free=True)
    return parser


def parse(argv):
    """The Settings, the content of the model file they name, and of the checkpoint to go on from (or None)."""
    parser = build_parser()
    typed, file, checkpoint = parser.typed(argv), None, None
    values = options.merge(parser.defaults, {}, typed)
    if values["resume"] is not None:
        folder, checkpoint = training.find_run(values, CONTENTS, training.TRAINING)
    if checkpoint:
        values = options.follow_run(parser, checkpoint["args"], typed) | {"output_folder": folder}
        return options.Settings(**values), None, checkpoint
    if values["evaluate"] and values["pretrained"] is None:
        values["pretrained"] = os.path.join(values["output_folder"], "model.pt")
    elif values["evaluate"] and "output_folder" not in typed:
        values["output_folder"] = os.path.dirname(values["pretrained"]) or "."
    if values["pretrained"]:
        file = training.load(values["pretrained"], training.MODEL)
        folder, of_training = values["output_folder"], TESTED_WITH if values["evaluate"] else None
        values = options.follow_model(parser, file, values["pretrained"], typed, of_training=of_training)
        values["output_folder"] = folder
    values = options.complete(values, typed)
    values["py"] = values["py"] or 1 / values["num_parts"]
    check(values)
    return options.Settings(**values), file, None


def check(values):
    """Raises UsageError for options that exclude each other."""
    own = os.path.join(values["output_folder"], "model.pt")
    if values["py"] == 1 and values["arch"] == "patchy" and not values["categorical"]:
        raise UsageError("--py must lie below 1, and a single part has no default; give one, e.g. --py 0.5")
    if values["overwrite"] and values["pretrained"] and os.path.realpath(values["pretrained"]) == os.path.realpath(own):
        raise UsageError(f"--overwrite would delete {own} first; give another --output-folder")
    if values["target"] == "edges" and values["recon_mask"]:
        raise UsageError("--target edges has edges alone to reconstruct; drop --recon-mask or the target")
    if values["min_temp"] > values["temp"]:
        raise UsageError(f"--min-temp {values['min_temp']:g} is above --temp {values['temp']:g}; drop one")


@runtime.together
def main(argv=None):
    """Train, or evaluate, as `argv` says; returns the best test figures: a dict of floats."""
    settings, file, checkpoint = parse(argv)
    goes_on = checkpoint is not None
    if not settings.evaluate:
        options.check_batch(images_per_step(settings), (settings.size // settings.scale) ** 2)
        training.check_folder(settings.output_folder, CONTENTS, settings.overwrite, goes_on)  # before hours of decoding
    device = runtime.choose_device(settings.no_cuda)
    settings = settings.changed(precision=runtime.choose_precision(settings.precision, device))
    train, test = (None, *open_data(settings, device, file or checkpoint))[-2:]  # --evaluate opens the test alone
    described = options.describe_model(settings)
    torch.manual_seed(settings.seed)
    model = runtime.channels_last(modules.build_model(described).to(device))
    if file or checkpoint:
        model.load_state_dict((file or checkpoint)["model"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{settings.dataset}: {batches.count_images(train, test)}, {settings.size} px, {runtime.describe(device)}")
    print(f"{settings.arch}: {parameters:,} parameters, encoder {settings.encoder_arch}, {bottleneck(settings)}")
    if settings.evaluate:
        return evaluate_only(settings, model, test)
    folder = training.prepare_folder(settings.output_folder, CONTENTS, settings.overwrite, goes_on)
    if runtime.is_main():
        runtime.write_json(folder / "args.json", {**vars(settings), **runtime.record()})
    return fit(settings, described, model, train, test, folder, checkpoint)


def images_per_step(settings):
    return min(settings.batch_size, settings.img_per_epoch)


def open_data(settings, device, file):
    """Batches to train and to test on; of --evaluate to test on: all of images that the model was not trained on.

    `file`: the content of the model file or checkpoint, which knows its own data set.
    """
    splits = ("unlabelled", "test")
    if settings.evaluate:
        both = file["args"], vars(settings)
        own, here = ((args["dataset"], os.path.realpath(args["data_folder"])) for args in both)
        splits = ("test" if own == here else "all",)
    with runtime.main_first():
        sources = [open_split(settings.dataset, settings.data_folder, split, settings.size) for split in splits]
    return batches.open_batches(settings, sources, device)


# ---------------------------------------------------------------------------------------------------- training


def fit(settings, described, model, train, test, folder, checkpoint=None):
    """The whole training. Returns the best test figures."""
    optimizer = build_optimizer(settings, model)
    content = {"kind": training.TRAINING, "model": model, "optimizer": optimizer, "images": len(train)}
    with training.Run(
        folder, settings, content, checkpoint, batch_size=images_per_step(settings), images=settings.img_per_epoch,
        epochs=settings.num_epochs, log_interval=settings.log_interval, save_interval=settings.save_interval,
    ) as run:
        network = runtime.compiled(runtime.parallel(model), settings.compile).train()
        # Order, mirroring and noise are functions of (seed, step): the step is all that has to be remembered of them.
        stream = train.training(run.batch_size, settings.seed, run.step + 1, run.last_step)
        for step, (x, _) in run.steps(stream, partial(finish_epoch, settings, described, model, test, run)):
            temperature = modules.temperature_at(step, settings.temp, settings.anneal, settings.min_temp)
            terms = train_step(settings, network, optimizer, x, step, temperature, run.batch_size)  # x: B×C×H×W
            run.add(terms, temperature=temperature, learning_rate=settings.lr)
        run.conclude()
    say_farewell(settings, run.first, run.best, folder, train.source, test.source)
    return run.best


def build_optimizer(settings, model):
    """Adam as the paper has it."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.5, 0.999), fused=True)


def train_step(settings, network, optimizer, x, step, temperature, batch_size):
    """One optimiser step on x, B×C×H×W, this process's share of the batch: its loss terms, a dict of vectors of B.

    `network` has to be in training mode.
    """
    temperature = torch.full((), temperature, device=x.device)  # a number would be compiled in
    runtime.seed_step(settings.seed, step, x.device)
    optimizer.zero_grad()
    shown = modules.damage(x, settings.hide, settings.grey, settings.scale // 2)  # B×C×H×W
    with runtime.autocast(settings.precision, x.device):
        output = network(shown, temperature)
    terms = loss(settings, x, output)
    runtime.batch_mean(terms["total"], batch_size).backward()
    optimizer.step()
    return terms


def loss(settings, x, output):
    """The loss terms of a batch as the options weigh them: a dict of vectors of length B."""
    cell = settings.scale if settings.recon_mask == "edge" else None
    return modules.loss_terms(target_of(settings, x), output, settings.beta_a, settings.beta_v, cell)


def target_of(settings, x):
    """What --target wants reconstructed of x: B×C×H×W -> B×C×H×W."""
    return modules.reconstruction_target(x, settings.target, *normalisation(x.shape[1], settings.inet))


# ---------------------------------------------------------------------------------------------------- testing


def evaluate(settings, model, stream, images):
    """Mean loss terms over the `images` test images of `stream`, without sampling, and two counts of parts.

    In use: a latent of the part varies over images. Above half: the part surely occurs in some cell of some image.
    """
    means, moments, surest = training.Means(), 0, []
    runtime.share_statistics(model)
    with training.evaluating(model):
        for x, _ in stream:
            output = model(x)
            means.add(loss(settings, x, output))
            if output.posterior.occurrence is not None:
                surest.append(output.posterior.occurrence.amax(dim=(0, 2, 3)))  # of each part
            latents = posterior_means(output.posterior).double()  # B×parts×latents of a part
            moments = moments + torch.stack([latents.sum(0), latents.square().sum(0)])
    mean, mean_square = runtime.total(moments) / images
    active = (mean_square - mean.square()).amax(dim=1) > ACTIVE
    found = {**means.read(), f"{UNITS[settings.arch]}_in_use": int(active.sum())}
    if surest:
        found["parts_above_half"] = int((runtime.largest(torch.stack(surest).amax(dim=0)) > 0.5).sum())
    return found


def posterior_means(posterior):
    """What the encoder says of each part, appearance and places: B×N×(d + h·w); the VAE's latents: B×(N·d)×1."""
    if posterior.occurrence is None:
        return posterior.mean.flatten(1)[:, :, None]
    return torch.cat([posterior.mean, posterior.occurrence.flatten(2)], dim=2)


def finish_epoch(settings, described, model, test, run):
    """Test, report, keep the best model, draw."""
    found = evaluate(settings, model, test.in_order(settings.batch_size), len(test))
    trained = run.since_epoch.read()
    improved = run.best is None or found["total"] < run.best["total"]
    run.note_test(found, improved)
    if improved and runtime.is_main():
        content = {"options": described, "args": vars(settings), "epoch": run.epoch, "test": found}
        training.save(run.folder / "model.pt", {"kind": training.MODEL, "model": model.state_dict(), **content})
    is_count = {name: name.startswith(("parts_", "latents_")) for name in found}
    run.scalars({name.replace("_", "/", 1) if is_count[name] else f"loss/test/{name}": found[name] for name in found})
    if runtime.is_main():
        for name, picture in draw_pictures(settings, model, test).items():
            run.picture(name, picture, f"images/{name}_epoch_{run.epoch:03d}.png")
    losses = f"train {in_words(settings, trained)}  test {in_words(settings, found)}"
    words = f"{losses}  {sure_parts(settings, found)}  {run.speed:.0f} images/s"
    tqdm.write(f"epoch {run.epoch}/{settings.num_epochs}  {words}")


def draw_pictures(settings, model, test):
    """PIL grids by name: reconstructions, where the parts occur (if there are parts), samples from the prior."""
    x = test.examples(SHOWN)  # SHOWN×C×H×W
    with training.evaluating(model):
        output = model(x)
        runtime.seed_step(settings.seed, 0, x.device)  # the same draws after every epoch
        drawn = model.draw(2 * SHOWN, x.device)
    rgb = partial(figures.to_rgb, mean=test.mean.flatten().tolist(), std=test.std.flatten().tolist())
    target = [] if settings.target == "image" else [rgb(target_of(settings, x))]
    originals, copies, samples = rgb(x), rgb(output.reconstruction), rgb(drawn)
    pictures = {"reconstructions": figures.grid([originals, *target, copies])}
    if output.posterior.occurrence is not None:
        occurrence = output.posterior.occurrence.cpu().numpy()
        pictures["occurrence"] = figures.occurrence_grid(originals, copies, occurrence)
    return {**pictures, "samples": figures.grid([samples[:SHOWN], samples[SHOWN:]])}


def evaluate_only(settings, model, test):
    """Test the model and leave its pictures in the output folder's evaluated/."""
    found = evaluate(settings, model, test.in_order(settings.batch_size), len(test))
    if runtime.is_main():
        folder = Path(settings.output_folder, "evaluated")
        for name, picture in draw_pictures(settings, model, test).items():
            figures.save(picture, str(folder / f"{name}.png"))
        print(f"test  {in_words(settings, found)}  {sure_parts(settings, found)}")
        print(f"its pictures are in {runtime.relative(folder)}")
    return found


# ---------------------------------------------------------------------------------------------------- words


def in_words(settings, terms):
    """The raw terms with their weights, and their total, in a line."""
    weight = {"kl_app": f"{settings.beta_a:g}x", "kl_occ": f"{settings.beta_v:g}x"}
    shown = [name for name in ("recon", "kl_app", "kl_occ", "total") if name in terms]
    return " ".join(f"{name} {weight.get(name, '')}{terms[name]:.1f}" for name in shown)


def bottleneck(settings):
    """The bottleneck in words."""
    cells = settings.size // settings.scale
    if settings.arch == "vae":
        return f"one vector of {settings.num_parts * settings.hidden_size} latents"
    return f"{settings.num_parts} parts of size {settings.hidden_size} on {cells}x{cells} cells"


def sure_parts(settings, found):
    """How much of the bottleneck says something about the image, in words."""
    if settings.arch == "vae":
        return f"{found['latents_in_use']} of {settings.num_parts * settings.hidden_size} latents in use"
    return f"{found['parts_above_half']} of {settings.num_parts} parts are sure somewhere"


def say_farewell(settings, first, best, folder, train, test):
    """What was learned, and what to do next with the images of the sources `train` and `test`."""
    place = runtime.relative(folder)
    quoted = shlex.quote(place)
    before = f"epoch 1: {first['recon']:.1f}, total {first['total']:.1f}"
    print(f"best epoch {best['epoch']}: reconstruction error {best['recon']:.1f}, total {best['total']:.1f} ({before})")
    print(f"{sure_parts(settings, best)}; the model is {place}/model.pt, the pictures are in {place}/images")
    if not best[f"{UNITS[settings.arch]}_in_use"]:
        print("none of them says different things of different images yet: train longer, with --lr 1e-3 or a lower "
              "--beta-v such as 0.1")
    print(f"next: tensorboard --logdir {quoted}")
    if settings.arch == "patchy":
        print(f"      python utils/parts.py --pretrained {quoted}/model.pt")
    if 1 < len(train.classes) and 0 < len(test.classes) <= len(train.classes):  # more would be unknown
        data = f"--dataset {settings.dataset} --data-folder {shlex.quote(settings.data_folder)}"
        encoder = f"--arch {settings.arch} --pretrained {quoted}/model.pt --freeze -1 --epochs 10 --lr 0.01"
        print(f"      python classifier.py {data} {encoder} --output-folder {quoted}")


if __name__ == "__main__":
    runtime.start(main)
