"""``harness.adapt``: a language model with context-grouped adapters, usable without the rest of the harness.

Shapes: B rows, T positions of this pass, K positions seen so far (the KV cache's included), D the model's width.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters import checkpoint
from adapters.attach import Adapters, count_trainable
from adapters.generation import layouts_while_generating
from adapters.inputs import CacheContexts, cached_positions, checked_context_ids, only_input
from adapters.merge import merge_into
from adapters.router import Router
from adapters.spec import Spec, resolve
from harness.errors import UserError, did_you_mean

_MARK = "_context_peft_adapted"  # an attribute of the base while it is adapted
SHARED = "(shared)"  # no group can have this name


def adapt(
    model: Any,
    spec: Mapping[str, Any],
    contexts: Sequence[str] = ("image", "text"),
    grouping: str | Mapping[str, str | None] = "agnostic",
    seed: int = 0,
    roles: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """Attach context-grouped adapters (Context-PEFT, arXiv 2312.08900) to a Hugging Face causal LM.

    The model is frozen but for what the method itself trains, and hooked, not copied: ``detach`` gives it back. Adapter
    parameters are created on the model's device in fp32, also on a bf16 or fp16 base, as small updates are lost in
    16 bits (PEFT does the same); on a float64 base in float64.

    Args:
        model: a Hugging Face causal LM.
        spec: ``{"method": "lora", "rank": 8}`` for all groups, or group → such a mapping, or None for no adapter:
            ``{"image": {"method": "lora", "rank": 64}, "text": {"method": "bitfit"}}``. ``harness adapters`` lists the
            methods and their options; ``lora+bitfit`` is both.
        contexts: names of the token domains; ``context_ids`` index them.
        grouping: ``agnostic`` (one group), ``specific`` (one per context), or context → group, None for no adapter.
        seed: of the adapters' initialisation.
        roles: layer path pattern → role, for an architecture that the harness does not know:
            ``{"model.layers.*.attention.query": "q"}``.

    Raises:
        UserError: an unknown method, option, group or role, an option out of range, an unknown architecture, or a model
            that is adapted already.
    """
    return AdaptedModel(model, resolve(spec, contexts, grouping, seed, roles))


def load_adapter(model: Any, folder: str | Path, contexts: Sequence[str] | None = None) -> AdaptedModel:
    """Put adapters that ``AdaptedModel.save`` wrote onto a base model like the one they were made for.

    Args:
        model: the base; it may be in another dtype than at saving.
        folder: that was saved to.
        contexts: what the caller takes the context ids to mean; None: what the file says.

    Raises:
        UserError: files missing or damaged, another base, other contexts, a method that is not installed, or tensors
            that are missing, left over or of another shape. The model is then as it was.
    """
    folder = Path(folder)
    saved, tensors = checkpoint.read(folder)
    where = str(folder / checkpoint.JSON_NAME)
    if contexts is not None and tuple(contexts) != saved.contexts:
        raise UserError(
            f"{where}: contexts, in the order of their ids: found {saved.contexts}; wanted {tuple(contexts)}"
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


class AdaptedModel(nn.Module):
    """A language model and its adapters. Made by ``adapt`` and ``load_adapter``.

    Args:
        base_model: a Hugging Face causal LM.
        spec: what to attach.

    Raises:
        UserError: see ``adapt``.
    """

    def __init__(self, base_model: Any, spec: Spec) -> None:
        super().__init__()
        _check_free(base_model)
        methods = {group: choice.method for group, choice in spec.by_group.items()}
        ungrouped = spec.ungrouped.method if spec.ungrouped else None
        self.spec = spec
        self.contexts = tuple(spec.grouping)
        self.router = Router(spec.grouping)
        own = dict(base_model.named_parameters())
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in own.values()) else torch.float32
        with _default_dtype(dtype):
            self.adapters = Adapters(base_model, methods, self.router, spec.seed, ungrouped, spec.roles)
        self.adapters.to(base_model.get_input_embeddings().weight.device, dtype)
        self.train(base_model.training)  # before the base is a part: its own flags stay
        self.base_model = base_model
        self._base_parameters = own
        self._required_grad = {name: p.requires_grad for name, p in own.items()}
        self._caches = CacheContexts()
        trained = [p for choice in spec.choices for p in choice.method.trained(base_model)]
        self._mark = object()
        setattr(base_model, _MARK, self._mark)
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
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, every token adapted by its context's group.

        Args:
            input_ids: (B, T); or ``inputs_embeds``.
            attention_mask: (B, K), as the base takes it. Padding may stand on either side; its context ids are any.
            context_ids: int64 index into ``contexts``, (B, T), or (T,) for all rows alike.
            inputs_embeds: (B, T, D).
            past_key_values: a KV cache that this model filled; ``context_ids`` are those of the new tokens only.
            kwargs: handed to the base (``labels``, ``use_cache``, …).

        Returns:
            What the base returns.

        Raises:
            UserError: context_ids are missing or do not fit, or the cache was filled by another model.
        """
        self._check_attached()
        given = only_input(input_ids, inputs_embeds)
        ids_XT = checked_context_ids(context_ids, given, self.contexts)
        self.router.set_context_ids(ids_XT, self._caches.of(past_key_values, given.shape[0]))
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
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
            input_ids: the prompt (B, T); or ``inputs_embeds``.
            context_ids: of the prompt, as in ``forward``.
            new_token_context: the context of what is generated.
            inputs_embeds: (B, T, D).
            attention_mask: (B, T), 0 for padding, which stands on the left.
            kwargs: handed to the base's ``generate``.

        Returns:
            What the base's ``generate`` returns.

        Raises:
            UserError: see ``forward``; an unknown ``new_token_context``, padding on the right, or a cache that is not
                empty.
        """
        self._check_attached()
        ids_XT = checked_context_ids(context_ids, only_input(input_ids, inputs_embeds), self.contexts)
        if new_token_context not in self.contexts:
            allowed = did_you_mean(str(new_token_context), self.contexts)
            raise UserError(f"new_token_context: found {new_token_context!r}; {allowed}")
        if cached_positions(kwargs.get("past_key_values")):
            raise UserError("past_key_values: generate starts from a whole prompt; allowed: none, or an empty cache")
        if attention_mask is not None:
            padded = (attention_mask[:, -1] == 0).nonzero()[:, 0].tolist()
            if padded:
                raise UserError(f"attention_mask: rows {padded} are padded on the right; generate needs it on the left")
            kwargs["attention_mask"] = attention_mask
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        self.router.set_context_ids(ids_XT)
        with layouts_while_generating(self.base_model, self.router, new_token_context):
            output = self.base_model.generate(**inputs, **kwargs)
        self._caches.remember(getattr(output, "past_key_values", None), self.router.layout.context_ids_XK)
        return output

    def num_trainable_parameters(self, by: Literal["group", "role"] | None = None) -> Any:
        """Number of trainable parameters, the base's included where the method trains them (``full``).

        Args:
            by: None: one number. ``group``: group → number, ``(shared)`` for what is no group's own. ``role``: role →
                number, ``model`` for what is not in an adapted layer. Both sum to the total.

        Raises:
            UserError: another ``by``.
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
        """Write the adapters, and the base's own parameters where they are trained, as safetensors and JSON.

        Raises:
            UserError: the model was detached, or the folder cannot be written.
        """
        self._check_attached()
        paths = dict.fromkeys(key.partition(":")[0].replace("/", ".") for key in self.adapters.layers)
        base = checkpoint.describe_base(self.base_model, paths, self._base_parameters)
        checkpoint.write(Path(folder), self.spec, base, self._tensors())

    def export_peft(self, folder: str | Path, group: str | None = None) -> None:
        """Write one group's adapter (where there is one group: its) for the ``peft`` library; adapters/peft_io.py."""
        self._check_attached()
        # By name: peft_io builds on this module, and needs the optional peft library.
        importlib.import_module("adapters.peft_io").export_peft(self, folder, group)

    def merge(self) -> Any:
        """Compute the adapters into the base's weights and detach. Logits stay equal to rounding.

        A layer without bias gets one where the method adds one (BitFit). The model's configuration does not know of it:
        ``save_pretrained`` writes it, but ``from_pretrained`` would leave it out.

        Returns:
            The base model, without hooks.

        Raises:
            UserError: contexts have different groups, or one has none, or no weight can stand for a method. Nothing is
                changed then.
        """
        self._check_attached()
        bare = [context for context, group in self.spec.grouping.items() if group is None]
        if len(self.router.groups) > 1 or (bare and not self.spec.ungrouped):
            found = ", ".join(f"{context}: {group or 'no adapter'}" for context, group in self.spec.grouping.items())
            raise UserError(
                f"merge: a weight cannot depend on the token, so all contexts must share a group; found {found}"
            )
        merge_into(self.base_model, self.adapters)
        return self.detach()

    def detach(self) -> Any:
        """Take the adapters off.

        Returns:
            The base model, bit for bit as before, ``requires_grad`` included; weights that the method itself trained
            (``full``) stay trained.
        """
        self.adapters.detach()
        if self._is_attached():
            for name, p in self._base_parameters.items():
                p.requires_grad_(self._required_grad[name])
            delattr(self.base_model, _MARK)
        return self.base_model

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take the values of tensors that ``save`` wrote.

        Args:
            tensors: by name.
            where: they come from, for messages.

        Raises:
            UserError: some are missing, left over or of another shape (all named); nothing is changed then.
        """
        also = {name.removeprefix("base.") for name in tensors if name.startswith("base.")}
        own = self._tensors(also)
        for what, names in (("missing", own.keys() - tensors.keys()), ("left over", tensors.keys() - own.keys())):
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
            self._base_parameters[name].requires_grad_(True)

    def _tensors(self, also: Collection[str] = ()) -> dict[str, Tensor]:
        """What makes this model differ from its base, by name and each once; ``also`` names parameters of the base."""
        named = {f"adapters.{name}": tensor for name, tensor in self.adapters.state_dict(keep_vars=True).items()}
        named |= {f"base.{name}": p for name, p in self._base_parameters.items() if p.requires_grad or name in also}
        once = {id(tensor): name for name, tensor in reversed(named.items())}
        return {name: tensor for name, tensor in named.items() if once[id(tensor)] == name}

    def _is_attached(self) -> bool:
        # Its own mark: the base may have been adapted anew after this one was detached.
        return getattr(self.base_model, _MARK, None) is self._mark

    def _check_attached(self) -> None:
        if not self._is_attached():
            raise UserError("this adapted model was detached (or merged): use its base model, or adapt that again")


def _check_free(model: Any) -> None:
    """Raises: UserError: the model is no language model, or has adapters already."""
    if isinstance(model, AdaptedModel) or hasattr(model, _MARK):
        raise UserError("this model is adapted already; call detach() on what harness.adapt or load_adapter returned")
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise UserError(f"model: found {type(model).__name__}; allowed: a Hugging Face causal language model")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What parameters are made in: not made in fp32 and cast, as some start as a value computed from the base's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
