"""What a checkpoint says about its single pass: task, pooling, modules after it, labels, prompts. No torch.

Read from `config.json` and the sentence-transformers files (`modules.json`, `1_Pooling/config.json`,
`config_sentence_transformers.json`, `sentence_bert_config.json`). What the files do not say is refused with
the file's name and the way out; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace.errors import MissingFile, UnsupportedCheckpoint, nearest
from headrace.models.card_files import count, json_list, json_object, object_of, token_id
from headrace.types import EncodeTask

__all__ = ["ACTIVATIONS", "POOLINGS", "EncodeCard", "ModuleSpec", "read_encode_card", "stated_max_tokens"]

PoolingMode = Literal["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"]
Kind = Literal["embed", "classify", "token_classify", "splade", "multi_vector", "m3", "yes_no"]

# The flag in 1_Pooling/config.json (sentence-transformers up to 5) and the word (from 6 on), in the order in
# which several modes are concatenated.
_POOLING_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_WORDS: dict[str, PoolingMode] = {
    "cls": "cls",
    "first": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "weighted_mean": "weighted_mean",
    "last": "last",
    "lasttoken": "last",
    "last_token": "last",
}
POOLINGS = (*sorted(_POOLING_WORDS), "splade", "colbert", "m3", "yes_no")

# Settings of the Transformer module: the name says which family, sentence-transformers takes the first.
_TRANSFORMER_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

ACTIVATIONS = ("identity", "tanh", "gelu", "relu", "sigmoid", "silu")
_TORCH_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
}


@dataclass(frozen=True)
class ModuleSpec:
    """A step after pooling, or on every token vector before it.

    Attributes:
        kind: ``dense``, ``layer_norm`` or ``normalize``.
        folder: subfolder with its weights; "": ``linear`` in the model's own files (ColBERT).
        size_in, size_out: features.
        activation: one of ACTIVATIONS.
        per_token: applies to token vectors instead of the pooled one.
        residual: adds its input to its output (through a projection when the sizes differ).
    """

    kind: Literal["dense", "layer_norm", "normalize"]
    folder: str = ""
    size_in: int = 0
    size_out: int = 0
    bias: bool = True
    activation: str = "identity"
    per_token: bool = False
    residual: bool = False


@dataclass(frozen=True)
class EncodeCard:
    """How to use one checkpoint in one pass.

    Attributes:
        kind: which head.
        tasks: what may be asked of it; the first is the default.
        pooling: modes whose results are concatenated; empty where the head needs none.
        modules: what follows, in order.
        labels: names of the outputs of a classifier, by index.
        multi_label: labels do not exclude each other (sigmoid instead of softmax).
        regression: outputs are quantities, which neither bounds.
        prompts: texts that may be put before an input, by name.
        default_prompt: name of the one that is put there when the request names none.
        similarity: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``.
        dimensions: Matryoshka sizes that the checkpoint declares; empty: it does not say.
        max_tokens: longest input that the sentence-transformers files allow; None: the model's positions.
        lowercase: texts are lowercased before the tokenizer.
        splade: (reduction over tokens, ``relu`` or ``log1p_relu``).
        yes_no: token ids of a generative reranker's answers; the second is None for a bare logit.
    """

    architecture: str
    kind: Kind
    tasks: tuple[EncodeTask, ...]
    pooling: tuple[PoolingMode, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    regression: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    dimensions: tuple[int, ...] = ()
    max_tokens: int | None = None
    lowercase: bool = False
    splade: tuple[str, str] = ("max", "relu")
    yes_no: tuple[int, int | None] | None = None

    @property
    def normalized(self) -> bool:
        """Whether the checkpoint's pooled vectors end with L2 normalization."""
        return self._ends_normalized(per_token=False)

    @property
    def tokens_normalized(self) -> bool:
        """The same of its token vectors."""
        return self._ends_normalized(per_token=True)

    def _ends_normalized(self, per_token: bool) -> bool:
        kinds = [module.kind for module in self.modules if module.per_token == per_token]
        return kinds[-1:] == ["normalize"]


