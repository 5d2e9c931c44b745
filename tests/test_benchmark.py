"""utils/benchmark.py measures all that it promises, of two loops that compute the same; precision and compiling."""

import json
import math

import pytest
import torch
import torch._inductor.exc
from conftest import ROOT

import classifier
import run
from utils import benchmark, runtime, training
from utils.runtime import UsageError

CPU, TINY = torch.device("cpu"), benchmark.TINY.split()
DIGITS = ["--dataset", "digits", "--ngf", "8", "--encoder-arch", "pyramid", "--img-per-epoch", "16", "--workers", "0"]
DIGITS += ["--batch-size", "8", "--num-epochs", "1", "--output-folder"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options that name a folder of small images."""
    folder = tmp_path_factory.mktemp("files")
    benchmark.write_images(folder, 64, 24, 20)
    return ["--dataset", "folder", "--data-folder", str(folder), "--batch-size", "8", "--no-cuda"]


def test_every_figure_is_there_and_finite(tmp_path):
    path, before = tmp_path / "figures.json", json.loads((ROOT / "imgs/benchmark.json").read_text())
    quick = ["--quick", "--no-cuda", "--rounds", "1", "--steps", "1", "--settings", "cifar", "head"]
    found = benchmark.main([*quick, "--output", str(path)])
    assert json.loads(path.read_text()) == found and list(tmp_path.iterdir()) == [path]
    assert before.keys() - found.keys() <= {"curves"} and found["start_up"]["shapes"] > 0
    for name in ("cifar", "head"):
        figures, earlier = found["settings"][name], before["settings"][name]
        assert figures.keys() == earlier.keys() and figures["speed_up"] > 0 and figures["speed_up_step"] > 0
        for loop in ("plain", "ours"):
            assert figures[loop].keys() == {"images_per_second", "step_only", "waiting"} <= earlier[loop].keys()
            assert 0 <= figures[loop].pop("waiting") < 1
            assert all(0 < value < math.inf for value in figures[loop].values())


@pytest.mark.parametrize("script, typed, tolerance", [
    (run, f"{benchmark.TINY} --precision fp32", 1e-5), (run, f"{benchmark.TINY} --precision bf16", 3e-2),
    (classifier, "--arch resnet18 --size 32 --precision fp32 --workers 0", 1e-4),
    (classifier, f"{benchmark.HEAD} --size 32 --precision fp32 --workers 0", 1e-4),
])
def test_both_loops_compute_the_same_losses(script, typed, tolerance, data):
    loops = [loop(script, [*data, *typed.split()]) for loop in (benchmark.plain_loop, benchmark.our_loop)]
    (plain_model, plain_batches, plain_step), (our_model, _, our_step) = loops
    for number in (3, 1):
        for _, batches, _ in loops:
            found = list(batches(number))
            assert len(found) == number and len(found[0][0]) == 8  # a batch
    x, labels = next(plain_batches(1))
    seen, steps, losses = x, 3, []
    if script is classifier:
        plain_model.head[0].p = our_model.head[0].p = 0.0  # each draws its own dropout
        seen, steps = (plain_model.features(x).detach() if plain_model.only_head_trains else x), 1
    for step in range(steps):  # the weights that follow are the same, too
        runtime.seed_step(1, step + 1, CPU)  # as ours does itself
        losses.append(plain_step(x, labels))
        terms = our_step(seen, labels)
        assert terms["total" if script is run else "loss"].mean().item() == pytest.approx(losses[-1], rel=tolerance)
    assert len(set(losses)) == steps


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UsageError, match="nowhere"):
        benchmark.main(["--settings", "nowhere"])


@pytest.mark.parametrize("has, expected", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_takes_what_the_machine_has_in_hardware(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True}, raising=False)
    assert runtime.choose_precision("auto", CPU) == expected
    assert runtime.choose_precision("fp32", CPU) == "fp32"


def test_weights_latents_and_reconstruction_stay_float32_under_bf16(data):
    model, batches, step = benchmark.our_loop(run, [*data, *TINY, "--precision", "bf16"])
    x, labels = next(batches(1))
    with runtime.autocast("bf16", CPU):
        assert model.encoder(x).dtype == torch.bfloat16
        output = model(x)
    assert {value.dtype for value in (*output[:1], *output.posterior, *output.kl.values())} == {torch.float32}
    assert output.posterior.logits.is_contiguous()  # the noise meets the same latents in every layout
    step(x, labels)
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}


def test_a_state_saved_in_another_layout_goes_on_the_same(tmp_path):
    """Fused Adam on the CPU pairs weights and state by their place in memory."""
    weights = []
    for relaid in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for _ in range(3):
            weight.grad = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
            optimizer.step()
            saved = optimizer.state_dict()
            for name in ("exp_avg", "exp_avg_sq") if relaid else ():
                saved["state"][0][name] = saved["state"][0][name].contiguous()
            progress = dict.fromkeys(("window", "epoch_means"), training.Means().state())
            checkpoint, content = {"progress": progress, "optimizer": saved}, {"optimizer": optimizer}
            training.Run(tmp_path, None, content | {"images": 1}, checkpoint | {"images": 1}, batch_size=1, images=1,
                         epochs=1)
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_a_resumed_run_keeps_its_precision(finished):
    saved = json.loads((finished[0] / "args.json").read_text())["precision"]
    resume = ["--resume", str(finished[0]), "--num-epochs", "3"]
    assert run.parse(resume)[0].precision == saved
    with pytest.raises(UsageError, match="--precision"):
        run.parse([*resume, "--precision", "fp32" if saved == "bf16" else "bf16"])


def test_a_compiled_run_computes_what_an_eager_one_does_and_saves_what_it_reads(tmp_path, monkeypatch):
    traced, compile_really, losses, names = [], torch.compile, [], []  # no new kernels, which would take a minute

    def compile_quickly(network, mode):
        traced.append(network)
        return compile_really(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    for more in ([], ["--compile"]):
        folder = tmp_path / f"run{len(more)}"
        losses.append(run.main([*DIGITS, str(folder), *more, "--precision", "fp32"])["total"])
        names.append(training.load(folder / "model.pt", training.MODEL)["model"].keys())
        assert len(traced) == len(more)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and names[0] == names[1]


def test_a_machine_without_a_compiler_says_so_in_one_line(tmp_path, monkeypatch, line_of_error):
    def compile_nothing(network, mode):
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", compile_nothing)
    status, line = line_of_error(run.main, [*DIGITS, str(tmp_path), "--compile"])
    assert status == 1 and "--compile" in line and "leave it out" in line and "compiler" in line
