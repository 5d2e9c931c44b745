"""utils/indoor.py moves exactly the listed images, refuses every bad input untouched, and never loses an image."""

import errno
import itertools
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import indoor  # noqa: E402
from utils.console import RunError, run  # noqa: E402

SCRIPT = str(ROOT / "utils" / "indoor.py")
TEST = ["kitchen/plain.jpg", "kitchen/with two spaces.jpg", "bar/плита.jpg", "bar/plain.jpg"]
TRAIN = ["kitchen/a.jpg", "mall/b.jpg", "bar/c.jpg"]
UNLISTED = ["kitchen/left over.jpg"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """data/indoor below the current folder: Images, each of other content, and both lists without a last newline."""
    monkeypatch.chdir(tmp_path)
    folder = Path("data/indoor")
    for name in TEST + TRAIN + UNLISTED:
        image = folder / "Images" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(name.encode() * 50)
    write_list(folder / "TestImages.txt", TEST)
    write_list(folder / "TrainImages.txt", TRAIN)
    return folder


def write_list(path, names):
    path.write_bytes("\n".join(names).encode())


def options(data, split="test", **changes):
    """The command line of one step of the README."""
    values = {"image_dir": data / "Images", "split_file": data / f"{split.title()}Images.txt",
              "target_dir": data / split, **changes}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(*words, **more):
    """The script as a user starts it."""
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60, **more)


def files(folder):
    """{relative path: content} of every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(folder):
    """All that a run could change below `folder`: paths, kinds, link targets, contents, inodes, times."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.lstat()[:2], path.lstat().st_mtime_ns, path.is_symlink() and os.readlink(path),
                        path.read_bytes() if path.is_file() else None) for path in paths}


def prepared(*splits):
    """files() of data/indoor after the steps `splits`."""
    place = {name: split for split, names in (("test", TEST), ("train", TRAIN)) if split in splits for name in names}
    expected = {f"{place.get(name, 'Images')}/{name}": name.encode() * 50 for name in TEST + TRAIN + UNLISTED}
    return expected | {"TestImages.txt": "\n".join(TEST).encode(), "TrainImages.txt": "\n".join(TRAIN).encode()}


# The commands of the README


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": f"{ROOT}:"}], ids=["bare", "with PYTHONPATH"])
def test_the_commands_of_the_readme(data, environment):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    first = command(*options(data, "test"), env=environment)
    shutil.copytree(data / "Images", data / "allminustest")
    second = command(*options(data, "train"), env=environment)

    assert (first.returncode, first.stderr, second.returncode, second.stderr) == (0, "", 0, "")
    assert first.stdout.splitlines() == [
        "     2 bar", "     2 kitchen", "     4 images of 2 classes for data/indoor/test: 4 moved; 0 were there"]
    assert second.stdout.splitlines()[-1].startswith("     3 images of 3 classes for data/indoor/train: 3 moved")
    found = files(data)
    copied = {name: found.pop(f"allminustest/{name}") for name in TRAIN + UNLISTED}
    assert copied == {name: name.encode() * 50 for name in TRAIN + UNLISTED}
    assert found == prepared("test", "train")


def test_main_returns_the_count_of_each_class(data):
    assert indoor.main(options(data)) == {"kitchen": 2, "bar": 2}


def test_twice_is_harmless(data, capsys):
    indoor.main(options(data))
    before = state(data)
    assert indoor.main(options(data)) == {"kitchen": 2, "bar": 2}
    assert state(data) == before
    assert capsys.readouterr().out.endswith(": 0 moved; 4 were there\n")


def test_dry_writes_nothing(data, capsys):
    (data / "test" / "bar").mkdir(parents=True)
    (data / "test" / "bar" / f"{indoor.LEFTOVER}of a killed run").touch()
    before = state(data)
    assert indoor.main([*options(data), "--dry"]) == {"kitchen": 2, "bar": 2}
    assert state(data) == before
    assert "4 would be moved, nothing was written; 0 were there" in capsys.readouterr().out