def read_encode_card(path: Path, *, pooling: str | None = None) -> EncodeCard:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        pooling: the user's explicit choice (`--pooling`), which replaces `modules.json` and its files.
    Raises:
        MissingFile: a file that would have to say how to pool, or name labels, is absent.
        UnsupportedCheckpoint: a module or pooling mode that is not implemented, or contradictory files.
    """
    config = json_object(path / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnsupportedCheckpoint(
            f'{path / "config.json"} names no architecture: add "architectures", e.g. ["BertModel"]'
        )
    architecture = str(architectures[0])
    common = _common(path, config, architecture)
    if pooling is not None and pooling not in POOLINGS:
        raise UnsupportedCheckpoint(
            f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}{nearest(pooling, POOLINGS)}",
            param="pooling",
        )
    if architecture.endswith(("ForSequenceClassification", "ForRewardModel")):
        return _classifier(path, config, common)
    if "ForTokenClassification" in architecture:
        labels = _labels(path, config)
        return EncodeCard(**common, kind="token_classify", tasks=(EncodeTask.TOKEN_CLASSIFY,), labels=labels)
    if pooling is not None:
        return _explicit(pooling, common)
    return _from_modules(path, config, common)


def stated_max_tokens(files: Callable[[str], dict[str, Any]], architecture: str) -> int | None:
    """Longest input by the files beside `config.json`; None: they do not say.

    As sentence-transformers reads them: its own file (whose name has changed with the family), else
    ``model_max_length`` of the tokenizer, which generators state for other purposes.

    Args:
        files: name -> the JSON object of that file; {} for an absent one.
    """
    own = next((found for name in _TRANSFORMER_FILES if (found := files(name))), {})
    stated = own.get("max_seq_length")
    if not stated and not architecture.endswith("ForCausalLM"):
        stated = files("tokenizer_config.json").get("model_max_length")
    # Tokenizers without a limit state 10^30.
    return int(stated) if isinstance(stated, int | float) and 0 < stated < 1 << 31 else None


def _common(path: Path, config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Facts that every kind shares."""
    st_file = path / "config_sentence_transformers.json"
    st = json_object(st_file, optional=True)
    if st.get("truncate_dim") is not None:
        raise UnsupportedCheckpoint(
            f"{st_file} has truncate_dim {st['truncate_dim']!r}, which is not implemented; remove it, and let requests "
            "ask for that many dimensions",
            param="truncate_dim",
        )
    own = (json_object(path / name, optional=True) for name in _TRANSFORMER_FILES)
    bert = next((found for found in own if found), {})
    prompts = {
        name: str(text) for name, text in object_of(st, "prompts", st_file).items() if text is not None
    }
    default = st.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise UnsupportedCheckpoint(
            f"default_prompt_name {default!r} in {st_file} is none of its prompts {sorted(prompts)}"
        )
    return {
        "architecture": architecture,
        "prompts": prompts,
        "default_prompt": default,
        "similarity": str(st.get("similarity_fn_name") or "cosine"),
        "dimensions": _dimensions(path, config, st),
        "max_tokens": stated_max_tokens(lambda name: json_object(path / name, optional=True), architecture),
        "lowercase": bool(bert.get("do_lower_case", False)),
    }


def _dimensions(path: Path, config: dict[str, Any], st: dict[str, Any]) -> tuple[int, ...]:
    """Matryoshka sizes, ascending; of config.json, else of sentence-transformers' file."""
    key = "matryoshka_dimensions"
    sizes = config.get(key) or st.get(key) or []
    if not isinstance(sizes, list) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UnsupportedCheckpoint(
            f"{path} has {key} {sizes!r}; expected a list of positive integers", param=key
        )
    return tuple(sorted(sizes))


def _classifier(path: Path, config: dict[str, Any], common: dict[str, Any]) -> EncodeCard:
    reward = common["architecture"].endswith("ForRewardModel")
    labels = ("reward",) if reward and "id2label" not in config else _labels(path, config)
    tasks: tuple[EncodeTask, ...] = (EncodeTask.CLASSIFY,)
    if len(labels) == 1:
        tasks = (EncodeTask.SCORE, EncodeTask.CLASSIFY)
    problem = config.get("problem_type")
    return EncodeCard(
        **common, kind="classify", tasks=tasks, labels=labels, multi_label=problem == "multi_label_classification",
        regression=problem == "regression",
    )  # fmt: skip


