"""The two ways to train that utils/benchmark.py lets take turns, and what they train on."""

import contextlib
import io
import itertools
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import classifier
import modules
import run
from datasets import normalisation, open_split
from utils import features, loop, options, runtime


class Setting(NamedTuple):
    """What is trained on which files; a CPU gets smaller batches where those of a GPU would take minutes."""

    words: str
    typed: str  # options of run.py, or of classifier.py if they name one of its networks
    pixels: tuple  # width and height of the JPEG files
    files: int
    batch: int
    batch_on_cpu: int
    is_classifier: bool = False

    def plus(self, options):
        """The same with more `options`, a str."""
        return self._replace(typed=f"{self.typed} {options}")

    def batch_on(self, device):
        """Images of a batch on the torch.device `device`."""
        return self.batch if device.type == "cuda" else self.batch_on_cpu


SETTINGS = {
    "cifar": Setting("CIFAR command, 32 px", "--size 32 --inet", (32, 32), 1024, 128, 128),
    "places": Setting("Places command, 64 px", "--size 64 --inet", (256, 256), 512, 128, 64),
    "imagenet": Setting("ImageNet command, 224 px", "--size 224 --scale 32 --num-parts 64 --hidden-size 16 --inet "
                        "--lr 2e-4", (500, 375), 128, 256, 16),
    "resnet18": Setting("classifier: ResNet-18, 64 px", "--arch resnet18 --size 64 --inet", (256, 256), 512, 256, 64,
                        True),
    "head": Setting("classifier: frozen encoder, 64 px", "--arch patchy --random-init --freeze -1 --size 64 --inet "
                    "--lr 0.01", (256, 256), 512, 256, 64, True),
}
TINY = "--size 16 --scale 4 --ngf 8 --encoder-arch pyramid --workers 0 "
QUICK = {False: Setting("a tiny model, 16 px", TINY, (24, 20), 16, 8, 8),
         True: Setting("classifier: a tiny frozen encoder", TINY + SETTINGS["head"].typed.replace("64", "16"), (24, 20),
                       16, 8, 8, True)}


class Plain:
    """Training as a first implementation is written: Pillow in loader processes in every epoch, eager, float32.

    On a GPU, float32 is what torch makes of it by default: TF32 in convolutions, which our own float32 does without.
    """

    def __init__(self, setting, folder, device):
        self.args, self.batch_size = options_of(setting, folder, device)
        self.device, self.is_classifier = device, setting.is_classifier
        mean, std = normalisation(3, self.args.inet)
        kinds = torchvision.transforms
        steps = [kinds.Resize(self.args.size), kinds.CenterCrop(self.args.size), kinds.RandomHorizontalFlip()]
        steps += [kinds.ToTensor(), kinds.Normalize(mean, std)]
        self.files = torchvision.datasets.ImageFolder(folder, kinds.Compose(steps))
        self.model = build(self.args, self.files.classes, device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.is_classifier:
            self.optimizer = torch.optim.SGD(trained, self.args.lr, momentum=0.9, weight_decay=1e-4)
        else:
            self.optimizer = torch.optim.Adam(trained, self.args.lr, betas=(0.5, 0.999))
        self.loader, self.steps = None, 0

    def batches(self, steps):
        """An iterator of `steps` batches (x: B×C×H×W, labels: B)."""
        order = np.random.default_rng(0).integers(len(self.files), size=(steps, self.batch_size)).tolist()
        if self.loader is None:  # its processes stay from turn to turn, as they do through a long epoch
            workers, self.order = min(self.args.workers, os.cpu_count()), []
            self.loader = torch.utils.data.DataLoader(
                self.files, batch_sampler=self.order, num_workers=workers, persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda", worker_init_fn=one_thread,
            )
        self.order[:] = order
        return ((x.to(self.device), labels.to(self.device)) for x, labels in self.loader)

    def step(self, x, labels):
        """One optimiser step. Returns the mean loss."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return self._step(x, labels)

    def _step(self, x, labels):
        self.model.train()
        if self.is_classifier:
            loss = F.cross_entropy(self.model(x), labels)
        else:
            self.steps += 1
            runtime.seed_step(self.args.seed, self.steps, x.device)  # both variants draw alike
            terms = modules.loss_terms(x, self.model(x, self.args.temp), self.args.beta_a, self.args.beta_v)
            loss = terms["total"].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """Training as run.py and classifier.py do it, with their own functions."""

    def __init__(self, setting, folder, device):
        self.args, self.batch_size = options_of(setting, folder, device)
        self.device, self.is_classifier = device, setting.is_classifier
        self.progress = loop.Progress(steps_per_epoch=10**9)
        with contextlib.redirect_stdout(io.StringIO()):
            source = open_split("folder", folder, "train", self.args.size)
            (train,) = options.open_batches(self.args, [source], device)
            self.model = runtime.channels_last(build(self.args, source.classes, device))
            if self.is_classifier:
                self.model, train, _ = classifier.skip_frozen_encoder(self.args, self.model, train, train)
        self.optimizer = script_of(setting).build_optimizer(self.args, self.model)
        self.network = runtime.compiled(self.model, self.args.compile).train()
        self.stream = train.training(self.batch_size, self.args.seed, 1, 10**9)
        if not isinstance(train, features.StoredFeatures):
            for _ in range(-(-2 * len(train) // self.batch_size)):  # until every image has been decoded
                next(self.stream)

    def batches(self, steps):
        """An iterator of `steps` batches (x: B×C×H×W, or B×F where the encoder is frozen; labels: B)."""
        return itertools.islice(self.stream, steps)

    def step(self, x, labels):
        """One optimiser step."""
        self.progress.step += 1
        if self.is_classifier:
            classifier.train_step(self.args, self.network, self.optimizer, x, labels, self.batch_size, self.progress)
        else:
            run.train_step(self.args, self.network, self.optimizer, x, self.batch_size, self.progress)


VARIANTS = {"plain": Plain, "ours": Ours}


def script_of(setting):
    """The module whose training it is: run or classifier."""
    return classifier if setting.is_classifier else run


def options_of(setting, folder, device):
    """The options that the script itself would have, and the batch size."""
    typed = ["--dataset", "folder", "--data-folder", str(folder), "--batch-size", str(setting.batch_on(device))]
    typed += setting.typed.split()
    args = script_of(setting).parse(typed)[0]
    args.fresh = []
    args.precision = runtime.choose_precision(args.precision, device)
    return args, args.batch_size


def build(args, classes, device):
    """The model of the options, with fresh weights, the same for the same seed."""
    torch.manual_seed(args.seed)
    if not hasattr(args, "freeze"):
        return modules.build_model(options.describe_model(args)).to(device)
    model = classifier.build_model(args, len(classes)).to(device)
    with contextlib.redirect_stdout(io.StringIO()):
        classifier.prepare_layers(args, model)
    return model


def one_thread(worker):
    torch.set_num_threads(1)
