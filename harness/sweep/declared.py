"""What the plugins of an experiment declare: the metrics of its tasks, and the training stages of its methods."""

from __future__ import annotations

from collections.abc import Sequence

from harness.core.errors import UserError
from harness.core.naming import metric_name
from harness.core.record import MetricInfo
from harness.experiment.plan import TrialSpec
from harness.experiment.shared import distinct
from harness.model.components import method_of
from tasks.registry import METRICS


def metrics_of(specs: Sequence[TrialSpec]) -> tuple[MetricInfo, ...]:
    """The metrics of the trials: perplexity, with the right and with the wrong inputs, and those of the tasks."""
    infos = [
        MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
        MetricInfo(name="perplexity_wrong_input", label="Perplexity, wrong input", higher_is_better=False),
    ]
    for spec in distinct(specs, "task"):
        for member, metrics in spec.task.metrics.items():
            prefix = f"{member}: " if member else ""
            if member:
                name, label = metric_name(member, "perplexity"), f"{prefix}Perplexity"
                infos.append(MetricInfo(name=name, label=label, higher_is_better=False))
            for metric in (METRICS.load(plugin.target) for plugin in metrics.values()):
                infos += [
                    MetricInfo(
                        name=metric_name(member, name),
                        label=f"{prefix}{label}",
                        higher_is_better=name not in metric.lower_is_better,
                        corpus=metric.corpus.get(name, "mean"),
                        lower=metric.bounds.get(name, (None, None))[0],
                        upper=metric.bounds.get(name, (None, None))[1],
                    )
                    for name, label in metric.labels.items()
                ]
    return tuple({info.name: info for info in infos}.values())


def check_stages(specs: Sequence[TrialSpec], where: str) -> None:
    """Check that the training stages of every method fit into the budget's epochs.

    Raises:
        UserError: they do not.
    """
    for spec in distinct(specs, "adapter", "budget"):
        try:
            method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs)
        except UserError as error:
            raise UserError(f"{where}: {spec.adapter.label}: {error}") from None
