"""What a model will take and reach, before anything loads: no GPU needed, no weights read."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from headrace.cli.flags import PLAN_FLAGS, add_spec_flags, resolution

if TYPE_CHECKING:
    from rich.table import Table

    from headrace.config.plan.plan import Plan
    from headrace.config.resolve import Resolution

EXAMPLES = """\
examples:
  headrace plan smollm2-135m                      on this machine
  headrace plan ./Qwen3-8B --gpu H100             on a GPU that is not here
  headrace plan ./Qwen3-8B --gpu L4 --quantization fp8 --max-model-len 8192
  headrace plan config.yaml --json                of a configuration, for programs

exit codes: 0 it fits; 1 it does not; 2 the model or configuration is wrong.
"""

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument(
        "model", metavar="MODEL|config.yaml", help="name, folder, .gguf file, hub id or configuration"
    )
    parser.add_argument(
        "--gpu", metavar="TYPE[:N]", help="plan for these instead of this machine, such as H100:2"
    )
    parser.add_argument(
        "--prompt", type=int, default=1024, metavar="N", help="tokens of prompts for the floors (1024)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_spec_flags(parser, PLAN_FLAGS)


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from headrace.engines.plan import gpu_machine, plan_for
    from headrace.errors import ConfigError

    if args.prompt < 1:
        raise ConfigError(f"--prompt is {args.prompt}; expected at least 1", param="prompt")
    found = resolution(args, PLAN_FLAGS)
    named = args.gpu or found.accelerator
    machine = gpu_machine(named) if named else None
    plan = plan_for(found.spec, machine, prompt=args.prompt)
    if args.json:
        print(json.dumps(plan.as_dict() | {"notices": found.report.as_dict()["notices"]}, indent=1))
    else:
        _show(plan, found)
    return 0 if plan.fits else DOES_NOT_FIT


def _show(plan: Plan, found: Resolution) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{plan.model}[/bold]: {plan.engine} engine on {plan.machine}")
    console.print(f"  {plan.reason}", markup=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_capacity(plan), markup=False, soft_wrap=True)
    if plan.floors is not None:
        console.print(_speed(plan), markup=False, soft_wrap=True)
    if plan.options:
        console.print(_options_table(plan))
    for sentence in plan.warnings:
        console.print("[yellow]warning[/yellow]:", sentence)
    for notice in found.report.notices:
        console.print(f"{notice.kind.replace('_', ' ')}: {notice}", markup=False, soft_wrap=True)
    if plan.licence_files:
        console.print(f"terms: {', '.join(plan.licence_files)}", markup=False, soft_wrap=True)
    if not plan.fits:
        from headrace.errors import DoesNotFit

        try:
            plan.check_fits()
        except DoesNotFit as error:
            console.print("[red]does not fit[/red]:", error.message)


def _memory_table(plan: Plan) -> Table:
    from rich.table import Table

    from headrace.config.plan.plan import human_bytes

    budget = plan.budget
    format_ = plan.quantization or plan.dtype
    title = "memory of one GPU" if plan.ranks > 1 else "memory"
    table = Table("", title, box=None, header_style="bold", padding=(0, 2))
    for kind, size in plan.weights.by_kind.items():
        table.add_row(f"  {kind}", human_bytes(size), style="dim")
    whole = f" (of {human_bytes(plan.weights.total)})" if plan.ranks > 1 else ""
    table.add_row(f"weights, {plan.parameters_text} in {format_}", human_bytes(budget.weights) + whole)
    table.add_row(
        f"activations, {plan.step_tokens:,} tokens a step", _about(plan, "activations", budget.activations)
    )
    if budget.graphs:
        table.add_row("graphs", _about(plan, "graphs", budget.graphs))
    if budget.process:
        table.add_row("process", _about(plan, "process", budget.process))
    if plan.kv_token_bytes:
        table.add_row(f"KV pool, {plan.kv_dtype}", human_bytes(max(budget.pool, 0)))
    table.add_row("usable", f"{human_bytes(budget.usable)} of {human_bytes(budget.total)}")
    return table


def _about(plan: Plan, what: str, size: int) -> str:
    from headrace.config.plan.plan import human_bytes

    return ("~" if what in plan.estimates else "") + human_bytes(size)


def _capacity(plan: Plan) -> str:
    from headrace.config.plan.plan import human_bytes

    if not plan.kv_token_bytes:
        return f"  inputs of up to {plan.max_model_len:,} tokens; no KV cache"
    return (
        f"  KV {human_bytes(plan.kv_token_bytes)} a token: {plan.pool_tokens:,} tokens; one sequence of up to "
        f"{plan.largest_context:,}, or {plan.batch:,} of {plan.max_model_len:,} at once"
    )


def _speed(plan: Plan) -> str:
    bounds = plan.floors
    assert bounds is not None
    first = (
        f"first token of a {bounds.prompt:,} token prompt no sooner than {bounds.first_token * 1e3:.2f} ms"
    )
    if not bounds.token:
        return f"  no faster than {bounds.throughput:,.0f} tokens/s in texts of {bounds.prompt:,} tokens"
    return (
        f"  {first}\n  one sequence no faster than {bounds.single:,.0f} tokens/s ({bounds.token * 1e3:.2f} ms a "
        f"token), {bounds.batch:,} at once no faster than {bounds.throughput:,.0f} tokens/s"
    )


def _options_table(plan: Plan) -> Table:
    from rich.table import Table

    from headrace.config.plan.plan import human_bytes

    table = Table(
        "or with", "weights", "fits", "context", "KV tokens", box=None, header_style="bold", padding=(0, 2)
    )
    for option in plan.options:
        table.add_row(
            option.what,
            human_bytes(option.weights),
            ("yes" if option.served else "not yet") if option.fits else "no",
            f"{option.context:,}" if option.fits else "-",
            f"{option.tokens:,}" if option.tokens else "-",
        )
    return table
