"""How fast the run is, and how long it still takes."""

_HALF_LIFE_S = 30.0
_HALF_LIFE_STEPS = 10.0


class TokenRate:
    """Recent tokens per second of training: recent tokens over the recent time.

    Both sums forget a step by half within 30 s of later steps or 10 later steps, whichever is longer: fast steps do
    not make the rate jump, slow ones do not make it the rate of the last step alone. A ratio of sums stays right while
    the length grows, where the mean of the steps' rates would weigh a short step like a long one.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, *, tokens: float, seconds: float) -> None:
        """Count a step of so many tokens that took so many seconds."""
        assert seconds >= 0, f"a step cannot take {seconds} s"
        kept = max(0.5 ** (seconds / _HALF_LIFE_S), 0.5 ** (1 / _HALF_LIFE_STEPS))
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first step."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def seconds_left(self, tokens: int) -> float | None:
        """Seconds that so many tokens take at the recent rate; None where there is no rate yet."""
        rate = self.tokens_per_s
        return max(0, tokens) / rate if rate else None


def format_count(number: float) -> str:
    """A number of tokens for people: 950, 12.3K, 4.56M, 157.3B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,960 rounds to 1000K: it is shown as 1M.
        if number >= limit * 0.99995:
            return f"{number / limit:.4g}{suffix}"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def format_duration(seconds: float | None) -> str:
    """A time left or spent: 0:42, 1:02:03, 3d 04:05, or ? where it is not known."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
