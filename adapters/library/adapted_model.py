"""``harness.adapt``: a language model with context-grouped adapters, usable without the rest of the harness.

Shapes: B rows, T positions of this pass, K positions seen so far (including the KV cache), D the model's width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters.attach import Adapters, count_trainable
from adapters.library import checkpoint
from adapters.library.as_base import AsBase
from adapters.library.context_ids import (
    CacheContexts,
    ContextIds,
    cached_positions,
    check_no_state,
    checked_context_ids,
    only_input,
)
from adapters.library.merge import merge_into
from adapters.library.peft_export import export_group
from adapters.library.spec import Spec, resolve
from adapters.library.state import own_tensors, without_frozen_base
from adapters.library.token_contexts import check_takes_tokens, contexts_of_tokens
from adapters.placement.generation import layouts_while_generating
from adapters.placement.offload import is_offloaded
from adapters.placement.parts import medium_context
from adapters.placement.router import Router
from harness.core.errors import UserError, did_you_mean

_MARK = "_context_peft_adapted"  # an attribute of the base while it is adapted: the AdaptedModel
SHARED = "(shared)"  # no group can have this name


def adapt(
    model: Any,
    spec: Mapping[str, Any],
    contexts: Sequence[str] = ("image", "text"),
    grouping: str | Mapping[str, str | None] = "agnostic",
    seed: int = 0,
    roles: Mapping[str, Any] | None = None,
    contexts_from: Mapping[int, str] | None = None,
) -> AdaptedModel:
    """Attach context-grouped adapters (Context-PEFT, arXiv 2312.08900) to a Hugging Face language model.

    That is a causal LM, or a vision- or audio-language model, whose inner language model is adapted.

    The model is frozen except for what the method itself trains, and hooked, not copied: ``detach`` restores it.
    Adapter parameters are created on the device of their layer in fp32, even on a bf16 or fp16 base, because small
    updates are lost in 16 bits (PEFT does the same); in float64 on a float64 layer.

    Args:
        model: a Hugging Face causal LM, or a vision- or audio-language model.
        spec: ``{"method": "lora", "rank": 8}`` for all groups, or group → such a mapping or None for no adapter:
            ``{"image": {"method": "lora", "rank": 64}, "text": {"method": "bitfit"}}``. ``harness adapters`` lists the
            methods and their options; ``lora+bitfit`` is both.
        contexts: names of the token domains; ``context_ids`` index them.
        grouping: ``agnostic`` (one group), ``specific`` (one per context), ``shared+specific`` (one for all tokens, and
            one per context, both acting on every token), or context → group, None for no adapter.
        seed: for the adapters' initialisation.
        roles: layer path pattern → role, for an architecture unknown to the harness:
            ``{"model.layers.*.attention.query": "q"}``.
        contexts_from: token id → context, ``{model.config.image_token_id: "image"}``; every other token is of the last
            context. The model is then called without ``context_ids``, as it is called without adapters.

    Raises:
        UserError: an unknown method, option, group, role or context, an option out of range, an unknown architecture, a
            token id outside the vocabulary, or a model that already has adapters.
    """
    return AdaptedModel(model, resolve(spec, contexts, grouping, seed, roles, contexts_from))


def load_adapter(model: Any, folder: str | Path, contexts: Sequence[str] | None = None) -> AdaptedModel:
    """Load adapters that ``AdaptedModel.save`` wrote onto the base model that they were trained on.

    Args:
        model: the base model; its dtype may differ from when the adapters were saved.
        folder: the folder passed to ``save``.
        contexts: the contexts that the caller's context ids index, to check against the file; None: no check.

    Raises:
        UserError: missing or damaged files, another base, other contexts, a method that is not installed, or tensors
            that are missing, unexpected or of another shape. The model is then unchanged.
    """
    folder = Path(folder)
    saved, tensors = checkpoint.read(folder)
    where = str(folder / checkpoint.JSON_NAME)
    if contexts is not None and tuple(contexts) != saved.contexts:
        raise UserError(
            f"{where}: contexts: found {saved.contexts}; expected {tuple(contexts)}, in the order of the context ids"
        )
    spec = checkpoint.spec_of(saved, where)
    _check_free(model)
    checkpoint.check_base(saved.base, model, where)
    adapted = AdaptedModel(model, spec)
    try:
        adapted.fill(tensors, str(folder / checkpoint.TENSORS_NAME))
    except UserError:
        adapted.detach()
        raise
    return adapted


def detach(model: Any) -> Any:
    """Remove the adapters of a model, also if what ``adapt`` or ``load_adapter`` returned is lost.

    Args:
        model: the base model, or the adapted one. A model without adapters is returned as it is.

    Returns:
        The base model (see ``AdaptedModel.detach``).

    Raises:
        UserError: it is not a language model.
    """
    if isinstance(model, AdaptedModel):
        return model.detach()
    _check_language_model(model)
    adapted: AdaptedModel | None = vars(model).get(_MARK)
    return model if adapted is None else adapted.detach()


class AdaptedModel(AsBase):
    """A language model and its adapters, as returned by ``adapt`` and ``load_adapter``.

    Args:
        base_model: a Hugging Face causal LM.
        spec: what to attach.

    Raises:
        UserError: see ``adapt``.
    """

    def __init__(self, base_model: Any, spec: Spec) -> None:
        super().__init__()
        _check_free(base_model)
        if spec.contexts_from is not None:
            check_takes_tokens(base_model, spec.contexts_from)
        methods = {group: choice.method for group, choice in spec.by_group.items()}
        ungrouped = spec.ungrouped.method if spec.ungrouped else None
        self.spec = spec
        self.contexts = tuple(spec.grouping)
        self.router = Router(spec.grouping)
        own = dict(base_model.named_parameters())
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in own.values()) else torch.float32
        medium = spec.grouping.get(medium_context(base_model, spec.contexts_from, spec.grouping) or "")
        with _default_dtype(dtype):
            self.adapters = Adapters(
                base_model, methods, self.router, spec.seed, ungrouped, spec.roles, spec.shared, medium
            )
        self.adapters.place(base_model)
        self.train(base_model.training)  # before the base becomes a submodule, which keeps its own flags
        self.base_model = base_model
        self.takes_what_the_base_takes()
        self._required_grad = {name: p.requires_grad for name, p in own.items()}
        parts = [part for choice in spec.choices for part in choice.method.parts]
        self._caches = CacheContexts(any(part.reads_past for part in parts))
        trained = [p for choice in spec.choices for p in choice.method.trained(base_model)]
        if any(p.is_meta for p in trained) and is_offloaded(base_model):
            raise UserError("the base model is offloaded, and weights that are offloaded cannot be trained")
        without_frozen_base(self)
        vars(base_model)[_MARK] = self  # not by setattr, which would register a submodule
        try:
            for p in own.values():
                p.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)
            self.adapters.attach(base_model)
        except BaseException:
            self.detach()
            raise

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        context_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with every token adapted by its context's group.

        Args:
            input_ids: (B, T); or pass ``inputs_embeds``.
            attention_mask: (B, K), as for the base. Padding may be on either side; its context ids do not matter.
            context_ids: int64 index into ``contexts``, (B, T), or (T,) if all rows are alike; None with
                ``contexts_from``: from ``input_ids``.
            inputs_embeds: (B, T, D).
            past_key_values: a KV cache that this model filled; ``context_ids`` are then those of the new tokens only.
            labels: (B, T), for the base's loss; named here because ``transformers.Trainer`` reads the signature.
            kwargs: passed to the base (``pixel_values``, ``use_cache``, …).

        Returns:
            The base model's output.

        Raises:
            UserError: context_ids are missing or do not match the input, or another model filled the cache.
        """
        self._check_attached()
        given = only_input(input_ids, inputs_embeds)
        ids_XT, host_XT = self._contexts_of(given, context_ids)
        check_no_state(kwargs, [choice.method for choice in self.spec.choices])
        past_XK = self._caches.of(past_key_values, given.shape[0])
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        inputs |= {} if labels is None else {"labels": labels}
        with self.router.one_pass():
            self.router.set_context_ids(ids_XT, past_XK, host_XT)
            output = self.base_model(**inputs, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
            cache = getattr(output, "past_key_values", None) if past_key_values is None else past_key_values
            self._caches.remember(cache, self.router.layout.context_ids_XK)
        return output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        context_ids: Tensor | None = None,
        new_token_context: str | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate``: greedy, sampling or beams, with or without a KV cache.

        Args:
            input_ids: the prompt (B, T); or pass ``inputs_embeds``.
            context_ids: the prompt's, as in ``forward``.
            new_token_context: the context of the generated tokens, whatever their ids; None with ``contexts_from``: the
                last.
            inputs_embeds: (B, T, D).
            attention_mask: (B, T), 0 for padding, which must be on the left.
            kwargs: passed to the base's ``generate``.

        Returns:
            The output of the base's ``generate``.

        Raises:
            UserError: see ``forward``; an unknown ``new_token_context``, padding on the right, or a non-empty cache.
        """
        self._check_attached()
        ids_XT, host_XT = self._contexts_of(only_input(input_ids, inputs_embeds), context_ids)
        if new_token_context is None and self.spec.contexts_from is not None:
            new_token_context = self.contexts[-1]
        if new_token_context not in self.contexts:
            allowed = did_you_mean(str(new_token_context), self.contexts)
            raise UserError(f"new_token_context: found {new_token_context!r}; {allowed}")
        if cached_positions(kwargs.get("past_key_values")):
            raise UserError(
                "past_key_values: found a filled cache; allowed: none or an empty one, as generate needs a whole prompt"
            )
        if attention_mask is not None:
            padded = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
            if padded:
                raise UserError(f"attention_mask: rows {padded} are padded on the right; allowed: padding on the left")
            kwargs["attention_mask"] = attention_mask
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        with self.router.one_pass():
            self.router.set_context_ids(ids_XT, host_XT=host_XT)
            with layouts_while_generating(self.base_model, self.router, new_token_context, host_XT):
                output = self.base_model.generate(**inputs, **kwargs)
            self._caches.remember(getattr(output, "past_key_values", None), self.router.layout.context_ids_XK)
        return output

    def num_trainable_parameters(self, by: Literal["group", "role"] | None = None) -> Any:
        """Number of trainable parameters, including the base's if the method trains them (``full``).

        Args:
            by: None: the total. ``group``: group → number, ``(shared)`` for parameters of no single group. ``role``:
                role → number, ``model`` for parameters outside adapted layers. Both sum to the total.

        Raises:
            UserError: ``by`` has another value.
        """
        total = count_trainable(self)
        if by is None:
            return total
        if by not in ("group", "role"):
            raise UserError(f"by: found {by!r}; {did_you_mean(str(by), ('group', 'role'))}, or None")
        counts = self.adapters.parameters_by_group() if by == "group" else self.adapters.parameters_by_role()
        rest = total - sum(counts.values())
        name = SHARED if by == "group" else "model"
        return {**counts, name: counts.get(name, 0) + rest} if rest else counts

    def save(self, folder: str | Path) -> None:
        """Write the adapters, and those of the base's own parameters that are trained, as safetensors and JSON.

        Raises:
            UserError: the model was detached, or the folder cannot be written.
        """
        self._check_attached()
        paths = dict.fromkeys(key.partition(":")[0].replace("/", ".") for key in self.adapters.layers)
        base = checkpoint.describe_base(self.base_model, paths)
        checkpoint.write(Path(folder), self.spec, base, self._tensors())

    def export_peft(self, folder: str | Path, group: str | None = None) -> None:
        """Write one group's adapter as a checkpoint of the ``peft`` library: LoRA (rsLoRA too), DoRA, IA3 or VeRA.

        Args:
            folder: for ``adapter_config.json`` and ``adapter_model.safetensors``; created if missing.
            group: a group, or a context, whose group is meant; None: the one that all contexts share. PEFT applies it
                to every token.

        Raises:
            UserError: contexts do not share a group and none is named, the method has no equivalent in PEFT, it acts on
                a part of a fused layer, the folder cannot be written, peft is not installed, or the model was detached.
        """
        self._check_attached()
        export_group(self.base_model, self.adapters, self.spec, Path(folder), group)

    def merge(self) -> Any:
        """Merge the adapters into the base's weights and detach. Logits are unchanged up to rounding.

        A layer without bias gets one if the method adds one (BitFit). The model's config does not record it:
        ``save_pretrained`` writes the bias, but ``from_pretrained`` would drop it.

        Returns:
            The base model, without hooks.

        Raises:
            UserError: contexts have different groups, one has no group, or a method cannot be expressed by the weights.
                The model is then unchanged.
        """
        self._check_attached()
        bare = [context for context, group in self.spec.grouping.items() if group is None]
        if len(self.router.groups) > 1 or (bare and not self.spec.ungrouped):
            raise UserError(
                f"merge: all contexts must share a group; found {self.spec.named_groups} (a weight cannot depend on "
                "the token)"
            )
        merge_into(self.base_model, self.adapters)
        return self.detach()

    def detach(self) -> Any:
        """Remove the adapters.

        Returns:
            The base model, bit for bit as before, including ``requires_grad``; weights that the method itself trained
            (``full``) stay trained.
        """
        self.adapters.detach()
        if self._is_attached():
            for name, p in self.base_model.named_parameters():
                p.requires_grad_(self._required_grad_of(name))
            del vars(self.base_model)[_MARK]
        return self.base_model

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Set the values of the tensors that ``save`` writes.

        Args:
            tensors: name → tensor.
            where: the file that they come from, for error messages.

        Raises:
            UserError: some are missing, unexpected or of another shape (all named); nothing is changed then.
        """
        also = {name.removeprefix("base.") for name in tensors if name.startswith("base.")}
        own = self._tensors(also)
        for what, names in (("missing", own.keys() - tensors.keys()), ("unexpected", tensors.keys() - own.keys())):
            if names:
                raise UserError(f"{where}: {what}: {', '.join(sorted(names))}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise UserError(
                    f"{where}: {name} must have shape {tuple(tensor.shape)}; found {tuple(tensors[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name in also:
            self.base_model.get_parameter(name).requires_grad_(True)

    def _tensors(self, also: Collection[str] = ()) -> dict[str, Tensor]:
        """Name in a file → every tensor that differs from the base; ``also`` names further parameters of the base."""
        found = own_tensors(self.adapters, self.base_model, also)
        return {name.replace("base_model.", "base.", 1) if name.startswith("base_model.") else name: tensor
                for name, tensor in found.items()}  # fmt: skip

    def _required_grad_of(self, name: str) -> bool:
        """Whether a parameter of the base required a gradient before; one that is new, whether its layer's others did.

        Merging and resizing embeddings make new parameters.
        """
        if name in self._required_grad:
            return bool(self._required_grad[name])
        layer = name.rpartition(".")[0]
        siblings = [required for other, required in self._required_grad.items() if other.rpartition(".")[0] == layer]
        return any(siblings or self._required_grad.values())

    def _contexts_of(self, given: Tensor, context_ids: Tensor | None) -> ContextIds:
        """The context ids of an input: the caller's, or from the ids of its tokens."""
        by_token = self.spec.contexts_from
        if context_ids is None and by_token is not None and not given.is_floating_point():
            return contexts_of_tokens(given, by_token, self.contexts)
        return checked_context_ids(context_ids, given, self.contexts)

    def _is_attached(self) -> bool:
        # The base may have been adapted again after this model was detached.
        return vars(self.base_model).get(_MARK) is self

    def _check_attached(self) -> None:
        if not self._is_attached():
            raise UserError("this adapted model was detached or merged; use its base model, or adapt that again")


def _check_free(model: Any) -> None:
    """Check that ``model`` is a language model without adapters.

    Raises:
        UserError: it is not.
    """
    if isinstance(model, AdaptedModel) or hasattr(model, _MARK):
        raise UserError("this model already has adapters; remove them with harness.detach(model)")
    _check_language_model(model)


def _check_language_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise UserError(f"model: found {type(model).__name__}; allowed: a Hugging Face causal language model")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of new parameters. Casting later is not enough: some start from values computed from the base's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
