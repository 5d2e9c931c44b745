"""utils/benchmark.py measures everything it promises, of two variants that compute the same."""

import json
import math

import pytest
import torch
import torch._inductor.exc

import run
from utils import benchmark, checkpoints, console, runtime, variants

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    benchmark.write_images(folder, variants.QUICK[False])
    return folder


def test_every_figure_is_there_and_finite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))
    path = tmp_path / "figures.json"
    options = ["--quick", "--no-cuda", "--rounds", "1", "--steps", "1", "--settings", "cifar"]
    found = benchmark.main([*options, "--output", str(path)])
    assert json.loads(path.read_text()) == found and [path] == list(tmp_path.iterdir())
    for figures in found["settings"].values():
        assert figures["speed_up"] > 0 and figures["speed_up_step"] > 0
        for variant in variants.VARIANTS:
            waiting = figures[variant].pop("waiting")
            assert 0 <= waiting < 1 and all(0 < value < math.inf for value in figures[variant].values())
            assert len(figures[variant]) == 5
    assert found["start_up"]["shapes"] > 0
    assert capsys.readouterr().out.count("peak memory") == 1


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_both_variants_compute_the_same_losses(folder, precision, tolerance):
    setting = variants.QUICK[False].plus(f"--precision {precision}")
    plain, ours = (kind(setting, folder, CPU) for kind in (variants.Plain, variants.Ours))
    x, labels = next(ours.batches(1))
    for _ in range(3):  # the weights that follow are the same, too
        expected = plain.step(x, labels)
        ours.step(x, labels)
        assert ours.progress.close_window()[0]["total"] == pytest.approx(expected, rel=tolerance)
    is_same = all(map(torch.equal, plain.model.state_dict().values(), ours.model.state_dict().values()))
    assert plain.model.state_dict().keys() == ours.model.state_dict().keys() and not is_same


def test_the_plain_loop_reads_every_batch_that_it_is_asked_for(folder):
    plain = variants.Plain(variants.QUICK[False], folder, CPU)
    for steps in (3, 1):
        batches = list(plain.batches(steps))
        assert len(batches) == steps and batches[0][0].shape == (8, 3, 16, 16)


@pytest.mark.parametrize("name", ["resnet18", "head"])
def test_the_classifiers_compute_the_same_losses(name, folder):
    small = variants.SETTINGS[name].plus("--size 32 --batch-size 8 --precision fp32 --workers 0")
    plain, ours = (kind(small, folder, CPU) for kind in (variants.Plain, variants.Ours))
    for head in (plain.model.head, ours.model[:] if name == "head" else ours.model.head):
        head[0].p = 0.0  # each draws its own dropout
    x, labels = next(plain.batches(1))
    seen = plain.model.features(x).detach() if name == "head" else x
    expected = plain.step(x, labels)
    ours.step(seen, labels)
    assert ours.progress.close_window()[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_cost_is_measured_against_work(folder, monkeypatch):
    monkeypatch.setattr(benchmark, "CURVES", {"num-parts": (4, 16)})
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))
    small, large = benchmark.curves(variants.QUICK[False], folder, CPU, 1)["num-parts"].values()
    latents, hidden = 6 * (16 - 4), 8 * 2  # more latents; width of the decoder's first layer
    heads = 9 * 16 * (2 * latents + 16 - 4)  # both of the appearance, and the occurrence: 3×3, from 16 channels
    more = 4 * 4 * (heads + latents * hidden)  # on 4×4 cells
    assert large["flops_per_image"] - small["flops_per_image"] == 3 * 2 * more  # forward, to inputs, to weights
    assert small["seconds_per_image"] > 0 and small["peak_memory"] > 2**20


def test_flops_are_those_of_the_layers(folder):
    variant = variants.Plain(variants.QUICK[True], folder, CPU)
    x, labels = next(variant.batches(1))
    head = 2 * (16 * 4 * 4 * 512 + 512 * 2)  # forward: multiplications and additions of its two layers
    encoder = 2 * (8 * 8 * 8 * 3 * 16 + 4 * 4 * 16 * 8 * 16)
    backward = 2 * head - 2 * 16 * 4 * 4 * 512  # of the weights, and of all inputs but the frozen features
    assert benchmark.flops_per_image(variant, (x, labels)) == encoder + head + backward


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(console.UsageError, match="nowhere"):
        benchmark.main(["--settings", "nowhere"])


