"""Download one file of a hub repository, with readable errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError, first_line


class OneRetryNotice(logging.Filter):
    """One line for all retries of a request, in place of huggingface_hub's two lines per retry."""

    def __init__(self):
        super().__init__()
        self.reported = False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.reported or record.levelno != logging.WARNING:
            return record.levelno > logging.WARNING
        self.reported = True
        record.msg = (
            "the hub does not answer; trying again for about half a minute (HF_HUB_OFFLINE=1: only cached files)"
        )
        record.args = ()
        return True


def report_retries_once() -> None:
    """Report in one line that requests to the hub are repeated."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(known, OneRetryNotice) for known in logger.filters):
        logger.addFilter(OneRetryNotice())


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

    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except hub.LocalEntryNotFoundError:
        problem = f"{kind} {repo} is not in the local cache, and {why_unreachable()}, or give {instead}"
    # LocalEntryNotFoundError (no network, not cached) is a subclass of EntryNotFoundError.
    except hub.EntryNotFoundError:
        problem = f"{kind} {repo} on the hub has no {file}: check the name"
    except (OSError, hub.HFValidationError) as error:
        problem = why_no_access(error, repo, kind, revision)
    raise UserError(problem)


def why_no_access(error: Exception, repo: str, kind: str, revision: str | None = None) -> str:
    """Why the hub refused a repository, and the fix, as one line. Arguments as `fetch`."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    subject, page = f"{kind} {repo}", repo if kind == "model" else f"datasets/{repo}"
    # The hub answers "not found" for private repositories too. GatedRepoError is a subclass, so it is tested first.
    if isinstance(error, hub.GatedRepoError):
        return (
            f"{subject} is gated: accept its licence at {constants.ENDPOINT}/{page}, then run `hf auth login` (or set"
            " HF_TOKEN)"
        )
    if isinstance(error, (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError)):
        return (
            f"{subject} (revision {revision or 'main'}) is neither on the hub nor a local folder: check the spelling;"
            f" for a private {kind}, run `hf auth login` first"
        )
    return f"{subject}: {why_unreachable(error)}"


def why_unreachable(error: Exception | None = None) -> str:
    """Why the hub gave no answer, and the fix: the end of an error line. `error`: its text is added."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set: unset it, or copy the files into the cache {constants.HF_HUB_CACHE}"
            " (docs/install.md)"
        )
    detail = f" ({first_line(error)})" if error else ""
    return f"the hub {constants.ENDPOINT} cannot be reached{detail}: check the network, HTTPS_PROXY and HF_ENDPOINT"


@contextmanager
def upload_errors(what: str, fix: str) -> Iterator[None]:
    """Around an upload: its failure in one line.

    Args:
        what: the flag with its repository.
        fix: what continues a failed upload.

    Raises:
        UserError: no access, or no network.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}: {why_unreachable()}")
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            login = "run `hf auth login` with a token that may write there, or name a repository of your own"
            raise UserError(f"{what}: the hub refuses it ({status}): {login}") from None
        raise UserError(f"{what}: the upload failed ({first_line(error)}); {fix}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{what}: not a name of a repository ({first_line(error)}): OWNER/NAME") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{what}: {why_unreachable(error)}; {fix}") from None
