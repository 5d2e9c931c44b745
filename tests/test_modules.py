"""The formulas against their definitions, and the properties that the networks promise."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import modules
from datasets import normalisation

CIFAR = {
    "arch": "patchy", "encoder_arch": "resnet", "decoder_arch": "pyramid", "channels": 3, "size": 32, "scale": 8,
    "ngf": 64, "num_parts": 16, "hidden_size": 6, "py": 1 / 16, "categorical": False, "hard": False,
    "independent": False, "mean": [0.5] * 3, "std": [0.5] * 3,
}
IMAGENET = {**CIFAR, "size": 224, "scale": 32, "num_parts": 64, "hidden_size": 16}


def build(**changes):
    torch.manual_seed(0)
    return modules.build_model({**CIFAR, "ngf": 16, **changes})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameter_counts_are_those_of_the_method():
    model = modules.build_model(CIFAR)
    parts = [count(part) for part in (model.encoder, model.occurrence, model.appearance, model.decoder)]
    assert parts == [683_072, 18_448, 221_376, 683_904] and count(model) == 1_606_800
    assert count(modules.build_model({**CIFAR, "arch": "vae"})) == 1_662_336
    assert count(modules.build_model(IMAGENET)) == 33_107_456


# ------------------------------------------------------------------------------------------------ KL terms


def test_kl_terms_are_those_of_torch_distributions():
    mean, log_variance = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(modules.kl_normal(mean, log_variance), expected)
    logits = 3 * torch.randn(4, 5, 2, 3, dtype=torch.float64)
    expected = kl_divergence(Bernoulli(logits=logits), Bernoulli(torch.tensor(0.1).double())).flatten(1).sum(1)
    torch.testing.assert_close(modules.kl_bernoulli(logits, 0.1), expected)
    prior = Categorical(probs=torch.full((5,), 0.2).double())
    expected = kl_divergence(Categorical(logits=logits.movedim(1, -1)), prior).flatten(1).sum(1)
    torch.testing.assert_close(modules.kl_categorical(logits, 0.2), expected)


def test_kl_is_zero_at_the_prior():
    zeros = torch.zeros(2, 3, 4)
    assert modules.kl_normal(zeros, zeros).abs().max() == 0
    at_prior = torch.full((2, 3, 4, 4), math.log(0.2 / 0.8))
    assert modules.kl_bernoulli(at_prior, 0.2).abs().max() < 1e-5
    assert modules.kl_categorical(torch.zeros(2, 5, 4, 4), 0.2).abs().max() < 1e-5


@pytest.mark.parametrize("logit, expected", [(1000.0, -math.log(0.1)), (-1000.0, -math.log(0.9))])
def test_kl_bernoulli_is_stable_at_certainty(logit, expected):
    logits = torch.full((1, 1), logit, requires_grad=True)
    kl = modules.kl_bernoulli(logits, 0.1)
    kl.sum().backward()
    assert kl.item() == pytest.approx(expected, rel=1e-5) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("logit", [-9.0, 0.5, 9.0])
def test_kl_bernoulli_has_the_exact_gradient_also_near_certainty(logit):
    logits = torch.tensor([[logit]], requires_grad=True)
    modules.kl_bernoulli(logits, 0.1).sum().backward()
    q = 1 / (1 + math.exp(-logit))
    exact = q * (1 - q) * (logit - math.log(0.1 / 0.9))  # dq/dlogit · (logit of q - logit of p)
    assert logits.grad.item() == pytest.approx(exact, rel=1e-3)


# ------------------------------------------------------------------------------------------------ loss


def test_edge_weights_average_one_per_channel_and_follow_edges():
    x = torch.zeros(1, 2, 16, 16)
    x[:, :, :, 9:] = 1.0  # one vertical edge, between the columns 8 and 9
    weights = modules.edge_weights(x, 8)
    torch.testing.assert_close(weights.mean(dim=(2, 3)), torch.ones(1, 2))
    assert (weights[..., :8] == 0).all() and torch.allclose(weights[..., 8:], torch.tensor(2.0))


def test_edge_weights_equal_the_laplacian_summed_over_cells():
    x = torch.randn(2, 3, 12, 12)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).repeat(3, 1, 1, 1)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    laplacian = torch.nn.functional.conv2d(padded, kernel, groups=3).abs()
    sums = laplacian.unflatten(2, (3, 4)).unflatten(4, (3, 4)).sum(dim=(3, 5))  # 2×3×3×3 cells
    expected = sums / sums.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(modules.edge_weights(x, 4)[..., ::4, ::4], expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 2.2489])
def test_a_channel_without_edges_weighs_one_also_among_others(value):
    x = torch.randn(3, 3, 16, 16)
    x[1, 2] = value
    weights = modules.edge_weights(x, 8)
    assert (weights[1, 2] == 1).all() and torch.isfinite(weights).all()
    torch.testing.assert_close(weights.mean(dim=(2, 3)), torch.ones(3, 3))


def test_loss_terms_are_sums_and_add_up():
    model = build().eval()
    x = torch.rand(2, 3, 32, 32)
    output = model(x)
    terms = modules.loss_terms(x, output, beta_app=2, beta_occ=3)
    torch.testing.assert_close(terms["recon"], ((output.reconstruction - x) ** 2).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(terms["total"], terms["recon"] + 2 * terms["kl_app"] + 3 * terms["kl_occ"])
    torch.testing.assert_close(terms["kl_occ_weighted"], 3 * terms["kl_occ"])
    edges = modules.loss_terms(x, output, 2, 3, edge_cell=8)["recon"]
    expected = ((output.reconstruction - x) ** 2 * modules.edge_weights(x, 8)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(edges, expected)


@pytest.mark.parametrize("step, times", [(1, []), (2, [1]), (1001, [1]), (1002, [1, 1001]),
                                         (12002, range(1, 12002, 1000))])
def test_temperature_shrinks_after_the_steps_1_1001_2001(step, times):
    expected = 1.0
    for moment in times:
        expected *= math.exp(-3e-5 * moment)
    assert modules.temperature_at(step) == pytest.approx(max(0.1, expected), rel=1e-12)


def test_temperature_never_falls_below_its_minimum():
    assert (modules.temperature_at(10**7), modules.temperature_at(10**7, anneal=0)) == (0.1, 1.0)


# ------------------------------------------------------------------------------------------------ samples


def test_hard_samples_are_bernoulli_with_a_gradient():
    torch.manual_seed(0)
    logits = torch.full((200_000,), -1.0, requires_grad=True)
    for temperature in (1.0, 0.1):
        sample = modules.sample_bernoulli(logits, temperature, hard=True)
        assert set(sample.unique().tolist()) == {0.0, 1.0}
        rate = torch.sigmoid(torch.tensor(-1.0)).item()
        assert sample.mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / 200_000))
    sample.sum().backward()
    assert (logits.grad >= 0).all() and logits.grad.sum() > 0


def test_relaxed_samples_lie_strictly_between_and_sharpen():
    torch.manual_seed(0)
    logits = torch.randn(10_000)
    warm, cold = (modules.sample_bernoulli(logits, temperature) for temperature in (1.0, 0.1))
    assert warm.min() > 0 and warm.max() < 1
    assert ((cold - 0.5).abs() > 0.45).float().mean() > ((warm - 0.5).abs() > 0.45).float().mean() + 0.3


def test_sample_normal_has_mean_and_deviation():
    sample = modules.sample_normal(torch.full((100_000,), 2.0), torch.full((100_000,), math.log(9.0)))
    assert sample.mean().item() == pytest.approx(2, abs=0.05) and sample.std().item() == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("hard", [False, True])
def test_categorical_gives_every_cell_one_part_in_all(hard):
    model = build(categorical=True, hard=hard).train()
    posterior = model.encode(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(posterior.occurrence.sum(dim=1), torch.ones(2, 4, 4))
    for z_occ in (model.occurrence.sample(posterior.logits, 0.5), model.occurrence.mode(posterior.logits)):
        torch.testing.assert_close(z_occ.sum(dim=1), torch.ones(2, 4, 4))
        assert not hard or torch.allclose(z_occ, z_occ.round())


# ------------------------------------------------------------------------------------------------ heads and placing


def test_pooled_appearance_is_the_weighted_mean_of_the_cells():
    head = modules.AppearanceHead(features=5, parts=3, size=2)
    f, occurrence = torch.randn(2, 5, 4, 4), torch.rand(2, 3, 4, 4)
    mean, log_variance = head(f, occurrence)
    cells, variances = head.mean(f), head.log_variance(f).exp().clamp(1e-7, 1e7)
    for image in range(2):
        for part in range(3):
            weight = occurrence[image, part] / occurrence[image, part].sum()
            for k in range(2):
                expected = (weight * cells[image, 2 * part + k]).sum()
                torch.testing.assert_close(mean[image, part, k], expected)
                expected = (weight * variances[image, 2 * part + k]).sum()
                torch.testing.assert_close(log_variance[image, part, k].exp(), expected)


@pytest.mark.parametrize("logit", [-math.inf, -200.0, 200.0])
def test_a_part_that_occurs_nowhere_or_everywhere_has_finite_appearance_and_gradients(logit):
    head = modules.AppearanceHead(features=5, parts=3, size=2)
    mean, log_variance = head(1e3 * torch.randn(2, 5, 4, 4), torch.full((2, 3, 4, 4), logit).sigmoid())
    assert torch.isfinite(mean).all() and torch.isfinite(log_variance).all()
    modules.kl_normal(mean, log_variance).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_pooling_sends_no_gradient_into_occurrence():
    head = modules.AppearanceHead(features=5, parts=3, size=2)
    f = torch.randn(2, 5, 4, 4, requires_grad=True)
    occurrence = torch.rand(2, 3, 4, 4, requires_grad=True)
    sum(part.sum() for part in head(f, occurrence)).backward()
    assert occurrence.grad is None and f.grad.abs().sum() > 0


def test_variance_is_clamped():
    head = modules.AppearanceHead(features=5, parts=3, size=2)
    with torch.no_grad():
        head.log_variance.bias.fill_(1000.0)
    _, log_variance = head(torch.randn(1, 5, 4, 4), torch.rand(1, 3, 4, 4))
    assert log_variance.exp().max().item() == pytest.approx(1e7, rel=1e-4)


def test_parts_are_placed_cell_by_cell():
    z_app, z_occ = torch.randn(2, 3, 4), torch.rand(2, 3, 5, 6)
    placed = modules.place_parts(z_app, z_occ)
    assert placed.shape == (2, 12, 5, 6)
    for part in range(3):
        for k in range(4):
            expected = z_app[1, part, k] * z_occ[1, part]
            torch.testing.assert_close(placed[1, 4 * part + k], expected)


# ------------------------------------------------------------------------------------------------ decoder and models


@pytest.mark.parametrize("inet", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoder_covers_exactly_the_valid_pixels(inet, channels):
    mean, std = normalisation(channels, inet)
    decoder = modules.PyramidDecoder(4, channels, 4, mean, std, ngf=16).eval()
    torch.nn.init.normal_(decoder.to_pixels.weight, std=1e4)
    image = decoder(100 * torch.randn(8, 4, 8, 8))
    for channel in range(channels):
        black, white = (0 - mean[channel]) / std[channel], (1 - mean[channel]) / std[channel]
        assert image[:, channel].min().item() == pytest.approx(black, abs=1e-5)
        assert image[:, channel].max().item() == pytest.approx(white, abs=1e-5)


PATCHES = {"encoder_arch": "patches", "decoder_arch": "patches"}


def test_patches_keep_to_their_cells():
    model = build(**PATCHES).eval()
    x = torch.rand(1, 3, 32, 32)
    touched = x.clone()
    touched[..., 8:16, 16:24] += 1  # the cell in row 1, column 2
    moved = model.encode(touched).occurrence - model.encode(x).occurrence
    assert moved.abs().amax(dim=(0, 1)).nonzero().tolist() == [[1, 2]]

    latents = torch.randn(1, 96, 4, 4)
    changed = latents.clone()
    changed[..., 1, 2] += 1
    drawn = (model.decoder(changed) - model.decoder(latents))[0].abs().amax(dim=0) > 0
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:16, 16:24] = True
    assert drawn[inside].all() and not drawn[~inside].any()


def test_a_cell_of_the_pyramid_draws_far_beyond_itself():
    decoder = build(size=64).decoder.eval()
    latents = torch.randn(1, 96, 8, 8)
    changed = latents.clone()
    changed[..., 4, 4] += 1
    drawn = ((decoder(changed) - decoder(latents))[0].abs().amax(dim=0) > 0).nonzero()
    assert (drawn.amax(dim=0) - drawn.amin(dim=0) + 1).tolist() == [3 * 8 - 2] * 2


def test_damage_hides_squares_and_takes_colour_as_often_as_it_is_told():
    x = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    assert modules.damage(x, 0, 0, 4) is x
    hidden = modules.damage(x, 0.3, 0, 4)
    squares = (hidden == 0).unflatten(2, (4, 4)).unflatten(4, (4, 4)).movedim(4, 3).flatten(4).flatten(0, 3)
    assert set(squares.sum(1).tolist()) == {0, 16} and torch.equal(hidden[hidden != 0], x[hidden != 0])
    assert (hidden == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert ((hidden == 0).all(dim=1) == (hidden == 0).any(dim=1)).all()  # of all channels alike
    grey = modules.damage(x, 0, 0.7, 4)
    is_grey = (grey == grey[:, :1]).flatten(1).all(dim=1)
    assert is_grey.float().mean() == pytest.approx(0.7, abs=0.1) and torch.equal(grey[~is_grey], x[~is_grey])
    torch.testing.assert_close(grey[is_grey].mean(dim=1), x[is_grey].mean(dim=1))


@pytest.mark.parametrize("inet", [False, True])
def test_the_edge_target_sees_shape_and_not_colour(inet):
    mean, std = normalisation(3, inet)
    to_normal = [torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]
    unit = 0.4 + 0.1 * torch.rand(4, 3, 16, 16)
    tinted, flat = 0.5 * unit + torch.rand(4, 3, 1, 1), torch.full_like(unit, 0.3)
    edges = [
        modules.edge_target((pixels - to_normal[0]) / to_normal[1], mean, std) * to_normal[1] + to_normal[0]
        for pixels in (unit, 1 - unit, unit[:, [2, 0, 1]], tinted, flat)
    ]
    assert 0.1 < edges[0].min() and edges[0].max() < 0.99 and torch.allclose(edges[0][:, :1], edges[0], atol=1e-5)
    for other in edges[1:3]:  # inverted, with channels exchanged
        torch.testing.assert_close(other, edges[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edges[3].atanh(), 0.5 * edges[0].atanh(), rtol=1e-2, atol=1e-3)  # half as strong
    assert edges[4].abs().max() < 1e-6  # flat


def test_independent_parts_do_not_mix_before_the_pixels():
    model = build(independent=True).eval()
    latents = torch.zeros(1, 96, 4, 4)
    hidden = model.decoder.layers(latents)
    latents[:, 6 * 3 : 6 * 4] = 1.0  # part 3 alone
    changed = (model.decoder.layers(latents) - hidden).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.nonzero().flatten().tolist() == [3]  # ngf 16 over 16 parts: one hidden channel each


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"arch": "vae"}, {"hard": True}, {"categorical": True}, {"categorical": True, "hard": True},
        {"independent": True}, {"scale": 4}, {"scale": 16}, {"scale": 32}, {"encoder_arch": "pyramid"},
        PATCHES, {"encoder_arch": "pyramid", "scale": 2}, {"encoder_arch": "resnet18", "scale": 32},
        {"encoder_arch": "resnet50", "scale": 32}, {"encoder_arch": "alexnet", "scale": 32},
        {"encoder_arch": "alexnet", "scale": 32, "size": 96}, {"arch": "vae", "scale": 4},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()) or "defaults",
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_model_trains_and_evaluates_deterministically(changes, channels):
    mean, std = normalisation(channels, False)
    model = build(channels=channels, mean=mean, std=std, **changes)
    size = changes.get("size", 32)
    x = torch.randn(2, channels, size, size).clamp(-1, 1)
    output = model.train()(x)
    assert output.reconstruction.shape == x.shape
    modules.loss_terms(x, output, 1, 10)["total"].mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not torch.equal(model(x).reconstruction, model(x).reconstruction)  # training samples
    model.eval()
    assert torch.equal(model(x).reconstruction, model(x).reconstruction)
    assert model.draw(3).shape == (3, channels, size, size)


def test_evaluation_uses_the_mean_and_the_probability():
    model = build().eval()
    posterior = model.encode(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.latents(posterior), modules.place_parts(posterior.mean, posterior.occurrence))
    model = build(hard=True).eval()
    posterior = model.encode(torch.randn(2, 3, 32, 32))
    thresholded = (posterior.occurrence > 0.5).float()
    assert torch.equal(model.latents(posterior), modules.place_parts(posterior.mean, thresholded))


@pytest.mark.parametrize("categorical", [False, True])
def test_occurrence_from_the_prior_has_its_rate(categorical):
    torch.manual_seed(0)
    head = build(categorical=categorical, num_parts=4, py=0.25).occurrence
    drawn = head.draw_prior(2000, 4, 4, "cpu")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.25, abs=0.01)


def test_encoder_is_torchvisions_resnet_under_its_names():
    import torchvision

    theirs = torchvision.models.resnet18(weights=None)
    encoder, features = modules.build_encoder("resnet", 3, 32)
    missing, unexpected = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert unexpected == [] and set(missing) == {"fc.weight", "fc.bias"} and features == 512
    x = torch.randn(2, 3, 64, 64)
    theirs.eval(), encoder.eval()
    expected = torch.nn.Sequential(*list(theirs.children())[:-2])(x)
    torch.testing.assert_close(encoder(x), expected)
    names = [name for name, _ in encoder.named_children()]
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
