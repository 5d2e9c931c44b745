"""run.py from the command line to the files that it leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, paint, paint_classes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import modules
import run
from utils import checkpoints, tracking

TERMS = ("recon", "kl_app", "kl_occ", "kl_app_weighted", "kl_occ_weighted", "total")


def test_output_folder_holds_what_the_readme_says(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "args.json", "checkpoints", "images", "logs", "metrics.jsonl", "model.pt",
    ]  # fmt: skip
    names = [
        f"{kind}_epoch_{epoch:03d}.png" for kind in ("occurrence", "reconstructions", "samples") for epoch in (1, 2)
    ]
    assert sorted(path.name for path in (folder / "images").iterdir()) == names
    assert len(list((folder / "checkpoints").iterdir())) == 2
    args = json.loads((folder / "args.json").read_text())
    assert args["dataset"] == "digits" and args["torch"] == torch.__version__


def test_metrics_have_one_line_per_event(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["train", "train", "test", "train", "train", "test", "end"]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4]
    assert all(set(TERMS) <= set(line) for line in lines[:-1])


def test_tensorboard_has_every_curve_and_picture(finished):
    board = EventAccumulator(str(finished[0] / "logs"), size_guidance={"images": 0})
    board.Reload()
    tags = board.Tags()
    wanted = {f"loss/{split}/{term}" for split in ("train", "test") for term in TERMS}
    wanted |= {"temperature", "learning_rate", "images_per_second", "parts_in_use", "parts_above_half", "best/total"}
    assert wanted <= set(tags["scalars"])
    assert {"reconstructions", "occurrence", "samples"} <= set(tags["images"])
    assert [event.step for event in board.Scalars("loss/train/recon")] == [1, 2, 3, 4]
    assert "_hparams_/experiment" in board.summary_metadata


def test_model_file_rebuilds_its_own_architecture(finished):
    folder, best = finished
    content = torch.load(folder / "model.pt", weights_only=True)
    model = modules.build_model(content["options"])
    model.load_state_dict(content["model"])
    assert content["test"]["total"] == best["total"]


@pytest.mark.parametrize("options", ["--beta-v 3 --recon-mask edge", "--arch vae --beta-a 2"])
def test_evaluate_repeats_the_figures_of_training_with_its_options(options, tmp_path):
    trained = run.main(["--dataset", "digits", *TINY, *options.split(), "--output-folder", str(tmp_path)])
    tested = run.main(["--evaluate", "--workers", "0", "--output-folder", str(tmp_path)])
    assert {name: trained[name] for name in tested} == pytest.approx(tested, rel=1e-5)


def test_evaluate_needs_test_images_alone_and_leaves_the_folder_free(tmp_path):
    paint_classes(tmp_path / "data" / "train", images=4)
    paint_classes(tmp_path / "data" / "val", images=4)
    options = ["--dataset", "imagenet", "--data-folder", str(tmp_path / "data"), "--size", "32", *TINY]
    run.main([*options, "--output-folder", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "data" / "train")
    other = ["--workers", "0", "--output-folder", str(tmp_path / "other")]
    run.main(["--evaluate", "--pretrained", str(tmp_path / "run" / "model.pt"), *other])
    assert {path.name for path in (tmp_path / "other" / "evaluated").iterdir()} == {
        "occurrence.png", "reconstructions.png", "samples.png"}  # fmt: skip
    tracking.check_folder(tmp_path / "other", run.CONTENTS)


def test_another_data_set_is_not_looked_for_in_the_folder_of_the_first(finished):
    where = []
    for more in ([], ["--dataset", "digits"], ["--dataset", "mnist"]):
        argv = ["--evaluate", "--output-folder", str(finished[0]), *more]
        where.append(run.parse(argv)[0].data_folder)
    saved = checkpoints.load(finished[0] / "model.pt", checkpoints.MODEL)["args"]["data_folder"]
    assert where == [saved, saved, "./data"]


def test_what_is_hidden_has_to_be_reconstructed_and_tests_hide_nothing(tmp_path, monkeypatch):
    seen, wanted, loss = {True: [], False: []}, {True: [], False: []}, run.loss

    def forward(model, x, temperature=1.0, original=modules.PatchVAE.forward):
        seen[model.training].append(x)
        return original(model, x, temperature)

    def noted(args, x, output):
        wanted[torch.is_grad_enabled()].append(x)
        return loss(args, x, output)

    monkeypatch.setattr(modules.PatchVAE, "forward", forward)
    monkeypatch.setattr(run, "loss", noted)
    run.main(["--dataset", "digits", *TINY, "--hide", "0.5", "--output-folder", str(tmp_path)])
    for shown, whole in zip(seen[True], wanted[True], strict=True):
        assert torch.equal(shown[shown != 0], whole[shown != 0])
        assert 0.3 < ((shown == 0) & (whole != 0)).sum() / (whole != 0).sum() < 0.7
    tested = len(wanted[False])  # what follows is drawn
    assert tested and all(map(torch.equal, seen[False][:tested], wanted[False]))


def test_model_file_is_the_best_so_far(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    totals = [line["total"] for line in lines if line["event"] == "test"]
    saved = checkpoints.load(finished[0] / "model.pt", checkpoints.MODEL)
    assert saved["test"]["total"] == pytest.approx(min(totals), rel=1e-5)


def test_pictures_are_grids_of_the_images(finished):
    picture = Image.open(finished[0] / "images" / "reconstructions_epoch_001.png")
    assert picture.size == (12 * 66 + 2, 2 * 66 + 2)  # twelve digits of 32 pixels, twice as large, over their copies
    assert len(np.unique(np.asarray(picture))) > 20


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{term: line[term] for term in TERMS} for line in lines if line["event"] in ("train", "test")]


def test_one_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    for name, seed, workers in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        options = [*TINY, "--seed", str(seed), "--workers", str(workers), "--output-folder", str(tmp_path / name)]
        run.main(["--dataset", "digits", *options])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.parametrize(
    "options",
    [
        "--arch vae", "--recon-mask edge", "--hard", "--categorical", "--independent --num-parts 8", "--dataset shapes",
        "--dataset bincircles --encoder-arch pyramid --scale 4", "--inet --hard --categorical",
        "--encoder-arch alexnet", "--size 64 --encoder-arch resnet18", "--beta-app 2 --beta-occ 3",
        "--num-parts 1 --py 0.5 --no-cuda", "--arch vae --encoder-arch resnet50",
    ],
)  # fmt: skip
def test_every_option_trains(options, tmp_path):
    figures = run.main(["--dataset", "digits", *TINY, *options.split(), "--output-folder", str(tmp_path)])
    assert np.isfinite(figures["total"]) and (tmp_path / "model.pt").is_file()


def test_training_goes_on_from_a_pretrained_model(finished, tmp_path):
    weights = str(finished[0] / "model.pt")
    options = ["--dataset", "digits", "--num-epochs", "1", "--img-per-epoch", "16", "--lr", "1e-12", "--workers", "0"]
    run.main([*options, "--pretrained", weights, "--output-folder", str(tmp_path)])
    before, after = (checkpoints.load(path, checkpoints.MODEL)["model"] for path in (weights, tmp_path / "model.pt"))
    for name in before:
        if "running" not in name and "num_batches" not in name:  # statistics move with every batch
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-9)


def test_overwrite_replaces_a_run_and_nothing_else(finished, tmp_path):
    options = ["--dataset", "digits", *TINY, "--output-folder", str(tmp_path)]
    run.main(options)
    (tmp_path / "notes.txt").write_text("mine")
    run.main([*options, "--overwrite"])
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(losses(tmp_path)) == 2


def test_last_lines_say_what_was_learned_and_what_to_do_next(finished, tmp_path, capsys):
    run.main(["--dataset", "digits", *TINY, "--output-folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    learned = next(number for number, line in enumerate(lines) if "reconstruction error" in line)
    assert "of 16 parts in use" in lines[learned + 1]
    assert "tensorboard --logdir" in lines[-2] and "classifier.py" in lines[-1]


# ------------------------------------------------------------------------------------------------ the seed's commands

FEW = ["--num-epochs", "1", "--img-per-epoch", "4", "--batch-size", "2"]


def seed_command(dataset):
    """The run.py command for `dataset` of the README, as the list of its options."""
    blocks = (ROOT / "README.md").read_text().split("```")
    text = next(block for block in blocks if "python run.py" in block and f"--dataset={dataset}" in block)
    return text[text.index("run.py") + 6 :].replace("\\", " ").split()


def placed(options, data, output):
    filled = {"/path/to/logs/directory": str(output)}
    return [filled.get(option, str(data) if option.startswith("/path/to/") else option) for option in options]


def test_seed_command_places205(tmp_path):
    lists = tmp_path / "data" / "trainvalsplit_places205"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}_places205.csv").write_text("".join(f"a/abbey/{split}{i}.jpg 0\n" for i in range(4)))
        for number in range(4):
            images = tmp_path / "data" / "data/vision/torralba/deeplearning/images256"
            paint(images / f"a/abbey/{split}{number}.jpg", side=(256, 256), seed=number)
    run.main([*placed(seed_command("places205"), tmp_path / "data", tmp_path / "out"), *FEW])
    assert json.loads((tmp_path / "out/args.json").read_text())["size"] == 64


def test_seed_command_imagenet(tmp_path):
    for split in ("train", "val"):
        paint_classes(tmp_path / "data" / split, images=2, side=(300, 250))
    run.main([*placed(seed_command("imagenet"), tmp_path / "data", tmp_path / "out"), *FEW])
    described = checkpoints.load(tmp_path / "out/model.pt", checkpoints.MODEL)["options"]
    assert (described["size"], described["scale"], described["num_parts"], described["hidden_size"]) == (
        224,
        32,
        64,
        16,
    )


def test_seed_command_cifar100(tmp_path, monkeypatch):
    import torchvision
    from test_datasets import tiny_cifar

    tiny_cifar(
        tmp_path, "cifar-100-python", ["train", "test"], ("meta", "fine_label_names"), "fine_labels", list("abcde")
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    run.main([*placed(seed_command("cifar100"), tmp_path, tmp_path / "out"), *FEW])
    assert (tmp_path / "out/model.pt").is_file()


def test_help_is_grouped_and_advises_on_every_option():
    shown = run.build_parser().format_help()
    for title in ("data:", "model:", "loss:", "training:", "output:"):
        assert f"\n{title}" in shown
    assert all(action.help for action in run.build_parser()._actions)
