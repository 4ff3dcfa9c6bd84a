"""Send many inputs to a server: embed, rerank, classify, chat, or a whole batch file."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client import PerformanceClient, RequestProcessingPreference

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  headrace client embed texts.jsonl -o vectors.npy --model minilm
  headrace client rerank documents.csv -o scores.jsonl --query "how to cook rice"
  headrace client classify reviews.parquet -o labels.parquet --field review
  headrace client chat questions.jsonl -o answers.jsonl --model smollm2-135m --set temperature=0
  headrace client batch requests.jsonl -o results.jsonl      (stop it at any time; the same command goes on)

Inputs are JSONL (objects or bare values), CSV, Parquet or lines of text; outputs JSONL, Parquet or npy, by name.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a task."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    embed = _task(tasks, "embed", "vectors of texts", "text")
    embed.add_argument("--dimensions", type=int, help="leading dimensions to keep (Matryoshka models)")
    embed.add_argument(
        "--encoding",
        default="base64",
        choices=("base64", "bytes", "float"),
        help="on the wire; default: %(default)s",
    )
    rerank = _task(tasks, "rerank", "scores of texts for a query, best first", "text")
    rerank.add_argument("--query", required=True)
    classify = _task(tasks, "classify", "labels of texts", "text")
    for scorer in (rerank, classify):
        scorer.add_argument("--raw-scores", action="store_true", help="logits instead of probabilities")
        scorer.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    chat = _task(tasks, "chat", "answers to prompts or lists of messages", "messages")
    chat.add_argument("--stream", action="store_true", help="ask the server for streams")
    chat.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of every request, as JSON, such as max_tokens=64",
    )
    batch = _task(tasks, "batch", "an OpenAI batch file; resumes where it was stopped", None)
    batch.add_argument("--errors", help="file for failed requests; default: OUTPUT with .errors")


def _task(tasks: Any, name: str, text: str, field: str | None) -> argparse.ArgumentParser:
    task: argparse.ArgumentParser = tasks.add_parser(name, help=text, description=text, allow_abbrev=False)
    task.add_argument("input", help="file to read")
    task.add_argument("-o", "--output", required=True, help="file to write")
    if field is not None:
        task.add_argument(
            "--field",
            default=field,
            help="field or column to read; the others are not sent; default: %(default)s",
        )
        task.add_argument(
            "--model", required=name in ("embed", "chat"), help="as the server names it", default=None
        )
    task.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    task.add_argument("--api-key", help="default: HEADRACE_API_KEY, BASETEN_API_KEY or OPENAI_API_KEY")
    task.add_argument("--concurrency", type=int, default=None, help="requests in flight at most")
    task.add_argument("--timeout", type=float, default=None, help="seconds for one request")
    task.add_argument("--max-retries", type=int, default=None)
    if name in ("embed", "rerank", "classify"):
        task.add_argument("--batch-size", type=int, default=None, help="texts in one request at most")
    task.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None)
    return task


def run(args: argparse.Namespace) -> int:
    """0 when every input was answered, 3 when some failed for good (``batch`` and ``chat``)."""
    from headrace.client import InvalidArgument, PerformanceClient
    from headrace.client.core import api_key_from_environment
    from headrace.errors import HeadraceError

    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise InvalidArgument(f"{args.output} is the input too; give another output")
    url = args.base_url.rstrip("/").removesuffix("/v1")  # as it is given to the openai package
    key = args.api_key or api_key_from_environment() or "none"
    client = PerformanceClient(url, key)
    task = {"embed": _embed, "rerank": _rerank, "classify": _classify, "chat": _chat, "batch": _batch}
    try:
        return task[args.task](client, _preference(args), args)
    except HeadraceError as error:
        if isinstance(error, OSError):  # HTTPError and Timeout: their text without an error number
            print(f"headrace client: {error.message}", file=sys.stderr)
            return 1
        raise
    except OSError as error:
        if error.filename is None:
            raise
        raise InvalidArgument(f"{error.filename}: {error.strerror}") from None


def _preference(args: argparse.Namespace) -> RequestProcessingPreference:
    from headrace.client import RequestProcessingPreference

    return RequestProcessingPreference(
        max_concurrent_requests=args.concurrency,
        batch_size=getattr(args, "batch_size", None),
        timeout_s=args.timeout,
        max_retries=args.max_retries,
    )


def _texts(args: argparse.Namespace) -> Iterator[str]:
    from headrace.client import InvalidArgument
    from headrace.client.tables import read_column

    for i, value in enumerate(read_column(args.input, args.field)):
        if not isinstance(value, str):
            raise InvalidArgument(f"{args.input}: row {i} is {type(value).__name__}, expected text")
        yield value


def _embed(client: PerformanceClient, preference: RequestProcessingPreference, args: Any) -> int:
    from headrace.client.progress import Progress
    from headrace.client.tables import open_writer

    total = sum(1 for _ in _texts(args))  # a bad row is found before anything is sent
    parts = client.embed_stream(
        _texts(args), args.model, args.encoding, args.dimensions, preference=preference
    )
    with (
        open_writer(args.output) as out,
        Progress("embed", total, show=args.progress) as bar,
    ):
        for part in parts:
            out.vectors(bar.done, part.numpy())
            bar.add(len(part.data))
    return 0


def _rerank(client: PerformanceClient, preference: RequestProcessingPreference, args: Any) -> int:
    from headrace.client.tables import open_writer

    with open_writer(args.output, vectors=False) as out:
        texts = list(_texts(args))
        response = client.rerank(
            args.query,
            texts,
            args.raw_scores,
            args.model,
            truncate=args.truncate,
            preference=preference,
            sort=True,
        )
        out.rows([{"index": r.index, "score": r.score, "text": texts[r.index]} for r in response.data])
    return 0


def _classify(client: PerformanceClient, preference: RequestProcessingPreference, args: Any) -> int:
    from headrace.client.progress import Progress
    from headrace.client.tables import open_writer

    total = sum(1 for _ in _texts(args))
    groups = client.classify_stream(
        _texts(args), args.model, args.raw_scores, args.truncate, preference=preference
    )
    with (
        open_writer(args.output, vectors=False) as out,
        Progress("classify", total, show=args.progress) as bar,
    ):
        for chunk in _chunks(groups, 256):
            rows = [
                {"index": bar.done + i, "labels": [{"label": r.label, "score": r.score} for r in group]}
                for i, group in enumerate(chunk)
            ]
            out.rows(rows)
            bar.add(len(rows))
    return 0


def _chat(client: PerformanceClient, preference: RequestProcessingPreference, args: Any) -> int:
    from headrace.client.chat import chat_bodies
    from headrace.client.progress import Progress
    from headrace.client.tables import open_writer, read_column

    fields = _fields(args.set)
    total = sum(1 for _ in chat_bodies(read_column(args.input, args.field), args.model, fields))
    answers = client.chat_stream(
        read_column(args.input, args.field),
        args.model,
        preference,
        stream=args.stream,
        return_errors=True,
        **fields,
    )
    failed = 0
    with (
        open_writer(args.output, vectors=False) as out,
        Progress("chat", total, show=args.progress) as bar,
    ):
        for answer in answers:
            error = None if answer.error is None else str(answer.error)
            text = None if answer.error is not None else answer.text
            failed += error is not None
            out.rows([{"index": answer.index, "text": text, "body": answer.body or None, "error": error}])
            bar.add(1)
    if failed:
        print(
            f"headrace client: {failed} of {bar.done} requests failed; see 'error' in the output",
            file=sys.stderr,
        )
    return 3 if failed else 0


def _batch(client: PerformanceClient, preference: RequestProcessingPreference, args: Any) -> int:
    from headrace.client.jobs import BatchCounts, errors_path
    from headrace.client.progress import Progress

    bar: Progress | None = None

    def on_progress(counts: BatchCounts) -> None:
        nonlocal bar
        if bar is None:
            bar = Progress("batch", counts.total, begun_with=counts.resumed, show=args.progress)
        bar.add(counts.done - bar.done)

    counts = client.run_batch(
        args.input, args.output, preference, error_path=args.errors, on_progress=on_progress
    )
    if bar is not None:
        with bar:
            pass
    resumed = f" ({counts.resumed} from before)" if counts.resumed else ""
    print(f"{counts.completed} of {counts.total} answered{resumed}, {counts.failed} failed", file=sys.stderr)
    if counts.failed:
        print(f"failures: {args.errors or errors_path(args.output)}", file=sys.stderr)
    return 3 if counts.failed else 0


def _fields(pairs: list[str]) -> dict[str, Any]:
    import json

    from headrace.client import InvalidArgument

    fields: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InvalidArgument(f"--set {pair}: expected NAME=VALUE")
        try:
            fields[name] = json.loads(text)
        except ValueError:
            fields[name] = text
    return fields


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
