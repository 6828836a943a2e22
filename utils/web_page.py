"""What self-contained HTML pages share: a policy that lets nothing be fetched."""

import base64
import hashlib


def content_policy(script: str, style: str, pictures: bool = False) -> str:
    """The Content-Security-Policy of a page with this inline script and style: nothing else runs, nothing is fetched.

    Args:
        pictures: whether the page has pictures in data URIs.
    """
    images = "data:" if pictures else "'none'"
    return (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    """The Content-Security-Policy source expression that allows exactly this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
