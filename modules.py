"""PatchVAE and its baseline, the beta-VAE, from pixels to loss. Read downwards: formulas, networks, models.

    x ─ encoder φ ─ f ─┬─ occurrence head ─ Q^O ─ z_occ ─┐
                       └─ appearance head ─ Q^A ─ z_app ─┴─ ẑ ─ decoder ─ x̂

Letters: B images, C channels, H×W pixels, D feature channels, h×w cells (h = H / scale), N parts, d appearance size.
Method: Gupta, Singh, Shrivastava, "PatchVAE: Learning Local Latent Codes for Recognition", CVPR 2020
(arXiv 2004.03623).
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

ARCHS = ("patchy", "vae")
# A new encoder needs: a branch in build_encoder; its scales in SCALES of utils/options.py, or its only one in
# FIXED_STRIDE; the ends of its blocks in _ENDS of utils/features.py; its lines in utils/export.py.
ENCODERS = ("resnet", "resnet18", "resnet50", "alexnet", "pyramid", "patches")
DECODERS = ("pyramid", "patches")
FIXED_STRIDE = {"resnet18": 32, "resnet50": 32, "alexnet": 32}  # whole torchvision trunks: their scale is given
VARIANCE_RANGE = (1e-7, 1e7)


# ---------------------------------------------------------------------------------------------------- formulas


def kl_normal(mean, log_variance):
    """KL(N(mean, exp(log_variance)) || N(0, I)) in nats, summed per image: B×... twice -> B.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).flatten(1).sum(1)


def kl_bernoulli(logits, prior):
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(prior)) in nats, summed per image: B×... -> B.

    Written with log-sigmoids, so that probabilities of exactly 0 or 1 cost what they should and never NaN.
    """
    q = logits.sigmoid()
    present = q * (F.logsigmoid(logits) - math.log(prior))
    absent = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log1p(-prior))  # 1 - q without cancellation
    return (present + absent).flatten(1).sum(1)


def kl_categorical(logits, prior):
    """Sum over parts of q log(q / prior), q = softmax over dimension 1, in nats per image: B×N×h×w -> B."""
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * (log_q - math.log(prior))).flatten(1).sum(1)


def clamp_log_variance(log_variance):
    """The logarithms of variances, kept within VARIANCE_RANGE."""
    low, high = (math.log(bound) for bound in VARIANCE_RANGE)
    return log_variance.clamp(low, high)


def sample_normal(mean, log_variance):
    """A reparameterised draw from N(mean, exp(log_variance)), of their shape."""
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)


def sample_bernoulli(logits, temperature, hard=False):
    """A binary Concrete draw in (0, 1), of the shape of `logits`; `hard`: 0 or 1 with the draw's gradient.

    Source: Maddison, Mnih, Teh, "The Concrete Distribution" (2017), appendix B; the hard sample is its threshold
    at one half, which is Bernoulli(sigmoid(logits)) at every temperature.
    """
    uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
    return straight_through((soft > 0.5).to(soft), soft) if hard else soft


def straight_through(value, gradient_of):
    """The first argument forward, the gradient of the second backward; both of one shape."""
    return value + (gradient_of - gradient_of.detach())  # the bracket is exactly 0


def temperature_at(step, start=1.0, anneal=3e-5, minimum=0.1):
    """The temperature of optimiser step 1, 2, …: after steps 1, 1001, 2001, … it shrinks by exp(-anneal * step)."""
    times = (step - 2) // 1000 + 1  # how often it has shrunk before this step
    sum_of_steps = 500 * times * (times - 1) + times  # 1 + 1001 + 2001 + …
    return max(minimum, start * math.exp(-anneal * sum_of_steps))


def laplacian(x):
    """The Laplacian of every channel (0 1 0 / 1 -4 1 / 0 1 0, borders replicated): B×C×H×W -> B×C×H×W."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    # Differences first: a constant channel then gives exactly 0, not rounding noise that edge_weights would blow up.
    return (up - x) + (down - x) + (left - x) + (right - x)


