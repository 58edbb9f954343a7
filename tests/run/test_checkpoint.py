"""The run folder: what is read back, what is refused, and what a kill leaves behind."""

import contextlib
import errno
import itertools
import json
import logging
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pretrain import checkpoint
from pretrain.account import ledger, process
from pretrain.account.flops import Flops, StepCost
from pretrain.account.ledger_writer import Ledger
from pretrain.checkpoint import FILES, State
from pretrain.config import build_config, load_config
from pretrain.continuing import check_branches, check_continues
from pretrain.data.corpora import open_data
from pretrain.errors import UserError
from pretrain.files import TEMPORARY, remove, truncate_torn_line
from pretrain.parallel.pieces import TensorPiece, join
from pretrain.parallel.topology import Topology
from pretrain.provenance import code_revision
from pretrain.run_folder import RunFolder

COST = StepCost(4, 512, 504, 76, Flops(3000, 600, 90), 4890, 24.5)


class TinyEngine:
    """Tensors that tell the step and the kind they belong to."""

    def __init__(self, step=0, size=64):
        self.step, self.size = step, size
        self.loaded = {}

    def tensors(self, kind):
        value = self.step + list(FILES).index(kind) / 4
        yield "word.weight", torch.full((8, self.size), value)
        yield "bias", torch.full((self.size,), -value)
        yield "turned", torch.arange(6.0).reshape(2, 3).T + value  # not contiguous

    def pieces(self, kind):
        return (TensorPiece(name, tensor.shape, 0, tensor.flatten()) for name, tensor in self.tensors(kind))

    def join(self, pieces):
        return join(pieces, Topology(), divided=True)

    def load_tensors(self, kind, get):
        self.loaded[kind] = {name: get(name) for name in ("word.weight", "bias", "turned")}


def make_config(**sections):
    tree = {"run": {"dir": "r"}, "corpus": {"train": "c"}, "budget": {"steps": 9}}
    return build_config({**tree, **sections})


def make_state(step, loss=None, head=""):
    config = make_config().model_dump(mode="json")
    return State(step, 4 * step, step, config, {"train": "a" * 64, "tokenizer": "b" * 64}, head, loss)


def save(folder, step, loss=None, keep_last=2, head=""):
    return checkpoint.save(folder, TinyEngine(step), make_state(step, loss, head), keep_last)


def assert_holds(path, step):
    """Every byte of the checkpoint is that of `step`."""
    engine = TinyEngine()
    checkpoint.load(path, engine)
    for kind in FILES:
        expected = {name: tensor for name, tensor in TinyEngine(step).tensors(kind)}
        assert engine.loaded[kind].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(engine.loaded[kind][name], tensor)
    assert checkpoint.read_state(path).step == step


