"""Measure how fast training is on this machine, against a plain loop: each epoch decodes anew, eager, float32.

    python utils/benchmark.py
    python utils/benchmark.py --settings cifar --curves --output benchmark.json

Both variants take turns on the same JPEG files, which are written to a temporary folder; what is shown are medians over
the turns. Ours is measured once every image is decoded, as from the second epoch on.
"""

import concurrent.futures
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import console, runtime, tracking  # noqa: E402
from utils.variants import QUICK, SETTINGS, VARIANTS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CURVES = {"batch-size": (32, 64, 128, 256, 512, 1024), "num-parts": (4, 16, 64, 256), "size": (32, 64, 128, 224)}
CURVE_BATCH = 32  # where it is not the batch that grows


# ---------------------------------------------------------------------------------------------------- measuring


def write_images(folder, setting):
    """Fill `folder` with two classes of JPEG files that take as long to decode as photographs of their size."""
    generator, (width, height) = np.random.default_rng(0), setting.pixels
    for number in range(setting.files):
        path = Path(folder, "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height))
        noise = generator.normal(0, 12, (height, width, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turn(variant, steps):
    """One turn: seconds per image end to end and of the step alone, and the share of time spent waiting for data."""
    source, waited = variant.batches(steps), 0.0
    batch = next(source)  # the clock starts with full hands: loader processes have been given a start
    synchronise(variant.device)
    started = time.perf_counter()
    while batch is not None:
        variant.step(*batch)
        held, asked = batch, time.perf_counter()
        batch = next(source, None)
        waited += time.perf_counter() - asked
    synchronise(variant.device)
    seconds, started = time.perf_counter() - started, time.perf_counter()
    for _ in range(steps):
        variant.step(*held)
    synchronise(variant.device)
    images = steps * variant.batch_size
    return seconds / images, (time.perf_counter() - started) / images, waited / seconds


def product_rate(dtype, device):
    """FLOPs per second of a large matrix product: what the machine can do, at this moment."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    a @ a
    synchronise(device)
    started = time.perf_counter()
    for _ in range(3):
        a @ a
    synchronise(device)
    return 3 * 2 * side**3 / (time.perf_counter() - started)


def flops_per_image(variant, batch):
    """FLOPs of convolutions and matrix products in a training step, per image."""
    with FlopCounterMode(display=False) as counter:
        variant.step(*batch)
    return counter.get_total_flops() / variant.batch_size


def peak_memory(name, setting, folder, device):
    """Bytes at the peak of the GPU, or of this process, made for that; its loader processes are not counted."""
    runtime.choose_device(device.type == "cpu")
    variant = VARIANTS[name](setting, folder, device)
    for batch in variant.batches(2):
        variant.step(*batch)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: its ru_maxrss would begin with that of the process which started this one
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(setting, folder, device, rounds, steps):
    """Medians over `rounds` turns of both variants: a dict of dicts of numbers."""
    variants = {name: kind(setting, folder, device) for name, kind in VARIANTS.items()}
    flops = {name: flops_per_image(variant, next(variant.batches(1))) for name, variant in variants.items()}
    turns = {name: [] for name in variants}
    dtypes = {name: used_dtype(name, variant.args) for name, variant in variants.items()}
    rates = {dtype: [] for dtype in dtypes.values()}
    for variant in variants.values():
        turn(variant, 2)  # kernels are chosen or compiled
    for _ in range(rounds):
        for dtype, found in rates.items():
            found.append(product_rate(dtype, device))
        for name, variant in variants.items():
            turns[name].append(turn(variant, steps))
    figures = {}
    for name in variants:
        whole, step, waiting = (statistics.median(column) for column in zip(*turns[name]))
        reached, possible = flops[name] / step, statistics.median(rates[dtypes[name]])
        figures[name] = {"images_per_second": 1 / whole, "step_only": 1 / step, "waiting": waiting,
                         "flops_per_second": reached, "share_of_product": reached / possible}
    pairs = [[a / b for a, b in zip(plain, ours)][:2] for plain, ours in zip(turns["plain"], turns["ours"])]
    whole, step = (statistics.median(column) for column in zip(*pairs))
    return {**figures, "speed_up": whole, "speed_up_step": step}


def used_dtype(name, args):
    return torch.bfloat16 if name == "ours" and args.precision == "bf16" else torch.float32


def start_up(typed):
    """Seconds from the command to the end of the first step of run.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, str(ROOT / "run.py"), *typed, "--output-folder", str(output), "--log-interval", "1"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = output / "metrics.jsonl"
        while process.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
    if process.returncode > 0:
        raise console.RunError(f"'{' '.join(command)}' ended with {process.returncode}; run it to see why")
    return seconds


def start_ups(setting, folder, device, quick):
    """Start-up seconds for drawn shapes and, unless it has to be quick, for a folder of images in a cache on disk."""
    typed = [*setting.typed.split(), "--batch-size", str(setting.batch_on(device))]
    typed += ["--no-cuda"] if device.type == "cpu" else []
    drawn = start_up(["--dataset", "shapes", *typed])
    if quick:
        return {"shapes": drawn}
    cached = ["--dataset", "folder", "--data-folder", str(folder), "--cache", "disk", *typed]
    start_up(cached)  # builds the cache
    return {"shapes": drawn, "cached folder": start_up(cached)}


def curves(setting, folder, device, rounds):
    """What an image costs as the batch, the parts or the image grow: {option: {value: figures}}."""
    found = {}
    for option, values in CURVES.items():
        print("     work per image        time           rate  peak memory", flush=True)
        for value in values:
            grown = setting.plus(f"--workers 0 --batch-size {CURVE_BATCH} --{option} {value}")
            variant = VARIANTS["ours"](grown, folder, device)
            flops = flops_per_image(variant, next(variant.batches(1)))
            seconds = statistics.median(turn(variant, 1)[1] for _ in range(rounds))
            memory = in_own_process(peak_memory, "ours", grown, folder, device)
            found.setdefault(option, {})[value] = {
                "flops_per_image": flops, "seconds_per_image": seconds, "peak_memory": memory
            }
            print(f"  {flops / 1e6:10,.0f} MFLOP {seconds * 1e3:8.2f} ms {flops / seconds / 1e9:6,.0f} GFLOP/s "
                  f"{memory / 2**20:8,.0f} MiB  --{option} {value}", flush=True)
    return found


# ---------------------------------------------------------------------------------------------------- the command


def main(argv=None):
    """Measure what `argv` asks for, print a table; returns all figures: a dict, as --output holds it."""
    args = parse(argv)
    device = runtime.choose_device(args.no_cuda)
    print(f"{runtime.describe(device)}; {args.rounds} turns of {args.steps} steps", flush=True)
    found = {"device": runtime.describe(device), "rounds": args.rounds, "settings": {}, **runtime.record()}
    for name in args.settings:
        setting = QUICK[SETTINGS[name].is_classifier] if args.quick else SETTINGS[name]
        setting = setting.plus("--compile") if args.compile else setting
        with tempfile.TemporaryDirectory() as folder:
            write_images(folder, setting)
            figures = measure(setting, folder, device, args.rounds, args.steps)
            for variant in VARIANTS:
                figures[variant]["peak_memory"] = in_own_process(peak_memory, variant, setting, folder, device)
            report(setting, figures)
            found["settings"][name] = figures
            if not setting.is_classifier and "start_up" not in found:  # of the first that run.py trains
                found["start_up"] = start_ups(setting, folder, device, args.quick)
                for what, seconds in found["start_up"].items():
                    print(f"  from the command to the first step, {what}: {seconds:.1f} s", flush=True)
                if args.curves:
                    found["curves"] = curves(setting, folder, device, args.rounds)
    if args.output:
        tracking.write_json(args.output, found)
    return found


def parse(argv):
    """The checked command line `argv` as a namespace. Raises UsageError."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
                        help=f"what to measure: {', '.join(SETTINGS)} (default: all, some minutes on two cores)")
    parser.add_argument("--rounds", type=console.whole(1), default=5, metavar="K",
                        help="turns of each variant; more where other programs disturb (default: %(default)s)")
    parser.add_argument("--steps", type=console.whole(1), default=4, metavar="K",
                        help="steps of a turn; more where loader processes are to settle (default: %(default)s)")
    parser.add_argument("--curves", action="store_true",
                        help="also what an image costs as batch, parts and image grow, in the first setting")
    parser.add_argument("--compile", action="store_true",
                        help="ours with --compile; the kernels are made before the clock starts")
    parser.add_argument("--quick", action="store_true", help="a tiny model instead, to try the command itself")
    parser.add_argument("--output", metavar="FILE", help="write all figures to this file, as JSON")
    parser.add_argument("--no-cuda", action="store_true", help="measure the CPU even where there is a GPU")
    args = parser.parse_args(argv)
    if args.curves and all(SETTINGS[name].is_classifier for name in args.settings):
        raise console.UsageError("--curves goes with a setting that run.py trains; add cifar to --settings")
    return args


def in_own_process(function, *arguments):
    """function(*arguments), computed by a fresh process, which has the whole GPU."""
    torch.cuda.empty_cache()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def report(setting, figures):
    """A setting's lines of the table."""
    print(f"{setting.words}: {figures['speed_up']:.2f} times as fast, the step {figures['speed_up_step']:.2f} times")
    print("           images/s  step only  waiting  GFLOP/s  of a product  peak memory")
    for name in VARIANTS:
        f = figures[name]
        print(f"  {name:6} {f['images_per_second']:10,.1f} {f['step_only']:10,.1f} {f['waiting']:8.0%} "
              f"{f['flops_per_second'] / 1e9:8,.1f} {f['share_of_product']:13.0%} {f['peak_memory'] / 2**20:8,.0f} MiB",
              flush=True)


if __name__ == "__main__":
    console.run(main)
