"""`alignkit doctor`: what is said of a machine, and of one on which things are missing."""

import sys

import pytest

from alignkit.doctor import machine, places
from alignkit.doctor.machine import findings


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, str | None]]:
    return {finding.topic: (finding.text, finding.advice) for finding in findings()}


def test_all_that_a_run_will_use_is_named(said):
    libraries = ("torch", "triton", "diffusers", "deepspeed", "flash-attn", "xformers")
    used = ("attention", "kernels", "numbers", "processes", "compiler")
    for topic in (*libraries, *used, "cores", "memory", "open files", "/dev/shm", "models"):
        assert said[topic][0], topic
    assert said["attention"][0].startswith("native")


def test_what_is_missing_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(machine, "_version", lambda name: None)
    found = {finding.topic: finding for finding in findings()}
    assert "not installed" in found["deepspeed"].text and "alignkit[train]" in found["deepspeed"].advice
    assert "cannot be imported" in found["torch"].text
    assert "attention" not in found


def test_small_limits_are_said_with_what_raises_them(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(machine, "SHM_WANTED", 1 << 60)
    advice = {finding.topic: finding.advice for finding in machine._limits()}
    assert "ulimit -n 4096" in advice["open files"] and "--shm-size" in advice["/dev/shm"]


MOUNTS = """1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
2 1 0:5 / /data rw,relatime shared:2 - nfs4 server:/data rw,vers=4.2,local_lock=none
3 1 0:6 / /data/old rw shared:3 - nfs server:/old rw,nolock,vers=3
4 1 0:7 / /scratch rw - lustre server:/scratch rw
5 1 0:8 / /a\\040b rw - lustre server:/flocked rw,flock
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared", "locks"),
    [("/x", "ext4", False, True), ("/data/run", "nfs4", True, True), ("/data/old/run", "nfs", True, False),
     ("/database", "ext4", False, True), ("/scratch", "lustre", True, False), ("/a b/run", "lustre", True, True)],
)  # fmt: skip
def test_a_mount_says_whether_locks_hold_between_machines(tmp_path, path, kind, shared, locks):
    file = tmp_path / "mounts"
    file.write_text(MOUNTS)
    found = places.file_system(places.Path(path), file)
    assert (found.kind, found.network, found.no_locks is None) == (kind, shared, locks)


def test_locks_are_tried_and_nothing_is_left(tmp_path, monkeypatch):
    kind = places.FileSystem("ext4", frozenset())
    assert places.lock_problem(tmp_path, kind) is None

    def none(*_):
        raise OSError(places.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(places.fcntl, "flock", none)
    assert "has none" in places.lock_problem(tmp_path, kind)
    assert not list(tmp_path.iterdir())


def test_a_containers_memory_is_what_counts(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n")
    assert places.memory_limit(tmp_path) == (1_024_000, 921_600)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    assert places.memory_limit(tmp_path) == (1_024_000, 921_600)
    (group / "memory.max").write_text("100000\n")
    assert places.memory_limit(tmp_path) == (100_000, 95_000)
