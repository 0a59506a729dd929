"""A failure handler that posts each failure to a URL: `queue.on_failed("orders", "webhook")`, and consumers that are
started with `--import pqueue_tools.webhook`, $PQUEUE_WEBHOOK_URL and $PQUEUE_WEBHOOK_SECRET."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pqueue import DoNotRetry, task
from pqueue_tools.masking import masked

TIMEOUT_SECONDS = 10.0


def sign(secret: str, at: str, body: bytes) -> str:
    """Return the signature of a body that was sent at this time: HMAC-SHA256 of time, a period and body, in hex."""
    return hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()


class _NoRedirect(HTTPRedirectHandler):
    """A POST that is redirected would become a GET without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


@task(name="webhook", max_attempts=10, timeout_seconds=60, retry_on=(OSError, HTTPException))
def webhook(failed: dict[str, Any]) -> int:
    """Post the failed job as JSON, with secrets masked, and return the status.

    The headers Pqueue-Timestamp, Unix seconds, and Pqueue-Signature, see `sign`, let the receiver check who sent it.
    After errors of the network, and answers of 500 or above, 408, 425 and 429, it is tried again.
    """
    url, secret = os.environ.get("PQUEUE_WEBHOOK_URL", ""), os.environ.get("PQUEUE_WEBHOOK_SECRET", "")
    if urlsplit(url).scheme not in ("http", "https"):
        raise DoNotRetry("expected PQUEUE_WEBHOOK_URL to be an http or https URL")
    body, at = json.dumps(masked(failed)).encode(), str(int(time.time()))
    headers = {"Content-Type": "application/json", "Pqueue-Timestamp": at}
    if secret:
        headers["Pqueue-Signature"] = f"sha256={sign(secret, at, body)}"
    try:
        with build_opener(_NoRedirect).open(Request(url, body, headers), timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return int(answer.status)
    except HTTPError as error:
        if error.code >= 500 or error.code in (408, 425, 429):
            raise
        raise DoNotRetry(f"the webhook answered {error.code} {error.reason}") from None
