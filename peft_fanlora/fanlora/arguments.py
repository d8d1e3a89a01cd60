"""Checks of arguments that several functions take."""


def check_count(argument: str, value: int, least: int = 1) -> None:
    """Raises a ValueError that names the argument if the value is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{argument}` is {value!r}; it must be an integer of at least {least}.")
