"""The sections of the page on what went into a run: the model, its data, what trained, the flags."""

from llava_lite.train.monitor.plots import has_matplotlib
from llava_lite.train.monitor.report import charts
from llava_lite.train.monitor.report.files import CONFIG, RUN, STATE
from llava_lite.train.monitor.report.html import Html, details, facts, fault, faults, section, table, tag
from llava_lite.train.monitor.report.words import big, clock, count, with_flags
from llava_lite.train.publish.card import STAGES

NOT_RECORDED = "Not recorded: the directory has no run.json. Runs of earlier versions wrote none."
MOST_SKIPPED, MOST_FILES = 50, 5


def not_recorded(run, more: str = "") -> Html | None:
    """Return why what run.json says is not on the page, or not all of it; None where it is complete."""
    if RUN in run.files.missing:
        return tag("p", f"{NOT_RECORDED} {more}".strip(), class_="note")
    return fault(f"{sentence} {more}".strip()) if (sentence := run.files.sentence(RUN)) else None


def what_it_is(run) -> Html:
    """Return what the model is made of, and how the run was started."""
    record, config, tuning = run.record, run.config, run.tuning
    starts = record.get("starts", [])
    commands = dict.fromkeys(str(start["command"]) for start in starts if start.get("command"))
    pairs = [
        ("stage", f"{tuning}: {STAGES[tuning]}" if tuning in STAGES else tuning),
        ("base", record.get("base") or config.get("base_model_name_or_path")),
        ("model", record.get("model_type") or config.get("model_type")),
        ("vision encoder", record.get("tower") or config.get("mm_vision_tower")),
        ("connector", record.get("connector") or config.get("mm_projector_type")),
        ("experts", get_experts(record, config)),
        ("conversation template", record.get("conv_template") or config.get("conv_template")),
        ("precision", record.get("dtype")),
        ("devices", get_devices(record)),
        ("records a step", record.get("records_a_step")),
        ("started", "; ".join(map(start_line, starts))),
        ("ended", end_line(record.get("end"))),
        ("versions", ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())),
    ]
    others = [name for name in run.files.faults if name in (CONFIG, STATE) or name.startswith("checkpoint-")]
    notes = faults(run, *(name for name in others if name not in run.files.missing))
    more = "" if record else "What is here is from its other files."
    return section(
        "The run", not_recorded(run, more), *notes, facts(pairs), *(tag("pre", command) for command in commands)
    )


def get_experts(record, config) -> str | None:
    """Return the experts of run.json, or of the config.json of an old run; None for a dense model."""
    if record:
        found = record.get("experts", {}).values()
        kinds = {f"{one['num']} experts, {one['top_k']} for each token" for one in found}
        return f"{'; '.join(sorted(kinds))}; in layers {', '.join(record['experts'])}" if kinds else None
    moe = config.get("moe")
    if not isinstance(moe, dict) or not moe.get("moe_enable", True):
        return None
    layers = moe.get("moe_layers_idx")
    return f"{moe.get('num_experts')} experts, {moe.get('top_k_experts')} for each token; in layers {layers}"


def get_devices(record) -> str | None:
    """Return the ranks of the last start, their device and ZeRO's stage."""
    starts = record.get("starts")
    if not starts:
        return None
    zero = record.get("zero_stage")
    ranks = f"{count(starts[-1]['ranks'], 'rank')}: {starts[-1]['device']}"
    return ranks + ("" if zero is None else f", DeepSpeed ZeRO-{zero}")


def start_line(start) -> str:
    """Return when a run was started, and from where it went on."""
    step = start.get("step")
    return clock(start.get("date")) + (f" (resumed from step {step:,})" if step else "")


def end_line(end) -> str | None:
    """Return when and how a run ended."""
    return f"{clock(end.get('date'))}, {end.get('state')}" if end else None


def data(run) -> Html:
    """Return what the run trained and was evaluated on."""
    found, parts = run.record.get("data", {}), []
    for name, title in (("train", "Training"), ("eval", "Evaluation")):
        if name in found:
            parts += [tag("h3", title), data_set(found[name], len(run.skipped[name]), name)]
    none = tag("p", "Not recorded: run.json names no data.", class_="note") if run.record and not found else None
    logs = faults(run, *(name for name in run.files.faults if name.startswith("skipped_")))
    return section("Data", not_recorded(run) or none, *parts, *logs, skipped_table(run))


