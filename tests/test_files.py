"""Files that are whole or not there, JSON without NaN, and paths that can be printed whatever their bytes."""

import errno
import json
import os
import subprocess

import pytest

from bigru import files

NOT_UTF8 = os.fsdecode(b"d\xe4ta")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.write_atomically(path, b"old")

    def fail(error):
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"new and")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.pt'"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert path.read_bytes() == b"old"
    files.write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    files.write_atomically(tmp_path / "file", b"content")
    assert events[:2] == ["sync", "rename"]


def test_what_a_kill_left_is_removed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f".{name}.0123abcd.partial").touch()
    files.remove_partials(tmp_path, "a", age_s=3600)
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_partials(tmp_path, "a")
    assert [file.name for file in tmp_path.iterdir()] == [".b.0123abcd.partial"]
    files.remove_partials(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_json_has_no_nan(tmp_path):
    assert files.as_json({"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "x")}) == (
        '{"a": null, "b": [1.5, null], "c": [1, "x"]}'
    )
    files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None}


def test_a_path_that_is_not_utf8_can_be_written_and_comes_back_from_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"path": NOT_UTF8})
    assert os.fsencode(json.loads((tmp_path / "a.json").read_text())["path"]) == b"d\xe4ta"
    files.write_lines(tmp_path / "b", [NOT_UTF8])
    assert (tmp_path / "b").read_text() == "d\\xe4ta\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"clips 1/\xc3\xa4", "clips 1/ä"),
        (b"d\xe4ta", r"d\xe4ta"),
        (b"a\nb\tc", r"a\nb\tc"),
        (b"\x1b[31mred", r"\x1b[31mred"),
    ],
)
def test_any_path_can_be_printed(name, shown):
    assert files.printable(os.fsdecode(name)) == shown
    shown.encode()


@pytest.mark.skipif(os.name != "posix", reason="asks a shell")
@pytest.mark.parametrize("name", [b"plain", b"two words", b"it's d\xe4ta\n\\", b"\xffab"])
def test_a_shell_reads_the_command_line_as_it_was_meant(name):
    line = files.shell_line(["printf", "%s", os.fsdecode(name)])
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == name
