"""How long to wait between two looks for something that comes over a network."""

import time

SHARE = 0.05  # of the time that it has been waited for so far
SHORTEST_WAIT = 0.1  # seconds: a look is a request, and many looks keep a server busy


def wait_between_looks(waited: float, longest: float) -> None:
    """Sleeps for a twentieth of the time that has been waited so far, but no less than `SHORTEST_WAIT`.

    Args:
        waited: Seconds since the wait began.
        longest: Seconds that are slept at most.
    """
    time.sleep(min(max(SHARE * waited, SHORTEST_WAIT), longest))
