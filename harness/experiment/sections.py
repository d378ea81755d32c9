"""Typed sections of an experiment; a trial's spec consists of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from harness.core import hub
from harness.core.registry import Plugin
from harness.core.search import Search


class Section(BaseModel):
    """Base of all sections: frozen, strict, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Keys that came later.
_LATER = frozenset(
    {
        *("model", "connector", "encoder_plugins", "encoder_options", "start_token", "prompt", "chat_template"),
        *("dtype", "quantization"),
    }
)


class Backbone(Section):
    """The frozen models, each a built-in name, a local folder or a Hugging Face hub id."""

    # A vision-language model: its decoder is the language model, its vision tower the encoder of images. Left out if
    # unset; else language_model and encoders.image name it too.
    model: str | None = None
    # Of ``model``: between its tower and its decoder. frozen: a part of the encoder; trained: it is the projector.
    connector: Literal["frozen", "trained"] = "frozen"  # left out if frozen
    language_model: str = "builtin/tiny-llama"
    revision: str | None = None  # of the language model on the hub: branch, tag or commit; of an encoder: id@revision
    # By modality; others use the modality's default.
    encoders: dict[str, str] = Field(default_factory=dict, examples=[{"image": "google/siglip2-base-patch16-224"}])
    # By modality: of encoders that are plugins. No experiment sets them: a name in ``encoders`` does.
    encoder_plugins: dict[str, Plugin] = Field(default_factory=dict)
    # By modality: what ``encoders: {image: {model: NAME, layer: -2}}`` says beside the name, without defaults.
    encoder_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    projector: Literal["linear", "mlp"] = "linear"  # linear as in the paper; mlp: linear, GELU, linear (LLaVA 1.5)
    projector_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # before the projector, as in the paper
    projector_boundary_tokens: bool = False  # a learned token before and after every item
    projector_positions: PositiveInt | None = None  # learned position embeddings after the projector: tokens per item
    add_prefix_space: bool = False  # before every target: BPE vocabularies have most words only with a leading space
    start_token: str | None = None  # begins every row; left out if unset: the tokenizer's bos_token, else its eos_token
    prompt: str | None = None  # text between the inputs and every target; left out if unset
    # The inputs and the prompt as a turn of the user. Left out if unset: false; of ``model``, true where it has one.
    chat_template: bool | None = None
    # Of the frozen language model; adapters and projectors stay in fp32. auto: that of its checkpoint. Left out if
    # unset: fp32.
    dtype: Literal["fp32", "bf16", "auto"] | None = None
    # Of the frozen language model: weights in 4 or 8 bits (bitsandbytes), or from a GGUF file. Left out if unset.
    quantization: Literal["nf4", "int8", "gguf"] | None = None
    trust_remote_code: bool = False
    # Path pattern → role, for architectures that adapters/placement/families.py does not know.
    roles: Annotated[dict[str, Any] | None, Field(examples=[{"model.layers.*.attn.out": "o"}])] = None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys where they are not set: ids and records of such trials are as before there were these."""
        content: dict[str, Any] = dump(self)
        kept = {key: value for key, value in content.items() if key not in _LATER or (value and value != "frozen")}
        if self.model is not None and self.chat_template is False:
            kept["chat_template"] = False
        return kept

    @model_validator(mode="before")
    @classmethod
    def _of_one_model(cls, given: Any) -> Any:
        """The language model of ``model``, which has no projector of ours."""
        if isinstance(given, dict) and given.get("model") is not None:
            return {"projector_dropout": 0.0, "language_model": given["model"], **given}
        return given

    @property
    def pinned_language_model(self) -> str:
        """The language model with its revision: ``facebook/opt-125m@27dcfa7``."""
        if self.revision is None or hub.looks_like_folder(self.language_model):
            return self.language_model
        return f"{hub.split_revision(self.language_model)[0]}@{self.revision}"


class Budget(Section):
    """Training data of a trial. For the same seed, smaller budgets are subsets of larger ones."""

    examples: PositiveInt | Literal["all"] = "all"
    epochs: PositiveInt = 1
    patience: PositiveInt | None = None  # stop when validation has not improved for so many epochs; left out if unset
    # Per example and epoch. one: drawn at random in each epoch; grouped: all, those of the same inputs in succession.
    references: Literal["one", "all", "grouped"] = "one"
    max_target_length: PositiveInt = 63  # tokens; longer target texts are truncated (63 as in the paper)
    max_input_length: PositiveInt = 256  # tokens of each input text; longer ones are truncated

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``patience`` where it is not set: ids and records of such trials are as before there was one."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if key != "patience" or value is not None}


class Limits(Section):
    """Keys of the section ``budget`` that limit the whole run, not a trial: they change no result and no trial's id."""

    # Of all trials together; then the run ends as by harness stop. Without GPUs hours of slots: places of a trial.
    gpu_hours: Annotated[float, Field(gt=0)] | None = None


