"""What the parts of a PatchVAE do in many images: running statistics, whose memory does not grow with the images."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


class Statistics:
    """What each part does in all images, from running sums: takes the same memory however many images there are."""

    def __init__(self, kept):
        self.kept, self.images, self.sums = kept, 0, {}
        self.top, self.placed = None, 0.0

    def add(self, posterior, placed):
        """Add a batch; `placed`: z_occ in evaluation, B×N×h×w: Q^O, or zeros and ones under --hard."""
        maps = posterior.occurrence.flatten(2).double()  # B×N×l, l = h·w
        cells = maps.movedim(1, 0).flatten(1)  # N×(B·l)
        appearance = posterior.mean.double()  # B×N×d
        best, place = posterior.occurrence.flatten(2).max(dim=2)  # B×N
        sums = {
            "cell": maps.sum(0), "cell_square": maps.square().sum(0), "products": cells @ cells.T,  # N×l, N×l, N×N
            "appearance": appearance.sum(0), "spread": torch.einsum("bnd,bne->nde", appearance, appearance),
            "best": best.double().sum(0), "strongest": torch.bincount(maps.argmax(1).flatten(), minlength=len(cells)),
        }  # fmt: skip
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.placed = placed.amax(dim=(0, 2, 3)).clamp_min(self.placed)
        self._keep(best, place)
        self.images += len(maps)

    def _keep(self, best, place):
        """Keep the `kept` surest of the cells so far and of these, the best of their images; of equals, the first."""
        numbers = torch.arange(self.images, self.images + len(best), device=best.device)
        new = (best, numbers[:, None].expand_as(place), place)  # B×N each: probability, image, cell
        joined = new if self.top is None else [torch.cat(pair) for pair in zip(self.top, new)]
        order = joined[0].argsort(dim=0, descending=True, stable=True)[: self.kept]
        self.top = [values.gather(0, order) for values in joined]

    def read(self):
        """The figures of the parts: a dict of arrays of N, but top…: N×kept; deviations: N×d; directions: N×d×d."""
        sums = {name: value.double().cpu().numpy() / self.images for name, value in self.sums.items()}
        cells = sums["cell"].shape[1]
        rate = sums["cell"].mean(1)
        deviations, directions = principal(sums["appearance"], sums["spread"])
        spread = np.einsum("ndd->nd", sums["spread"]) - sums["appearance"] ** 2  # N×d, each latent by itself
        variance = np.maximum((sums["cell_square"] - sums["cell"] ** 2).max(1), spread.max(1))
        top, images, places = (values.T.cpu().numpy() for values in self.top)
        return {
            "rate": rate, "mean_best": sums["best"], "strongest": sums["strongest"] / cells, "variance": variance,
            "placed": self.placed.cpu().numpy(), "correlation": correlation(rate, sums["products"] / cells),
            "deviations": deviations, "directions": directions, "top": top, "top_images": images, "top_cells": places,
        }  # fmt: skip


def principal(mean, products):
    """Standard deviations and directions (rows) of N Gaussians, the strongest first, from their raw moments.

    N×d, N×d×d -> N×d, N×d×d.
    """
    variances, vectors = np.linalg.eigh(products - mean[:, :, None] * mean[:, None])  # the weakest first, in columns
    directions = vectors[:, :, ::-1].swapaxes(1, 2)  # N×d×d
    largest = np.take_along_axis(directions, np.abs(directions).argmax(2, keepdims=True), axis=2)
    return np.sqrt(variances[:, ::-1].clip(0)), directions * np.sign(largest)  # the sign would be arbitrary


def correlation(mean, products):
    """Correlations, N×N, from means, N, and mean products, N×N; 0 where a part's occurrence is the same everywhere."""
    covariance = products - np.outer(mean, mean)
    variance = np.diag(covariance)
    deviation = np.sqrt(np.where(variance < 1e-12, np.inf, variance))  # single precision rounds to about that
    return covariance / np.outer(deviation, deviation)


@torch.no_grad()
def watch(model, images, batch_size, kept):
    """The figures of all images, see Statistics.read; `kept`: how many of the surest images of each part."""
    statistics = Statistics(kept)
    with tqdm(total=len(images), desc="look", unit="image", leave=False, disable=None) as bar:
        for x, _ in images.in_order(batch_size):
            posterior = model.encode(x)
            statistics.add(posterior, model.occurrence.mode(posterior.logits))
            bar.update(len(x))
    return statistics.read()


@torch.no_grad()
def contributions(model, x, target, batch_size):
    """The squared error of an image, and its rise when a part's occurrence is set to 0: a float, N floats.

    Both summed over pixels, in normalised units, and averaged over x: B×C×H×W; `target`: what is to be reconstructed
    of it, of the same shape.
    """
    kept = 1 - torch.eye(model.parts, device=x.device)  # a row for each part: all but this
    kept = torch.cat([torch.ones_like(kept[:1]), kept])
    errors, pairs = np.zeros(len(kept)), list(zip(x.split(batch_size), target.split(batch_size)))
    with tqdm(total=len(kept) * len(pairs), desc="switch off", leave=False, disable=None) as bar:
        for some, wanted in pairs:
            latents = model.latents(model.encode(some)).unflatten(1, (model.parts, -1))  # B×N×d×h×w
            for number, row in enumerate(kept):
                copy = model.decoder((latents * row[:, None, None, None]).flatten(1, 2))  # B×C×H×W
                errors[number] += float((copy - wanted).square().sum(dtype=torch.float64)) / len(x)
                bar.update()
    return float(errors[0]), errors[1:] - errors[0]


def receptive_field(encoder):
    """The side, in pixels, of the square that a cell of `encoder` sees, along the widest branch of its blocks.

    Source: Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019.
    """
    size, step = 1, 1
    for name, layer in encoder.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and "downsample" not in name:  # which is the narrow branch
            kernel, stride = (np.max(getattr(layer, of)) for of in ("kernel_size", "stride"))
            size, step = size + (kernel - 1) * step, step * stride
    return int(size)
