"""Flags of one model among several."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from headrace.cli import options, serve
from headrace.cli.main import main
from headrace.config.spec import EngineSpec
from headrace.errors import ConfigError


def specs(*words: str) -> list[EngineSpec]:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(serve.prepare(list(words)))
    return options.specs(args, args.models)


def test_a_flag_of_one_model_goes_before_the_flag_of_all() -> None:
    chat, embed, other = specs(
        *("chat=some/big", "embed=some/small", "qwen2.5-coder-0.5b", "--dtype", "bfloat16", "--block-size", "32"),
        *("--embed.dtype", "float32", "--chat.max-model-len=8192", "--chat.kv-cache-bytes", "2GiB"),
        *("--qwen2.5-coder-0.5b.num-threads", "1", "--chat.eager", "--embed.no-prefix-caching"),
        *("--chat.tool-call-parser", "hermes"),
    )  # fmt: skip
    assert [spec.dtype for spec in (chat, embed, other)] == ["bfloat16", "float32", "bfloat16"]
    assert [spec.block_size for spec in (chat, embed, other)] == [32, 32, 32]
    assert (chat.max_model_len, embed.max_model_len) == (8192, None)
    assert chat.kv_cache_bytes == 2 * 2**30
    assert (chat.eager, embed.eager) == (True, False)
    assert (chat.prefix_caching, embed.prefix_caching) == (True, False)
    assert (other.num_threads, chat.num_threads) == (1, None)
    assert chat.tool_call_parser == "hermes"


def test_names_of_its_own() -> None:
    first, second = specs(
        *("a=x/y", "b=x/z", "--a.served-model-name", "one", "--a.served-model-name", "two"),
        *("--b.revision", "v1"),
    )
    assert first.served_names == ("one", "two", "a")
    assert second.served_names == ("b",)
    assert second.revision == "v1"


def test_flags_win_over_that_models_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(
        "model_name: talk\nmodel_metadata: {headrace: {model: o/n, dtype: float16, max_num_seqs: 4, block_size: 8}}\n"
    )
    one, two = specs(str(file), "other", "--chat.dtype", "float32", "--max-num-seqs", "9")
    assert (one.dtype, one.max_num_seqs, one.block_size, one.name) == ("float32", 9, 8, "talk")
    assert (two.dtype, two.max_num_seqs, two.block_size) == ("auto", 9, 16)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m", "--m.dtype"], "--m.dtype needs a value"),
        (["m", "--m.dtype", "--port", "1"], "--m.dtype needs a value"),
        (["m", "--m.dtyp", "x"], "did you mean 'dtype'"),
        (["m", "--m.no-dtype", "x"], "no setting 'no-dtype'"),
        (["m", "--m.port", "1"], "no setting 'port'"),
        (["m", "--m.eager=true"], "takes no value"),
        (["m", "e", "--x.dtype", "float32"], "no model 'x' here; models: e, m"),
        (["a/m", "b/m", "--m.dtype", "float32"], "several models are called so"),
        (["m", "e", "--e.max-model-len", "0"], "--e.max-model-len is 0"),
        (["m", "e", "--e.max-model-len", "1_0k"], "--e.max-model-len is"),
        (["m", "e", "--e.tensor-parallel-size", "2"], "e: tensor_parallel_size 2 is not in this version"),
        (["m", "e", "--served-model-name", "x"], "--NAME.served-model-name"),
    ],
)
def test_what_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        specs(*words)
    assert says in str(error.value)


def test_all_problems_of_all_models_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "e", "--m.dtype", "half", "--e.block-size", "9", "--max-num-seqs", "0"]) == 2
    told = capsys.readouterr().err
    assert all(flag in told for flag in ("--m.dtype", "--e.block-size", "--max-num-seqs"))
    assert told.count("--max-num-seqs") == 1


def test_other_words_are_left_alone() -> None:
    words = ["./a.b/c", "--host", "1.2.3.4", "--port=80", "x=./m.v2", "--api-key", "a.b", "--", "--x.dtype"]
    assert serve.prepare(words) == words