@pytest.fixture
def no_fsync(monkeypatch):
    """Tests outlive no power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path, no_fsync):
    made = RunFolder(tmp_path / "run")
    made.claim()
    yield made
    made.release()


# ---- round trip ----------------------------------------------------------------------------------


def test_what_was_saved_is_read_back(folder):
    path = save(folder, 12, loss=1 / 3)
    assert path == folder.checkpoints / "step-00000012" == checkpoint.find_verified(folder.path)[0]
    assert_holds(path, 12)
    assert checkpoint.read_state(path) == make_state(12, loss=1 / 3)
    weights = checkpoint.read_tensors(path)
    assert torch.equal(weights["word.weight"], torch.full((8, 64), 12.0))
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES.values(), "state.json", "manifest.json"])
    assert checkpoint.pointed(folder.path, "latest") == checkpoint.pointed(folder.path, "best") == path


def test_files_are_as_readable_as_the_umask_says(folder):
    path = save(folder, 1)
    modes = {(path / name).stat().st_mode & 0o777 for name in (*FILES.values(), "state.json")}
    assert modes == {0o666 & ~current_umask()}


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_other_ranks_take_part_and_write_nothing(folder):
    class Watched(TinyEngine):
        asked = []

        def tensors(self, kind):
            yield from super().tensors(kind)
            self.asked.append(kind)

    checkpoint.save(folder, Watched(3), make_state(3), 2, is_main=False)
    assert Watched.asked == list(FILES) and checkpoint.steps(folder.path) == []


def test_a_good_latest_is_not_written_twice(folder):
    path = save(folder, 5)
    before = path.stat().st_ino
    save(folder, 5)
    assert path.stat().st_ino == before
    (path / "state.json").write_text("{}")
    save(folder, 5)
    assert path.stat().st_ino != before
    assert_holds(checkpoint.find_verified(folder.path)[0], 5)


def test_retention_keeps_the_newest_and_the_best(folder):
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, float("nan"))):
        save(folder, step, loss)
    assert checkpoint.steps(folder.path) == [2, 4, 5]
    assert checkpoint.find_verified(folder.path, "best")[0].name == "step-00000002"
    save(folder, 6, 2.5, keep_last=1)
    assert checkpoint.steps(folder.path) == [6]


def test_what_the_run_went_back_from_is_retired(folder):
    for step in (10, 20, 30):
        save(folder, step, keep_last=3)
    (folder.checkpoints / "latest").write_text("step-00000010\n")
    assert checkpoint.find_verified(folder.path)[0].name == "step-00000010"
    save(folder, 15)
    assert checkpoint.steps(folder.path) == [10, 15]


# ---- refusal -------------------------------------------------------------------------------------

DAMAGES = {
    "flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "flipped last bit": lambda path: flip(path, path.stat().st_size - 1),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES.values(), "state.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_named_and_an_older_good_checkpoint_taken(folder, name, damage, caplog):
    for step in (1, 2):
        save(folder, step, loss=5.0 - step)
    bad = folder.checkpoints / "step-00000002"
    DAMAGES[damage](bad / name)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.find_verified(folder.path)[0]
    assert_holds(found, 1)
    assert str(bad) in caplog.text and name in caplog.text and "refused" in caplog.text
    for which in ("best", 2, "2"):
        with pytest.raises(UserError, match=name):
            checkpoint.find_verified(folder.path, which)[0]
    assert_holds(checkpoint.find_verified(folder.path, "1")[0], 1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {}}', "null", '{"files": null}', "\xff"])
def test_a_checkpoint_without_a_whole_manifest_is_refused(folder, text):
    path = save(folder, 1)
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"step 1: |none of its 1 checkpoints is whole"):
        checkpoint.find_verified(folder.path)[0]


def test_a_manifest_damaged_at_any_byte_is_refused_or_harmless(folder):
    manifest = save(folder, 1) / "manifest.json"
    whole = manifest.read_bytes()
    entries = whole.index(b'"files"')
    for position in range(len(whole)):
        flip(manifest, position)
        bad = not checkpoint.is_whole(manifest.parent)
        assert bad or position < entries or whole[position : position + 1].isspace()
        manifest.write_bytes(whole)


@pytest.mark.parametrize("pointer", ["", "step-00000009", "../../etc", "\udcff", None])
def test_without_a_usable_pointer_the_newest_is_taken(folder, pointer):
    save(folder, 1)
    save(folder, 2)
    if pointer is None:
        (folder.checkpoints / "latest").unlink()
    else:
        (folder.checkpoints / "latest").write_bytes(os.fsencode(pointer))
    assert_holds(checkpoint.find_verified(folder.path)[0], 2)


def test_a_state_that_was_changed_is_not_believed(folder):
    """By the ledger's check, which reads no more of a checkpoint than this."""
    path = save(folder, 1)
    assert checkpoint.verified_state(path).step == 1
    state = path / "state.json"
    state.write_text(state.read_text(encoding="utf-8").replace('"samples": ', '"samples": 1'))
    with pytest.raises(UserError, match=f"^{path}: state.json has .* bytes instead of"):
        checkpoint.verified_state(path)
    remove(path / "manifest.json")
    with pytest.raises(UserError, match="manifest.json is missing or unreadable"):
        checkpoint.verified_state(path)


def test_a_latest_that_is_gone_is_named(folder, caplog):
    """Taken away by a cleaner, say: nothing there is not the same as nothing yet."""
    save(folder, 1)
    gone = save(folder, 2)
    remove(gone)
    assert_holds(checkpoint.find_verified(folder.path)[0], 1)
    assert f"{gone}: is gone, though it is the latest" in caplog.text
    remove(folder.checkpoints / "step-00000001")
    with pytest.raises(UserError, match=f"^{gone}: is gone, and no other is there; .* to start over$"):
        checkpoint.find_verified(folder.path)[0]
    remove(folder.checkpoints)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find_verified(folder.path)[0]


