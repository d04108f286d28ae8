"""Where files are: local paths and bucket urls. Credentials are no part of either: configs and logs would show them."""

import re

SCHEMES = ("gs://", "s3://")
SECRET = re.compile(r"(?i)(key|secret|passw(or)?d|credentials?|(^|_)(token|auth))$")
"""Names of settings whose values are not shown."""


def checked(place: str) -> str:
    """Returns a path or bucket url as it is.

    Raises:
        ValueError: it holds credentials, is the url of something else than a bucket, or no system takes it. The
            message does not quote it.
    """
    if "\0" in place:
        raise ValueError("a path cannot hold a NUL character")
    scheme, found, rest = place.partition("://")
    if not found or "/" in scheme:
        return place
    if "@" in rest.partition("/")[0] or re.search(r"\?[^/]*=", rest):
        raise ValueError(
            "this url holds credentials, which configs and logs would show; leave them out of it and set them where "
            "the cloud's own tools look, such as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if not place.startswith(SCHEMES):
        raise ValueError(f"{scheme[:20]}:// is no place that maxlm reads or writes; use a local path, gs:// or s3://")
    return place


def redacted(text: str) -> str:
    """The text with *** for user names, passwords and queries of the urls in it."""
    text = re.sub(r"(\w://)[^\s/@]*@", r"\1***@", text)
    return re.sub(r"(\w://[^\s?'\"]*\?)[^\s'\"]+", r"\1***", text)
