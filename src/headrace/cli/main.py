"""The `headrace` command. Imports nothing heavy: each command brings what it needs when it runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

CONFIG_ERROR, RUNTIME_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141  # the last two are 128 + the signal

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)

COMMANDS = {
    "serve": "serve one or more models over HTTP (OpenAI's API)",
    "chat": "talk to a model in the terminal",
    "models": "list the models that are here, and those that can be fetched by name",
    "plan": "say whether a model fits, and how fast it can be, without a GPU and without reading weights",
    "build": "fetch a model and compile its kernels ahead, so that its starts need neither",
    "verify": "measure what quantized weights or a smaller cache cost against the 16-bit model",
    "quantize": "write a quantized copy of a model",
    "bench": "measure generation, and profile where its time goes",
    "config": "check or show a config.yaml",
    "init": "write a commented config.yaml for a model",
    "client": "send many texts, chats or batch files to any server",
}

_TOP = """\
usage: headrace COMMAND [options]

Open, self-hosted inference: give it a model, it serves it fast.

commands:
{commands}

first steps:
  headrace plan ./Qwen3-8B --gpu H100  does it fit?
  headrace models                    what can be served by name
  headrace serve smollm2-135m        serve it on http://127.0.0.1:8000
  headrace chat                      talk to what is served there

Every command explains itself: headrace COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the value is the exit code: 0, 2 for a wrong configuration, 1 for what fails at run time.

    Output into a pipe whose reader has left (``| head``) ends the command in silence, as shells expect.
    """
    try:
        try:
            return _main(argv)
        finally:
            if sys.stdout is not None:  # a shell may have closed it
                sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # What is still in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more (and not some other connection broke)."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help", "help"):
        rows = "\n".join(f"  {command:<10} {text}" for command, text in COMMANDS.items())
        print(_TOP.format(commands=rows), end="")
        return 0
    if name in ("-V", "--version"):
        from headrace import __version__

        print(f"headrace {__version__}")
        return 0
    if name not in COMMANDS:
        from headrace.errors import nearest

        print(f"headrace: no command {name!r}{nearest(name, COMMANDS)}; see headrace --help", file=sys.stderr)
        return CONFIG_ERROR
    return _run(name, args[1:])


def _run(name: str, args: list[str]) -> int:
    from headrace.errors import EngineError, HeadraceError

    module = importlib.import_module(f"headrace.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"headrace {name}",
        description=module.__doc__,
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:
        prepare = getattr(module, "prepare", None)
        code: int = module.run(parser.parse_args(args if prepare is None else prepare(args)))
        return code
    except HeadraceError as error:
        print(f"headrace {name}: {error.message}", file=sys.stderr)
        return RUNTIME_ERROR if isinstance(error, EngineError) else CONFIG_ERROR
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"headrace {name}: {error.strerror}{where}", file=sys.stderr)
        return CONFIG_ERROR
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("headrace"):
            raise
        print(
            f'headrace {name}: the package {error.name!r} is missing; pip install "headrace[serve]"',
            file=sys.stderr,
        )
        return CONFIG_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
