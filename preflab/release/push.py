"""Upload a release to the hub. What the repository has already is skipped, so a second call continues a first one."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from preflab.release.files import files_of
from utils.hub import upload_errors
from utils.tables import number, render


@dataclass
class Upload:
    """A file of the folder: its name in the repository, its bytes, and whether it is there already."""

    name: str
    size: int
    there: bool | None = None


def listing(folder: Path, repository: str | None, uploads: list[Upload]) -> str:
    """The files with their sizes, and what happens to each."""
    words = {None: "", True: "in the repository", False: "uploaded"}
    lines = [("file", "bytes", "")] + [(u.name, str(u.size), words[u.there]) for u in uploads]
    total = number(sum(u.size for u in uploads) / 1e6, 1)
    return render(f"{folder}{f' -> {repository}' if repository else ''}: {len(uploads)} files, {total} MB", lines)


def uploads_of(folder: Path) -> list[Upload]:
    """Every file of the folder."""
    return [Upload(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files_of(folder)]


def push(folder: Path, repository: str, private: bool) -> list[Upload]:
    """Create the repository if there is none, and upload what it does not have.

    Raises:
        UserError: no access, or no network. What was uploaded before is in the repository.
    """
    from huggingface_hub import HfApi

    api, uploads = HfApi(), uploads_of(folder)
    with upload_errors(f"--push {repository}", "the same command continues"):
        api.create_repo(repository, private=private, exist_ok=True)
        there = _remote(api, repository)
        for upload in uploads:
            upload.there = there.get(upload.name) in _hashes(folder / upload.name)
        missing = [upload.name for upload in uploads if not upload.there]
        if missing:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=missing,
                commit_message=f"Release of {folder.name}",
            )
    return uploads


def _remote(api, repository: str) -> dict[str, str]:
    """`{file: hash}` of the repository: SHA-256 of large files, git's hash of the others."""
    files = api.list_repo_tree(repository, recursive=True)
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files if hasattr(f, "blob_id")}


def _hashes(path: Path) -> tuple[str, str]:
    """(SHA-256, git's hash) of a file."""
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return sha256.hexdigest(), git.hexdigest()
