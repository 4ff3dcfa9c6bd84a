"""What the first HTTP process of a server and its further ones say to each other."""

from __future__ import annotations

import msgspec

from headrace.engines.attached import Attachment
from headrace.serving.state import ServerOptions

__all__ = ["COUNTS", "UP", "FrontPlan"]

UP = b"up\n"  # the line that a process writes when it listens
COUNTS = "/counts"  # where it tells its counts, on a socket of its own


class FrontPlan(msgspec.Struct, frozen=True):
    """What a further process is to serve.

    Attributes:
        options: with the port that the first process has.
        attachments: the cores, in the order of the models.
        row: its row of the file of places; 0 is the first process's.
        parent: the first process's id.
        first, own, places: paths of the first process's socket, of its own (for its counts), and of that file.
    """

    options: ServerOptions
    attachments: tuple[Attachment, ...]
    row: int
    parent: int
    first: str
    own: str
    places: str