def _labels(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    table = config.get("id2label")
    file = path / "config.json"
    if not isinstance(table, dict) or not table:
        raise UnsupportedCheckpoint(
            f'{file} has no "id2label": give one name for each output of the last layer, '
            'e.g. {"0": "negative", "1": "positive"}',
            param="id2label",
        )
    try:
        named = {int(index): str(name) for index, name in table.items()}
    except ValueError:
        raise UnsupportedCheckpoint(
            f'"id2label" in {file} has a key that is no integer', param="id2label"
        ) from None
    if sorted(named) != list(range(len(named))):
        raise UnsupportedCheckpoint(
            f'"id2label" in {file} names outputs {sorted(named)}; expected 0 to {len(named) - 1}, no gaps',
            param="id2label",
        )
    return tuple(named[index] for index in range(len(named)))


def _explicit(pooling: str, common: dict[str, Any]) -> EncodeCard:
    """The user says how to pool: trust that, and end with unit length."""
    if pooling == "splade":
        return EncodeCard(**common, kind="splade", tasks=(EncodeTask.SPARSE,))
    if pooling == "m3":
        return _m3(common)
    if pooling == "yes_no":
        return EncodeCard(**common, kind="yes_no", tasks=(EncodeTask.SCORE,))
    if pooling == "colbert":
        modules = (ModuleSpec("dense", per_token=True), ModuleSpec("normalize", per_token=True))
        return EncodeCard(**common, kind="multi_vector", tasks=(EncodeTask.EMBED_ALL,), modules=modules)
    return EncodeCard(
        **common,
        kind="embed",
        tasks=(EncodeTask.EMBED, EncodeTask.EMBED_ALL),
        pooling=(_POOLING_WORDS[pooling],),
        modules=(ModuleSpec("normalize"),),
    )


def _m3(common: dict[str, Any]) -> EncodeCard:
    """BGE-M3 (Chen et al. 2024): CLS vector, token weights and token vectors of one pass."""
    return EncodeCard(
        **common,
        kind="m3",
        tasks=(EncodeTask.EMBED, EncodeTask.SPARSE, EncodeTask.EMBED_ALL),
        pooling=("cls",),
        modules=(ModuleSpec("normalize"),),
    )


def _from_modules(path: Path, config: dict[str, Any], common: dict[str, Any]) -> EncodeCard:
    file = path / "modules.json"
    if not file.exists():
        raise MissingFile(_no_modules(path, common["architecture"]), param="pooling")
    entries = json_list(file)
    found: dict[str, Any] = {
        "pooling": None, "modules": [], "splade": None, "yes_no": None, "mask": False, "pylate": False
    }  # fmt: skip
    for entry in entries:
        early = len(found["modules"]) if found["pooling"] is None else 0
        _read_module(path, str(entry.get("type", "")), str(entry.get("path", "")), found)
        if early and found["pooling"] is not None:
            raise UnsupportedCheckpoint(
                f"{file} has {found['modules'][0].kind} before Pooling, which is not implemented: "
                "expected Transformer, Pooling, and then what works on the pooled vector"
            )
    if found["pylate"]:
        found["modules"].append(ModuleSpec("normalize", per_token=True))
    modules = tuple(found["modules"])
    if found["splade"] is not None:
        return EncodeCard(**common, kind="splade", tasks=(EncodeTask.SPARSE,), splade=found["splade"])
    if found["yes_no"] is not None:
        return EncodeCard(**common, kind="yes_no", tasks=(EncodeTask.SCORE,), yes_no=found["yes_no"])
    if found["mask"] or (modules and modules[0].per_token and found["pooling"] is None):
        per_token = (EncodeTask.EMBED_ALL,)
        return EncodeCard(**common, kind="multi_vector", tasks=per_token, modules=modules)
    if found["pooling"] is None:
        raise MissingFile(
            f"{file} lists no Pooling module: add 1_Pooling/config.json and its entry, or say how to pool "
            f"with --pooling (one of {', '.join(POOLINGS)})",
            param="pooling",
        )
    m3 = common["architecture"] == "XLMRobertaModel" and all(
        any((path / f"{stem}_linear{suffix}").exists() for suffix in (".safetensors", ".pt"))
        for stem in ("sparse", "colbert")
    )
    if m3 and all((path / f"{stem}_linear.safetensors").exists() for stem in ("sparse", "colbert")):
        return _m3(common)
    return EncodeCard(
        **common,
        kind="embed",
        tasks=(EncodeTask.EMBED, EncodeTask.EMBED_ALL),
        pooling=found["pooling"],
        modules=modules,
    )


def _no_modules(path: Path, architecture: str) -> str:
    if architecture.endswith("ForCausalLM"):
        return (
            f"{path} has no modules.json and {architecture} is a generator. To embed with it, add "
            "modules.json and 1_Pooling/config.json or pass --pooling last (or mean); to rerank with its "
            "yes/no logits pass --pooling yes_no and a chat template"
        )
    return (
        f"{path} has no modules.json and 1_Pooling/config.json, so nothing says how {architecture} pools its "
        "token vectors: add those files or pass --pooling (cls, mean, last, ...)"
    )


def _read_module(path: Path, type_: str, folder: str, found: dict[str, Any]) -> None:
    """One entry of modules.json, by the last word of its type."""
    name = type_.rsplit(".", 1)[-1]
    where = path / folder
    if not type_.startswith(("sentence_transformers.", "pylate.")):
        raise UnsupportedCheckpoint(
            f"{path / 'modules.json'} has a module of type {type_!r}: code of the checkpoint's own, which is never "
            f"run. If it does what sentence_transformers.models.{name} does, write that instead, or say how to pool "
            "with --pooling",
            param="pooling",
        )
    if name in ("Transformer", "MLMTransformer"):
        return
    if name == "Pooling":
        found["pooling"] = _pooling(where / "config.json")
    elif name == "Normalize":
        config = json_object(where / "config.json", optional=True)
        per_token = config.get("module_input_name") == "token_embeddings"
        found["modules"].append(ModuleSpec("normalize", per_token=per_token))
    elif name == "Dense":
        # PyLate's Dense works on token vectors and leaves the normalization to its own encode().
        pylate = type_.startswith("pylate.")
        found["modules"].append(_dense(where / "config.json", folder, pylate))
        found["pylate"] |= pylate
    elif name == "LayerNorm":
        config = json_object(where / "config.json")
        size = count(config, "dimension", where / "config.json")
        found["modules"].append(ModuleSpec("layer_norm", folder, size, size))
    elif name == "Dropout":
        return
    elif name == "SpladePooling":
        found["splade"] = _splade(where / "config.json")
    elif name == "LogitScore":
        config = json_object(where / "config.json")
        answers = [token_id(config, "true_token_id", where / "config.json")]
        if config.get("false_token_id") is not None:
            answers.append(token_id(config, "false_token_id", where / "config.json"))
        found["yes_no"] = (answers[0], answers[1] if len(answers) > 1 else None)
    elif name == "MultiVectorMask":
        found["mask"] = True
    else:
        raise UnsupportedCheckpoint(
            f"{path / 'modules.json'} has a module of type {type_!r}, which is not implemented; known are "
            "Transformer, Pooling, Dense, LayerNorm, Normalize, SpladePooling, LogitScore and MultiVectorMask"
        )


def _pooling(file: Path) -> tuple[PoolingMode, ...]:
    if not file.exists():
        raise MissingFile(
            f"{file} is missing, so nothing says how to pool: restore it or pass --pooling", param="pooling"
        )
    config = json_object(file)
    if "pooling_mode" in config:
        words = config["pooling_mode"]
        words = [words] if isinstance(words, str) else list(words)
        unknown = [word for word in words if word not in _POOLING_WORDS]
        if unknown or not words:
            raise UnsupportedCheckpoint(
                f"{file} has pooling_mode {config['pooling_mode']!r}; expected {sorted(_POOLING_WORDS)}"
            )
        modes = tuple(_POOLING_WORDS[word] for word in words)
    else:
        modes = tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag))
    if not modes:
        raise UnsupportedCheckpoint(f"{file} sets no pooling mode: set one of {', '.join(_POOLING_FLAGS)}")
    if config.get("include_prompt") is False:
        raise UnsupportedCheckpoint(
            f"{file} excludes prompt tokens from pooling (include_prompt: false), which is not implemented"
        )
    return modes


