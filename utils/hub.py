"""One file of a hub repository, and in words why it cannot be had."""

from pathlib import Path

from utils.errors import UserError


def fetch(repo: str, file: str, kind: str, revision: str | None = None, instead: str = "a local file") -> Path:
    """The local path of `file` in the hub repository `repo`, downloaded where it is not cached.

    Args:
        kind: "model" or "dataset".
        instead: what a user without a network may give.

    Raises:
        UserError: a gated, private, unknown or incomplete repository; a hub that cannot be reached.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    what, page = f"{kind} {repo}", repo if kind == "model" else f"datasets/{repo}"
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except hub.GatedRepoError:
        raise UserError(
            f"{what} is gated: accept its licence at https://huggingface.co/{page}, then run `hf auth login` (or set"
            " HF_TOKEN)"
        ) from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        raise UserError(
            f"{what} (revision {revision or 'main'}) is neither on the hub nor a local folder: check the spelling;"
            f" for a private {kind} run `hf auth login` first"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise UserError(
            f"{what} is not in the local cache and the hub cannot be reached: check the network, or give {instead}"
        ) from None
    except hub.EntryNotFoundError:
        raise UserError(f"{what} on the hub has no {file}: check the name") from None
    except (OSError, hub.HfHubHTTPError) as error:
        raise UserError(f"{what}: the hub cannot be reached ({str(error).splitlines()[0]})") from None
