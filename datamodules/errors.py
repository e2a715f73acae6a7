"""The one exception for mistakes that the person at the terminal can mend."""


class UserError(Exception):
    """Something the user gave is wrong: `what` happened, and `hint` what to do about it, one line each."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}"