def _splade(file: Path) -> tuple[str, str]:
    """Reduction and activation, see EncodeCard."""
    config = json_object(file, optional=True)
    words = []
    for key, known in (("pooling_strategy", ("max", "sum")), ("activation_function", ("relu", "log1p_relu"))):
        words.append(config.get(key, known[0]))
        if words[-1] not in known:
            raise UnsupportedCheckpoint(
                f"{file} has {key} {words[-1]!r}; expected {' or '.join(known)}", param=key
            )
    return words[0], words[1]


def _dense(file: Path, folder: str, per_token: bool = False) -> ModuleSpec:
    config = json_object(file)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _TORCH_ACTIVATIONS.get(name.rsplit(".", 1)[-1]) if name.startswith("torch.") else None
    if activation is None:
        raise UnsupportedCheckpoint(
            f"{file} has activation_function {name!r}; supported are {sorted(_TORCH_ACTIVATIONS)} of torch.nn"
        )
    source = config.get("module_input_name", "sentence_embedding")
    target = config.get("module_output_name") or source
    if source != target or source not in ("sentence_embedding", "token_embeddings"):
        raise UnsupportedCheckpoint(
            f"{file} reads {source!r} and writes {target!r}, which is not implemented"
        )
    return ModuleSpec(
        "dense",
        folder,
        count(config, "in_features", file),
        count(config, "out_features", file),
        bool(config.get("bias", True)),
        activation,
        per_token=per_token or source == "token_embeddings",
        residual=bool(config.get("use_residual", False)),
    )