def swapped(path):
    """Another file of the same size in its place, with its times."""
    about, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    os.replace(other, path)


def rewritten(path):
    """Another byte in the same file."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


@pytest.mark.parametrize("change", [swapped, rewritten])
@pytest.mark.parametrize("name", [*FILES.values(), "state.json"])
def test_what_is_read_is_what_was_verified(folder, name, change):
    save(folder, 1)
    path, stamps = checkpoint.find_verified(folder.path)
    assert checkpoint.read_state(path, stamps).step == 1
    change(path / name)
    with pytest.raises(UserError, match=f"{name}: changed since it was verified; start again"):
        checkpoint.read_state(path, stamps)
        checkpoint.load(path, TinyEngine(), stamps)


def test_what_changes_while_it_is_read_is_refused(folder):
    save(folder, 1)
    path, stamps = checkpoint.find_verified(folder.path)

    class Slow(TinyEngine):
        def load_tensors(self, kind, get):
            super().load_tensors(kind, get)
            rewritten(path / FILES[kind])

    with pytest.raises(UserError, match="model.safetensors: changed since it was verified"):
        checkpoint.load(path, Slow(), stamps)


def test_what_is_not_there_is_a_users_error(folder):
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find_verified(folder.path)[0]
    save(folder, 1)
    for which in ("best", "7", "newest", "-1"):
        with pytest.raises(UserError, match="take latest, or one of 1"):
            checkpoint.find_verified(folder.path, which)[0]


def test_another_format_is_a_users_error(folder):
    path = save(folder, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(UserError, match="format 2, this program reads 1"):
        checkpoint.read_state(path)


def test_only_what_may_change_may_change():
    old = make_state(5)
    free = make_config(
        run={"dir": "elsewhere"},
        corpus={"train": "moved", "valid": "v"},
        train={"micro_batch_size": 1, "engine": "deepspeed"},
        parallel={"zero": 2},
        budget={"flops": 1e18},
        checkpoint={"every_steps": 3},
    )
    check_continues(old, free, None)
    changed = make_config(model={"num_layers": 6}, optimizer={"lr": 0.1}, run={"dir": "r", "seed": 1})
    with pytest.raises(UserError) as caught:
        check_continues(old, changed, None)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["run.seed", "model.num_layers", "optimizer.lr"]
    assert all("set it back, or choose another run.dir" in line for line in lines)


@pytest.mark.parametrize("check", [check_continues, check_branches])
def test_an_unreadable_config_hides_no_other_reason(check, tiny):
    """Of a checkpoint that this program cannot read the config of, and a tokenizer that has changed."""
    config = make_config(run={"dir": "r", "branch": {"of": "trunk"}}, corpus={"train": str(tiny / "train")})
    old = replace(make_state(5), config={"budget": {"days": 3}}, fingerprints={"tokenizer": "another"})
    with pytest.raises(UserError, match="unknown key budget.days") as caught:
        check(old, config, open_data(config.corpus))
    assert re.search("^corpus: .*tokenizer", str(caught.value), re.M)


def test_a_full_disk_is_a_users_error_after_all_collectives(folder, monkeypatch):
    save(folder, 1)
    asked = []

    class Watched(TinyEngine):
        def tensors(self, kind):
            asked.append(kind)
            return super().tensors(kind)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="step-00000002: cannot be saved .*No space left"):
        checkpoint.save(folder, Watched(2), make_state(2), 2)
    assert asked == list(FILES)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest", "step-00000001"]


def test_what_could_not_be_written_in_the_background_is_told(folder, monkeypatch):
    save(folder, 1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, checkpoint.Writer() as writer:
        patch.setattr(safetensors.torch, "save_file", full)
        checkpoint.save(folder, TinyEngine(2), make_state(2), 2, writer=writer)
        with pytest.raises(UserError, match="step-00000002: cannot be saved .*No space left"):
            writer.wait()
        assert not writer.failed
    assert checkpoint.find_verified(folder.path)[0].name == "step-00000001"
    with pytest.raises(RuntimeError), checkpoint.Writer() as writer:  # the run ends, the checkpoint stays
        checkpoint.save(folder, TinyEngine(5), make_state(5), 2, writer=writer)
        raise RuntimeError
    assert_holds(checkpoint.find_verified(folder.path)[0], 5)


def test_no_memory_for_copies_is_a_users_error(folder):
    """At the save, and not on the thread, where other ranks would wait for what this one does not send."""

    class Vast(TinyEngine):
        def tensors(self, kind):
            yield "vast", torch.zeros(1).expand(1 << 50)

        def pieces(self, kind):
            for name, tensor in self.tensors(kind):
                yield TensorPiece(name, tensor.shape, 0, tensor)

    with checkpoint.Writer() as writer:
        with pytest.raises(UserError, match="no memory for the copies .*; set checkpoint.background=false"):
            checkpoint.save(folder, Vast(), make_state(1), 2, writer=writer)
        assert not writer.copying and not writer.failed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_of_the_moment_of_the_save(folder, device):
    """On a GPU too, where that comes later; their memory is that of the save before."""
    word, memory = torch.zeros(1000, device=device), set()

    class Live(TinyEngine):
        def tensors(self, kind):
            yield "own", word
            yield "put together", word + 0.5

    with checkpoint.Writer() as writer:
        for step in range(3):
            writer.wait()
            if device == "cuda":
                torch.cuda._sleep(10**8)
            word.fill_(step)
            checkpoint.save(folder, Live(), make_state(step), 9, writer=writer)
            writer.wait_copied()
            word.fill_(-1)
            memory |= {copy.data_ptr() for copy in writer._copies.values()}
    assert len(memory) == 2 * len(FILES)
    for step in range(3):
        for kind in FILES:
            found = checkpoint.read_tensors(checkpoint.find_verified(folder.path, step)[0], kind)
            assert set(found["own"].tolist()) == {step}
            assert set(found["put together"].tolist()) == {step + 0.5}


def test_a_file_size_limit_is_a_users_error(folder):
    """The real thing: the kernel refuses the bytes in the middle of a file."""
    code = f"""if True:
        import resource, signal
        from tests.run import test_checkpoint as t
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        folder = t.RunFolder({str(folder.path)!r})
        try:
            t.save(folder, 1)
        except t.UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "step-00000001: cannot be saved" in done.stdout, done
    assert list(folder.checkpoints.iterdir()) == []


