"""Names of the types, and the folder of files: what it refuses, and how it continues."""

import os
from pathlib import Path

import pytest

from preflab.gguf.files import MARK, GgufFolder, chosen_types
from preflab.models import llama_cpp
from preflab.models.loading import load_tokenizer, locate
from utils.artifacts import write_json
from utils.errors import UserError


def folder_in(tmp_path, source="a", overwrite=False) -> GgufFolder:
    return GgufFolder(tmp_path / "files", "run", {"source": source}, overwrite)


def test_types_are_ordered_and_unique():
    assert chosen_types(None) == ["F16", "Q8_0", "Q4_K_M"]
    assert chosen_types(["q4_k_m", "F16", "Q4_K_M"]) == ["F16", "Q4_K_M"]
    with pytest.raises(UserError, match="--types Q4KM: unknown; did you mean Q4_K_M"):
        chosen_types(["Q4KM"])


def test_file_gets_its_name_only_when_published(tmp_path):
    folder = folder_in(tmp_path)
    folder.open()
    path = folder.write("F16", lambda place: place.write_text("x"))
    assert path.exists() and not folder.file("F16").exists()
    folder.publish("F16")
    assert folder.file("F16").read_text() == "x" and not folder.file("Q8_0").exists()
    folder.close()
    assert not folder.part.exists()


def test_interrupted_file_is_written_again_and_a_complete_one_is_reused(tmp_path):
    def interrupted(place):
        place.write_text("half")
        raise KeyboardInterrupt

    folder = folder_in(tmp_path)
    folder.open()
    with pytest.raises(KeyboardInterrupt):
        folder.write("F16", interrupted)
    # The next call of the script.
    folder = folder_in(tmp_path)
    folder.open()
    assert folder.write("F16", lambda place: place.write_text("whole")).read_text() == "whole"
    assert folder.write("F16", interrupted).read_text() == "whole"


def test_killed_between_the_first_writes(tmp_path):
    """Neither a folder whose mark was being written nor one that was being deleted is taken for the user's own."""
    for name in ("files", "files.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".partial-gguf_from-x.json").touch()
    folder = folder_in(tmp_path)
    folder.open()
    for k in range(3):
        (folder.path / f"run-{k}.gguf").write_text("x")
    deleted = []
    with pytest.MonkeyPatch.context() as patch:
        # The mark goes last.
        patch.setattr(Path, "unlink", lambda path, **_: deleted.append(path.name) or os.unlink(path))
        folder_in(tmp_path, overwrite=True)
    assert len(deleted) > 3 and MARK not in deleted and not folder.path.exists()


def test_rejected_file_is_deleted(tmp_path):
    folder = folder_in(tmp_path)
    folder.open()
    path = folder.write("F16", lambda place: place.write_text("x"))
    folder.reject("F16")
    assert not path.exists() and not folder.file("F16").exists()


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not written by this script.*--gguf_dir"):
        folder_in(tmp_path, overwrite=True)
    assert (tmp_path / "files/thesis.txt").exists()


def test_files_of_another_model_are_replaced_only_on_request(tmp_path):
    folder_in(tmp_path).open()
    with pytest.raises(UserError, match="another model.*--overwrite"):
        folder_in(tmp_path, source="b")
    folder_in(tmp_path, source="b", overwrite=True).open()
    folder_in(tmp_path, source="b")


def test_unfinished_work_for_another_model_is_dropped(tmp_path):
    folder = folder_in(tmp_path)
    folder.part.mkdir()
    write_json(folder.part / MARK, {"source": "another"})
    (folder.part / "run-F16.gguf").write_text("another model's")
    folder_in(tmp_path).open()
    assert not (folder.part / "run-F16.gguf").exists()


def test_missing_tools_are_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFERENCELAB_GGUF_TOOLS", str(tmp_path))
    with pytest.raises(UserError, match="bash install_gguf.sh"):
        llama_cpp.require_tools()


def test_missing_gguf_file_is_named(tmp_path):
    for load in (locate, load_tokenizer):
        with pytest.raises(UserError, match="gguf:.*nowhere.gguf: no such file"):
            load(f"gguf:{tmp_path}/nowhere.gguf")
