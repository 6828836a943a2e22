"""Remove passwords and keys from addresses before they are shown or stored."""

import re

# user:password@ of an address. It may hold a second @, never a slash or white space.
LOGIN = re.compile(r"(?<=://)[^/\s\"']*@")
# Values of a query whose names say that they are secret.
SECRET_VALUE = re.compile(r"([?&][^=&\s\"']*(?:key|token|secret|sig|pass)[^=&\s\"']*=)[^&\s\"']+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` with the login of every address removed, and secret values of its query replaced by `***`."""
    return SECRET_VALUE.sub(r"\1***", LOGIN.sub("", text))