# ---- the folder ----------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = f"""if True:
        import sys
        from pretrain.checkpoint import RunFolder
        folder = RunFolder({str(tmp_path)!r})
        folder.claim()
        print("claimed", flush=True)
        sys.stdin.read()
    """
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"claimed\n"
    with pytest.raises(UserError, match=f"in use by process {first.pid} on "):
        RunFolder(tmp_path).claim()
    first.kill()
    first.wait()
    RunFolder(tmp_path).claim()


def test_claiming_clears_the_remains_of_kills_and_nothing_else(folder):
    path = save(folder, 1)
    (folder.checkpoints / ".tmp-step-00000002").mkdir()
    (folder.checkpoints / ".tmp-step-00000002" / "model.safetensors").write_bytes(b"half")
    (folder.checkpoints / ".tmp-latest").write_text("step")
    (folder.path / ".tmp-status.json").write_text("{")
    (folder.path / "notes.txt").write_text("mine")
    folder.release()
    folder.claim()
    assert {p.name for p in folder.path.iterdir()} == {".lock", "checkpoints", "notes.txt"}
    assert (folder.path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert {p.name for p in folder.checkpoints.iterdir()} == {"latest", path.name}


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another run.dir"):
        RunFolder(tmp_path / "file" / "run").claim()


def test_config_status_and_provenance(folder):
    config = make_config(optimizer={"lr": 1e-4})
    folder.write_config(config)
    assert load_config(folder.path / "config.yaml") == config
    before = time.time()
    folder.write_status("stopped", 7, "USR1", 75, "a" * 64)
    after = time.time()
    status = json.loads((folder.path / "status.json").read_text())
    assert before <= status.pop("time") <= after
    said = {"state": "stopped", "exit_code": 75, "step": 7, "reason": "USR1", "ledger_head": "a" * 64}
    assert status == said
    folder.write_status("running", 8)  # an attempt later: the last word of the one before is still there
    assert folder.status()["ledger_head"] == "a" * 64
    for device in ("cpu", "gpu"):
        folder.add_provenance(device=device)
    first, second = json.loads((folder.path / "provenance.json").read_text())
    assert (first["device"], second["device"]) == ("cpu", "gpu")
    assert first["packages"]["torch"] == torch.__version__ and first["python"] == sys.version.split()[0]
    assert (
        first["version"]
        and first["host"]
        and first["os"] == platform.platform()
        and first["command"] == shlex.join(sys.orig_argv)
    )


def test_a_refusal_after_the_start_leaves_the_status_of_a_run_that_had_ended(folder):
    folder.write_status("finished", 7, "the budget is spent", 0, "a" * 64)
    before = folder.status()
    again = RunFolder(folder.path)
    again.write_status("running", 7)
    again.write_failure("failed", "no room", 2)
    assert {**before, "attempt": again.last_attempt()} == again.status()
    assert again.last_attempt()["reason"] == "no room" and again.last_attempt()["exit_code"] == 2
    for step, code in ((8, 2), (7, 1)):  # it went on; a defect
        folder.write_status("finished", 7, "the budget is spent", 0, "a" * 64)
        other = RunFolder(folder.path)
        other.write_status("running", step)
        other.write_failure("failed", "no room", code)
        assert other.status()["state"] == "failed"


def test_the_commit_is_that_of_this_code():
    root = Path(checkpoint.__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
    assert code_revision().removesuffix("-dirty") == head


def test_mending_cuts_only_a_line_without_an_end(tmp_path):
    path = tmp_path / "lines"
    assert truncate_torn_line(path) == b"" and not path.exists()
    for data, kept, torn in ((b"a\nb\n", b"a\nb\n", b""), (b"a\nb", b"a\n", b"b"), (b"ab", b"", b"ab")):
        path.write_bytes(data)
        assert truncate_torn_line(path) == torn and path.read_bytes() == kept


# ---- kills and power cuts ------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here; nothing may catch this."""


