"""Times and counts as messages and tables show them."""


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours = f"{seconds / 3600:.1f}".removesuffix(".0")
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{hours} h"


def tokens(n: int) -> str:
    if n < 1e6:
        return "-" if not n else "< 1 k" if n < 500 else f"{n / 1e3:.0f} k"
    return f"{n / 1e9:.2f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"