class Optimizer(Section):
    """AdamW and its schedule, with the names of ``transformers.TrainingArguments``."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # an adapter's learning_rate takes precedence
    per_device_train_batch_size: PositiveInt = 32
    # group_by_length: batches of rows of similar lengths and about as many tokens each, of this size on average; left
    # out if random.
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    gradient_accumulation_steps: PositiveInt = 1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bf16: bool = False  # parameters, activations and gradients in bf16, with fp32 master weights

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the sampling strategy where it is the default: ids and records are as before there was one."""
        content: dict[str, Any] = dump(self)
        return {k: v for k, v in content.items() if k != "train_sampling_strategy" or v != "random"}


class Evaluation(Section):
    """Evaluation data, text generation and metrics."""

    validation_examples: PositiveInt | Literal["all"] = "all"
    test_examples: PositiveInt | Literal["all"] = "all"
    per_device_eval_batch_size: PositiveInt = 128
    max_new_tokens: PositiveInt = 32
    num_beams: PositiveInt = 1  # 1: greedy
    # Registry names, in addition to those of the task.
    metrics: Annotated[tuple[str, ...], Field(examples=[["bleu"]])] = ()
    primary_metric: str = "perplexity"  # the leaderboard is ordered by it
    # Scores that differ by no more are as good as equal: 0.01 is 1 % of a perplexity, and 0.01 of any other score.
    equivalence_margin: Annotated[float, Field(gt=0, lt=1)] = 0.01


class Resources(Section):
    """Resources of a trial. They do not affect results, so they are not part of a trial's id."""

    workers: PositiveInt = 1  # processes of a trial, which share each of its batches
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"  # auto: one if there is a GPU, else none
    max_concurrent_trials: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0  # preset clusters/deepspeed/zero<stage>.json
    # To main memory; presets clusters/deepspeed/offload_*.json. parameters: with the optimizer's state.
    offload: Literal["none", "optimizer", "parameters"] = "none"
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0  # training that a crash costs, at most, and one step
    grace_s: Annotated[float, Field(ge=0)] = 30.0  # at most, for running trials to save where they are when a run ends
    max_failures: Annotated[int, Field(ge=0)] = 1  # restarts of a trial whose worker process died
    # Trials that differ in their adapters alone train in one process, up to so many; auto: where that is faster.
    pack: PositiveInt | Literal["auto", "off"] = "auto"
    # Adapters are computed together with their layers, and one operation steps all parameters; false: one by one.
    fused_step: bool = True
    chunked_loss: bool = True  # where logits are more than 64 MiB, they are computed in chunks, again in backward
    shared_prefix: bool = True  # targets of the same inputs share a row of a batch, where the model allows it
    # Encoders' features, which all trials of a machine share: an absolute path; null: features/ of $HARNESS_CACHE.
    feature_cache: str | None = None
    # Of the folder; the least recently used go first. 0: no folder, each worker keeps features in its memory. null:
    # $HARNESS_FEATURE_CACHE_GIB, or 100.
    feature_cache_gib: Annotated[float, Field(ge=0)] | None = None
    gradient_checkpointing: bool = False  # layers are computed again in backward: less memory, more time
    # Blocks of the language model are compiled for training: less time for a step, after seconds to minutes.
    torch_compile: bool = False
    # As in transformers: eager, sdpa, flash_attention_2, …; null: the model's default.
    attn_implementation: str | None = None
    # A trial that reports no step, batch or phase for so long is stuck: it is ended, and its slot filled again. Two
    # hours are longer than anything silent, such as reading a very large backbone from a slow disk; null: never.
    trial_timeout_s: Annotated[float, Field(gt=0)] | None = 7200.0
    profile: bool = True  # after the trials, measure speed and memory of the methods, each alone (harness profile)

    @field_validator("feature_cache")
    @classmethod
    def _check_feature_cache(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "~")):
            raise ValueError("a path that begins with / or ~ is needed, because trials run on several machines")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, value: float | str, info: ValidationInfo) -> float | str:
        if isinstance(value, str):
            return value
        if value > 1 and value != int(value):
            raise ValueError("above 1 it must be a whole number")
        if 0 < value < 1 and info.data.get("workers", 1) > 1:
            raise ValueError(
                "two workers of a trial cannot share a GPU, because NCCL refuses it; allowed: auto, 0 or 1, or a "
                "part of a GPU with workers: 1"
            )
        return value

    @field_validator("torch_compile")
    @classmethod
    def _check_torch_compile(cls, value: bool, info: ValidationInfo) -> bool:
        workers, stage, pack = (info.data.get(name) for name in ("workers", "zero_stage", "pack"))
        if value and workers is not None and workers > 1:
            raise ValueError(f"found beside workers: {workers}, which exchange layer by layer; allowed: workers: 1")
        if value and stage:
            raise ValueError(
                f"found beside zero_stage: {stage}, with which it was never compared; allowed: zero_stage: 0"
            )
        if value and isinstance(pack, int) and pack > 1:
            raise ValueError(
                f"found beside pack: {pack}; trials that take their steps together are not compiled; allowed: auto, "
                "off or 1, with which each trains alone"
            )
        return value

    @field_validator("offload")
    @classmethod
    def _check_offload(cls, value: str, info: ValidationInfo) -> str:
        stage, allowed = info.data.get("zero_stage"), {"optimizer": (1, 2, 3), "parameters": (3,)}
        if stage is not None and stage not in allowed.get(value, (stage,)):
            stages = " or ".join(map(str, allowed[value]))
            raise ValueError(f"with zero_stage {stage} DeepSpeed offloads no {value}; allowed: zero_stage {stages}")
        return value


