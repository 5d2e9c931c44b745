"""run.py from the command line to the files that it leaves."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, events, paint_classes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import modules
import run
from utils import training

TERMS = ("recon", "kl_app", "kl_occ", "kl_app_weighted", "kl_occ_weighted", "total")
DIGITS = ["--dataset", "digits", *TINY]


def losses(folder):
    return [{term: line[term] for term in TERMS} for line in events(folder) if line["event"] in ("train", "test")]


def test_output_folder_holds_what_the_readme_says(finished):
    folder, best = finished
    names = {".lock", "args.json", "checkpoints", "images", "logs", "metrics.jsonl", "model.pt"}
    assert {path.name for path in folder.iterdir()} == names and len(list((folder / "checkpoints").iterdir())) == 2
    pictures = {f"{kind}_epoch_00{epoch}.png" for kind in ("occurrence", "reconstructions", "samples")
                for epoch in (1, 2)}
    assert {path.name for path in (folder / "images").iterdir()} == pictures
    picture = Image.open(folder / "images" / "reconstructions_epoch_001.png")
    assert picture.size[0] > 12 * 32 and picture.size[1] >= 2 * 32  # twelve digits of 32 pixels over their copies
    assert len(np.unique(np.asarray(picture))) > 20
    args = json.loads((folder / "args.json").read_text())
    assert args["dataset"] == "digits" and args["torch"] == torch.__version__
    content = training.load(folder / "model.pt", training.MODEL)  # the best so far, and how to rebuild it
    modules.build_model(content["options"]).load_state_dict(content["model"])
    assert content["test"]["total"] == best["total"]
    assert best["total"] == pytest.approx(min(line["total"] for line in events(folder, "test")), rel=1e-5)


def test_metrics_and_tensorboard_have_every_figure_and_picture(finished):
    lines = events(finished[0])
    assert [line["event"] for line in lines] == ["train", "train", "test", "train", "train", "test", "end"]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4]
    assert all(set(TERMS) <= set(line) for line in lines)
    board = EventAccumulator(str(finished[0] / "logs"), size_guidance={"images": 0})
    board.Reload()
    wanted = {f"loss/{split}/{term}" for split in ("train", "test") for term in TERMS}
    wanted |= {f"run/{name}" for name in ("temperature", "learning_rate", "images_per_second")}
    assert wanted | {"parts/in_use", "parts/above_half", "result/total"} <= set(board.Tags()["scalars"])
    assert {"reconstructions", "occurrence", "samples"} <= set(board.Tags()["images"])
    assert [event.step for event in board.Scalars("loss/train/recon")] == [1, 2, 3, 4]


@pytest.mark.parametrize("options", ["--beta-v 3 --recon-mask edge", "--arch vae --beta-a 2"])
def test_evaluate_repeats_the_figures_of_training_with_its_options(options, tmp_path):
    trained = run.main([*DIGITS, *options.split(), "--output-folder", str(tmp_path)])
    tested = run.main(["--evaluate", "--workers", "0", "--pretrained", str(tmp_path), "--output-folder", str(tmp_path)])
    assert {name: trained[name] for name in tested} == pytest.approx(tested, rel=1e-5)


def test_evaluate_needs_test_images_alone_and_leaves_the_folder_free(tmp_path):
    for split in ("train", "val"):
        paint_classes(tmp_path / "data" / split, images=4)
    options = ["--dataset", "imagenet", "--data-folder", str(tmp_path / "data"), "--size", "32", *TINY]
    run.main([*options, "--output-folder", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "data" / "train")
    run.main(["--evaluate", "--pretrained", str(tmp_path / "run"), "--output-folder", str(tmp_path / "other")])
    pictures = {"occurrence.png", "reconstructions.png", "samples.png"}
    assert {path.name for path in (tmp_path / "other" / "evaluated").iterdir()} == pictures
    assert training.check_folder(tmp_path / "other", run.CONTENTS) == []


def test_evaluate_tests_all_of_another_folder_and_of_the_models_own_what_was_held_out(class_folder, tmp_path, capsys):
    data = ["--dataset", "folder", "--data-folder", str(class_folder)]
    place = ["--output-folder", str(tmp_path / "run")]
    run.main([*data, "--size", "32", *TINY, *place])
    other = ["--data-folder", str(paint_classes(tmp_path / "other"))]
    for more, images in (([], 3), (data, 3), (["--resume"], 3), (["--resume", *data[2:]], 3), (other, 12)):
        capsys.readouterr()
        run.main(["--evaluate", *place, *more])
        assert f"folder: {images} test images" in capsys.readouterr().out, more


def test_another_data_set_is_not_looked_for_in_the_folder_of_the_first(finished):
    saved = training.load(finished[0] / "model.pt", training.MODEL)["args"]["data_folder"]
    for more, expected in (([], saved), (["--dataset", "digits"], saved), (["--dataset", "mnist"], "./data")):
        assert run.parse(["--evaluate", "--output-folder", str(finished[0]), *more])[0].data_folder == expected


def test_home_and_other_names_of_options(monkeypatch):
    settings, *_ = run.parse(["--output-folder=~/x", "--epochs", "7", "--learning-rate", "0.5", "--beta-occ", "3"])
    assert settings.output_folder == os.path.expanduser("~/x")
    assert (settings.num_epochs, settings.lr, settings.beta_v) == (7, 0.5, 3)
    with pytest.raises(AttributeError, match="changed"):
        settings.lr = 1
    assert settings.changed(lr=1).lr == 1 and settings.lr == 0.5


def test_what_is_hidden_has_to_be_reconstructed_and_tests_hide_nothing(tmp_path, monkeypatch):
    seen, wanted, loss = {True: [], False: []}, {True: [], False: []}, run.loss

    def forward(model, x, temperature=1.0, original=modules.PatchVAE.forward):
        seen[model.training].append(x)
        return original(model, x, temperature)

    def noted(settings, x, output):
        wanted[torch.is_grad_enabled()].append(x)
        return loss(settings, x, output)

    monkeypatch.setattr(modules.PatchVAE, "forward", forward)
    monkeypatch.setattr(run, "loss", noted)
    run.main([*DIGITS, "--hide", "0.5", "--output-folder", str(tmp_path)])
    for shown, whole in zip(seen[True], wanted[True], strict=True):
        assert torch.equal(shown[shown != 0], whole[shown != 0])
        assert 0.3 < ((shown == 0) & (whole != 0)).sum() / (whole != 0).sum() < 0.7
    tested = len(wanted[False])  # what follows is drawn
    assert tested and all(map(torch.equal, seen[False][:tested], wanted[False]))


def test_one_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    for name, seed, workers in (("a", "3", "0"), ("b", "3", "1"), ("c", "4", "0")):
        run.main([*DIGITS, "--seed", seed, "--workers", workers, "--output-folder", str(tmp_path / name)])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


EVERY_OPTION = (
    "--arch vae", "--recon-mask edge", "--hard", "--categorical", "--independent --num-parts 8", "--dataset shapes",
    "--dataset bincircles --encoder-arch pyramid --scale 4", "--inet --hard --categorical", "--target edges",
    "--encoder-arch alexnet", "--size 64 --encoder-arch resnet18", "--beta-app 2 --beta-occ 3", "--precision bf16",
    "--num-parts 1 --py 0.5 --no-cuda", "--arch vae --encoder-arch resnet50", "--grey 0.5 --dataset shapes",
    "--encoder-arch patches --decoder-arch patches --scale 8",
)


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_every_option_trains(options, tmp_path):
    figures = run.main([*DIGITS, *options.split(), "--output-folder", str(tmp_path)])
    assert np.isfinite(figures["total"]) and (tmp_path / "model.pt").is_file()


def test_training_goes_on_from_a_pretrained_model(finished, tmp_path):
    options = ["--dataset", "digits", "--num-epochs", "1", "--img-per-epoch", "16", "--lr", "1e-12", "--workers", "0"]
    run.main([*options, "--pretrained", str(finished[0]), "--output-folder", str(tmp_path)])
    before, after = (training.load(place / "model.pt", training.MODEL)["model"] for place in (finished[0], tmp_path))
    for name in before:
        if "running" not in name and "num_batches" not in name:  # statistics move with every batch
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-9)


def test_overwrite_replaces_a_run_and_nothing_else_and_last_lines_say_what_was_learned(tmp_path, capsys):
    options = [*DIGITS, "--output-folder", str(tmp_path)]
    run.main(options)
    (tmp_path / "notes.txt").write_text("mine")
    capsys.readouterr()
    run.main([*options, "--overwrite"])
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(losses(tmp_path)) == 2
    *_, learned, in_use, board, parts, judge = capsys.readouterr().out.splitlines()
    assert "reconstruction error" in learned and "of 16 parts" in in_use
    assert "tensorboard --logdir" in board and "parts.py" in parts and "classifier.py" in judge


# ------------------------------------------------------------------------------------------------ the seed's commands


def seed_command(dataset, data, output):
    """The run.py command for `dataset` of the README, as the list of its options, made short."""
    blocks = (ROOT / "README.md").read_text().split("```")
    text = next(block for block in blocks if "python run.py" in block and f"--dataset={dataset}" in block)
    options, filled = text[text.index("run.py") + 6 :].replace("\\", " ").split(), {"/path/to/logs/directory": output}
    placed = [str(filled.get(option, data)) if option.startswith("/path/to/") else option for option in options]
    return [*placed, "--num-epochs", "1", "--img-per-epoch", "4", "--batch-size", "2"]


def test_seed_command_places205(tmp_path):
    images = paint_classes(tmp_path / "data/vision/torralba/deeplearning/images256", ["a/abbey"], 4, (256, 256))
    (tmp_path / "trainvalsplit_places205").mkdir()
    for split in ("train", "val"):
        lines = [f"{path.relative_to(images)} 0\n" for path in images.rglob("*.jpg")]
        (tmp_path / f"trainvalsplit_places205/{split}_places205.csv").write_text("".join(lines))
    run.main(seed_command("places205", tmp_path, tmp_path / "out"))
    assert json.loads((tmp_path / "out/args.json").read_text())["size"] == 64


def test_seed_command_imagenet(tmp_path):
    for split in ("train", "val"):
        paint_classes(tmp_path / "data" / split, images=2, side=(300, 250))
    run.main(seed_command("imagenet", tmp_path / "data", tmp_path / "out"))
    described = training.load(tmp_path / "out/model.pt", training.MODEL)["options"]
    assert [described[name] for name in ("size", "scale", "num_parts", "hidden_size")] == [224, 32, 64, 16]


def test_seed_command_cifar100(tmp_path, monkeypatch):
    import torchvision
    from test_datasets import tiny_cifar

    labels = ("meta", "fine_label_names"), "fine_labels", list("abcde")
    tiny_cifar(tmp_path, "cifar-100-python", ["train", "test"], *labels)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    run.main(seed_command("cifar100", tmp_path, tmp_path / "out"))
    assert (tmp_path / "out/model.pt").is_file()


def test_help_is_grouped_and_advises_on_every_option():
    shown = run.build_parser().format_help()
    for title in ("data:", "model:", "loss:", "training:", "output:"):
        assert f"\n{title}" in shown or f" {title}" in shown
    assert all(action.help for action in run.build_parser()._actions)
