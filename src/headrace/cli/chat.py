"""Talk to a model in the terminal, over HTTP to a running server, or to one started for the purpose."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from headrace.cli.chat_http import ChatClient
from headrace.cli.options import add_model_arguments, specs
from headrace.errors import EngineError, HeadraceError, InvalidRequest

EXAMPLES = """\
examples:
  headrace chat                                  the server on http://127.0.0.1:8000
  headrace chat --url http://gpu7:8000 --model m another server, one of its models
  headrace chat smollm2-135m                     start this model, talk to it, stop it
  echo "Name three rivers." | headrace chat      one question from a pipe

while chatting:
  /clear starts anew   /system TEXT sets the system message   /exit leaves
  Ctrl-C stops an answer, Ctrl-D leaves
"""

_HELP = "/clear starts anew, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("start", nargs="?", metavar="[NAME=]MODEL", help="a model to start; none: use --url")
    add = parser.add_argument_group("conversation").add_argument
    add("--url", default="http://127.0.0.1:8000", help="of a running server (default http://127.0.0.1:8000)")
    add("--model", metavar="NAME", help="one of that server's models (default: its first that generates)")
    add("--api-key", default="", metavar="KEY")
    add("--system", metavar="TEXT", help="system message")
    add("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    add("--temperature", type=float, metavar="T")
    add("--top-p", type=float, metavar="P")
    add("--seed", type=int, metavar="N")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends."""
    if args.start is None:
        return Chat(ChatClient(args.url, args.api_key), args).run()
    from headrace.cli.background import BackgroundServer

    print(f"loading {args.start} ...", file=sys.stderr, flush=True)
    with BackgroundServer(specs(args, [args.start])) as server:
        return Chat(ChatClient(server.url, ""), args).run()


class Chat:
    """One conversation."""

    def __init__(self, client: ChatClient, args: argparse.Namespace) -> None:
        self._client = client
        self._model: str = args.model or client.first_model()
        self._messages: list[dict[str, Any]] = []
        self._system: str | None = args.system
        names = ("max_tokens", "temperature", "top_p", "seed")
        self._options = {name: value for name in names if (value := getattr(args, name)) is not None}

    def run(self) -> int:
        """Ask and answer; the exit code."""
        if not sys.stdin.isatty():
            return 0 if self._ask(sys.stdin.read()) else 1
        print(f"{self._model}: {_HELP}", file=sys.stderr)
        with contextlib.suppress(ModuleNotFoundError):
            import readline  # noqa: F401  # line editing and history of input()
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line in ("/exit", "/quit"):
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/clear":
            self._messages.clear()
        elif word == "/system":
            self._system = rest.strip() or None
        else:
            print(_HELP, file=sys.stderr)

    def _ask(self, text: str) -> bool:
        """Send a message and print the answer as it comes; False when it failed."""
        if not text.strip():
            raise InvalidRequest("there is no message; write one to standard input")
        turn = {"role": "user", "content": text.strip()}
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {"model": self._model, "messages": [*system, *self._messages, turn], **self._options}
        pieces: list[str] = []
        try:
            for piece in self._client.stream(body):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except HeadraceError as error:
            print(f"\nheadrace chat: {error.message}", file=sys.stderr)
            if isinstance(error, EngineError) and not sys.stdin.isatty():
                raise
            return False
        print()
        self._messages += [turn, {"role": "assistant", "content": "".join(pieces)}]
        return True