def test_dry_refuses_what_the_run_would_refuse(data):
    (data / "Images" / TEST[0]).unlink()
    before = state(data)
    with pytest.raises(RunError, match="1 of 4 lines cannot be moved"):
        indoor.main([*options(data), "--dry"])
    assert state(data) == before


@pytest.mark.parametrize("text", [
    "\r\n".join(TEST),
    "\ufeff" + "\n".join(TEST),
    "\n\n \n".join(TEST) + "\n\r\n\n",
    "\ufeff" + "\r\n".join(TEST) + "\r\n",
], ids=["CRLF", "byte-order mark", "blank lines", "all of them"])
def test_lists_as_editors_leave_them(data, text):
    (data / "TestImages.txt").write_bytes(text.encode())
    indoor.main(options(data))
    write_list(data / "TestImages.txt", TEST)
    assert files(data) == prepared("test")


def test_names_keep_their_outer_spaces(data):
    odd = ["bar/ before.jpg", "bar/after.jpg ", "bar/vertical\x0btab.jpg", "bar/*[x]?.jpg"]
    for name in odd:
        (data / "Images" / name).write_text(name)
    write_list(data / "TestImages.txt", odd)
    indoor.main(options(data))
    assert {name: (data / "test" / name).read_text() for name in odd} == {name: name for name in odd}


def test_the_named_folders_may_be_links(data):
    shutil.move(data / "Images", "big disk")
    Path("other disk").mkdir()
    (data / "Images").symlink_to(Path("big disk").absolute())
    (data / "test").symlink_to(Path("other disk").absolute())
    indoor.main(options(data))
    assert {name for name in files(Path("other disk"))} == set(TEST)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_on_a_terminal_only(data, terminal):
    read, write = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(write, (24, 80))  # the bar of a terminal without width is empty
    subprocess.run([sys.executable, SCRIPT, *options(data)], stdout=subprocess.DEVNULL, stderr=write, check=True)
    os.write(write, b"end")
    seen = b""
    while not seen.endswith(b"end"):
        seen += os.read(read, 10_000)
    assert (b"moving: 100%" in seen) is terminal


# Bad input: what is wrong, how to mend it, and not one file touched


def no_list(data):
    (data / "TestImages.txt").unlink()


def no_images(data):
    shutil.rmtree(data / "Images")


def list_of(content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda data: (data / "TestImages.txt").write_bytes(content)


def link_of(path, to):
    """Put a symbolic link at `path` that leads to `to`, a path below data/indoor, in place of what stands there."""
    def prepare(data):
        place = data / path
        if place.exists():
            shutil.move(place, "moved away")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.abspath(data / to))
    return prepare


def file_at(path, content=b"other"):
    def prepare(data):
        if (data / path).is_dir():
            shutil.move(data / path, "moved away")
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_bytes(content)
    return prepare


def folder_at(path):
    def prepare(data):
        (data / path).unlink(missing_ok=True)
        (data / path).mkdir(parents=True)
    return prepare


def fifo_at(path):
    def prepare(data):
        (data / path).unlink()
        os.mkfifo(data / path)
    return prepare


def moved_by_another_list(data):
    (data / "train" / "kitchen").mkdir(parents=True)
    os.rename(data / "Images" / TEST[0], data / "train" / TEST[0])


