"""Checks that texts consist of characters, as all files in UTF-8 do."""


def check(text: str) -> None:
    """Checks that a text has no half of a character, which tokenizers can't read.

    JSON may hold half of a character that takes two units in UTF-16, and the command line of a
    program bytes that are not UTF-8.

    Raises:
      ValueError: it has one.

    >>> check("half a smile: " + chr(0xD83D))
    Traceback (most recent call last):
    ValueError: the text has half of a character ('\\ud83d', a lone surrogate); remove it
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a character ({error.object[error.start]!a}, a lone surrogate); "
            "remove it"
        ) from error
