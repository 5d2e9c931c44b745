"""Measure how fast training is on this machine, against a plain loop: each epoch decodes anew, eager, float32.

    python utils/benchmark.py
    python utils/benchmark.py --settings cifar --output benchmark.json

Both loops take turns on the same JPEG files, which are written to a temporary folder; what is shown are medians over
the turns. Ours is measured once every image is decoded, as from the second epoch on.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import classifier
import modules
import run
from datasets import normalisation, open_split
from utils import batches, options, runtime

HEAD = "--arch patchy --random-init --freeze -1 --inet --lr 0.01"
TINY = "--size 16 --scale 4 --ngf 8 --encoder-arch pyramid --workers 0"
# Script, its options, width and height of the JPEG files, images of a batch on a GPU and on a CPU, which is slower.
SETTINGS = {
    "cifar": (run, "--size 32 --inet", (32, 32), 128, 128),
    "places": (run, "--size 64 --inet", (256, 256), 128, 64),
    "imagenet": (run, "--size 224 --scale 32 --num-parts 64 --hidden-size 16 --inet --lr 2e-4", (500, 375), 256, 16),
    "resnet18": (classifier, "--arch resnet18 --size 64 --inet", (256, 256), 256, 64),
    "head": (classifier, f"{HEAD} --size 64", (256, 256), 256, 64),
}
QUICK = {run: (run, TINY, (24, 20), 8, 8), classifier: (classifier, f"{HEAD} {TINY}", (24, 20), 8, 8)}


def write_images(folder, count, width, height):
    """Fill `folder` with two classes of JPEG files that take as long to decode as photographs of their size."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = Path(folder, "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height))
        noise = generator.normal(0, 12, (height, width, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)


def open_model(script, typed):
    """The settings that the script itself would have, its model with the weights of a fresh start, and the device."""
    settings = script.parse(typed)[0]
    device = runtime.choose_device(settings.no_cuda)
    settings = settings.changed(precision=runtime.choose_precision(settings.precision, device))
    torch.manual_seed(settings.seed)
    if script is run:
        model = modules.build_model(options.describe_model(settings))
    else:
        model = classifier.build_model(settings, classes=2)
        classifier.prepare_layers(settings, model)
    return settings, model.to(device).train(), device


def plain_loop(script, typed):
    """Training as a first implementation is written: Pillow in loader processes in every epoch, eager, float32.

    Returns the model; a function of a number of steps that yields their batches (x: B×C×H×W, labels: B); and one of x
    and labels that is an optimiser step and returns the loss.
    """
    s, model, device = open_model(script, [*typed, "--precision", "fp32"])
    pixels = ToTensor(), Normalize(*normalisation(3, s.inet))
    files = ImageFolder(s.data_folder, Compose([Resize(s.size), CenterCrop(s.size), RandomHorizontalFlip(), *pixels]))
    order, workers = [], min(s.workers, os.cpu_count())  # `order` is of one turn; the processes stay for the next
    loader = DataLoader(files, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0,
                        pin_memory=device.type == "cuda")
    optimizer = (torch.optim.Adam(model.parameters(), s.lr, betas=(0.5, 0.999)) if script is run else
                 torch.optim.SGD(model.parameters(), s.lr, momentum=0.9, weight_decay=1e-4))

    def stream(steps):
        order[:] = np.random.default_rng(0).integers(len(files), size=(steps, s.batch_size)).tolist()
        return ((x.to(device), labels.to(device)) for x, labels in loader)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=True)  # torch's default on a GPU; ours is true float32
    def step(x, labels):
        if script is run:
            loss = modules.loss_terms(x, model(x, s.temp), s.beta_a, s.beta_v)["total"].mean()
        else:
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, stream, step


def our_loop(script, typed):
    """Training as run.py and classifier.py do it, with their own functions; see plain_loop."""
    s, model, device = open_model(script, typed)
    network = model = runtime.channels_last(model)
    (train,) = batches.open_batches(s, [open_split("folder", s.data_folder, "train", s.size)], device)
    if script is classifier:
        network, train, _ = classifier.skip_frozen_encoder(s, model, train, train)
    for _ in train.in_order(s.batch_size):
        pass  # now every image is decoded
    optimizer, numbers = script.build_optimizer(s, model), count(1)
    network = runtime.compiled(network, s.compile).train()
    endless = train.training(s.batch_size, s.seed, 1, 10**9)

    def step(x, labels):
        if script is run:
            return run.train_step(s, network, optimizer, x, next(numbers), s.temp, s.batch_size)
        return classifier.train_step(s, network, optimizer, x, labels, next(numbers), s.lr, s.batch_size)

    return model, lambda steps: islice(endless, steps), step


