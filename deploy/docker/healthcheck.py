"""Exit 0 when the server in this container answers 200, else 1 and the reason: the image's health
check.

    python healthcheck.py [PATH] [PORT]

Standard library only, and little of it: it runs every few seconds beside a busy engine. It speaks
plain HTTP; with TLS, give the container another check.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main(arguments: list[str]) -> int:
    path = arguments[0] if arguments else "/health/live"
    port = arguments[1] if len(arguments) > 1 else os.environ.get("PACKHORSE_HTTP__PORT", "8000")
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{path} on port {port}: {error}")
        return 1
    print(f"{path} on port {port}: {status}")
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