class Tracking(Section):
    """Experiment tracking with MLflow."""

    mlflow_uri: str | None = None  # default: MLFLOW_TRACKING_URI, else SQLite next to the run folders


class InitSource(Section):
    """The adapter group of a finished trial whose trained weights initialise an adapter group."""

    trial: str  # its folder; not part of a trial's id
    group: str
    weights_sha256: str  # of the trial's best.safetensors
    projectors: tuple[str, ...]  # contexts whose projectors are initialised from it too


class RateSearch(Section):
    """The keys of an adapter entry about its learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # takes precedence over the optimizer's
    tried_learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()


class GroupChoice(Section):
    """What one adapter group has: a method with its options."""

    method: str  # registry name, such as "lora" or "lora+bitfit"
    plugins: tuple[Plugin, ...]  # the method, or the methods that are combined
    config: dict[str, Any]  # the method's options, with defaults


class AdapterChoice(Section):
    """One adapter, with all axes expanded."""

    method: str  # registry name, such as "lora" or "lora+bitfit"; "lora/bitfit" where groups differ
    plugins: tuple[Plugin, ...]  # the method, or the methods that are combined, or of all groups
    grouping: dict[str, str | None]  # context → group; None: no adapter on that context
    grouping_name: str  # "agnostic", "specific", "image=vision text=language"; "" if the method has no groups
    config: dict[str, Any]  # the method's options, with defaults; empty where groups differ
    label: str
    # Where groups differ, what each has; left out if they do not.
    groups: dict[str, GroupChoice] = Field(default_factory=dict)
    # The group that acts on every token beside the token's own; left out if there is none.
    shared_group: str | None = None
    learning_rate: float | None = None
    tried_learning_rates: tuple[float, ...] = ()  # before this experiment; they count as search effort
    # How the learning rate was proposed; in the plan, but not in specs: it affects no result.
    search: Search | None = Field(default=None, exclude=True)
    init_from: dict[str, InitSource] = Field(default_factory=dict)  # by group; other groups are initialised at random

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys where they are not set: ids and records of such trials are as before there were these."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if value or key not in {"groups", "shared_group"}}

    @property
    def group_names(self) -> tuple[str, ...]:
        """All groups, the shared one first."""
        own = [group for group in dict.fromkeys(self.grouping.values()) if group is not None]
        return (*((self.shared_group,) if self.shared_group else ()), *own)

    def of_group(self, group: str) -> GroupChoice:
        """What a group has."""
        return self.groups.get(group) or GroupChoice(method=self.method, plugins=self.plugins, config=self.config)

    @property
    def choices(self) -> tuple[GroupChoice, ...]:
        """What all groups have, or the method without groups."""
        return tuple(self.of_group(group) for group in self.group_names) or (self.of_group(""),)


class TaskChoice(Section):
    """One task, with its options resolved."""

    name: str  # registry name
    plugin: Plugin
    contexts: tuple[str, ...]
    modalities: dict[str, Plugin]
    metrics: dict[str, dict[str, Plugin]]  # task in a mixture ("" for a single task) → metric → its plugin
    config: dict[str, Any]
