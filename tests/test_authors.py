"""The model beside the authors' code: the same weights and noise, the same losses, outputs and gradients.

authors.json has only numbers. They were computed once, in float64 and training mode, with the code that the authors of
the paper published; how weights, images and noise follow from integers is written at the functions below.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import modules
from utils import features

CASES = json.loads(Path(__file__).with_name("authors.json").read_text())
LARGEST_DIFFERENCE = 1e-5  # relative; the authors add 1e-7 in three places


def uniform(shape, k):
    """The k-th tensor of pseudo-random numbers in [0, 1): float64 of `shape`."""
    h = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64) * 2654435761 + np.uint64(40503 * k + 12345)
    h &= 0xFFFFFFFF
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 73244475) & 0xFFFFFFFF
    h ^= h >> 16
    return torch.from_numpy(h.astype(np.float64) / 2**32).reshape(shape)


def images(batch, channels, size):
    """Smooth images B×C×S×S: noise averaged over 5×5 pixels, times 2."""
    v = torch.nn.functional.pad(2 * uniform((batch, channels, size, size), 1001) - 1, (2, 2, 2, 2), mode="replicate")
    return 2 * torch.nn.functional.avg_pool2d(v, 5, stride=1)


def model_of(case):
    options = {"decoder_arch": "pyramid", "hard": False, "py": case["py"], **case["options"]}
    channels = options["channels"]
    model = modules.build_model({**options, "mean": [0.5] * channels, "std": [0.5] * channels}).double()
    values = {}
    for tensor in case["tensors"]:
        u = uniform(tensor["shape"], tensor["k"])
        values[tensor["name"]] = eval(tensor["formula"], {"u": u})
    own = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert own == set(values)
    model.load_state_dict(values, strict=False)
    return model.train()


def fix_noise(monkeypatch):
    """Occurrence and appearance draw the noise of the reference instead of torch's."""

    def occurrence(like):
        return uniform(tuple(like.shape), 1002).clamp(1e-4, 1 - 1e-4)

    def appearance(like):
        return 3**0.5 * (2 * uniform(tuple(like.shape), 1003) - 1)

    monkeypatch.setattr(torch, "rand_like", occurrence)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda like: -occurrence(like).log())  # of Gumbel noise
    monkeypatch.setattr(torch, "randn_like", appearance)


def worst(found, expected):
    """The largest relative difference of numbers; of several, relative to the largest of them."""
    found, expected = np.atleast_1d(np.asarray(found, float)), np.atleast_1d(np.asarray(expected, float))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def summary_difference(tensor, summary):
    flat = tensor.detach().flatten()
    differences = [worst(flat[summary["positions"]], summary["values"])]
    differences.append(worst(flat.square().sum(), summary["sum_of_squares"]))
    return max(differences)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_model_computes_what_the_authors_code_computes(case, monkeypatch):
    expected, options = case["training_mode"], case["options"]
    x = images(case["batch"], options["channels"], options["size"])
    model = model_of(case)
    fix_noise(monkeypatch)
    output = model(x, case["temperature"])
    cell = options["scale"] if case["edge_weights"] else None
    terms = modules.loss_terms(x, output, case["beta_a"], case["beta_v"], cell)
    terms = {name: values.mean() for name, values in terms.items()}
    terms["total"].backward()
    gradients = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    posterior = output.posterior
    found = {
        **{name: worst(terms[name].item(), value) for name, value in expected["losses"].items()},
        "total": worst(terms["total"].item(), expected["total"]),
        "reconstruction": summary_difference(output.reconstruction, expected["reconstruction"]),
        "appearance_mean": summary_difference(posterior.mean, expected["appearance_mean"]),
        "appearance_variance": summary_difference(posterior.log_variance.exp(), expected["appearance_variance"]),
        "gradients": max(worst(gradients[name], norm) for name, norm in expected["gradient_norms"].items()),
    }
    if "occurrence" in expected:
        found["occurrence"] = summary_difference(posterior.occurrence, expected["occurrence"])
    assert set(gradients) == set(expected["gradient_norms"])
    print(case["name"], {name: f"{difference:.1e}" for name, difference in found.items()})
    assert max(found.values()) < LARGEST_DIFFERENCE, found


CIFAR = {
    "arch": "patchy", "encoder_arch": "resnet", "decoder_arch": "pyramid", "channels": 3, "size": 32, "scale": 8,
    "ngf": 64, "num_parts": 16, "hidden_size": 6, "py": 1 / 16, "categorical": False, "hard": False,
    "independent": False, "mean": [0.5] * 3, "std": [0.5] * 3,
}
IMAGENET = {**CIFAR, "size": 224, "scale": 32, "num_parts": 64, "hidden_size": 16}


@pytest.mark.parametrize("options", [CIFAR, IMAGENET, {**CIFAR, "arch": "vae"}, {**CIFAR, "encoder_arch": "pyramid"}],
                         ids=["CIFAR", "ImageNet", "beta-VAE", "pyramid"])
def test_initial_weights_are_the_authors(options):
    torch.manual_seed(0)
    model, seen = modules.build_model(options), set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, torch.nn.Conv2d):
            assert module.bias is None or (module.bias == 0).all(), name
            deviation = (2 / module.weight[:, 0].numel()) ** 0.5  # fan-out, gain of ReLU
            error = 4 / (2 * module.weight.numel()) ** 0.5  # four standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(deviation, rel=error), name
            assert abs(module.weight.mean().item()) < 4 * deviation / module.weight.numel() ** 0.5
        elif isinstance(module, torch.nn.ConvTranspose2d):  # torch's own: uniform in ±1 / sqrt(fan-in)
            bound = 1 / (module.weight[0].numel()) ** 0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=4 / module.weight.numel() ** 0.5)
        else:
            continue
        seen.update(f"{name}.{own}" for own, _ in module.named_parameters())
    assert seen == {name for name, _ in model.named_parameters()}


def test_initial_weights_of_the_classifiers_head_are_the_authors():
    torch.manual_seed(0)
    head = features.Classifier(torch.nn.Identity(), 4096, classes=100).head
    linear = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [512, 100]
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and (layer.bias == 0).all()
