"""utils/indoor.py moves exactly the listed images, refuses every bad input untouched, and never loses an image."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call

from utils import indoor
from utils.runtime import start

TEST = ["kitchen/plain.jpg", "kitchen/with  two spaces.jpg", "bar/ Küche.jpg ", "bar/\x85\x0b*[x]?.jpg"]
TRAIN = ["kitchen/a.jpg", "mall/b.jpg", "bar/плита.jpg"]
SPLIT = dict.fromkeys(TEST, "test") | dict.fromkeys(TRAIN, "train") | {"kitchen/left over.jpg": "Images"}
AFTER_TEST = {f"{'test' if name in TEST else 'Images'}/{name}": name for name in SPLIT}  # what images() is then
TEST_STEP = ["--image-dir", "data/indoor/Images", "--split-file", "data/indoor/TestImages.txt",
             "--target-dir", "data/indoor/test"]
TRAIN_STEP = [word.replace("TestImages", "TrainImages").replace("/test", "/train") for word in TEST_STEP]
STATE = "tar c . | cksum"  # a command that says another thing when any file, folder or link has changed


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """data/indoor below the current folder: images that hold their names, and lists without a newline at the end."""
    monkeypatch.chdir(tmp_path)
    for name in SPLIT:
        put(f"Images/{name}", name)
    put("TestImages.txt", "\n".join(TEST))
    put("TrainImages.txt", "\n".join(TRAIN))


def put(path, content, encoding="utf-8"):
    path = Path("data/indoor", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def shell(command):
    return subprocess.check_output(command, shell=True, cwd="data/indoor")


def images(folder="."):
    """{relative path: content} of all files below data/indoor/`folder` but the lists, hidden ones too."""
    files = [path for path in Path("data/indoor", folder).rglob("*") if path.is_file() and path.suffix != ".txt"]
    return {str(path.relative_to(f"data/indoor/{folder}")): path.read_text() for path in files}


def test_the_commands_of_the_readme_with_and_without_its_path(tmp_path):
    first = call("utils/indoor.py", *TEST_STEP, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    shell("cp -r Images allminustest")
    second = call("utils/indoor.py", *TRAIN_STEP, cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:"})
    assert (first.returncode, first.stdout, first.stderr) == (0, "4 images moved, 0 in place\n", "")
    assert (second.returncode, second.stdout, second.stderr) == (0, "3 images moved, 0 in place\n", "")
    copied = {f"allminustest/{name}": name for name in SPLIT if name not in TEST}
    assert images() == {f"{split}/{name}": name for name, split in SPLIT.items()} | copied


def test_dry_and_a_second_run_write_nothing(capsys):
    put(f"test/bar/{indoor.UNFINISHED}of a killed run", "half")
    os.link(f"data/indoor/Images/{TEST[2]}", f"data/indoor/test/{TEST[2]}")  # two names of one file
    before = shell(STATE)
    assert indoor.main([*TEST_STEP, "--dry"]) == 4 and shell(STATE) == before
    assert indoor.main(TEST_STEP) == 4 and images() == AFTER_TEST
    before = shell(STATE)
    assert indoor.main(TEST_STEP) == 0 and shell(STATE) == before
    assert capsys.readouterr().out.splitlines()[::2] == ["4 images to move, 0 in place", "0 images moved, 4 in place"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n \n"], ids=["LF", "CRLF", "blank lines"])
def test_lists_as_editors_leave_them(line_end, encoding):
    put("TestImages.txt", line_end.join([*TEST, ""]), encoding)
    indoor.main(TEST_STEP)
    assert images() == AFTER_TEST


def test_the_named_folders_may_be_links_and_a_terminal_shows_a_bar(monkeypatch, capsys):
    shell("mv Images big; mkdir other; ln -s big Images; ln -s other test")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    indoor.main(TEST_STEP)
    assert "moving: 100%" in capsys.readouterr().err and set(images("other")) == set(TEST)


BAD_INPUT = {  # what is said: commands in data/indoor that lead to it; Images holds bar/x, which the list names
    "data/indoor/TestImages.txt: ": ["rm TestImages.txt", "rm TestImages.txt; mkdir TestImages.txt"],
    "--split-file lists no image; README": [": > TestImages.txt", r"printf '\357\273\277\r\n \n' > TestImages.txt"],
    "2,500 of 2,501 images cannot be moved, so none was; the first: 'bar/1' is not a file in data/indoor/Images; '":
        ["seq -f bar/%g 2500 >> TestImages.txt"],
    "'bar/x' is listed more than once": [r"printf 'bar/x\nmall/b.jpg\n\nbar/x' > TestImages.txt"],
    "is not CLASS/FILE": [f"printf '{path}' > TestImages.txt" for path in (
        "../TestImages.txt", "bar/..", "./bar", "bar/.", "bar/../bar/x", "/etc/hostname", "/bar/x", "/x", "bar", "bar/",
        "bar//x", "bar/x/x", r"bar/x\0", r"\377\0\n\211\0", f"bar/{indoor.UNFINISHED}x")],
    "is not a file in data/indoor/Images": [
        "printf bar/%5000d > TestImages.txt", "rm -r Images/bar; touch Images/bar", "cd Images/bar; rm x; mkdir x",
        "cd Images/bar; rm x; mkfifo x", "rm Images/bar/x; mkdir -p test/bar/x"],
    "'bar/x' is a symbolic link or lies in one": ["ln -sf ../../TestImages.txt Images/bar/x",
        "ln -sf ../mall/b.jpg Images/bar/x", "ln -sf nowhere Images/bar/x", "mv Images/bar .; ln -s ../bar Images",
        "mkdir -p test/bar; ln -s ../../Images/bar/x test/bar", "mkdir test; ln -s ../Images/bar test"],
    "with other content; remove one": ["mkdir -p test/bar; echo other > test/bar/x", "mkdir -p test/bar/x"],
    "cannot go to data/indoor/test/bar, which is a file": ["mkdir test; touch test/bar"],
    "--target-dir data/indoor/test is not a folder": ["touch test", "ln -s nowhere test"],
    "--image-dir data/indoor/Images is not a folder; README": ["rm -r Images", "rm -r Images; touch Images"],
    "lie one inside the other": [f"ln -s {to} test" for to in ("Images", "Images/bar", ".", "../indoor/Images/new")],
}


@pytest.mark.parametrize("words, command", [(words, command) for words in BAD_INPUT for command in BAD_INPUT[words]])
def test_bad_input_is_refused_untouched(line_of_error, words, command):
    put("Images/bar/x", "x")
    put("TestImages.txt", "bar/x\n")
    shell(command)
    before = shell(STATE)
    for options in [*TEST_STEP, "--dry"], TEST_STEP:
        status, line = line_of_error(indoor.main, options)
        assert words in line and len(line) < 2_000 and status == (2 if "inside" in words else 1)
        assert shell(STATE) == before


def watch_disk(monkeypatch, disks, act=lambda name: None):
    """Let each change of the disk call act(its name) first; no rename leads from one of two `disks` to the other."""
    for module, effect in (os, os.rename), (os, os.fsync), (os, os.sync), (os, os.unlink), (shutil, shutil.copy2):

        def change(*paths, effect=effect, name=effect.__name__):
            act(name)
            if name == "rename" and disks == 2 and indoor.UNFINISHED not in str(paths[0]):
                raise OSError(errno.EXDEV, "another disk")
            effect(*paths)

        monkeypatch.setattr(module, effect.__name__, change)


def test_a_copy_is_on_the_disk_before_its_original_goes(monkeypatch):
    os.utime(f"data/indoor/Images/{TEST[0]}", (1_000_000, 1_000_000))
    done = []
    watch_disk(monkeypatch, 2, done.append)
    indoor.main(TEST_STEP)
    assert done == ["rename", "copy2", "fsync", "rename"] * 4 + ["sync"] + ["unlink"] * 4
    assert os.path.getmtime(f"data/indoor/test/{TEST[0]}") == 1_000_000


@pytest.mark.parametrize("name, replacement, words", [
    ("shutil.copy2", lambda here, there: there.write_text("damaged"), "differs from it; check both disks; no image is"),
    ("utils.indoor.check", lambda *_: put(f"test/{TEST[0]}", "other"), "appeared with other content than data/indoor"),
    ("utils.indoor.samefile", lambda *_: True, "by a bind mount, the folder it comes from")])
def test_an_original_stays_unless_the_target_has_the_same(monkeypatch, line_of_error, name, replacement, words):
    Path("data/indoor/test/kitchen").mkdir(parents=True)
    watch_disk(monkeypatch, 2)
    monkeypatch.setattr(name, replacement)
    assert words in line_of_error(indoor.main, TEST_STEP)[1] and set(images("Images")) == SPLIT.keys()
    assert all(indoor.UNFINISHED in path or content == "other" for path, content in images("test").items())


@pytest.mark.parametrize("stop, status, words", [
    (signal.SIGINT, 130, ": interrupted\n"), (signal.SIGTERM, 143, ": terminated\n"), (signal.SIGKILL, -9, ""),
    (signal.SIGUSR1, 143, ": terminated\n"), (errno.EROFS, 1, "Read-only file system; no image is lost"),
    (errno.ENOSPC, 1, "No space left on device; no image is lost: mend this and run the same command again\n")])
@pytest.mark.parametrize("disks, changes", [(1, 4), (2, 21)])
def test_a_run_stopped_at_any_change_is_completed_by_another(monkeypatch, capfd, disks, changes, stop, status, words):
    def act(name):
        if multiprocessing.parent_process() and next(steps_left, None) is None:
            if isinstance(stop, signal.Signals):
                signal.raise_signal(stop)
            raise OSError(stop, os.strerror(stop))

    watch_disk(monkeypatch, disks, act)
    for last in range(changes):
        steps_left = iter(range(last))
        process = multiprocessing.get_context("fork").Process(target=start, args=[lambda: indoor.main(TEST_STEP)])
        process.start()
        process.join()
        assert process.exitcode == status and words in capfd.readouterr().err and set(SPLIT) <= set(images().values())
        indoor.main(TEST_STEP)
        assert images() == AFTER_TEST
        shell("cp -r test/. Images; rm -r test")


def test_two_runs_at_once_lose_nothing():
    shell("for name in $(seq -f bar/%g 400 | tee TestImages.txt); do echo $name > Images/$name; done")
    runs = [subprocess.Popen([sys.executable, ROOT / "utils/indoor.py", *TEST_STEP]) for _ in range(2)]
    assert {run.wait(120) for run in runs} <= {0, 1}
    indoor.main(TEST_STEP)
    assert images("test") == {f"bar/{number}": f"bar/{number}\n" for number in range(1, 401)}
