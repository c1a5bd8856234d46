"""What is said of files that cannot be written or read: which one, and what to do."""

import errno
import os
from collections import namedtuple

import pytest

from alignkit.errors import DataError
from alignkit.files import no_room, read_json_file
from alignkit.training.metrics import MetricsLog, read_metrics


def test_a_full_disk_is_that_of_the_folder_with_least_room(tmp_path, monkeypatch):
    """pairs.folder may be on another disk than output.dir; and neither need be there yet."""
    free = {tmp_path / "small": 2e6, tmp_path / "large": 5e12}
    for folder in free:
        folder.mkdir()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(free[folder]))
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for folders in ([tmp_path / "large" / "run" / "a", tmp_path / "small"], [tmp_path / "small", tmp_path / "large"]):
        said = no_room(error, *folders)
        assert said.startswith(f"{tmp_path / 'small'}: no space is left on its disk (2 MB free)")
    assert no_room(ValueError("something else"), tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"a": 1'])
def test_a_file_that_was_cut_off_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json: damaged \(.*\); run it again"):
        read_json_file(tmp_path / "summary.json", "run it again")


@pytest.mark.parametrize("damaged", [b"\x00" * 9 + b"\n", b"[1]\n", b"{}\n", b'{"step": 2, "lo\n'])
def test_a_damaged_line_of_the_metrics_costs_no_other(tmp_path, damaged):
    lines = [b'{"step": %d}\n' % step for step in (1, 2, 3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], damaged, *lines[2:], b'{"step": 6, "loss']))
    MetricsLog(tmp_path, 4).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 4]
