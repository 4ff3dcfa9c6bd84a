"""What crosses the border between a serving process and an engine core: msgpack, typed, versioned here.

serving ──► core   Submit · Abort · Forget · Shutdown
core ──► serving   Ready · Outputs · EncodeOutputs · Heartbeat · Failed
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from headrace.types import EncodeOutput, Output, Request

__all__ = [
    "Abort",
    "CoreStats",
    "EncodeOutputs",
    "Failed",
    "Forget",
    "FromCore",
    "Heartbeat",
    "Loading",
    "Outputs",
    "Ready",
    "Shutdown",
    "Submit",
    "ToCore",
    "decode_from_core",
    "decode_to_core",
    "encode",
]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """New requests, in the order in which they arrived."""

    requests: tuple[Request, ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The clients of these requests are gone; they leave the batch at the next step."""

    request_ids: tuple[str, ...]


class Forget(msgspec.Struct, frozen=True, tag=True):
    """The serving process of this name (its ZMQ routing id) is gone, and with it the clients of its requests."""

    client: bytes


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop. With ``drain`` finish what runs first."""

    drain: bool = True


class CoreStats(msgspec.Struct, frozen=True, array_like=True):
    """Counters and gauges of one core at one moment.

    Attributes:
        steps: forward passes so far: the progress that health is judged by.
        step_ms, host_ms: moving averages of a whole step and of its host share.
    """

    steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    aborted_tokens: int = 0
    step_ms: float = 0.0
    host_ms: float = 0.0


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Bytes of weights in place so far, and in all; or kernels compiled so far, and in all. Only before Ready."""

    done: int
    total: int
    part: Literal["weights", "kernels"] = "weights"


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The core has loaded its model and takes requests.

    Attributes:
        max_model_len: tokens of prompt and output together.
        max_num_seqs: sequences in one step at most.
        summary: facts for people and logs (parameters, bytes by kind, seconds by stage).
    """

    engine: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    summary: dict[str, Any] = {}


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step produced."""

    outputs: tuple[Output, ...]
    stats: CoreStats


class EncodeOutputs(msgspec.Struct, frozen=True, tag=True):
    """Finished single passes."""

    outputs: tuple[EncodeOutput, ...]
    stats: CoreStats


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent by the step loop itself (never by a side thread), at least once a second while it turns."""

    stats: CoreStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The core cannot start, or cannot go on. ``code`` is that of an error of ``headrace.errors``."""

    message: str
    code: str
    traceback: str = ""


ToCore = Submit | Abort | Forget | Shutdown
FromCore = Loading | Ready | Outputs | EncodeOutputs | Heartbeat | Failed

_encoder = msgspec.msgpack.Encoder()
_to_core: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)
_from_core: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)


def encode(message: ToCore | FromCore) -> bytes:
    """Message to bytes."""
    return _encoder.encode(message)


def decode_to_core(data: bytes) -> ToCore:
    """Bytes to a message for the core; msgspec.DecodeError when they are none."""
    return _to_core.decode(data)


def decode_from_core(data: bytes) -> FromCore:
    """Bytes to a message from the core; msgspec.DecodeError when they are none."""
    return _from_core.decode(data)
