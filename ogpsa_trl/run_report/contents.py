"""What the report of a run shows, taken from its log: facts, notes, charts and tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ogpsa_trl.run_report.charts import Chart, Line
from ogpsa_trl.run_report.log import RunLog

Rows = list[dict[str, object]]

_CAPABILITY_LOSS = {
    "kl": "divergence from the starting model, ",
    "nll": "negative log-likelihood, ",
    None: "",
}
_IN_SUBSPACE = ("proposal_in_subspace", "gradient_in_subspace", "update_in_subspace")

# Training arguments that are shown, where they are set.
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_length", "packing",
    "completion_only_loss", "assistant_only_loss", "loss_type", "beta", "bf16", "fp16",
    "gradient_checkpointing", "seed", "data_seed",
)  # fmt: skip
# Other keys of the training script that are shown.
_ARGUMENTS = (
    "dataset_name", "datasets", "gate_datasets", "dtype", "load_in_4bit", "load_in_8bit",
    "use_peft",
)  # fmt: skip
_WITH_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_WITH_OGPSA = ("preset", "capability_datasets")


def title(log: RunLog) -> str:
    """The kind of the run."""
    trainer = str(log.settings.get("trainer", "Trainer")).removeprefix("OGPSA")
    return f"{trainer} with OGPSA" if _has_ogpsa(log) else f"{trainer}, without OGPSA"


def facts(log: RunLog) -> dict[str, str]:
    """What is said of the run at the top, by name."""
    found = {}
    if model := log.settings.get("model"):
        found["Starting model"] = str(model["name_or_path"])
        found["Trained parameters"] = f"{model['num_trained']:,} of {model['num_parameters']:,}"
    found["Optimizer steps"] = f"{log.step} of {log.max_steps}"
    found["Epochs"] = shown(log.state.get("epoch"))
    if log.summary:
        found["Time"] = _duration(log.summary["train_runtime"])
    share = log.mean_over_steps("ogpsa/refresh_share")
    if share is not None:
        found["Time in refreshes"] = _percent(share)
    return found


def notes(log: RunLog) -> list[str]:
    """What has to be known of this run before its figures are read."""
    found = []
    if log.step < log.max_steps and not log.summary:
        found.append(
            "The run was cut off, or is still going on: this is the log of "
            f"{log.state_file.resolve().parent.name}."
        )
    elif log.step < log.max_steps:
        found.append(f"Training was stopped after {log.step} of {log.max_steps} steps.")
    if not log.settings:
        found.append("The folder holds no settings, so the report cannot show them.")
    tolerance = (log.settings.get("gate") or {}).get("max_capability_loss_increase")
    increases = log.series("ogpsa/gate_largest_increase").values
    if tolerance is not None and increases and not increases[-1] <= tolerance:
        found.append(
            f"The capability gate is not passed: at the end the largest increase is "
            f"{shown(increases[-1])} nats per token, the tolerance {shown(tolerance)}."
        )
    for metric, event in (
        ("kept_gradients", "Capability gradients were not finite, so that older ones were kept"),
        ("lost_gradients", "Training gradients were not finite, and counted as zero"),
    ):
        steps = log.series(f"ogpsa/{metric}").steps
        if steps:
            more = ", ..." if len(steps) > 10 else ""
            found.append(f"{event}, up to the steps {', '.join(map(str, steps[:10]))}{more}.")
    return found


def charts(log: RunLog) -> list[Chart]:
    """The charts that the log has values for."""
    settings, gate = log.settings.get("ogpsa") or {}, log.settings.get("gate") or {}
    of_loss = _CAPABILITY_LOSS[settings.get("capability_loss")]
    capped = log.mean_over_steps("ogpsa/restoration_capped")
    is_capped = "" if capped is None else f"; the cap binds in {_percent(capped)} of the steps"
    share = log.mean_over_steps("ogpsa/refresh_share")
    of_time = "" if share is None else f"; {_percent(share)} of the time of the run"
    is_harm = "above 0: the capability has suffered"
    losses, drift = _group_lines(log, "capability_loss"), _group_lines(log, "drift")
    if losses == drift:  # a divergence begins at zero
        of_loss, drift = f"{of_loss}and so its drift, ", []
    training_losses = _lines(log, [name for name in log.names if _is_loss(name)])
    accuracies = [name for name in log.names if name.endswith("rewards/accuracies")]
    cap = _limit(settings.get("restoration_cap"), "cap of the ratio")
    tolerance = _limit(gate.get("max_capability_loss_increase"), "tolerance")
    every = [
        Chart("Training loss", "mean since the last log", training_losses),
        Chart(
            "Preference accuracy", "share of pairs whose chosen completion has the larger reward",
            _lines(log, accuracies), bounds=(-0.03, 1.03),
        ),
        Chart("Capability loss", f"{of_loss}nats per token, at refreshes", losses),
        Chart(
            "Drift of the capability loss", f"its rise since the start, nats per token; {is_harm}",
            drift,
        ),
        Chart(
            "Held-out capability loss", f"its increase at the gate, nats per token; {is_harm}",
            _group_lines(log, "gate_increase"), limit=tolerance,
        ),
        Chart(
            "What is taken out", "share of the squared length that the projection removes",
            _lines(log, ["ogpsa/removed_fraction"]),
        ),
        Chart(
            "In the capability subspace", "share of the squared length",
            _lines(log, [f"ogpsa/{name}" for name in _IN_SUBSPACE]),
        ),
        Chart(
            "Cosine of safety and capability gradient", "below 0 they are in conflict",
            _lines(log, ["ogpsa/cosine"]),
        ),
        Chart(
            "Restoration",
            f"length relative to the update, share of steps at the cap{is_capped}",
            _lines(log, ["ogpsa/restoration_ratio", "ogpsa/restoration_capped"]), limit=cap,
        ),
        Chart("Time of a refresh", f"seconds{of_time}", _lines(log, ["ogpsa/refresh_seconds"])),
    ]  # fmt: skip
    return [chart for chart in every if chart.lines]


def metric_rows(log: RunLog) -> Rows:
    """First, last and extreme values of the metrics in the charts, those of groups aside."""
    ours = ["removed_fraction", "cosine", *_IN_SUBSPACE, "restoration_ratio", "restoration_capped"]
    ours += ["replay_length", "rank", "refresh_seconds", "refresh_share", "basis_megabytes"]
    names = [n for n in log.names if _is_loss(n) or n.endswith("rewards/accuracies")]
    names += [f"ogpsa/{name}" for name in ours]
    return [
        {
            "metric": name.removeprefix("ogpsa/"),
            "first": values[0],
            "last": values[-1],
            "lowest": -_largest([-value for value in values]),
            "largest": _largest(values),
        }
        for name in names
        if (values := log.series(name).values)
    ]


def group_rows(log: RunLog) -> Rows:
    """What the capability groups hold, and what became of their losses."""
    return _rows_of_groups(log, "capability", "capability_loss", "drift", "drift")


def gate_rows(log: RunLog) -> Rows:
    """What the groups of the gate hold, and what became of their losses."""
    return _rows_of_groups(log, "gate", "gate_loss", "gate_increase", "increase")


def _rows_of_groups(log: RunLog, kind: str, loss: str, rise: str, rise_name: str) -> Rows:
    data = log.settings.get(f"{kind}_groups", {})
    rows = []
    for name in dict.fromkeys([*data, *log.groups(loss), *log.groups(rise)]):
        losses, rises = (log.series(f"ogpsa/{m}/{name}").values or [None] for m in (loss, rise))
        rows.append(
            {
                f"{kind} group": name,
                **data.get(name, {}),
                "loss, first": losses[0],
                "loss, last": losses[-1],
                f"{rise_name}, last": rises[-1],
                f"{rise_name}, largest": None if rises == [None] else _largest(rises),
            }
        )
    return rows


TABLES = (metric_rows, group_rows, gate_rows)


def settings(log: RunLog) -> dict[str, dict[str, str]]:
    """The settings, by heading and name."""
    found = log.settings
    training, arguments = found.get("training", {}), found.get("arguments", {})
    keys = _WITH_OGPSA if found.get("ogpsa") else ()
    keys += _ARGUMENTS
    keys += _WITH_LORA if arguments.get("use_peft") else ()
    processes = {"processes": found["num_processes"]} if found else {}
    every = {
        "OGPSA": found.get("ogpsa") or {},
        "Capability gate": found.get("gate") or {},
        "Training": {n: training[n] for n in _TRAINING if training.get(n) is not None} | processes,
        "Model and data": {n: arguments[n] for n in keys if arguments.get(n)},
        "Versions": found.get("versions", {}),
    }
    return {
        heading: {name: shown(value) for name, value in values.items()}
        for heading, values in every.items()
        if values
    }


def shown(value: object) -> str:
    """A value as text: numbers with four digits, a dash where there is none."""
    match value:
        case None:
            return "-"
        case bool() | str() | int():
            return str(value).lower() if isinstance(value, bool) else str(value)
        case float():
            return f"{value:.4g}"
        case Mapping() if "path" in value:  # an entry of a list of data sets
            split = f" [{value['split']}]" if value.get("split") else ""
            group = f"{value['group']}: " if value.get("group") else ""
            return f"{group}{shown(value.get('data_files') or value['path'])}{split}"
        case list():
            return ", ".join(map(shown, value)) or "-"
    return json.dumps(value)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _has_ogpsa(log: RunLog) -> bool:
    return any(name.startswith("ogpsa/") and "ogpsa/gate_" not in name for name in log.names)


def _is_loss(name: str) -> bool:
    return name == "loss" or (name.startswith("eval_") and name.endswith("loss"))


def _limit(value: float | None, label: str) -> tuple[float, str] | None:
    return None if value is None else (value, f"{label}, {shown(value)}")


def _lines(log: RunLog, names: Sequence[str]) -> list[Line]:
    """A line for each metric that was logged."""
    every = [Line(name.removeprefix("ogpsa/"), log.series(name)) for name in names]
    return [line for line in every if line.series.values]


def _group_lines(log: RunLog, metric: str) -> list[Line]:
    return [Line(name, log.series(f"ogpsa/{metric}/{name}")) for name in log.groups(metric)]


def _largest(values: Sequence[Any]) -> float:
    """A value that is not a number counts as the largest."""
    return math.nan if any(map(math.isnan, values)) else max(values)