def turn(stream, step, steps):
    """One turn: seconds per step end to end and of the step alone, and the share of time spent waiting for data."""
    source, waited = stream(steps), 0.0
    batch = next(source)  # before the clock starts, so that loader processes are up
    started = now()
    for _ in range(steps):
        step(*batch)
        asked = time.perf_counter()
        batch = next(source, batch)  # the last one stays
        waited += time.perf_counter() - asked
    ended = now()
    for _ in range(steps):
        step(*batch)
    return (ended - started) / steps, (now() - ended) / steps, waited / (ended - started)


def now():
    """Seconds on a clock, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(script, typed, batch_size, rounds, steps):
    """Print medians over `rounds` turns of both loops. Returns a dict of dicts of numbers."""
    with contextlib.redirect_stdout(None):  # what the scripts print
        loops = {"plain": plain_loop(script, typed), "ours": our_loop(script, typed)}
    for _, *loop in loops.values():
        turn(*loop, 2)  # kernels are chosen or compiled
    turns = np.array([[turn(*loop, steps) for _, *loop in loops.values()] for _ in range(rounds)])  # rounds×loops×3
    figures = {}
    for name, (whole, step, waiting) in zip(loops, np.median(turns, axis=0).tolist()):
        figures[name] = {"images_per_second": batch_size / whole, "step_only": batch_size / step, "waiting": waiting}
        print(f"  {name:5} {batch_size / whole:8,.1f} images/s, step {batch_size / step:8,.1f}, waiting {waiting:3.0%}")
    whole, step = np.median(turns[:, 0, :2] / turns[:, 1, :2], axis=0).tolist()
    print(f"  ours is {whole:.2f} times as fast, its step {step:.2f} times", flush=True)
    return {**figures, "speed_up": whole, "speed_up_step": step}


def start_up(typed):
    """Seconds from the command to the end of the first step of run.py with the options `typed`."""
    with tempfile.TemporaryDirectory() as folder:
        lines, started = Path(folder, "run", "metrics.jsonl"), time.perf_counter()
        command = [sys.executable, run.__file__, *typed, "--log-interval", "1", "--output-folder", lines.parent]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
        if process.wait() > 0:
            raise runtime.RunError(f"'run.py {' '.join(typed)}' ended with {process.returncode}; run it to see why")
    return seconds


def main(argv=None):
    """Measure what `argv` asks for, print a table; returns all figures: a dict, as --output holds it."""
    parser = options.Parser(description=__doc__)
    parser.option("--settings", tuple(SETTINGS), list(SETTINGS), "NAME", "what to measure", nargs="+")
    parser.option("--rounds", options.whole(1), 5, "K", "turns of each loop; more where other programs disturb")
    parser.option("--steps", options.whole(1), 4, "K", "steps of a turn; more where loader processes are to settle")
    parser.switch("--compile", "ours with --compile; the kernels are made before the clock starts")
    parser.switch("--quick", "a tiny model instead, to try the command itself")
    parser.option("--output", options.path, None, "FILE", "write all figures to this file, as JSON")
    parser.switch("--no-cuda", "measure the CPU even where there is a GPU")
    args = parser.settings(argv)
    device = runtime.choose_device(args.no_cuda)
    print(f"{runtime.describe(device)}; {args.rounds} turns of {args.steps} steps", flush=True)
    found = {"device": runtime.describe(device), "rounds": args.rounds, "settings": {}, **runtime.record()}
    for name in args.settings:
        script, words, pixels, *sizes = QUICK[SETTINGS[name][0]] if args.quick else SETTINGS[name]
        batch_size = sizes[device.type == "cpu"]
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, 8 * sizes[1], *pixels)
            typed = ["--dataset", "folder", "--data-folder", folder, *words.split(), "--batch-size", str(batch_size)]
            typed += ["--no-cuda"] * args.no_cuda + ["--compile"] * args.compile
            print(f"{name}: {script.__name__}.py {words}", flush=True)
            found["settings"][name] = measure(script, typed, batch_size, args.rounds, args.steps)
            if script is run and "start_up" not in found:  # once, for the first that run.py trains
                found["start_up"] = {"shapes": start_up([*typed, "--dataset", "shapes"])}
                if not args.quick:
                    start_up([*typed, "--cache", "disk"])  # makes its file
                    found["start_up"]["cached folder"] = start_up([*typed, "--cache", "disk"])
                words = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found["start_up"].items())
                print(f"  from the command to the first step: {words}", flush=True)
    if args.output:
        runtime.write_json(args.output, found)
    return found


if __name__ == "__main__":
    runtime.start(main)