class Disk:
    """Ends the process at the n-th thing done to the disk, half of it done; knows what a power cut takes.

    Without a sync, a file's bytes and a folder's renames may be gone after a power cut.
    """

    def __init__(self, crash_at, monkeypatch):
        self.left = crash_at
        self.synced = set()
        self.renames = []  # (from, to, bytes of the file that was replaced), folder not synced yet
        self._replace, self._fsync, self._rmtree = os.replace, os.fsync, shutil.rmtree
        self._write_text, self._save_file = Path.write_text, safetensors.torch.save_file
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        monkeypatch.setattr(Path, "write_text", lambda *words, **more: self.write_text(*words, **more))
        monkeypatch.setattr(safetensors.torch, "save_file", self.save_file)

    def crashes(self):
        self.left -= 1
        return self.left == 0

    def replace(self, source, target):
        if self.crashes():
            raise Crash
        self.assert_ready(source, target)
        old = Path(target).read_bytes() if Path(target).is_file() else None
        self._replace(source, target)
        self.renames.append((Path(source), Path(target), old))

    def assert_ready(self, source, target):
        """What becomes visible is on disk, and so is what a pointer names before the pointer moves."""
        if not target.name.startswith(TEMPORARY):
            assert source.stat().st_ino in self.synced
        if target.name in ("latest", "best"):
            assert not self.renames

    def fsync(self, descriptor):
        if self.crashes():
            raise Crash
        self._fsync(descriptor)
        number = os.fstat(descriptor).st_ino
        self.synced.add(number)
        self.renames = [r for r in self.renames if r[1].parent.stat().st_ino != number]

    def rmtree(self, path, **more):
        if self.crashes():
            next(Path(path).iterdir()).unlink()
            raise Crash
        self._rmtree(path, **more)

    def write_text(self, path, text, **more):
        if self.crashes():
            self._write_text(path, text[: len(text) // 2], **more)
            raise Crash
        self._write_text(path, text, **more)

    def save_file(self, tensors, path, metadata):
        self._save_file(tensors, path, metadata)
        if self.crashes():
            os.truncate(path, path.stat().st_size // 2)
            raise Crash

    def cut_power(self, root, durable):
        """Undoes the renames whose folder was not synced, and halves the files that were not."""
        for source, target, old in reversed(self.renames):
            if target.exists():
                self._replace(target, source)
                if old is not None:
                    target.write_bytes(old)
                    self.synced.add(target.stat().st_ino)
        for path in filter(Path.is_file, root.rglob("*")):
            if path.stat().st_ino not in self.synced | durable:
                os.truncate(path, path.stat().st_size // 2)


def first(folder):
    return set()


def next_one(folder):
    save(folder, 10, 5.0, keep_last=1)
    return {10}


def over_a_bad_one(folder):
    save(folder, 10, 5.0)
    flip(save(folder, 20, 4.0) / "model.safetensors", 200)
    return {10}


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("prepare", [first, next_one, over_a_bad_one])
def test_a_crash_at_any_point_of_a_save_leaves_the_old_or_the_new(tmp_path, prepare, power_cut, no_fsync):
    for crash_at in itertools.count(1):
        folder = RunFolder(tmp_path / str(crash_at))
        folder.claim()
        allowed = prepare(folder) | {20}
        durable = {path.stat().st_ino for path in folder.path.rglob("*")}
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(crash_at, patch)
            with contextlib.suppress(Crash):
                save(folder, 20, 3.0, keep_last=1)
        if power_cut:
            disk.cut_power(folder.path, durable)
        if disk.left > 0:  # it came to the end
            break
        if not power_cut and allowed != {20}:
            assert checkpoint.pointed(folder.path, "latest") is not None
        assert_resumable(folder, allowed)
    assert crash_at > 15
    assert checkpoint.pointed(folder.path, "latest").name == "step-00000020"
    assert_holds(checkpoint.find_verified(folder.path)[0], 20)


def assert_resumable(folder, allowed):
    folder.release()
    again = RunFolder(folder.path)
    again.claim()
    for old in {10} & {*checkpoint.steps(again.path)}:  # whole or gone
        assert checkpoint.is_whole(again.checkpoints / f"step-{old:08d}")
    if checkpoint.steps(again.path) or allowed != {20}:
        found = checkpoint.find_verified(again.path)[0]
        step = checkpoint.read_state(found).step
        assert step in allowed
        assert_holds(found, step)
    save(again, 20, 3.0)
    save(again, 30, 2.0, keep_last=1)
    assert_holds(checkpoint.find_verified(again.path)[0], 30)
    assert checkpoint.find_verified(again.path, "best")[0] == checkpoint.find_verified(again.path)[0]
    assert sorted(p.name for p in again.checkpoints.iterdir()) == ["best", "latest", "step-00000030"]
    again.release()


def one_attempt(run):
    """Goes on from where the run is, saving all the time, until it is killed."""
    folder = RunFolder(run)
    folder.claim()
    account = Ledger.open(run, 1, "cpu", started=process.now())
    step, head = 0, ""
    if checkpoint.steps(run):
        state = checkpoint.read_state(checkpoint.find_verified(run)[0])
        step, head = state.step, state.ledger_head
    account.begin(step, head)
    while True:
        step += 1
        account.step(COST)
        save(folder, step, loss=1 / step, head=account.save())
        folder.write_status("running", step)


def newest(run):
    path = checkpoint.pointed(run, "latest")
    return int(path.name[5:]) if path else 0


def child_lives(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads: the child only saves
def test_a_run_killed_at_random_instants_always_goes_on(tmp_path):
    dice, reached = random.Random(0), 0
    for attempt in range(24):
        child = os.fork()
        if child == 0:
            try:
                one_attempt(tmp_path)
            finally:
                os._exit(1)  # only a kill ends it well
        while attempt % 2 and newest(tmp_path) <= reached and child_lives(child):
            time.sleep(0.001)  # every other one gets as far as a save, however slow the machine is
        time.sleep(dice.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"attempt {attempt} failed by itself"
        if checkpoint.steps(tmp_path):
            found = checkpoint.find_verified(tmp_path)[0]
            state = checkpoint.read_state(found)
            assert_holds(found, state.step)
            assert state.step >= reached
            assert state.ledger_head in ledger.chain(tmp_path)
            reached = state.step
            assert (
                not (tmp_path / "status.json").exists()
                or json.loads((tmp_path / "status.json").read_text())["step"] <= reached + 1
            )
    account = Ledger.open(tmp_path, 1, "cpu")
    account.begin(reached, state.ledger_head)
    assert account.totals().flops["total"] == reached * COST.flops.total
    ledger.check(tmp_path)
    assert reached >= 12
