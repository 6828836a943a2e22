"""Files that would run code if they were loaded carelessly: the code leaves a mark, which tests look for."""

import io
import pickle
import zipfile
from pathlib import Path

import torch


class Mark:
    """A file that a payload would create."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def code(self) -> str:
        """Python source that leaves the mark."""
        return f"open({str(self.path)!r}, 'w').close()\n"

    def __reduce__(self):
        # What unpickling calls: the builtin `exec`, with the code.
        return exec, (self.code,)

    def pickled(self, path: Path) -> Path:
        """A file of torch.save's format (a zip archive) whose pickle leaves the mark."""
        torch.save({"weight": torch.zeros(2)}, path)
        content = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                new.writestr(name, pickle.dumps(self, 2) if name.endswith("data.pkl") else old.read(name))
        path.write_bytes(content.getvalue())
        return path

    def assert_unmarked(self) -> None:
        assert not self.path.exists(), "the payload ran"
