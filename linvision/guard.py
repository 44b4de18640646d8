"""One guard for every entry point, commands, recipes and scripts: it tells a user's mistake from a fault of ours.

What the user can mend ends in one sentence, `error: …`, and exit code 2, as a wrong flag does; `LINVISION_TRACEBACK=1`
shows where it was raised. Everything else is a fault of ours: it keeps its traceback, and says where to report it.
Ctrl-C ends what has no handler of its own, as training has, in one sentence and exit code 130.
"""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from linvision.extras import MissingPackage

ISSUES = 'https://github.com/linvision/linvision/issues'
MISTAKES = (ValueError, OSError, FloatingPointError, MemoryError, MissingPackage)
# of other kinds those whose words say that a user can mend them, and how
MENDED = {
    'unexpected keyword argument': '',  # a name in --dataset-args or --opt-args
    'Unknown model argument': '',
    'DataLoader worker': 'Often it is memory: try fewer --workers, or more shared memory (docker run --shm-size).',
    'out of memory': 'Try a smaller batch, or more --accumulate.',
    "can't allocate memory": 'Choose smaller sizes, or fewer images at a time.',
    'size calculation overflowed': 'Choose smaller sizes: no memory holds these.',
}


class Mistake(SystemExit):
    """The end of the program for something that the user can mend; its text is the sentence that was printed."""

    def __init__(self, words: str, code: int = 2) -> None:
        super().__init__(words)
        self.code = code


def end(words: str) -> NoReturn:
    """Print `error: …` and end the program.

    Raises:
        Mistake: Always.
    """
    rank = int(os.environ.get('RANK', 0))  # of a process of torchrun
    words = f'error in process {rank}: {words}' if rank else f'error: {words}'
    print(words, file=sys.stderr)
    raise Mistake(words)


def escape_what_cannot_be_shown() -> None:
    """Let a name that the terminal has no letters for be printed as `\\xe9`, and end nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != 'backslashreplace':
            stream.reconfigure(errors='backslashreplace')


@contextmanager
def guarded() -> Iterator[None]:
    """End the program in a sentence where the user can mend what went wrong.

    Raises:
        Mistake: It is such a mistake, or Ctrl-C.
        Exception: A fault of ours, as it was raised, with a note.
    """
    escape_what_cannot_be_shown()
    logging.basicConfig(format='%(levelname)s: %(message)s')
    logging.getLogger('huggingface_hub').propagate = False  # it prints its lines itself
    try:
        try:
            yield
        except SystemExit as done:  # `--help` ends the program
            if not done.code:
                sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would meet what ends with the program
        words = 'stopped by Ctrl-C'
        print(words, file=sys.stderr)
        raise Mistake(words, 128 + signal.SIGINT) from stop
    except Exception as error:
        words, advice = str(error) or type(error).__name__, ''
        mistake = isinstance(error, MISTAKES)
        if isinstance(error, TypeError | RuntimeError):
            advice = next((' ' + MENDED[part] for part in MENDED if part in words), '')
            mistake = bool(advice)
        if mistake and not os.environ.get('LINVISION_TRACEBACK'):
            if isinstance(error, ValueError | TypeError) and int(os.environ.get('RANK', 0)):
                raise Mistake('') from error  # the first process says it
            end(words + advice.rstrip())
        if not mistake:
            error.add_note(f'This is a fault of linvision, not yours. Please report it, with all lines above: {ISSUES}')
        raise
