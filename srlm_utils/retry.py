"""What is asked of a server again, and when."""

import random

RETRIES = 8  # after the first try, each with about twice the wait: a minute and a half in all
BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


def may_pass(status: int) -> bool:
    """Whether what a server answers with this status may be over when it is asked again."""
    return status in (408, 409, 429) or status >= 500


def backoff(tries: int) -> float:
    """Seconds to wait after so many tries; random, so that what failed together does not come back together."""
    return min(BACKOFF_S * 2 ** (tries - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1)
