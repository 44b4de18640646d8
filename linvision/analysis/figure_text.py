"""Text of users in pictures: names of classes, files and models are what they are, no markup, and any bytes."""


def literal(text: str) -> str:
    r"""A text that matplotlib draws as it stands, where `$^$` would be mathematics.

    What is no valid Unicode, as names of files may be, is shown as `\udcff`.
    """
    return text.encode('utf-8', 'backslashreplace').decode().replace('$', r'\$')
