"""The sections of an experiment, typed: what a spec is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from harness.core.registry import Plugin


class Section(BaseModel):
    """Base of every section: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Backbone(Section):
    """The frozen models: names of built-in ones, local folders or Hugging Face hub ids."""

    language_model: str = "builtin/tiny-llama"
    encoders: dict[str, str] = Field(default_factory=dict)  # by modality; where none is named: the modality's default
    projector: Literal["linear", "mlp"] = "linear"  # linear as in the paper; mlp: linear, GELU, linear (LLaVA 1.5)
    projector_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # before the projector, as in the paper
    projector_boundary_tokens: bool = False  # a learnt token before and after every item
    projector_positions: PositiveInt | None = None  # learnt positions after the projector; tokens of the longest item
    add_prefix_space: bool = False  # a space before every target: BPE models know most words with one only
    trust_remote_code: bool = False
    # Path pattern → role of the language model's layers, where adapters/placement/families.py does not know them.
    roles: dict[str, Any] | None = None


class Budget(Section):
    """How much data training may see. Smaller budgets of one seed are subsets of larger ones."""

    examples: PositiveInt | Literal["all"] = "all"
    epochs: PositiveInt = 1
    references: Literal["one", "all"] = "one"  # of an example's, drawn anew each epoch; all: each one in every epoch
    max_target_length: PositiveInt = 63  # tokens of a target text; longer ones are cut (the paper's 63)
    max_input_length: PositiveInt = 256  # tokens of each text before the target; longer ones are cut


class Optimizer(Section):
    """AdamW and its schedule, in the words of ``transformers.TrainingArguments``."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # an adapter's own learning_rate goes before this one
    per_device_train_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 switches clipping off
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bf16: bool = False  # parameters, activations and gradients in bf16, fp32 master weights


class Evaluation(Section):
    """What is scored, and how texts are generated."""

    validation_examples: PositiveInt | Literal["all"] = "all"
    test_examples: PositiveInt | Literal["all"] = "all"
    per_device_eval_batch_size: PositiveInt = 128
    max_new_tokens: PositiveInt = 32
    num_beams: PositiveInt = 1  # 1: greedy
    metrics: tuple[str, ...] = ()  # registry names, beside the task's own
    primary_metric: str = "perplexity"  # what the leaderboard is ordered by


class Resources(Section):
    """What a trial gets. Nothing here changes a result, so nothing here is part of a trial's id."""

    cpus_per_trial: PositiveInt = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"  # auto: one where there is one
    max_concurrent_trials: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0  # preset clusters/deepspeed/zero<stage>.json
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0  # at the first epoch end after this long
    max_failures: Annotated[int, Field(ge=0)] = 1  # times a trial whose worker died is started again


class Tracking(Section):
    """Where MLflow keeps its runs."""

    mlflow_uri: str | None = None  # default: MLFLOW_TRACKING_URI, else SQLite beside the runs


class InitSource(Section):
    """The group of a finished trial whose trained weights an adapter group starts from."""

    trial: str  # its folder; where it lies is no part of a trial's id
    group: str
    weights_sha256: str  # of the trial's best.safetensors
    projectors: tuple[str, ...]  # contexts whose projectors come from there too


class RateSearch(Section):
    """The keys of an adapter entry that its learning rate comes from."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # goes before the optimizer's
    tried_learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()


class AdapterChoice(Section):
    """One adapter with all axes resolved."""

    method: str  # registry name, such as "lora" or "lora+bitfit"
    plugins: tuple[Plugin, ...]  # the method, or those that it combines
    grouping: dict[str, str | None]  # context → group; None: no adapter on that context
    grouping_name: str  # "agnostic", "specific", "image=vision text=language"; "" where the method has no groups
    config: dict[str, Any]  # the method's options, defaults included
    label: str
    learning_rate: float | None = None
    tried_learning_rates: tuple[float, ...] = ()  # before this experiment; they count as search effort
    init_from: dict[str, InitSource] = Field(default_factory=dict)  # group → its first weights; the others are drawn


class TaskChoice(Section):
    """One task with its options resolved."""

    name: str  # registry name
    plugin: Plugin
    contexts: tuple[str, ...]
    modalities: dict[str, Plugin]
    metrics: dict[str, dict[str, Plugin]]  # member of a mixture, "" for the task itself → metric → its plugin
    config: dict[str, Any]
