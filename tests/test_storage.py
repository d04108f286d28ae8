"""Local files; buckets are tested in data/test_bucket.py against servers."""

import os
import subprocess
import sys

import pytest

from maxlm import storage


def test_write_makes_folders_and_replaces(tmp_path):
    path = str(tmp_path / "a" / "b.txt")
    storage.write_bytes(path, b"old")
    storage.write_bytes(path, b"new content")
    assert storage.read_bytes(path) == b"new content"
    assert storage.read_bytes(path, 4, 7) == b"con"
    assert storage.list_dir(str(tmp_path / "a")) == ["b.txt"], "no temporary file stays"


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    storage.write_bytes(str(tmp_path / "a"), b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_missing_and_short_files(tmp_path):
    path = str(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="a does not exist"):
        storage.read_bytes(path)
    storage.write_bytes(path, b"abc")
    with pytest.raises(storage.StorageError, match="ends before byte 4"):
        storage.read_bytes(path, 1, 4)
    assert storage.list_dir(str(tmp_path / "nothing")) == []


def test_exists_and_remove_tree(tmp_path):
    folder = str(tmp_path / "folder")
    storage.write_bytes(storage.join(folder, "x", "y"), b"1")
    assert storage.exists(folder)
    storage.remove_tree(folder)
    storage.remove_tree(folder)
    assert not storage.exists(folder)


def test_join_and_is_bucket():
    assert storage.join("gs://bucket/a/", "b", "c") == "gs://bucket/a/b/c"
    assert storage.join("a", "b") == os.path.join("a", "b")
    assert storage.is_bucket("s3://bucket") and not storage.is_bucket("/s3/bucket")


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match=r"cannot write .*file/x: (Not a directory|File exists)"):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")


def test_a_whole_bucket_is_not_removed():
    with pytest.raises(storage.StorageError, match="whole bucket"):
        storage.remove_tree("s3://some-bucket/")


def test_full_disk_keeps_the_old_file(tmp_path):
    """A limit on file size fails writes the way a full disk does: in the middle."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limit = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
    program = limit + "from maxlm import storage\nstorage.write_bytes(sys.argv[1], bytes(2_000_000))"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert f"StorageError: cannot write {path}: File too large" in done.stderr
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
