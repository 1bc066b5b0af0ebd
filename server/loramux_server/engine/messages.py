"""What crosses the process boundary between the front and the worker, as msgspec structs.

The front sends `Command`s as they come; the worker answers with one `StepOutput` per engine step that carries
every new token of that step. No torch, no pickle. Nothing here is OpenAI's wire format: that is `api/protocol.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from loramux_adapters.probe import Probe
from loramux_adapters.training.memory import DecoderShape
from loramux_adapters.verify_report import VerifyReport
from loramux_server.engine.options import Policy
from loramux_server.engine.stats import AdapterEviction as AdapterEviction
from loramux_server.engine.stats import AdapterLoad as AdapterLoad
from loramux_server.engine.stats import DeviceSlot as DeviceSlot
from loramux_server.engine.stats import EngineStats as EngineStats

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of one request is chosen. Validated by the route; the engine trusts it.

    Order of operations, as in vLLM: logit_bias, min_tokens, repetition/presence/frequency penalties, temperature,
    min_p, top_k, top_p, then the draw. temperature 0 is greedy and ignores the filters.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None  # same seed and prompt: same tokens, whatever else is in the batch
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end tokens
    logprobs: int | None = None  # None: none; k: the sampled token's and the top k
    prompt_logprobs: int | None = None  # the same for every token of the prompt but the first
    grammar: str | None = None  # llguidance's own form, checked by the front: what the answer has to match
    cache_salt: str | None = None  # requests with different ones share nothing in the prefix cache
    priority: int = 0  # lower ones go first


class AdapterRef(msgspec.Struct, frozen=True):
    """Which weights answer: one immutable generation and the directory that holds it."""

    generation: str
    path: str


class AddRequest(msgspec.Struct, tag="add"):
    id: str
    prompt: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None


class AbortRequest(msgspec.Struct, tag="abort"):
    id: str


class PinAdapters(msgspec.Struct, tag="pin"):
    """Bring exactly these to the device and keep them there; what was pinned before and is not named no longer is."""

    adapters: list[AdapterRef]


class VerifyAdapter(msgspec.Struct, tag="verify"):
    """Find out between engine steps what an adapter does; it need not be registered. One `Verified` answers."""

    id: str
    adapter: AdapterRef
    probe: Probe


class StartTraining(msgspec.Struct, tag="train"):
    """Train between engine steps, from the last checkpoint in `out` if there is one. One job at a time.

    `Training*` events answer; a `TrainingEnded` is the last of them.
    """

    id: str
    out: str  # directory that the run owns
    recipe: dict[str, Any]  # the fields of a training Recipe, as asked for
    training_file: str
    validation_file: str | None = None
    initial: AdapterRef | None = None  # the weights that `recipe["init_from"]` names


class StopTraining(msgspec.Struct, tag="stop_training"):
    """End a job at the next slice: with a checkpoint of its last whole step if `save`, else without."""

    id: str
    save: bool


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop at once; the front has drained already."""


Command = AddRequest | AbortRequest | PinAdapters | VerifyAdapter | StartTraining | StopTraining | Shutdown


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Natural-log probabilities before temperature and filters: of the sampled token, and of the top k.

    `rank` is the token's place among all, from 1; counted for the tokens of prompts only.
    """

    logprob: float
    top: list[tuple[int, float]]
    rank: int = 0


class TokenOutput(msgspec.Struct, omit_defaults=True):
    """What one step gave one request: usually one token; `finish` set exactly once, on the last."""

    id: str
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = (
        None  # once, with the first token: of all prompt tokens but the first
    )
    error: str | None = None  # with finish == "error": one sentence
    error_code: str | None = None
    cached_tokens: int = 0  # with the first token: of the prompt, those that the prefix cache had
    queue_seconds: float | None = None  # with the first token: from `add` to the first step it ran in


class StepOutput(msgspec.Struct, tag="step"):
    outputs: list[TokenOutput]
    stats: EngineStats
    loads: list[AdapterLoad] = []
    evictions: list[AdapterEviction] = []


class Verified(msgspec.Struct, tag="verified"):
    """Exactly one of the two: what a verification found, or in one sentence why there was none."""

    id: str
    report: VerifyReport | None = None
    error: str | None = None


class TrainingPrepared(msgspec.Struct, tag="training_prepared"):
    """The files are read and nothing is wrong with them; the first step comes next."""

    id: str
    plan: dict[str, Any]  # `TrainingRun.plan()`: recipe, what "auto" became, counts of the data, warnings
    total_steps: int
    step: int  # steps done before: not 0 when a run is continued


class TrainingStep(msgspec.Struct, tag="training_step"):
    """One optimizer step. `seconds` is time spent computing, `waited` what serving took in between."""

    id: str
    step: int
    total_steps: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    waited: float
    memory_bytes: int  # held by the device's allocator, or resident if the device is the host


class TrainingEval(msgspec.Struct, tag="training_eval"):
    """Validation after `step` steps; 0 is before the first."""

    id: str
    step: int
    valid_loss: float
    valid_mean_token_accuracy: float


class TrainingCheckpoint(msgspec.Struct, tag="training_checkpoint"):
    """A PEFT directory on the disk, whole and durable."""

    id: str
    step: int
    path: str


class TrainingDiagnosis(msgspec.Struct, tag="training_diagnosis"):
    """What a curve means, with the figure it rests on and the change to try."""

    id: str
    step: int
    code: str
    param: str  # the field of the recipe to change
    message: str


class TrainingEnded(msgspec.Struct, tag="training_ended"):
    """`finished`: the adapter is at `out`. `stopped`: as asked; continue it any time. `failed`: one sentence why."""

    id: str
    status: Literal["finished", "stopped", "failed"]
    step: int
    error: str | None = None
    code: str | None = None
    param: str | None = None


TrainingEvent = (
    TrainingPrepared | TrainingStep | TrainingEval | TrainingCheckpoint | TrainingDiagnosis | TrainingEnded
)


class Ready(msgspec.Struct, tag="ready"):
    """The base is resident. Everything the front must know of it; shapes are (out_features, in_features)."""

    base_name: str
    base_identity: str
    architecture: str
    max_model_len: int
    vocab_size: int
    device: str
    dtype: str
    quantization: str
    eos_token_ids: list[int]
    linear_shapes: dict[str, tuple[int, int]]
    weight_bytes: int
    kv_blocks_total: int
    kv_block_size: int
    max_loras: int
    max_cpu_loras: int
    lora_rows: int  # rank rows of the device, shared by the adapters on it
    kv_cache_bytes: int = 0  # of all blocks
    decoder: DecoderShape | None = None  # what training memory is planned with
    context_length: int = 0  # of the base, which may be more than is served
    scheduling_policy: Policy = "fcfs"


class Fatal(msgspec.Struct, tag="fatal"):
    """The worker cannot go on; one sentence, no traceback (that is in the log)."""

    message: str


class Beat(msgspec.Struct, tag="beat"):
    """The worker's loop goes round and has work; sent when it had nothing else to say for a while."""


Event = StepOutput | Verified | TrainingEvent | Ready | Fatal | Beat

COMMAND_ENCODER = msgspec.msgpack.Encoder()
COMMAND_DECODER = msgspec.msgpack.Decoder(Command)
EVENT_ENCODER = msgspec.msgpack.Encoder()
EVENT_DECODER = msgspec.msgpack.Decoder(Event)
