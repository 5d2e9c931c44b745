"""Measure how fast training is on this machine, against a plain loop: each epoch decodes anew, eager, float32.

    python utils/benchmark.py
    python utils/benchmark.py --settings cifar --curves --output benchmark.json

Both loops take turns on the same JPEG files, which are written to a temporary folder; what is shown are medians over
the turns. Ours is measured once every image is decoded, as from the second epoch on.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import classifier
import modules
import run
from datasets import normalisation, open_split
from utils import options, runtime
from utils.batches import open_batches

HEAD = "--arch patchy --random-init --freeze -1 --inet --lr 0.01"
TINY = "--size 16 --scale 4 --ngf 8 --encoder-arch pyramid --workers 0"
# Script, its options, width and height of the JPEG files, images of a batch on a GPU and on a CPU, which is slower.
SETTINGS = {
    "cifar": ("run", "--size 32 --inet", (32, 32), 128, 128),
    "places": ("run", "--size 64 --inet", (256, 256), 128, 64),
    "imagenet": ("run", "--size 224 --scale 32 --num-parts 64 --hidden-size 16 --inet --lr 2e-4", (500, 375), 256, 16),
    "resnet18": ("classifier", "--arch resnet18 --size 64 --inet", (256, 256), 256, 64),
    "head": ("classifier", f"{HEAD} --size 64", (256, 256), 256, 64),
}
QUICK = {"run": ("run", TINY, (24, 20), 8, 8), "classifier": ("classifier", f"{HEAD} {TINY}", (24, 20), 8, 8)}
CURVES = {"batch-size": (32, 64, 128, 256, 512, 1024), "num-parts": (4, 16, 64, 256), "size": (32, 64, 128, 224)}
SCRIPTS = {"run": run, "classifier": classifier}


def plain_loop(script, typed):
    """Training as a first implementation is written: Pillow in loader processes in every epoch, eager, float32.

    `batches(steps)` yields (x: B×C×H×W, labels: B), `step(x, labels)` is one optimiser step and returns the loss.
    """
    s, model, device = prepare(script, [*typed, "--precision", "fp32"])
    pixels = ToTensor(), Normalize(*normalisation(3, s.inet))
    files = ImageFolder(s.data_folder, Compose([Resize(s.size), CenterCrop(s.size), RandomHorizontalFlip(), *pixels]))
    order, workers = [], min(s.workers, os.cpu_count())  # `order` is of one turn; the processes stay for the next
    loader = DataLoader(files, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0,
                        pin_memory=device.type == "cuda")
    optimizer = (torch.optim.Adam(model.parameters(), s.lr, betas=(0.5, 0.999)) if script == "run" else
                 torch.optim.SGD(model.parameters(), s.lr, momentum=0.9, weight_decay=1e-4))

    def batches(steps):
        order[:] = np.random.default_rng(0).integers(len(files), size=(steps, s.batch_size)).tolist()
        return ((x.to(device), labels.to(device)) for x, labels in loader)

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=True)  # torch's default on a GPU; ours is true float32
    def step(x, labels):
        if script == "run":
            loss = modules.loss_terms(x, model(x, s.temp), s.beta_a, s.beta_v)["total"].mean()
        else:
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return SimpleNamespace(settings=s, device=device, model=model, batches=batches, step=step)


def our_loop(script, typed):
    """Training as run.py and classifier.py do it, with their own functions; see plain_loop."""
    s, model, device = prepare(script, typed)
    network = model = runtime.channels_last(model)
    (train,) = open_batches(s, [open_split("folder", s.data_folder, "train", s.size)], device)
    if script == "classifier":
        network, train, _ = classifier.skip_frozen_encoder(s, model, train, train)
    for _ in train.in_order(s.batch_size):
        pass  # now every image is decoded
    optimizer = SCRIPTS[script].build_optimizer(s, model)
    network = runtime.compiled(network, s.compile).train()
    stream, number = train.training(s.batch_size, s.seed, 1, 10**9), count(1)

    def step(x, labels):
        if script == "run":
            return run.train_step(s, network, optimizer, x, next(number), s.temp, s.batch_size)
        return classifier.train_step(s, network, optimizer, x, labels, next(number), s.lr, s.batch_size)

    return SimpleNamespace(settings=s, device=device, model=model, batches=partial(islice, stream), step=step)


def prepare(script, typed):
    """The settings that the script itself would have, its model with the weights of a fresh start, and the device."""
    settings = SCRIPTS[script].parse(typed)[0]
    device = runtime.choose_device(settings.no_cuda)
    settings = settings.changed(precision=runtime.choose_precision(settings.precision, device))
    torch.manual_seed(settings.seed)
    if script == "run":
        model = modules.build_model(options.describe_model(settings))
    else:
        model = classifier.build_model(settings, classes=2)
        classifier.prepare_layers(settings, model)
    return settings, model.to(device).train(), device


def open_loop(name, script, typed):
    """The loop "plain" or "ours", opened without what the scripts print."""
    with contextlib.redirect_stdout(None):
        return {"plain": plain_loop, "ours": our_loop}[name](script, typed)


def write_images(folder, count, width, height):
    """Fill `folder` with two classes of JPEG files that take as long to decode as photographs of their size."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = Path(folder, "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height))
        noise = generator.normal(0, 12, (height, width, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)


def measure(script, typed, rounds, steps):
    """Print medians over `rounds` turns of both loops. Returns a dict of dicts of numbers."""
    loops = {name: open_loop(name, script, typed) for name in ("plain", "ours")}
    flops = {name: flops_per_image(loop) for name, loop in loops.items()}
    for loop in loops.values():
        turn(loop, 2)  # kernels are chosen or compiled
    turns, figures = {name: [] for name in loops}, {}
    for _ in range(rounds):
        for name, loop in loops.items():
            turns[name].append((*turn(loop, steps), product_rate(loop)))
    for name in loops:
        whole, step, waiting, rate = np.median(turns[name], axis=0).tolist()
        reached, memory = flops[name] / step, in_own_process(peak_memory, name, script, typed)
        figures[name] = {"images_per_second": 1 / whole, "step_only": 1 / step, "waiting": waiting,
                         "flops_per_second": reached, "share_of_product": reached / rate, "peak_memory": memory}
        print(f"  {name:5} {1 / whole:8,.1f} images/s, step {1 / step:8,.1f}, waiting {waiting:3.0%}, "
              f"{reached / 1e9:7,.1f} GFLOP/s, {reached / rate:3.0%} of a product, peak {memory / 2**20:6,.0f} MiB")
    whole, step, *_ = np.median(np.divide(turns["plain"], turns["ours"]), axis=0).tolist()
    print(f"  ours is {whole:.2f} times as fast, its step {step:.2f} times", flush=True)
    return {**figures, "speed_up": whole, "speed_up_step": step}


def turn(loop, steps):
    """One turn: seconds per image end to end and of the step alone, and the share of time spent waiting for data."""
    source, waited = loop.batches(steps), 0.0
    batch = next(source)  # before the clock starts, so that loader processes are up
    started = now(loop.device)
    for _ in range(steps):
        loop.step(*batch)
        asked = time.perf_counter()
        batch = next(source, batch)  # the last one stays
        waited += time.perf_counter() - asked
    ended = now(loop.device)
    for _ in range(steps):
        loop.step(*batch)
    images = steps * loop.settings.batch_size
    return (ended - started) / images, (now(loop.device) - ended) / images, waited / (ended - started)


def now(device):
    """Seconds on a clock, once `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_rate(loop):
    """FLOPs per second of a large matrix product in the loop's precision: what the machine can do, at this moment."""
    side = 8192 if loop.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if loop.settings.precision == "bf16" else torch.float32
    matrix = torch.randn(side, side, device=loop.device, dtype=dtype)
    matrix @ matrix
    started = now(loop.device)
    for _ in range(3):
        matrix @ matrix
    return 3 * 2 * side**3 / (now(loop.device) - started)


def flops_per_image(loop):
    """FLOPs of convolutions and matrix products in a training step, per image."""
    (batch,) = loop.batches(1)
    with FlopCounterMode(display=False) as counter:
        loop.step(*batch)
    return counter.get_total_flops() / loop.settings.batch_size


def in_own_process(function, *arguments):
    """function(*arguments), computed by a fresh process, which has the whole GPU."""
    torch.cuda.empty_cache()
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # spawned, not forked
        return pool.submit(function, *arguments).result()


def peak_memory(name, script, typed):
    """Bytes at the peak of the GPU, or of this process, which exists for that; loader processes are not counted."""
    loop = open_loop(name, script, typed)
    turn(loop, 1)
    if loop.device.type == "cuda":
        return torch.cuda.max_memory_allocated(loop.device)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # Linux's ru_maxrss begins with that of the process that started it
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


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


def curves(typed, rounds):
    """What an image costs as the batch, the parts or the image grow: {option: {value: figures}}."""
    found = {option: {} for option in CURVES}
    for option, value in [(option, value) for option, values in CURVES.items() for value in values]:
        grown = [*typed, "--workers", "0", "--batch-size", "32", f"--{option}", str(value)]
        loop = open_loop("ours", "run", grown)
        flops, seconds = flops_per_image(loop), float(np.median([turn(loop, 1)[1] for _ in range(rounds)]))
        memory = in_own_process(peak_memory, "ours", "run", grown)
        found[option][str(value)] = {"flops_per_image": flops, "seconds_per_image": seconds, "peak_memory": memory}
        print(f"  an image {flops / 1e6:8,.0f} MFLOP {seconds * 1e3:6.2f} ms {flops / seconds / 1e9:6,.0f} GFLOP/s, "
              f"peak {memory / 2**20:6,.0f} MiB  --{option} {value}", flush=True)
    return found


def main(argv=None):
    """Measure what `argv` asks for, print a table; returns all figures: a dict, as --output holds it."""
    args = parse(argv)
    device = runtime.choose_device(args.no_cuda)
    print(f"{runtime.describe(device)}; {args.rounds} turns of {args.steps} steps", flush=True)
    found = {"device": runtime.describe(device), "rounds": args.rounds, "settings": {}, **runtime.record()}
    for name in args.settings:
        script, words, pixels, batch, batch_on_cpu = QUICK[SETTINGS[name][0]] if args.quick else SETTINGS[name]
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, 8 * batch_on_cpu, *pixels)
            typed = ["--dataset", "folder", "--data-folder", folder, *words.split()]
            typed += ["--batch-size", str(batch if device.type == "cuda" else batch_on_cpu)]
            typed += ["--no-cuda"] * args.no_cuda + ["--compile"] * args.compile
            print(f"{name}: {script}.py {words}", flush=True)
            found["settings"][name] = measure(script, typed, args.rounds, args.steps)
            if script == "run" and "start_up" not in found:  # once, for the first that run.py trains
                found["start_up"] = {"shapes": start_up([*typed, "--dataset", "shapes"])}
                if not args.quick:
                    start_up([*typed, "--cache", "disk"])  # makes its file
                    found["start_up"]["cached folder"] = start_up([*typed, "--cache", "disk"])
                words = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found["start_up"].items())
                print(f"  from the command to the first step: {words}", flush=True)
                if args.curves:
                    found["curves"] = curves(typed, args.rounds)
    if args.output:
        runtime.write_json(args.output, found)
    return found


def parse(argv):
    """The checked command line `argv` as Settings. Raises UsageError."""
    parser = options.Parser(description=__doc__)
    parser.option("--settings", tuple(SETTINGS), list(SETTINGS), "NAME", "what to measure", nargs="+")
    parser.option("--rounds", options.whole(1), 5, "K", "turns of each loop; more where other programs disturb")
    parser.option("--steps", options.whole(1), 4, "K", "steps of a turn; more where loader processes are to settle")
    parser.switch("--curves", "also what an image costs as batch, parts and image grow, in the first setting")
    parser.switch("--compile", "ours with --compile; the kernels are made before the clock starts")
    parser.switch("--quick", "a tiny model instead, to try the command itself")
    parser.option("--output", options.path, None, "FILE", "write all figures to this file, as JSON")
    parser.switch("--no-cuda", "measure the CPU even where there is a GPU")
    args = parser.settings(argv)
    if args.curves and all(SETTINGS[name][0] == "classifier" for name in args.settings):
        raise runtime.UsageError("--curves goes with a setting that run.py trains; add cifar to --settings")
    return args


if __name__ == "__main__":
    runtime.start(main)