# ---------------------------------------------------------------------------------------------------- precision


def test_auto_takes_what_the_machine_has_in_hardware(monkeypatch):
    for has, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        assert runtime.choose_precision("auto", CPU) == expected
        assert runtime.choose_precision("fp32", CPU) == "fp32"


def test_weights_latents_and_reconstruction_stay_float32_under_bf16(folder):
    ours = variants.Ours(variants.QUICK[False].plus("--precision bf16"), folder, CPU)
    x, labels = next(ours.batches(1))
    with runtime.autocast("bf16", CPU):
        assert ours.model.encoder(x).dtype == torch.bfloat16
        output = ours.model(x)
    parts = (output.reconstruction, *output.posterior, *output.kl.values())
    assert {value.dtype for value in parts} == {torch.float32}
    ours.step(x, labels)
    assert {weight.grad.dtype for weight in ours.model.parameters()} == {torch.float32}


def test_the_noise_meets_the_same_latents_in_every_layout():
    logits = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert run.modules.plain(logits).stride() == torch.empty(2, 3, 4, 4).stride()


def test_a_state_saved_in_another_layout_goes_on_the_same():
    """Fused Adam on the CPU pairs weights and state by their place in memory."""
    weights = []
    for relaid in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for step in range(3):
            weight.grad = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
            optimizer.step()
            for name in ("exp_avg", "exp_avg_sq") if relaid else ():
                optimizer.state[weight][name] = optimizer.state[weight][name].contiguous()
            runtime.match_layout(optimizer)
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_a_resumed_run_keeps_its_precision(tmp_path):
    tiny = ["--dataset", "digits", "--ngf", "8", "--encoder-arch", "pyramid", "--img-per-epoch", "16", "--workers", "0"]
    folder = ["--output-folder", str(tmp_path)]
    run.main([*tiny, *folder, "--num-epochs", "1", "--batch-size", "8", "--precision", "fp32"])
    with pytest.raises(console.UsageError, match="--precision bf16"):
        run.main(["--resume", *folder, "--precision", "bf16"])
    run.main(["--resume", *folder, "--num-epochs", "2"])
    assert json.loads((tmp_path / "args.json").read_text())["precision"] == "fp32"


# ---------------------------------------------------------------------------------------------------- compiling


def test_a_compiled_run_computes_what_an_eager_one_does_and_saves_what_it_reads(tmp_path, monkeypatch):
    """dynamo's own graphs without new kernels, which would take a minute."""
    traced, compile_really = [], torch.compile

    def compile_quickly(network, mode):
        traced.append(network)
        return compile_really(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    tiny = ["--dataset", "digits", "--ngf", "8", "--encoder-arch", "pyramid", "--img-per-epoch", "16", "--workers", "0"]
    tiny += ["--batch-size", "8", "--num-epochs", "1", "--precision", "fp32"]
    eager = run.main([*tiny, "--output-folder", str(tmp_path / "eager")])
    assert not traced
    compiled = run.main([*tiny, "--compile", "--output-folder", str(tmp_path / "compiled")])
    assert len(traced) == 1 and compiled["total"] == pytest.approx(eager["total"], rel=1e-4)
    files = (tmp_path / name / "model.pt" for name in ("eager", "compiled"))
    one, other = (checkpoints.load(file, checkpoints.MODEL)["model"] for file in files)
    assert one.keys() == other.keys()


def test_a_machine_without_a_compiler_says_so_in_one_line(tmp_path, monkeypatch, line_of_error):
    def compile_nothing(network, mode):
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", compile_nothing)
    options = ["--dataset", "digits", "--ngf", "8", "--encoder-arch", "pyramid", "--workers", "0", "--compile"]
    status, line = line_of_error(run.main, [*options, "--output-folder", str(tmp_path)])
    assert status == 1 and "--compile" in line and "leave it out" in line and "compiler" in line
