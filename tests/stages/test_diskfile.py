"""A file written past the page cache holds the same bytes, also where that is not to be had."""

import errno
import fcntl
import os
import subprocess

import pytest

from training import diskfile
from training.diskfile import DiskFile

BUFFER = diskfile._GATHER_BYTES


def write(path, content, steps):
    file = DiskFile(path, len(content))
    view, start = memoryview(content), 0
    for step in steps:
        file.write(view[start : start + step])
        start += step
    file.write(view[start:])
    file.finish()
    file.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 70_001, BUFFER, BUFFER + 5, 2 * BUFFER + 4096])
@pytest.mark.parametrize("steps", [(), (1, 2, 4093), (BUFFER - 1, 7)])
def test_what_is_written_is_there(tmp_path, size, steps):
    content = os.urandom(size)
    write(tmp_path / "file", content, steps)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.skipif(not diskfile._DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("where", ["open", "write"])
def test_a_file_system_that_takes_no_direct_writes_gets_others(tmp_path, monkeypatch, where):
    opened, written = os.open, os.write
    refused = []

    def refusing_open(path, flags, *rest, **kwargs):
        if flags & diskfile._DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "no direct writes")
        return opened(path, flags, *rest, **kwargs)

    def refusing_write(descriptor, data):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & diskfile._DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "no direct writes")
        return written(descriptor, data)

    replacement = {"open": refusing_open, "write": refusing_write}[where]
    monkeypatch.setattr(diskfile.os, where, replacement)
    content = os.urandom(BUFFER + 5)
    write(tmp_path / "file", content, (9,))
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content
    assert len(refused) == 1 or os.name != "posix", "it asked once, and went on the usual way"


def test_other_faults_are_not_hidden(tmp_path, monkeypatch):
    def fail(descriptor, data):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(diskfile.os, "write", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        write(tmp_path / "file", b"x" * 10, ())


def test_a_disk_without_room_says_so_before_the_first_byte(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        with pytest.raises(OSError) as caught:
            DiskFile(tmp_path / "file", 2 << 20)
        assert caught.value.errno == errno.ENOSPC
        write(tmp_path / "file", b"x" * 9000, ())
        assert (tmp_path / "file").stat().st_size == 9000
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
