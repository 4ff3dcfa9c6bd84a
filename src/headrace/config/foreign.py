"""Names of other servers' options and what they are here: for ``engine_config`` and the migration page."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["ENGINE_OPTIONS", "TEI_FLAGS", "TRT_TO_VLLM", "VLLM_FLAGS", "Foreign"]


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """One option of another server.

    Attributes:
        name: its flag, or its key in a configuration.
        to: the field of EngineSpec, or a flag of ``headrace serve`` when it begins with ``--``; empty: none.
        kind: type of its value.
        note: what differs.
        inverted: true there is false here.
    """

    name: str
    to: str = ""
    kind: str = "int"
    note: str = ""
    inverted: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether a YAML value has the right type."""
        if value is None:
            return True
        if isinstance(value, bool) and self.kind not in ("bool", "any"):
            return False
        types: tuple[type, ...] = {
            "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "map": (dict,),
        }.get(self.kind, (object,))  # fmt: skip
        return isinstance(value, types)

    @property
    def expects(self) -> str:
        words = {
            "int": "an integer",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
            "map": "a mapping",
        }
        return words.get(self.kind, "a value")


def _f(name: str, to: str = "", kind: str = "int", note: str = "", *, inverted: bool = False) -> Foreign:
    return Foreign(name=name, to=to, kind=kind, note=note, inverted=inverted)


_ALWAYS = "always on"
_OURS = "chosen by this engine"

VLLM_FLAGS = (
    _f("--model", "model", "str", "the first argument of `headrace serve`"),
    _f("--served-model-name", "served_names", "str"),
    _f("--revision", "revision", "str"),
    _f("--dtype", "dtype", "str", "`half` is `float16`, `float` is `float32`"),
    _f(
        "--quantization",
        "quantization",
        "str",
        "a checkpoint's own format is recognized; name one to convert",
    ),
    _f("--kv-cache-dtype", "kv_cache_dtype", "str", "`fp8_e4m3` is `fp8`"),
    _f("--max-model-len", "max_model_len"),
    _f("--max-num-seqs", "max_num_seqs"),
    _f("--max-num-batched-tokens", "max_num_batched_tokens"),
    _f("--max-num-queued-reqs", "max_queue", note="a full queue answers 429 with Retry-After"),
    _f("--gpu-memory-utilization", "memory_fraction", "float", "of the whole device, as there"),
    _f("--kv-cache-memory-bytes", "kv_cache_bytes"),
    _f("--block-size", "block_size"),
    _f("--cpu-offload-gb", "", "float", "weights stay on the device"),
    _f("--swap-space", "host_kv_bytes", "float", "in bytes here, in GiB there"),
    _f("--tensor-parallel-size", "tensor_parallel_size"),
    _f("--pipeline-parallel-size", "pipeline_parallel_size"),
    _f("--enable-expert-parallel", "expert_parallel_size", "bool", "a number here"),
    _f("--enable-prefix-caching", "prefix_caching", "bool", "on by default"),
    _f("--no-enable-prefix-caching", "prefix_caching", "bool", "`prefix_caching: false`", inverted=True),
    _f("--enable-chunked-prefill", "chunked_prefill", "bool", "on by default"),
    _f("--enforce-eager", "eager", "bool"),
    _f("--async-scheduling", "overlap", "bool"),
    _f("--seed", "seed"),
    _f("--chat-template", "chat_template", "str"),
    _f(
        "--tool-call-parser",
        "tool_call_parser",
        "str",
        "found from the checkpoint; `--enable-auto-tool-choice` is on",
    ),
    _f("--enable-auto-tool-choice", "", "bool", _ALWAYS),
    _f("--reasoning-parser", "reasoning_parser", "str"),
    _f("--speculative-config", "speculation", "map", "`model_metadata.headrace.speculation`"),
    _f("--enable-lora", "", "bool", "on when adapters are named"),
    _f("--lora-modules", "adapters", "str"),
    _f("--max-lora-rank", "max_lora_rank"),
    _f("--trust-remote-code", "", "bool", "code of a checkpoint never runs"),
    _f("--tokenizer", "", "str", "taken from the model's folder"),
    _f("--load-format", "", "str", "found by what the folder holds"),
    _f(
        "--runner",
        "engine",
        "str",
        "found from the checkpoint: `pooling` is `encoder`, `generate` is `decoder`",
    ),
    _f("--task", "engine", "str", "found from the checkpoint"),
    _f("--override-pooler-config", "pooling", "map"),
    _f("--compilation-config", "", "map", "nothing is compiled at start"),
    _f("--structured-outputs-config", "", "map", "always llguidance"),
    _f("--disable-log-requests", "", "bool", "requests are not logged"),
    _f("--host", "--host", "str"),
    _f("--port", "--port"),
    _f("--api-server-count", "--api-server-count"),
    _f("--api-key", "--api-key", "str", "or the secret `headrace_api_key`"),
)

TEI_FLAGS = (
    _f("--model-id", "model", "str", "the first argument of `headrace serve`"),
    _f("--revision", "revision", "str"),
    _f("--served-model-name", "served_names", "str"),
    _f("--dtype", "dtype", "str"),
    _f("--pooling", "pooling", "str", "`last-token` is `last`"),
    _f("--tokenization-workers", "", note=_OURS),
    _f("--max-concurrent-requests", "max_queue", note="beyond it 429, as there"),
    _f("--max-batch-tokens", "max_num_batched_tokens"),
    _f("--max-batch-requests", "max_num_seqs"),
    _f("--max-client-batch-size", "--max-inputs"),
    _f("--auto-truncate", "auto_truncate", "bool"),
    _f("--default-prompt", "", "str", "the `prompt` field of a request"),
    _f("--default-prompt-name", "", "str", "the `prompt_name` field of a request"),
    _f("--dense-path", "", "str", "from `modules.json`"),
    _f("--hf-token", "secret_name", "str", "the secret `hf_access_token`, or the variable HF_TOKEN"),
    _f("--hostname", "--host", "str"),
    _f("--port", "--port"),
    _f("--uds-path", "", "str", "TCP only"),
    _f("--huggingface-hub-cache", "", "str", "the variable HEADRACE_HOME"),
    _f("--payload-limit", "--max-body-bytes"),
    _f("--api-key", "--api-key", "str"),
    _f("--json-output", "", "bool", "logs are JSON when no terminal is there"),
    _f("--otlp-endpoint", "", "str", "no traces yet"),
    _f("--prometheus-port", "", note="at /metrics of the same port"),
    _f("--cors-allow-origin", "--cors-allow-origin", "str"),
)

TRT_TO_VLLM = {
    "max_batch_size": "max_num_seqs",
    "max_num_tokens": "max_num_batched_tokens",
    "max_seq_len": "max_model_len",
}

_TRT_OPTIONS = (
    _f("max_batch_size", "max_num_seqs"),
    _f("max_num_tokens", "max_num_batched_tokens"),
    _f("max_seq_len", "max_model_len"),
    _f("enable_chunked_prefill", "chunked_prefill", "bool"),
    _f("free_gpu_memory_fraction", "memory_fraction", "float"),
    _f("pipeline_parallel_size", "pipeline_parallel_size"),
)

_NOT_AS_OPTIONS = {"--model", "--host", "--port", "--api-key", "--lora-modules", "--no-enable-prefix-caching"}

ENGINE_OPTIONS: dict[str, Foreign] = {option.name: option for option in _TRT_OPTIONS} | {
    option.name.removeprefix("--").replace("-", "_"): option
    for option in VLLM_FLAGS
    if option.name not in _NOT_AS_OPTIONS
}
