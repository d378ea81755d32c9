"""Groups that differ: LoRA of rank 64 on image tokens, BitFit on text. No method of its own, but several as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from adapters import base


class PerGroupConfig(base.Config):
    """The options of each group's method."""

    groups: dict[str, base.Config]


class PerGroup(base.AdapterMethod):
    """Another method, or other options, for each group.

    Args:
        methods: group → its method.
    """

    summary = "another method for each group"
    Config = PerGroupConfig

    def __init__(self, methods: Mapping[str, base.AdapterMethod]) -> None:
        super().__init__(PerGroupConfig.model_construct(groups={g: method.config for g, method in methods.items()}))
        self.methods = dict(methods)

    def label(self) -> str:
        """``LoRA r=64 on image, BitFit on text``."""
        groups: dict[str, list[str]] = {}
        for group, method in self.methods.items():
            groups.setdefault(method.label(), []).append(group)
        return ", ".join(f"{label} on {' and '.join(own)}" for label, own in groups.items())

    @property
    def parts(self) -> tuple[base.AdapterMethod, ...]:
        """The parts of all groups' methods."""
        return tuple(part for method in self.methods.values() for part in method.parts)

    def for_groups(self, groups: Sequence[str]) -> dict[str, base.AdapterMethod]:
        """Each group's own method."""
        return {group: self.methods[group] for group in groups}

    def roles(self) -> frozenset[str]:
        """The roles of all groups."""
        return frozenset().union(*(method.roles() for method in self.methods.values()))

    def reaches(self) -> frozenset[str]:
        """What any group's method reaches."""
        return frozenset().union(*(method.reaches() for method in self.methods.values()))

    def trained(self, language_model: nn.Module) -> Iterable[nn.Parameter]:
        """The base's parameters that any group's method trains."""
        return [p for method in self.methods.values() for p in method.trained(language_model)]

    def stages(self, epochs: int) -> tuple[base.Stage, ...]:
        """The stages of the first method that has several, if any."""
        found = [method.stages(epochs) for method in self.methods.values()]
        return next((stages for stages in found if len(stages) > 1), found[0])
