#!/usr/bin/env python3
"""Make a container on an Azure storage emulator of this machine: azure_container.py PORT NAME. Prints {"status": 201}.

The account and its key are those that every emulator has, and that Microsoft publishes.
"""
import base64
import email.utils
import hashlib
import hmac
import http.client
import json
import sys

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def signature(headers: dict[str, str], path: str) -> str:
    """Shared key authorization: the verb, eleven empty standard headers, the x-ms headers in order, and the resource."""
    own_headers = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    text = "PUT" + "\n" * 12 + own_headers + f"/{ACCOUNT}{path}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def main() -> None:
    port, name = int(sys.argv[1]), sys.argv[2]
    path = f"/{ACCOUNT}/{name}"
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    authorization = {"Authorization": f"SharedKey {ACCOUNT}:{signature(headers, path)}", "Content-Length": "0"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("PUT", f"{path}?restype=container", headers=headers | authorization)
    print(json.dumps({"status": connection.getresponse().status}))


if __name__ == "__main__":
    main()
