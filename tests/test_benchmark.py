"""utils/benchmark.py measures all that it promises, of two loops that compute the same; precision and compiling."""

import json
import math
import os

import pytest
import torch
import torch._inductor.exc
from conftest import ROOT

import modules
import run
from utils import benchmark, runtime, training
from utils.runtime import UsageError

CPU = torch.device("cpu")
LOOPS = (benchmark.plain_loop, benchmark.our_loop)
TINY = benchmark.TINY.split()
DIGITS = ["--dataset", "digits", "--ngf", "8", "--encoder-arch", "pyramid", "--img-per-epoch", "16", "--workers", "0"]
DIGITS += ["--batch-size", "8", "--num-epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options that name a folder of small images."""
    folder = tmp_path_factory.mktemp("files")
    benchmark.write_images(folder, 64, 24, 20)
    return ["--dataset", "folder", "--data-folder", str(folder), "--batch-size", "8", "--no-cuda"]


def names_and_numbers(figures, found):
    """The names in nested dicts, and the numbers that they end with are added to the list `found`."""
    if not isinstance(figures, dict):
        found.append(figures)
        return None
    return {name: names_and_numbers(value, found) for name, value in figures.items()}


def test_every_figure_is_there_and_finite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "CURVES", {"num-parts": (4, 16)})
    path, before = tmp_path / "figures.json", json.loads((ROOT / "imgs/benchmark.json").read_text())
    options = ["--quick", "--no-cuda", "--rounds", "1", "--steps", "1", "--settings", "cifar", "head", "--curves"]
    found = benchmark.main([*options, "--output", str(path)])
    assert json.loads(path.read_text()) == found and list(tmp_path.iterdir()) == [path]
    assert found.keys() == before.keys() and found["start_up"]["shapes"] > 0
    numbers = []
    for name in ("cifar", "head"):
        expected = names_and_numbers(before["settings"][name], [])
        assert names_and_numbers(found["settings"][name], numbers) == expected
    assert all(0 <= number < math.inf for number in numbers)
    small, large = found["curves"]["num-parts"].values()
    assert small.keys() == before["curves"]["num-parts"]["4"].keys()
    latents, hidden = 6 * (16 - 4), 8 * 2  # more latents; width of the decoder's first layer
    heads = 9 * 16 * (2 * latents + 16 - 4)  # both of the appearance, and the occurrence: 3×3, from 16 channels
    more = 4 * 4 * (heads + latents * hidden)  # on 4×4 cells
    assert large["flops_per_image"] - small["flops_per_image"] == 3 * 2 * more  # forward, to inputs, to weights
    assert small["seconds_per_image"] > 0 and small["peak_memory"] > 2**20
    assert capsys.readouterr().out.count("peak memory") == 2


def test_memory_is_measured_in_a_process_of_its_own():
    assert benchmark.in_own_process(os.getpid) != os.getpid()


@pytest.mark.parametrize("script, words, tolerance", [
    ("run", f"{benchmark.TINY} --precision fp32", 1e-5), ("run", f"{benchmark.TINY} --precision bf16", 3e-2),
    ("classifier", "--arch resnet18 --size 32 --precision fp32 --workers 0", 1e-4),
    ("classifier", f"{benchmark.HEAD} --size 32 --precision fp32 --workers 0", 1e-4),
], ids=["run", "bf16", "resnet18", "head"])
def test_both_loops_compute_the_same_losses(script, words, tolerance, data):
    plain, ours = (loop(script, [*data, *words.split()]) for loop in LOOPS)
    x, labels = next(plain.batches(1))
    seen = x
    if script == "classifier":
        plain.model.head[0].p = ours.model.head[0].p = 0.0  # each draws its own dropout
        seen = plain.model.features(x).detach() if plain.model.only_head_trains else x
    losses = []
    for _ in range(3 if script == "run" else 1):  # the weights that follow are the same, too
        losses.append(plain.step(x, labels))
        terms = ours.step(seen, labels)
        assert terms["total" if script == "run" else "loss"].mean().item() == pytest.approx(losses[-1], rel=tolerance)
    assert len(set(losses)) == len(losses)


def test_the_plain_loop_reads_every_batch_that_it_is_asked_for(data):
    plain = benchmark.plain_loop("run", data + TINY)
    for steps in (3, 1):
        batches = list(plain.batches(steps))
        assert len(batches) == steps and batches[0][0].shape == (8, 3, 16, 16)


def test_flops_are_those_of_the_layers(data):
    plain = benchmark.plain_loop("classifier", [*data, *benchmark.HEAD.split(), *TINY])
    head = 2 * (16 * 4 * 4 * 512 + 512 * 2)  # forward: multiplications and additions of its two layers
    encoder = 2 * (8 * 8 * 8 * 3 * 16 + 4 * 4 * 16 * 8 * 16)
    backward = 2 * head - 2 * 16 * 4 * 4 * 512  # of the weights, and of all inputs but the frozen features
    assert benchmark.flops_per_image(plain) == encoder + head + backward


@pytest.mark.parametrize("options, words", [("--settings nowhere", "nowhere"), ("--rounds 0", "--rounds"),
                                            ("--settings head --curves", "add cifar")])
def test_what_cannot_be_measured_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        benchmark.main(options.split())


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("has, expected", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_takes_what_the_machine_has_in_hardware(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True}, raising=False)
    assert runtime.choose_precision("auto", CPU) == expected
    assert runtime.choose_precision("fp32", CPU) == "fp32"


def test_weights_latents_and_reconstruction_stay_float32_under_bf16(data):
    ours = benchmark.our_loop("run", [*data, *TINY, "--precision", "bf16"])
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
    assert modules.plain(logits).stride() == torch.empty(2, 3, 4, 4).stride()


def test_a_resumed_run_keeps_its_precision(tmp_path):
    folder = ["--output-folder", str(tmp_path)]
    run.main([*DIGITS, *folder, "--precision", "fp32"])
    with pytest.raises(UsageError, match="--precision bf16"):
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
    results, names = [], []
    for more in ([], ["--compile"]):
        folder = tmp_path / f"run{len(more)}"
        results.append(run.main([*DIGITS, *more, "--precision", "fp32", "--output-folder", str(folder)])["total"])
        names.append(training.load(folder / "model.pt", training.MODEL)["model"].keys())
        assert len(traced) == len(more)
    assert results[1] == pytest.approx(results[0], rel=1e-4) and names[0] == names[1]


def test_a_machine_without_a_compiler_says_so_in_one_line(tmp_path, monkeypatch, line_of_error):
    def compile_nothing(network, mode):
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", compile_nothing)
    status, line = line_of_error(run.main, [*DIGITS, "--compile", "--output-folder", str(tmp_path)])
    assert status == 1 and "--compile" in line and "leave it out" in line and "compiler" in line
