"""Output appears whole or not at all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from sst_merge.atomic import check_output_dir, replace_dir, replace_file, save_tensors, write_text


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def output(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "sst_config.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("empty_exists", [False, True])
def test_new_folder(tmp_path, empty_exists):
    target = tmp_path / "deep" / "out"
    if empty_exists:
        target.mkdir(parents=True)
    with replace_dir(target) as fresh:
        (fresh / "a").write_text("1")
        assert fresh.parent == target.parent and tree(target) == {}
    assert tree(tmp_path) == {"deep/out/a": "1"}


def test_overwrite_replaces_the_whole_folder(tmp_path):
    target = output(tmp_path / "out", "old")
    with replace_dir(target, overwrite=True) as fresh:
        (fresh / "new").write_text("1")
        assert tree(target) == {"sst_config.yaml": "old"}
    assert tree(tmp_path) == {"out/new": "1"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_everything_as_it_was(tmp_path, error, exists):
    if exists:
        output(tmp_path / "out", "old")
    before = tree(tmp_path)
    with pytest.raises(error), replace_dir(tmp_path / "out", overwrite=True) as fresh:
        (fresh / "half").write_text("1")
        raise error
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(exists)


def test_interruption_between_the_two_renames_restores_the_old_folder(tmp_path, monkeypatch):
    target = output(tmp_path / "out", "old")
    rename = Path.rename

    def interrupted(self: Path, other: Path) -> Path:
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replace_dir(target, overwrite=True) as fresh:
        (fresh / "new").write_text("1")
    assert tree(tmp_path) == {"out/sst_config.yaml": "old"}


def test_refused_targets(tmp_path):
    target = output(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="--overwrite"), replace_dir(target):
        pytest.fail("entered")
    (target / "sst_config.yaml").rename(target / "thesis.tex")
    with pytest.raises(ValueError, match="not an earlier output"):
        check_output_dir(target, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(target / "thesis.tex", overwrite=True)
    assert tree(tmp_path) == {"out/thesis.tex": "old"}


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(ValueError, match="--overwrite"), replace_dir(tmp_path / "out") as fresh:
        (fresh / "mine").write_text("1")
        output(tmp_path / "out", "theirs")
    assert tree(tmp_path) == {"out/sst_config.yaml": "theirs"}


def test_a_link_is_followed(tmp_path):
    target = output(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(target)
    with replace_dir(tmp_path / "link", overwrite=True) as fresh:
        (fresh / "new").write_text("1")
    assert (tmp_path / "link").is_symlink() and tree(target) == {"new": "1"}


def test_files(tmp_path):
    write_text(tmp_path / "a", "grün")
    assert (tmp_path / "a").read_bytes() == "grün".encode()
    with replace_file(tmp_path / "a") as fresh:
        fresh.write_bytes(b"2")
    with pytest.raises(TypeError), replace_file(tmp_path / "a") as fresh:
        fresh.write_bytes(3)
    assert tree(tmp_path) == {"a": "2"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".out.{dead.pid}-ab12.new", f".out.{os.getpid()}-ab12.new", ".other.1-a.new", ".out.notes.new"):
        (tmp_path / name).mkdir()
    with replace_dir(tmp_path / "out") as fresh:
        (fresh / "a").write_text("1")
    assert {p.name for p in tmp_path.iterdir()} == {
        "out",
        f".out.{os.getpid()}-ab12.new",  # of a process that lives: this one
        ".other.1-a.new",
        ".out.notes.new",
    }


def test_tensor_files_have_the_modes_of_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match="output folder: /proc/.*name another"), replace_dir("/proc/nowhere/out"):
        pass
