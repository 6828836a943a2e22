"""Download one file of a hub repository, with readable errors."""

from pathlib import Path

from utils.errors import UserError


def fetch(repo: str, file: str, kind: str, revision: str | None = None, instead: str = "a local file") -> Path:
    """Return the local path of `file` in the hub repository `repo`, downloading it if it is not cached.

    Args:
        kind: "model" or "dataset".
        instead: the alternative that the error suggests to a user without a network.

    Raises:
        UserError: the repository is gated, private, unknown or has no such file; the hub cannot be reached.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    subject, page = f"{kind} {repo}", repo if kind == "model" else f"datasets/{repo}"
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except hub.GatedRepoError:
        raise UserError(
            f"{subject} is gated: accept its licence at https://huggingface.co/{page}, then run `hf auth login` (or set"
            " HF_TOKEN)"
        ) from None
    # The hub answers "not found" for private repositories too. GatedRepoError is a subclass, so it is caught first.
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        raise UserError(
            f"{subject} (revision {revision or 'main'}) is neither on the hub nor a local folder: check the spelling;"
            f" for a private {kind}, run `hf auth login` first"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise UserError(
            f"{subject} is not in the local cache and the hub cannot be reached: check the network, or give {instead}"
        ) from None
    # LocalEntryNotFoundError (no network, not cached) is a subclass of EntryNotFoundError.
    except hub.EntryNotFoundError:
        raise UserError(f"{subject} on the hub has no {file}: check the name") from None
    except (OSError, hub.HfHubHTTPError) as error:
        raise UserError(f"{subject}: the hub cannot be reached ({str(error).splitlines()[0]})") from None