def damage(x, hide, grey, patch):
    """What the encoder is shown of x in training, while all of x has to be reconstructed: B×C×H×W -> B×C×H×W.

    `hide`: how likely each of the `patch`×`patch` squares becomes 0, which is grey; `grey`: how likely the channels
    of an image become their mean. Source: Im, Ahn, Memisevic, Bengio, "Denoising Criterion for Variational
    Auto-Encoding Framework" (2017).
    """
    if grey:
        is_grey = torch.rand(len(x), 1, 1, 1, device=x.device) < grey
        x = torch.where(is_grey, x.mean(dim=1, keepdim=True), x)
    if hide:
        h, w = (side // patch for side in x.shape[2:])
        is_shown = torch.rand(len(x), 1, h, w, device=x.device) >= hide
        x = x * F.interpolate(is_shown.to(x), scale_factor=patch)
    return x


def reconstruction_target(x, target, mean, std):
    """What is to be reconstructed of x: x itself (`target` "image") or its edges ("edges"), see edge_target."""
    return edge_target(x, mean, std) if target == "edges" else x


@torch.no_grad()
def edge_target(x, mean, std):
    """Where x has edges, whatever their colours: B×C×H×W -> B×C×H×W.

    tanh(4 m), m the mean over 3×3 pixels of |L|: L has the Laplacians of the C channels of pixels in [0, 1], |·| is the
    Euclidean norm. All channels of the result are alike, and normalised, as x is, by `mean` and `std`, C numbers each.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1).to(x.device, non_blocking=True) for values in (mean, std))
    strength = torch.linalg.vector_norm(laplacian(x) * std, dim=1, keepdim=True)  # B×1×H×W
    smooth = F.avg_pool2d(strength, 3, stride=1, padding=1, count_include_pad=False)
    return (torch.tanh(4 * smooth) - mean) / std  # B×C×H×W


@torch.no_grad()
def edge_weights(x, cell):
    """How much each pixel's error counts under --recon-mask edge: B×C×H×W -> B×C×H×W.

    The absolute Laplacian, summed over `cell`×`cell` pixels, spread over them again, and scaled to average 1 in every
    channel of every image. A channel without an edge gets 1.
    """
    cells = F.avg_pool2d(laplacian(x).abs(), cell)  # B×C×h×w
    mean = cells.mean(dim=(2, 3), keepdim=True)
    weights = torch.where(mean > 0, cells / mean.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
    return weights.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)


def plain(values):
    """`values` in float32 and contiguous, whatever autocast and the layout of convolutions made of them.

    Samples, KL terms and losses need the precision, and noise has to meet the same latents in every layout.
    """
    return values.float().contiguous()


def place_parts(appearance, occurrence):
    """ẑ: every part's appearance wherever it occurs. B×N×d and B×N×h×w -> B×(N·d)×h×w."""
    placed = appearance[:, :, :, None, None] * occurrence[:, :, None]  # B×N×d×h×w
    return placed.flatten(1, 2)


def loss_terms(x, output, beta_app, beta_occ, edge_cell=None):
    """The terms of the loss, each summed over pixels or latents: a dict of vectors of length B.

    `recon`, the raw KL terms that the model has (`kl_app`, `kl_occ`), the same times their beta (`…_weighted`), and
    `total` = recon + weighted KL terms. `edge_cell`: the cell of the edge-weighted reconstruction, None for none.

    A new term needs: its value in Output.kl of a model's forward(), its weight in `beta` here and in loss() of run.py,
    its option in TESTED_WITH and its name in in_words() there.
    """
    squared = (output.reconstruction - x).square()  # B×C×H×W
    if edge_cell is not None:
        squared = squared * edge_weights(x, edge_cell)
    recon = squared.flatten(1).sum(1)
    beta = {"kl_app": beta_app, "kl_occ": beta_occ}
    weighted = {f"{name}_weighted": beta[name] * kl for name, kl in output.kl.items()}
    return {"recon": recon, **output.kl, **weighted, "total": recon + sum(weighted.values())}


# ---------------------------------------------------------------------------------------------------- networks


def build_encoder(encoder_arch, channels, scale, ngf=64):
    """φ: an nn.Sequential that maps B×C×H×W -> B×D×h×w, and D. Its children keep torchvision's names.

    `resnet` is ResNet-18 cut after log2(scale) - 1 stages; the other torchvision trunks are whole (stride 32);
    `pyramid` has log2(scale) stages of 4×4 stride-2 convolutions, `patches` of 2×2, so that a cell sees only its own
    pixels. Nothing is pretrained.
    """
    stages = int(math.log2(scale))
    if encoder_arch == "alexnet":
        encoder = AlexNetTrunk(*torchvision.models.alexnet(weights=None).features)
        encoder[0] = with_channels(encoder[0], channels)
    elif encoder_arch in ("pyramid", "patches"):
        encoder = pyramid_encoder(channels, ngf, stages, **_halving(encoder_arch))
    else:
        name = "resnet50" if encoder_arch == "resnet50" else "resnet18"
        children = list(torchvision.models.get_model(name, weights=None).named_children())
        encoder = nn.Sequential(OrderedDict(children[: 4 + stages - 1]))  # conv1, bn1, relu, maxpool, layer1, …
        encoder.conv1 = with_channels(encoder.conv1, channels)
    features = [module.out_channels for module in encoder.modules() if isinstance(module, nn.Conv2d)][-1]
    return initialise(encoder), features


def initialise(network):
    """The same network, its convolutions (not the transposed ones) with fresh weights as the authors have them.

    The heads need this as much as the encoder: with torch's smaller weights every part occurs everywhere with nearly
    the same probability at first, and fades into its prior. Source: He et al., "Delving Deep into Rectifiers" (2015).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class AlexNetTrunk(nn.Sequential):
    """torchvision's AlexNet features behind a border that makes the map exactly H/32 × W/32 from 28 pixels on."""

    BORDER = (17, 18, 17, 18)  # zeros left, right, above and below

    def forward(self, x):
        return super().forward(F.pad(x, self.BORDER))


def _halving(arch):
    """The geometry of a convolution that halves (or, transposed, doubles) the resolution."""
    if arch == "patches":
        return {"kernel_size": 2, "stride": 2}  # nothing overlaps
    return {"kernel_size": 4, "stride": 2, "padding": 1}


def pyramid_encoder(channels, ngf, stages, **geometry):
    """`stages` halvings by convolutions of one `geometry`, ngf channels after the first, doubling with each.

    All but the first are followed by BatchNorm.
    """
    widths = [ngf * 2**k for k in range(stages)]
    blocks = [nn.Sequential(nn.Conv2d(channels, ngf, bias=False, **geometry), nn.LeakyReLU(0.2))]
    blocks += [
        nn.Sequential(nn.Conv2d(a, b, bias=False, **geometry), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
        for a, b in zip(widths, widths[1:])
    ]
    return nn.Sequential(*blocks)


def with_channels(convolution, channels):
    """The same convolution, fresh, for images of another number of channels."""
    c = convolution
    return nn.Conv2d(channels, c.out_channels, c.kernel_size, c.stride, c.padding, bias=c.bias is not None)


class OccurrenceHead(nn.Module):
    """Where does each part occur? Q^O, its samples, and its distance to the prior."""

    def __init__(self, features, parts, prior, categorical=False, hard=False, kernel=3):
        super().__init__()
        self.convolution = initialise(nn.Conv2d(features, parts, kernel, padding=kernel // 2))
        self.prior, self.categorical, self.hard = prior, categorical, hard

    def forward(self, f):
        """f: B×D×h×w -> logits: B×N×h×w."""
        return plain(self.convolution(f))

    def probability(self, logits):
        """Q^O, B×N×h×w: each part by itself, or one part per cell (`categorical`)."""
        return logits.softmax(dim=1) if self.categorical else logits.sigmoid()

    def sample(self, logits, temperature):
        """z_occ in training, B×N×h×w: a relaxed draw, or 0 and 1 with its gradient (`hard`)."""
        if self.categorical:
            return F.gumbel_softmax(logits, tau=temperature, hard=self.hard, dim=1)
        return sample_bernoulli(logits, temperature, self.hard)

    def mode(self, logits):
        """z_occ in evaluation, B×N×h×w: Q^O itself, or its most probable 0s and 1s (`hard`)."""
        if not self.hard:
            return self.probability(logits)
        if self.categorical:
            return F.one_hot(logits.argmax(dim=1), logits.shape[1]).movedim(-1, 1).to(logits)
        return (logits > 0).to(logits)

    def kl(self, logits):
        """KL to the prior in nats per image: B."""
        return (kl_categorical if self.categorical else kl_bernoulli)(logits, self.prior)

    def draw_prior(self, images, h, w, device):
        """z_occ from the prior: images×N×h×w of 0s and 1s."""
        parts = self.convolution.out_channels
        if self.categorical:
            return F.one_hot(torch.randint(parts, (images, h, w), device=device), parts).movedim(-1, 1).float()
        return torch.bernoulli(torch.full((images, parts, h, w), self.prior, device=device))


class AppearanceHead(nn.Module):
    """What does each part look like in this image? Q^A: one Gaussian of size d per part and image."""

    def __init__(self, features, parts, size, kernel=3):
        super().__init__()
        self.mean = initialise(nn.Conv2d(features, parts * size, kernel, padding=kernel // 2))
        self.log_variance = initialise(nn.Conv2d(features, parts * size, kernel, padding=kernel // 2))
        self.parts, self.size = parts, size

    def forward(self, f, occurrence):
        """f: B×D×h×w, Q^O: B×N×h×w -> mean and log-variance: B×N×d each.

        Mean and variance are averages over the cells, weighted by Q^O; no gradient enters Q^O through these weights.
        """
        weights = occurrence.detach().flatten(2)  # B×N×l, l = h·w
        weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-7)
        mean = self._pool(plain(self.mean(f)), weights)
        variance = self._pool(clamp_log_variance(plain(self.log_variance(f))).exp(), weights)
        # A part that occurs nowhere has hardly any weight: its variance must not become 0.
        return mean, variance.clamp_min(VARIANCE_RANGE[0]).log()

    def _pool(self, cells, weights):
        cells = cells.flatten(2).unflatten(1, (self.parts, -1))  # B×N×d×l
        return (cells * weights[:, :, None]).sum(dim=3)  # B×N×d; einsum would be a matrix product, in bfloat16


class PyramidDecoder(nn.Module):
    """ẑ -> pixels: a 1×1 layer, then k = log2(scale) doublings of the resolution, ending in a valid image.

    With 4×4 kernels (`arch` pyramid) what a cell says reaches 3·scale - 2 pixels, so that up to nine cells draw
    a pixel together; with 2×2 kernels (patches) each cell draws its own pixels alone.
    """

    def __init__(self, latents, channels, scale, mean, std, ngf=64, groups=1, arch="pyramid"):
        super().__init__()
        doublings = int(math.log2(scale))
        widths = [ngf * 2**k for k in reversed(range(doublings))]  # ngf·2^(k-1), …, ngf
        layers = [_up(latents, widths[0], groups, kernel_size=1)]
        layers += [_up(a, b, groups, **_halving(arch)) for a, b in zip(widths, widths[1:])]
        self.layers = nn.Sequential(*layers)
        # The last layer adds the groups up: an image has C channels, not one per part.
        self.to_pixels = nn.ConvTranspose2d(widths[-1], channels, bias=False, **_halving(arch))
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, latents):
        """B×latents×h×w -> B×C×H×W, every value that a normalised pixel can have and no other."""
        hidden = self.layers(latents)  # B×ngf×H/2×W/2
        unit = (torch.tanh(plain(self.to_pixels(hidden))) + 1) / 2  # B×C×H×W in [0, 1]
        return (unit - self.pixel_mean) / self.pixel_std


def _up(inputs, outputs, groups, **geometry):
    convolution = nn.ConvTranspose2d(inputs, outputs, bias=False, groups=groups, **geometry)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


# ---------------------------------------------------------------------------------------------------- models


class Posterior(NamedTuple):
    """What the encoder says of a batch. The beta-VAE has no occurrence, and one part of size N·d."""

    mean: torch.Tensor  # of the appearance, B×N×d
    log_variance: torch.Tensor  # of the appearance, B×N×d
    logits: torch.Tensor | None = None  # of the occurrence, B×N×h×w
    occurrence: torch.Tensor | None = None  # Q^O, B×N×h×w


class Output(NamedTuple):
    """What a model returns for a batch."""

    reconstruction: torch.Tensor  # x̂, B×C×H×W, normalised pixels
    posterior: Posterior
    kl: dict  # KL terms by name, raw nats, each of length B


class PatchVAE(nn.Module):
    """A VAE whose bottleneck is made of parts."""

    def __init__(self, encoder, occurrence, appearance, decoder, grid):
        """`occurrence`, `appearance`: the heads; `grid`: cells a side."""
        super().__init__()
        self.encoder, self.occurrence, self.appearance, self.decoder = encoder, occurrence, appearance, decoder
        self.parts, self.appearance_size, self.grid = appearance.parts, appearance.size, grid

    def forward(self, x, temperature=1.0):
        """x: B×C×H×W normalised pixels -> Output. Samples in training mode, is deterministic in evaluation mode."""
        posterior = self.encode(x)
        latents = self.latents(posterior, temperature)  # B×(N·d)×h×w
        reconstruction = self.decoder(latents)  # B×C×H×W
        kl_app = kl_normal(posterior.mean, posterior.log_variance)
        return Output(reconstruction, posterior, {"kl_app": kl_app, "kl_occ": self.occurrence.kl(posterior.logits)})

    def encode(self, x):
        """x: B×C×H×W -> Posterior of every part's occurrence and appearance."""
        f = self.encoder(x)  # B×D×h×w
        logits = self.occurrence(f)  # B×N×h×w
        occurrence = self.occurrence.probability(logits)  # B×N×h×w
        mean, log_variance = self.appearance(f, occurrence)  # B×N×d
        return Posterior(mean, log_variance, logits, occurrence)

    def latents(self, posterior, temperature=1.0):
        """ẑ: B×(N·d)×h×w, drawn from the posterior in training mode, its mode in evaluation mode."""
        if self.training:
            z_app = sample_normal(posterior.mean, posterior.log_variance)  # B×N×d
            z_occ = self.occurrence.sample(posterior.logits, temperature)  # B×N×h×w
        else:
            z_app, z_occ = posterior.mean, self.occurrence.mode(posterior.logits)
        return place_parts(z_app, z_occ)

    def draw(self, images, device="cpu"):
        """Images from the prior: images×C×H×W, normalised pixels."""
        z_app = torch.randn(images, self.parts, self.appearance_size, device=device)
        z_occ = self.occurrence.draw_prior(images, self.grid, self.grid, device)
        return self.decoder(place_parts(z_app, z_occ))


class BetaVAE(nn.Module):
    """The baseline: the same encoder and decoder around one Gaussian vector of size N·d for the whole image."""

    def __init__(self, encoder, features, decoder, latent_size, grid, ngf=64):
        super().__init__()
        self.encoder = encoder
        squeeze = initialise(nn.Conv2d(features, ngf, 1, bias=False))
        self.squeeze = nn.Sequential(squeeze, nn.BatchNorm2d(ngf), nn.ReLU())
        self.mean = initialise(nn.Conv2d(ngf, latent_size, grid))
        self.log_variance = initialise(nn.Conv2d(ngf, latent_size, grid))
        self.spread = _up(latent_size, ngf, groups=1, kernel_size=grid)
        self.decoder = decoder
        self.latent_size = latent_size

    def forward(self, x, temperature=1.0):
        """x: B×C×H×W normalised pixels -> Output. `temperature` belongs to occurrence, which this model has not."""
        posterior = self.encode(x)
        reconstruction = self._decode(self.latents(posterior))  # B×C×H×W
        return Output(reconstruction, posterior, {"kl_app": kl_normal(posterior.mean, posterior.log_variance)})

    def encode(self, x):
        """x: B×C×H×W -> Posterior with mean and log-variance of B×1×(N·d)."""
        squeezed = self.squeeze(self.encoder(x))  # B×ngf×h×w
        mean = plain(self.mean(squeezed))  # B×(N·d)×1×1
        log_variance = clamp_log_variance(plain(self.log_variance(squeezed)))
        return Posterior(mean.flatten(1)[:, None], log_variance.flatten(1)[:, None])

    def latents(self, posterior, temperature=1.0):
        """z: B×1×(N·d), drawn from the posterior in training mode, its mean in evaluation mode."""
        return sample_normal(posterior.mean, posterior.log_variance) if self.training else posterior.mean

    def draw(self, images, device="cpu"):
        """Images from the prior: images×C×H×W, normalised pixels."""
        return self._decode(torch.randn(images, 1, self.latent_size, device=device))

    def _decode(self, latents):
        return self.decoder(self.spread(latents.flatten(1)[:, :, None, None]))


def build_model(options):
    """The model that `options` describes, a dict of plain values that a checkpoint carries.

    Keys: arch, encoder_arch, decoder_arch, channels, size, scale, ngf, num_parts, hidden_size, py, categorical, hard,
    independent, mean, std (one of each per channel).
    """
    o = options
    encoder, features = build_encoder(o["encoder_arch"], o["channels"], o["scale"], o["ngf"])
    latent_size, grid = o["num_parts"] * o["hidden_size"], o["size"] // o["scale"]
    groups = o["num_parts"] if o["independent"] else 1
    inputs = o["ngf"] if o["arch"] == "vae" else latent_size
    pixels = o["channels"], o["scale"], o["mean"], o["std"]
    decoder = PyramidDecoder(inputs, *pixels, o["ngf"], groups, o["decoder_arch"])
    if o["arch"] == "vae":
        return BetaVAE(encoder, features, decoder, latent_size, grid, o["ngf"])
    kernel = 1 if o["encoder_arch"] == "patches" else 3
    occurrence = OccurrenceHead(features, o["num_parts"], o["py"], o["categorical"], o["hard"], kernel)
    appearance = AppearanceHead(features, o["num_parts"], o["hidden_size"], kernel)
    return PatchVAE(encoder, occurrence, appearance, decoder, grid)
