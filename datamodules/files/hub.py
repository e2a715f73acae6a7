"""The connection to the Hugging Face hub."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 5.0  # seconds for a connection to open
PORTS = {"http": 80, "https": 443}


@cache
def check_hub_connection() -> bool:
    """Check, once in a process, whether the hub can be reached. If not, its libraries read their caches only.

    Otherwise they would try again for 23 seconds for each file. A hub behind a proxy counts as reachable.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if not constants.HF_HUB_OFFLINE and address.scheme not in getproxies():
        try:
            socket.create_connection((address.hostname, address.port or PORTS[address.scheme]), PATIENCE).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE
