"""Names of models behind OpenAI-compatible servers: openai:MODEL@BASE_URL."""

from urllib.parse import urlsplit

from utils.errors import UserError

SERVER = "openai:"


def model_of_server(name: str) -> str:
    """MODEL of openai:MODEL@BASE_URL; another name unchanged."""
    # The model's name may contain @ (versions of hosted models).
    return name.removeprefix(SERVER).partition("@http")[0] if name.startswith(SERVER) else name


def model_and_url(spec: str, place: str) -> tuple[str, str]:
    """Model and address in openai:MODEL@BASE_URL. Raises UserError, naming `place`, for another specification."""
    model, at, url = spec.removeprefix(SERVER).partition("@http")
    url = f"http{url}"
    # What is not an address may still hold a login, which no message shows.
    name, _, rest = spec.removeprefix(SERVER).partition("@")
    shown = place.replace(spec, f"{SERVER}{name}@...") if "@" in rest else place
    try:
        host = urlsplit(url).hostname
        if urlsplit(url).port == 0:
            raise ValueError("port 0")
    except ValueError as error:
        raise UserError(f"{shown}: not an address ({error}); write / : @ of a password as %2F %3A %40") from None
    if not (model and at and url.startswith(("http://", "https://")) and host):
        raise UserError(
            f"{shown}: expected openai:MODEL@BASE_URL, such as openai:gpt-4o@https://host/v1 or"
            " openai:gemma@http://localhost:8000/v1"
        )
    if urlsplit(url).query or urlsplit(url).fragment:
        raise UserError(f"{place}: the address must end with its path; give a key as OPENAI_API_KEY")
    return model, url