def data_set(one, num_skipped: int, name: str) -> Html:
    """Return the facts of a data set, and a histogram of how long its records are."""
    sources = [(file, f"{num:,}" if num else "") for file, num in one["sources"]]
    files = ", ".join(file for file, _ in sources) if len(sources) <= MOST_FILES else count(len(sources), "file")
    listed = details("all files", table(("file", "records"), sources, (1,))) if len(sources) > 1 else None
    if one.get("is_stream"):
        words = "read as a stream: the records of shards are not counted before the run"
        return tag("div", facts([("files", files), ("records", words)]), listed)
    lengths, records = one["lengths"], one["records"]
    most = f" of at most {one['max_length']:,}"
    pairs = [
        ("files", files),
        ("records", f"{records:,}, {one['with_image']:,} of them with images"),
        ("images", f"{one['images']:,}"),
        ("media", ", ".join(f"{num:,} records with {kind}" for kind, num in one["media"].items())),
        ("tokens", f"{one['tokens']:,}, images included"),
        ("supervised", f"{one['supervised_fraction']:.1%} of the tokens"),
        ("tokens of a record", f"{lengths['p50']:,} (median); 5 to 95%: {lengths['p5']:,} to {lengths['p95']:,}"),
        ("longest record", f"{lengths['longest']:,} tokens{most}"),
        ("truncated", count(one["truncated"], "record") if one["truncated"] else ""),
        ("left out", count(num_skipped, "record") if num_skipped else ""),
    ]
    drawn = None
    if has_matplotlib() and len(one["histogram"]["counts"]) > 1 and records > 1:
        drawn = charts.lengths(one["histogram"], name)
    return tag("div", tag("div", facts(pairs), listed), drawn, class_="charts")


def skipped_table(run) -> Html | None:
    """Return the first records that were left out, and why."""
    lines = [line for name in ("train", "eval") for line in run.skipped[name]]
    rows = [
        (str(line.get("id")), line.get("kind", ""), line.get("step", "start"), line.get("reason", ""))
        for line in lines[:MOST_SKIPPED]
    ]
    more = f", the first {MOST_SKIPPED}" if len(lines) > MOST_SKIPPED else ""
    shown = table(("record", "fault", "at step", "reason"), rows)
    return details(f"{count(len(lines), 'record')} left out{more}", shown) if rows else None


def trained(run) -> Html:
    """Return the parameters by part of the model, and their learning rates."""
    parts = run.record.get("parameters")
    if not parts:
        none = tag("p", "Not recorded: run.json names no parameters.", class_="note")
        return section("What trained", not_recorded(run) or none)
    rows = [
        (
            part,
            f"{row['trained']:,}",
            f"{row['frozen']:,}",
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            ", ".join(row["dtypes"]),
        )
        for part, row in parts.items()
    ]
    yes, no = (sum(row[key] for row in parts.values()) for key in ("trained", "frozen"))
    return section(
        "What trained",
        tag("p", f"{big(yes)} of {big(yes + no)} parameters trained ({yes / max(1, yes + no):.1%})."),
        table(("part", "trained", "frozen", "learning rate", "dtype"), rows, numbers=(1, 2, 3)),
    )


def flags(run) -> Html:
    """Return the flags that were given, and the values that the run chose; of an old run those of its checkpoint."""
    given, settings = run.record.get("given"), run.settings
    if given is None:
        words = "not at the default" if run.record else "kept by the newest checkpoint"
        shown = [flag_table(settings, words)]
    else:
        shown = [flag_table({name: value for name, value in settings.items() if name in given}, "given")]
        rest = {name: value for name, value in settings.items() if name not in given}
        shown.append(flag_table(rest, "not given, whose value the run chose"))
    none = (
        None
        if any(shown) or not run.record
        else tag("p", "None are known that differ from their defaults.", class_="note")
    )
    return section("Flags", not_recorded(run), *shown, none)


def flag_table(settings: dict, words: str) -> Html | None:
    """Return flags with their values, None without any. words: which flags these are."""
    rows = with_flags(settings)
    return details(f"{count(len(rows), 'flag')} {words}", table(("flag", "value"), rows)) if rows else None
