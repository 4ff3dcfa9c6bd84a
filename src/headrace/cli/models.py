"""List the models that can be served by name, and those that lie in the caches of this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLES = """\
examples:
  headrace models            a table
  headrace models --json     the same for programs

A name from the first table works wherever a model is asked for; it is fetched when it is first used.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print what is there."""
    packaged, cached = _packaged(), _cached()
    if args.json:
        print(json.dumps({"packaged": packaged, "cached": cached}, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("NAME", "MODEL", "LICENCE", "DOWNLOAD", "HERE", box=None, header_style="bold")
    for row in packaged:
        here = "yes" if row["path"] else "no"
        table.add_row(row["name"], row["title"], row["licence"], f"{row['download_mb']} MB", here)
    console.print(table)
    if cached:
        table = Table("HUB CACHE", "SIZE", "PATH", box=None, header_style="bold")
        for row in cached:
            table.add_row(row["name"], f"{row['bytes'] / 1e6:.0f} MB", row["path"])
        console.print()
        console.print(table)
    console.print("\nServe one: [bold]headrace serve NAME[/bold] (or a folder, a .gguf file, a hub id)")
    return 0


def _packaged() -> list[dict[str, Any]]:
    from headrace.checkpoints.fetch import installed
    from headrace.checkpoints.packaged import PACKAGED

    rows = []
    for model in PACKAGED.values():
        if model.test_only:
            continue
        path = installed(model.name)
        rows.append(
            {
                "name": model.name,
                "title": model.title,
                "licence": model.licence,
                "source": model.source,
                "download_mb": model.download_mb,
                "path": str(path) if path else None,
            }
        )
    return rows


def _cached() -> list[dict[str, Any]]:
    """Repositories in Hugging Face's cache; none when that library or the cache is not there."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ModuleNotFoundError:
        return []
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    rows = [
        {"name": repo.repo_id, "bytes": repo.size_on_disk, "path": str(repo.repo_path)}
        for repo in repos
        if repo.repo_type == "model"
    ]
    return sorted(rows, key=lambda row: str(row["name"]))