SHAPE = "is not CLASS/FILE below data/indoor/Images"
BAD_LISTS = {
    "missing list": (no_list, "--split-file data/indoor/TestImages.txt: No such file", "official lists are http"),
    "list is a folder": (folder_at("TestImages.txt"), "--split-file data/indoor/TestImages.txt: Is a directory"),
    "empty list": (list_of(""), "--split-file data/indoor/TestImages.txt lists no image; download it again"),
    "only blank lines": (list_of("\ufeff\r\n \n"), "lists no image"),
    "not UTF-8": (list_of(b"bar/plain.jpg\nbar/\xff.jpg"), "TestImages.txt is not UTF-8 text; download it again"),
    "missing image": (list_of("bar/plain.jpg\nbar/none.jpg"), "line 2: 'bar/none.jpg' is not in data/indoor/Images;",
                      "1 of 2 lines cannot be moved", "run the same command again"),
    "all problems at once": (list_of("bar/none.jpg\n\n../x\nbar/plain.jpg"), "line 1: 'bar/none.jpg'",
                             "line 3: '../x'", "2 of 3 lines cannot be moved"),
    "too many to show": (list_of("\n".join(f"bar/{i}" for i in range(25))), "line 20: 'bar/19'", "\n... and 5 more\n",
                         "25 of 25 lines"),
    "parent folder": (list_of("../TestImages.txt"), f"line 1: '../TestImages.txt' {SHAPE}"),
    "parent as file": (list_of("bar/.."), SHAPE),
    "this folder": (list_of("./bar"), SHAPE),
    "this folder as file": (list_of("bar/."), SHAPE),
    "parent in between": (list_of("bar/../bar/plain.jpg"), SHAPE),
    "absolute path": (list_of("/etc/hostname"), SHAPE),
    "absolute file": (list_of("/hostname"), SHAPE),
    "class alone": (list_of("bar"), SHAPE),
    "empty file": (list_of("bar/"), SHAPE),
    "too deep": (list_of("bar/plain.jpg/x"), SHAPE),
    "NUL": (list_of("bar/plain.jpg\0"), r"line 1: 'bar/plain.jpg\x00'", SHAPE),
    "name of an incomplete copy": (list_of(f"bar/{indoor.LEFTOVER}x"), SHAPE),
    "name too long": (list_of("bar/" + "x" * 300), "is not in data/indoor/Images"),
    "repeated line": (list_of("bar/plain.jpg\nbar/c.jpg\nbar/plain.jpg"), "line 3: 'bar/plain.jpg' repeats line 1"),
    "image is a link out": (link_of("Images/bar/plain.jpg", "TestImages.txt"), "needs a real file, but",
                            "Images/bar/plain.jpg is a symbolic link; put there what it points to"),
    "image is a link inside": (link_of("Images/bar/plain.jpg", "Images/bar/c.jpg"), "needs a real file"),
    "image is a broken link": (link_of("Images/bar/plain.jpg", "nowhere"), "needs a real file"),
    "class is a link out": (link_of("Images/bar", "."), "needs a real folder, but data/indoor/Images/bar is a"),
    "class is a file": (file_at("Images/bar"), "needs a folder, but data/indoor/Images/bar is none"),
    "image is a folder": (folder_at("Images/bar/plain.jpg"),
                          "needs a file, but data/indoor/Images/bar/plain.jpg is none"),
    "image is a pipe": (fifo_at("Images/bar/plain.jpg"), "needs a file"),
    "target has other content": (file_at("test/bar/plain.jpg"), "line 4: 'bar/plain.jpg' is in data/indoor/test "
                                 "already with other content; remove one of the two"),
    "target is a link to the image": (link_of("test/bar/plain.jpg", "Images/bar/plain.jpg"),
                                      "needs a real file, but data/indoor/test/bar/plain.jpg is a symbolic link"),
    "target is a folder": (folder_at("test/bar/plain.jpg"),
                           "needs a file, but data/indoor/test/bar/plain.jpg is none"),
    "target class is a file": (file_at("test/bar"), "needs a folder, but data/indoor/test/bar is none"),
    "target class is a link": (link_of("test/bar", "Images/bar"), "needs a real folder, but data/indoor/test/bar is"),
    "target is a file": (file_at("test"), "--target-dir data/indoor/test is a file or a broken link; remove it"),
    "target is a broken link": (link_of("test", "nowhere"), "data/indoor/test is a file or a broken link"),
    "in another split": (moved_by_another_list, "line 1: 'kitchen/plain.jpg' is not in data/indoor/Images but in "
                         "data/indoor/train; was it moved there by another list?"),
    "no images": (no_images, "--image-dir data/indoor/Images is not a folder; download http",
                  "tar -xf indoorCVPR_09.tar -C data/indoor"),
}


@pytest.mark.parametrize("prepare, messages", [(prepare, messages) for prepare, *messages in BAD_LISTS.values()],
                         ids=BAD_LISTS.keys())
def test_bad_input_is_refused_untouched(data, monkeypatch, capsys, prepare, messages):
    prepare(data)
    before = state(Path())
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # leave those of pytest alone
    with pytest.raises(SystemExit) as end:
        run(lambda: indoor.main(options(data)))
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (1, "")
    assert all(message in printed.err for message in messages), printed.err
    assert state(Path()) == before


def test_bad_input_on_the_command_line(data):
    list_of("bar/plain.jpg\nbar/none.jpg\n../x")(data)
    before = state(data)
    result = command(*options(data))
    assert (result.returncode, result.stdout) == (1, "")
    assert [line.split(" is not ")[0] for line in result.stderr.splitlines()] == [
        "line 2: 'bar/none.jpg'", "line 3: '../x'",
        "indoor.py: error: --split-file data/indoor/TestImages.txt: 2 of 3 lines cannot be moved, see above; "
        "nothing was moved: mend them and run the same command again"]
    assert state(data) == before


@pytest.mark.parametrize("target", ["Images", "Images/test", "", "../indoor/Images/", "link"])
def test_folders_within_each_other_are_refused(data, target):
    (data / "link").symlink_to("Images")
    before = state(data)
    result = command(*options(data, target_dir=data / target))
    assert result.returncode == 2
    assert "one inside the other; choose a folder beside it, such as data/indoor/test" in result.stderr
    assert state(data) == before


def test_one_folder_under_two_names_is_refused(data, monkeypatch):
    """As by a bind mount, which no path shows."""
    monkeypatch.setattr(indoor, "samefile", lambda one, other: True)
    shutil.copytree(data / "Images", data / "test")
    before = state(data)
    with pytest.raises(RunError):
        indoor.main(options(data))
    assert state(data) == before


# Stopped at any point, the same command completes the run


class Killed(BaseException):
    """The process died here: no effect of a later call reaches the disk either."""


EFFECTS = [(os, "rename"), (os, "unlink"), (os, "mkdir"), (os, "fsync"), (shutil, "copy2"), (tempfile, "mkstemp")]


def die_at(monkeypatch, step, after):
    """Let the process die at the `step`-th of all calls that change the disk, before or after its effect."""
    steps = itertools.count()

    def mortal(effect):
        def call(*arguments, **more):
            number = next(steps)
            if number < step or (number == step and after):
                result = effect(*arguments, **more)
            if number >= step:
                raise Killed
            return result
        return call

    for module, name in EFFECTS:
        monkeypatch.setattr(module, name, mortal(getattr(module, name)))


def other_file_system(monkeypatch, code=errno.EXDEV):
    """Let a rename from Images to the target fail as it does between two disks, or with another `code`."""
    def rename(here, there, effect=os.rename):
        if indoor.LEFTOVER not in str(here):
            raise OSError(code, os.strerror(code))
        effect(here, there)
    monkeypatch.setattr(os, "rename", rename)


def assert_no_image_lost(data):
    contents = list(files(data / "Images").values()) + list(files(data / "test").values())
    assert {name.encode() * 50 for name in TEST + TRAIN + UNLISTED} <= set(contents)


def run_killed(data, monkeypatch, step, after, far):
    """Whether the run reached its `step`-th change of the disk, where it is killed."""
    with monkeypatch.context() as patch:
        if far:
            other_file_system(patch)
        die_at(patch, step, after)
        try:
            indoor.main(options(data))
        except Killed:
            return True
    return False


@pytest.mark.parametrize("far", [False, True], ids=["one file system", "two file systems"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_change_of_the_disk(data, monkeypatch, far, after):
    fresh = shutil.copytree(data, "fresh")
    for step in itertools.count():
        killed = run_killed(data, monkeypatch, step, after, far)
        assert_no_image_lost(data)
        with monkeypatch.context() as patch:
            if far:
                other_file_system(patch)
            indoor.main(options(data))
        assert files(data) == prepared("test")
        shutil.rmtree(data)
        shutil.copytree(fresh, data)
        if not killed:
            break
    assert step >= len(TEST) * (6 if far else 2)


REAL_KILL = """
import os, shutil, signal, sys
from utils import indoor
where, far = sys.argv.pop(1), sys.argv.pop(1) == "far"
calls, effects = [0], {"rename": os.rename, "copy2": shutil.copy2, "unlink": os.unlink}

def deadly(name):
    def call(here, there=None, **more):
        if name == "rename" and far and indoor.LEFTOVER not in str(here):
            raise OSError(18, "Invalid cross-device link")
        calls[0] += name == where
        if (name, calls[0]) == (where, 3):
            if name == "copy2":  # half of the bytes are written
                open(there, "wb").write(open(here, "rb").read(100))
            os.kill(os.getpid(), signal.SIGKILL)
        return effects[name](*([here] if there is None else [here, there]), **more)
    return call

os.rename, shutil.copy2, os.unlink = deadly("rename"), deadly("copy2"), deadly("unlink")
indoor.main()
"""


@pytest.mark.parametrize("where, far", [("rename", "near"), ("rename", "far"), ("copy2", "far"), ("unlink", "far")])
def test_really_killed(data, where, far):
    result = subprocess.run([sys.executable, "-c", REAL_KILL, where, far, *options(data)],
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert (data / "test" / TEST[0]).exists() and (data / "Images" / TEST[-1]).exists()
    assert_no_image_lost(data)
    indoor.main(options(data))
    assert files(data) == prepared("test")


@pytest.mark.parametrize("number, status, line",
                         [(signal.SIGTERM, 143, "terminated"), (signal.SIGUSR1, 143, "terminated"),
                          (signal.SIGINT, 130, "interrupted")])
def test_stopped_by_a_signal_in_the_middle(data, number, status, line):
    program = """
import os, shutil, signal, sys
from utils import console, indoor
def rename(here, there): raise OSError(18, "Invalid cross-device link")
def copy2(here, there): open(there, "wb").write(b"half"); os.kill(os.getpid(), int(sys.argv.pop(1))); signal.pause()
os.rename, shutil.copy2 = rename, copy2
console.run(lambda: indoor.main(sys.argv[2:]))
"""
    result = subprocess.run([sys.executable, "-c", program, str(int(number)), *options(data)], capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (status, f"-c: {line}\n")
    assert files(data) == prepared()
    indoor.main(options(data))
    assert files(data) == prepared("test")


def test_a_hard_link_left_between_link_and_unlink(data):
    """Both names of one file: only the name in Images goes."""
    (data / "test" / "bar").mkdir(parents=True)
    os.link(data / "Images" / "bar" / "plain.jpg", data / "test" / "bar" / "plain.jpg")
    indoor.main(options(data))
    assert files(data) == prepared("test")


def test_leftovers_of_a_killed_copy_are_removed(data):
    (data / "test" / "bar").mkdir(parents=True)
    (data / "test" / "bar" / f"{indoor.LEFTOVER}half").write_bytes(b"half")
    indoor.main(options(data))
    assert files(data) == prepared("test")


# Another file system, full disks, races


def test_between_file_systems(data, monkeypatch):
    image = data / "Images" / TEST[0]
    image.chmod(0o640)
    os.utime(image, (1_000_000, 1_000_000))
    other_file_system(monkeypatch)
    indoor.main(options(data))
    assert files(data) == prepared("test")
    moved = (data / "test" / TEST[0]).stat()
    assert (moved.st_mode & 0o777, moved.st_mtime) == (0o640, 1_000_000)


def test_a_copy_is_on_the_disk_before_its_original_goes(data, monkeypatch):
    done = []

    def log(name, describe):
        def call(*arguments, effect=getattr(os, name)):
            effect(*arguments)
            done.append(describe(arguments[0]))
        monkeypatch.setattr(os, name, call)

    write_list(data / "TestImages.txt", TEST[:1])
    other_file_system(monkeypatch)
    log("fsync", lambda handle: "flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "flush file")
    log("rename", lambda path: "rename copy")
    log("unlink", lambda path: "remove original")
    indoor.main(options(data))
    assert done == ["flush file", "rename copy", "flush folder", "remove original"]


def test_a_rename_that_is_forbidden_is_reported(data, monkeypatch):
    other_file_system(monkeypatch, errno.EACCES)
    with pytest.raises(RunError, match="kitchen/plain.jpg to data/indoor/test: Permission denied; 0 of 4 images"):
        indoor.main(options(data))
    assert files(data) == prepared()


def test_a_full_disk(data, monkeypatch):
    copies = itertools.count()

    def copy2(here, there, effect=shutil.copy2):
        if next(copies) == 2:
            Path(there).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), here)
        effect(here, there)

    other_file_system(monkeypatch)
    monkeypatch.setattr(shutil, "copy2", copy2)
    with pytest.raises(RunError, match="No space left on device; 2 of 4 images are moved, none is lost.*again"):
        indoor.main(options(data))
    assert set(files(data / "test")) == set(TEST[:2])
    assert_no_image_lost(data)
    indoor.main(options(data))
    assert files(data) == prepared("test")


def test_a_copy_that_differs_is_refused(data, monkeypatch):
    other_file_system(monkeypatch)
    monkeypatch.setattr(shutil, "copy2", lambda here, there: Path(there).write_bytes(b"damaged"))
    with pytest.raises(RunError, match="the copy differs from the original"):
        indoor.main(options(data))
    assert files(data) == prepared()


def test_a_file_that_appears_at_the_target_is_kept(data):
    """Between the check and the move."""
    here, there = data / "Images" / TEST[0], data / "test" / TEST[0]
    file_at(f"test/{TEST[0]}")(data)
    with pytest.raises(FileExistsError, match="other content"):
        indoor.move(here, there)
    assert (here.read_bytes(), there.read_bytes()) == (TEST[0].encode() * 50, b"other")


@pytest.mark.parametrize("code, stops", [(errno.EINVAL, False), (errno.EIO, True)])
def test_flushing_a_folder_may_be_unknown_but_not_fail(data, monkeypatch, code, stops):
    def fsync(handle):
        raise OSError(code, os.strerror(code))

    other_file_system(monkeypatch)
    monkeypatch.setattr(os, "fsync", fsync)
    if stops:
        with pytest.raises(RunError, match="Input/output error"):
            indoor.main(options(data))
    else:
        indoor.main(options(data))
    assert files(data) == prepared(*([] if stops else ["test"]))


def test_two_runs_at_once_lose_nothing(data):
    names = [f"bar/{number}.jpg" for number in range(400)]
    for name in names:
        (data / "Images" / name).write_text(name)
    write_list(data / "TestImages.txt", names)
    runs = [subprocess.Popen([sys.executable, SCRIPT, *options(data)], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL) for _ in range(2)]
    assert {run.wait(60) for run in runs} <= {0, 1}
    indoor.main(options(data))
    assert files(data / "test") == {name: name.encode() for name in names}
