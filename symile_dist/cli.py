"""The command line. `--help` and config commands import neither torch, ray nor deepspeed."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from symile_dist import __version__

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
EXIT_BROKEN_PIPE = 141


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _train_until_done(config: Any, options: argparse.Namespace, resume: bool) -> int:
    import psutil
    from rich.console import Console

    began = time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
    from symile_dist.driver import launch

    config = config.with_absolute_paths()
    # With --json standard output is the result's alone.
    console = Console(stderr=True) if options.json else None
    fresh = getattr(options, "fresh", False)
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():  # Ray prints there too
        result = launch(config, fresh, resume, options.plain or None, console, began)
    code = EXIT_PREEMPTED if result["status"] == "preempted" else EXIT_OK
    if options.json:
        _print_json({**result, "run": str(config.run_directory)})
        return code
    if code == EXIT_PREEMPTED:
        print(f"{result['message']}; the same command goes on from there", file=sys.stderr)
        return code
    best = ""
    if result.get("best_step") is not None:
        best = (
            f"  best         step {result['best_step']}: {config.validation.best_metric} {result['best_value']:.4f}\n"
        )
    print(
        f"finished: step {result['step']} in {result['seconds']:.0f} s, {result['restarts']} restarts\n"
        f"  the run      {config.run_directory}\n"
        f"{best}"
        f"  evaluate it  symile-dist evaluate {config.run_directory}\n"
        f"  its curves   tensorboard --logdir {config.run_directory / 'tensorboard'}"
    )
    return EXIT_OK


def _train(options: argparse.Namespace) -> int:
    from symile_dist.config import load_config

    return _train_until_done(load_config(options.config, options.overrides).config, options, options.resume)


def _resume(options: argparse.Namespace) -> int:
    from symile_dist.launch.arguments import resume_elsewhere
    from symile_dist.run_directory import load_run

    elsewhere = resume_elsewhere(options, _print_result, _examine)
    if elsewhere is not None:
        return elsewhere
    return _train_until_done(load_run(options.run, options.overrides), options, resume=True)


def _examine(config: Any, backend: str) -> None:
    from symile_dist.tools.doctor.command import before_submission

    before_submission(config, backend)


def _known_runs(runs: Sequence[str]) -> list[Path]:
    from symile_dist.launch.records import record_of, records

    return [Path(record["run"]) for record in ([record_of(run) for run in runs] if runs else records())]


def _state_folder() -> Path:
    from symile_dist.launch.records import state_folder

    return state_folder()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, the garbage collector rests: a fifth of what a command of seconds takes goes to looking, again and again,
    through all that torch has just defined."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _doctor(options: argparse.Namespace) -> int:
    from symile_dist.config import load_config
    from symile_dist.tools.doctor.command import examine, findings_table, summary

    config = None
    if options.config:
        config = load_config(options.config, options.overrides).config.with_absolute_paths()
    with contextlib.redirect_stdout(sys.stderr):  # Ray and the encoders' libraries print there too
        found = examine(config)
    told = summary(found)
    _print_result(options, told, lambda: findings_table(found))
    return EXIT_FAILED if told["FAIL"] else EXIT_OK


def _plan(options: argparse.Namespace) -> int:
    with _uncollected():
        from symile_dist.tools.plan.command import run

        return _print_result(options, *run(options))


def _benchmark_calibrate(options: argparse.Namespace) -> int:
    from symile_dist.tools.plan.calibrate_command import run

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints there
        found = run(options)
    return _print_result(options, *found)


def _view(options: argparse.Namespace) -> int:
    from symile_dist.launch.records import record_of
    from symile_dist.tools.view_command import view, visible

    return view(visible(options.run, record_of(options.run)["run"]), options)


def _watch(options: argparse.Namespace) -> int:
    from symile_dist.launch.records import record_of
    from symile_dist.tools.view_command import visible, watch
    from symile_dist.view.watch import summary

    directory = visible(options.run, record_of(options.run)["run"])
    if options.json:
        _print_json(summary(directory))
        return EXIT_OK
    return watch(directory, options)


def _fork(options: argparse.Namespace) -> int:
    from symile_dist.tools.fork import fork

    done = fork(options.run, options.new, options.step)
    words = f"{done['run']}: a run of its own, at step {done['step']}; train it: symile-dist resume {done['run']}"
    return _print_result(options, done, lambda: words)


def _compare(options: argparse.Namespace) -> int:
    from symile_dist.launch.records import record_of
    from symile_dist.tools.compare import as_json, check_out, compare, tables

    out = check_out(options.out, options.html)
    found, files = compare(options.runs, options.key, options.x, record_of=record_of), []
    if out is not None:
        from symile_dist.tools.compare_page import write_figures

        files = write_figures(found, out, options.html)
    code = _print_result(options, as_json(found, files), lambda: tables(found))
    if files and not options.json:
        print(f"{out}: {', '.join(file.name for file in files)}")
    return code


def _evaluate(options: argparse.Namespace) -> int:
    from symile_dist.tools.evaluate import evaluate_run, format_results
    from symile_dist.tools.progress import progress_bar, silent

    def words(text: str | None) -> list[str] | None:
        return None if text is None else [word.strip() for word in text.split(",") if word.strip() not in ("", "none")]

    recall_at = words(options.recall_at)
    if not all(word.isdecimal() for word in recall_at or []):
        raise ValueError(f"--recall-at {options.recall_at}: should be numbers, such as 1,5,10")
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes one tells
    with progress_bar(f"evaluating {options.run}") if is_first else contextlib.nullcontext(silent) as progress:
        results = evaluate_run(
            options.run,
            step=options.step,
            split=options.split,
            resamples=options.resamples,
            shards=options.shards,
            overrides=options.overrides,
            metrics=words(options.metrics) or [],
            directions=words(options.directions),
            recall_at=None if recall_at is None else [int(word) for word in recall_at],
            zero_shot_file=options.zero_shot,
            probe=words(options.probe) or [],
            probe_samples=options.probe_samples,
            export=options.export,
            metadata=words(options.metadata) or [],
            max_samples=options.max_samples,
            device=options.device,
            figure=not options.no_figure,
            progress=progress,
        )
    if not is_first:
        return EXIT_OK
    return _print_result(options, results, lambda: format_results(results))


def _checkpoints_list(options: argparse.Namespace) -> int:
    from symile_dist.tools.checkpoints import checkpoints_table, list_checkpoints

    found = list_checkpoints(options.run)
    return _print_result(options, found, lambda: checkpoints_table(found))


def _checkpoints_verify(options: argparse.Namespace) -> int:
    from symile_dist.tools.checkpoints import format_verified, verify_checkpoints
    from symile_dist.tools.progress import progress_bar

    with progress_bar(f"verifying {options.run}") as progress:
        found = verify_checkpoints(options.run, options.step, progress)
    _print_result(options, found, lambda: format_verified(found))
    return EXIT_FAILED if found["damaged"] else EXIT_OK


def _checkpoints_consolidate(options: argparse.Namespace) -> int:
    from symile_dist.tools.checkpoints import consolidate

    done = consolidate(options.run, options.out, options.step, options.force)
    words = f"{done['out']}: {done['parameters']:,} parameters of step {done['step']}, {done['bytes'] / 1e6:.1f} MB"
    return _print_result(options, done, lambda: words)


def _checkpoints_export(options: argparse.Namespace) -> int:
    from symile_dist.tools.checkpoints import export, format_exported

    summary = export(options.run, options.out, options.step, options.overrides)
    return _print_result(options, summary, lambda: format_exported(summary))


def _config_validate(options: argparse.Namespace) -> int:
    from symile_dist.config import load_config

    config = load_config(options.config, options.overrides).config
    words = f"{options.config}: valid (run '{config.run.name}', digest {config.digest()[:12]})"
    return _print_result(options, {"valid": True, "digest": config.digest()}, lambda: words)


def _config_explain(options: argparse.Namespace) -> int:
    from symile_dist.config import explain, load_config

    loaded = load_config(options.config, options.overrides)
    return _print_result(options, loaded.config.model_dump(mode="json"), lambda: explain(loaded))


def _config_schema(options: argparse.Namespace) -> int:
    from symile_dist.config import Config

    _print_json(Config.model_json_schema())
    return EXIT_OK


def _shards_demo(options: argparse.Namespace) -> int:
    from symile_dist.data.demo import make_demo
    from symile_dist.tools.progress import progress_bar

    with progress_bar("making demo data") as progress:
        summary = make_demo(
            options.out,
            languages=options.languages,
            train=options.train,
            val=options.val,
            test=options.test,
            seed=options.seed,
            progress=progress,
        )
    return _print_result(options, summary, lambda: summary["message"])


def _shards_index(options: argparse.Namespace) -> int:
    from symile_dist.data.manifest import default_processes, index_directory
    from symile_dist.tools.progress import progress_bar

    summaries = []
    for directory in options.directories:
        with progress_bar(f"indexing {directory}") as progress:
            manifest = index_directory(
                directory,
                force=options.force,
                progress=lambda done, total: progress("shards", done, total),
                processes=options.processes or default_processes(),
                storage=_storage(options),
                skip_damaged=options.skip_damaged,
            )
        summary = {
            "directory": manifest.url,
            "shards": len(manifest.shards),
            "samples": manifest.samples,
            "members": list(manifest.members),
            "left_out": sum(shard.left_out for shard in manifest.shards),
            "skipped": dict(manifest.skipped),
            "digest": manifest.digest,
        }
        summaries.append(summary)
        if not options.json:
            print(
                f"{directory}: {summary['samples']} samples in {summary['shards']} shards, "
                f"members {', '.join(manifest.members)}"
            )
            if summary["left_out"]:
                print(f"  {summary['left_out']} files without a suffix belong to no sample and are left out")
            for name, reason in manifest.skipped:
                print(f"  skipped {name}: {reason}")
    if options.json:
        _print_json(summaries)
    return EXIT_OK


def _storage(options: argparse.Namespace) -> Any:
    from symile_dist.config import StorageConfig

    return StorageConfig(endpoint_url=options.endpoint_url, profile=options.profile, anonymous=options.anonymous)


def _shards_verify(options: argparse.Namespace) -> int:
    from symile_dist.data.manifest import default_processes
    from symile_dist.tools.progress import progress_bar
    from symile_dist.tools.shards import quarantine_folder, verify_folder

    storage, found = _storage(options), {}
    for directory in options.directories:
        with progress_bar(f"verifying {directory}") as progress:
            faults = verify_folder(
                directory,
                storage,
                quick=options.quick,
                processes=options.processes or default_processes(),
                progress=lambda done, total: progress("shards", done, total),
            )
        found[directory] = faults
        new = quarantine_folder(directory, faults, storage) if options.quarantine and faults else 0
        if not options.json:
            for fault in faults:
                print(f"{directory}: {fault}")
            print(f"{directory}: {f'{len(faults)} faults' if faults else 'as its manifest says'}")
            if new:
                print(f"{directory}: {new} put into quarantine: new runs leave them out")
    if options.json:
        _print_json({directory: [fault._asdict() for fault in faults] for directory, faults in found.items()})
    return EXIT_FAILED if any(found.values()) else EXIT_OK


def _shards_stats(options: argparse.Namespace) -> int:
    from symile_dist.tools.progress import progress_bar
    from symile_dist.tools.shards import draw_stats, format_stats, stats_of

    with progress_bar(f"reading {options.directory}") as progress:
        stats = stats_of(options.directory, _storage(options), lambda done, total: progress("indices", done, total))
    if options.figure:
        draw_stats(stats, options.figure)
    return _print_result(options, stats, lambda: format_stats(stats))


def _shards_mean(options: argparse.Namespace) -> int:
    import numpy as np

    from symile_dist.data.manifest import default_processes
    from symile_dist.tools.progress import progress_bar
    from symile_dist.tools.shards import mean_of

    out = Path(options.out)
    if out.suffix != ".npy" or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: should be a .npy file in a folder that exists")
    with progress_bar(f"reading {options.directory}") as progress:
        mean, count = mean_of(
            options.directory,
            options.member,
            _storage(options),
            options.processes or default_processes(),
            lambda done, total: progress("shards", done, total),
        )
    np.save(out, mean.astype(np.float32))
    result = {"member": options.member, "samples": count, "shape": list(mean.shape), "out": str(out)}
    return _print_result(options, result, lambda: f"{out}: mean of '{options.member}' over {count} samples")


def _shards_quarantine(options: argparse.Namespace) -> int:
    from symile_dist.tools.shards import clear_quarantine, quarantine_of

    storage = _storage(options)
    if options.clear:
        cleared = clear_quarantine(options.place, options.shard, storage)
        words = f"{options.place}: {cleared} entries taken off the list"
        return _print_result(options, {"cleared": cleared}, lambda: words)
    entries = [entry for entry in quarantine_of(options.place, storage) if options.shard in (None, entry.shard)]
    if options.json:
        _print_json([entry._asdict() for entry in entries])
        return EXIT_OK
    for entry in entries:
        sample = "all samples" if entry.row < 0 else f"sample {entry.row}"
        where = f", member '{entry.member}' at byte {entry.offset}" if entry.member else ""
        found = f"; found at step {entry.step}, left out from epoch {entry.epoch} on" if entry.step else ""
        dataset = f"{entry.dataset}: " if entry.dataset else ""
        print(f"{dataset}{entry.shard}, {sample}{where}: {entry.reason} ({entry.kind}){found}")
    print(f"{options.place}: {len(entries)} entries in quarantine")
    return EXIT_OK


def _storage_arguments(parser: argparse.ArgumentParser) -> None:
    store = parser.add_argument_group("object stores", "credentials come from the usual AWS environment")
    store.add_argument("--endpoint-url", metavar="URL", help="of an S3 service other than AWS's")
    store.add_argument("--profile", help="profile in ~/.aws")
    store.add_argument("--anonymous", action="store_true", help="a public bucket, without credentials")


def _shards_pack(options: argparse.Namespace) -> int:
    from symile_dist.tools.pack.command import source_of
    from symile_dist.tools.pack.writer import pack
    from symile_dist.tools.progress import progress_bar

    source = source_of(options)
    with progress_bar(f"packing {options.out}") as progress:
        summary = pack(
            source,
            options.out,
            shard_bytes=options.shard_bytes,
            max_samples=options.max_samples,
            seed=None if options.no_shuffle else options.seed,
            part=options.part,
            processes=options.processes,
            progress=progress,
        )
    return _print_result(options, summary, lambda: summary["message"])


def _shards_encode(options: argparse.Namespace) -> int:
    from symile_dist.config import load_config
    from symile_dist.tools.features.encode import encode
    from symile_dist.tools.progress import progress_bar

    config = load_config(options.config, options.overrides).config.with_absolute_paths()

    def names(text: str | None) -> list[str] | None:
        return None if text is None else [name.strip() for name in text.split(",") if name.strip()]

    try:
        with (
            contextlib.redirect_stdout(sys.stderr),  # Ray prints there too
            progress_bar(f"encoding into {options.out}") as progress,
        ):
            summary = encode(
                config,
                options.out,
                shards=options.shards,
                modalities=names(options.modalities),
                keep=names(options.keep),
                actors=options.actors,
                gpus_per_actor=options.gpus_per_actor,
                batch_size=options.batch_size,
                dtype=options.dtype,
                part=options.part,
                on_error=options.on_error,
                progress=progress,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the whole shards", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _print_result(options, summary, lambda: summary["message"])


def _benchmark_objective(options: argparse.Namespace) -> int:
    from symile_dist.tools.benchmark import benchmark_objective, benchmark_tables

    results = benchmark_objective(
        options.shapes,
        threads=options.threads,
        repeats=options.repeats,
        world_size=options.world_size,
        device=options.device,
        dtype=options.dtype,
        negative_sampling=options.negative_sampling,
        sheets=options.sheets,
        out=options.out,
    )
    return _print_result(options, results, lambda: benchmark_tables(results))


def _benchmark_parity(options: argparse.Namespace) -> int:
    from symile_dist.tools.parity import measure_parity, parity_table

    results = measure_parity(options.world_size)
    return _print_result(options, results, lambda: parity_table(results))


def _benchmark_checkpoint(options: argparse.Namespace) -> int:
    from symile_dist.tools.benchmark_checkpoint import benchmark_checkpoint, checkpoint_table

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints there
        results = benchmark_checkpoint(options.megabytes, options.repeats, options.work)
    return _print_result(options, results, lambda: checkpoint_table(results))


def _benchmark_metrics(options: argparse.Namespace) -> int:
    from symile_dist.tools.benchmark_metrics import benchmark_metrics, metrics_table

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints there
        results = benchmark_metrics(options.world_size, options.steps, options.log_every)
    return _print_result(options, results, lambda: metrics_table(results))


def _benchmark_data(options: argparse.Namespace) -> int:
    from symile_dist.tools.benchmark_data import benchmark_data, benchmark_data_tables

    results = benchmark_data(
        samples=options.samples,
        shards=options.shards,
        sizes=options.sizes,
        repeats=options.repeats,
        processes=options.processes,
        peers=options.peers,
        skip_s3=options.skip_s3,
        work=options.work,
        out=options.out,
    )
    return _print_result(options, results, lambda: benchmark_data_tables(results))


def _benchmark_negatives(options: argparse.Namespace) -> int:
    from symile_dist.tools.negatives import compare_negatives, negatives_markdown

    results = compare_negatives(
        Path(options.data), options.cpu_seconds, options.global_batch_size, options.seeds, options.threads
    )
    return _print_result(options, results, lambda: negatives_markdown(results).rstrip("\n"))


def _print_result(options: argparse.Namespace, value: Any, shown: Callable[[], Any]) -> int:
    """The value as JSON where that was asked for, else what is shown of it: a text, or something of rich's."""
    if options.json:
        _print_json(value)
    elif isinstance(given := shown(), str):
        print(given)
    else:
        from rich.console import Console

        # A pipe or a file has no width: wide enough for one line per row.
        Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(given)
    return EXIT_OK


def _demo(options: argparse.Namespace) -> int:
    from symile_dist.tools.demo import run_demo

    return run_demo(Path(options.out), Path(options.data), plain=options.plain or None, quick=options.quick)


def _reproduce(options: argparse.Namespace) -> int:
    from symile_dist.tools.reproduce.names import EXPERIMENTS, MAX_SEEDS, folder_of
    from symile_dist.tools.reproduce.publish import check_page, publish

    if any(number is not None and number < 1 for number in (options.seeds, options.processes)):
        raise ValueError("--seeds and --processes should be 1 or more")
    if (options.seeds or 1) > MAX_SEEDS:
        raise ValueError(f"--seeds {options.seeds}: should be {MAX_SEEDS} or less")
    out = folder_of(options.out, options.quick)
    if options.publish is not None:
        check_page(Path(options.publish))

    from symile_dist.tools.progress import progress_bar
    from symile_dist.tools.reproduce.experiments import check_folder, reproduce, show, summarize
    from symile_dist.tools.reproduce.lab import Lab

    labs = [
        Lab(out.absolute(), name, quick=options.quick).with_options(options.seeds, options.processes)
        for name in (EXPERIMENTS if options.name == "all" else [options.name])
    ]
    for lab in labs:
        check_folder(lab)
    results = []
    for lab in labs:
        with (
            contextlib.redirect_stdout(sys.stderr),  # DeepSpeed prints there too
            progress_bar(lab.name) as progress,
            _ended_by_sigterm("the same command again goes on from the newest checkpoints"),
        ):
            results.append(reproduce(replace(lab, progress=progress)))
        if not options.json:
            _print_result(options, None, lambda: show(results[-1]))
    if options.publish is not None:
        publish(out, Path(options.publish))
    if options.json:
        _print_json([result.data for result in results] if options.name == "all" else results[0].data)
    elif options.name == "all":
        _print_result(options, None, lambda: summarize(results))
    return EXIT_OK if all(result.report.holds for result in results) else EXIT_FAILED


@contextlib.contextmanager
def _ended_by_sigterm(words: str) -> Iterator[None]:
    """SIGTERM ends what is within as an exception does, so that nothing is left behind, with exit code 75."""

    def end(number: int, frame: object) -> None:
        print(f"terminated; {words}", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chaos(options: argparse.Namespace) -> int:
    from symile_dist.tools.chaos import disturb, summary

    least, _, most = options.kill_every.partition("-")
    try:
        every = (float(least), float(most or least))
    except ValueError:
        raise ValueError(f"--kill-every {options.kill_every}: should be seconds, such as 20-40") from None
    result = disturb(
        Path(options.run),
        every,
        options.seconds,
        options.seed,
        tuple(options.faults.split(",")),
        tell=lambda words: print(words, file=sys.stderr),
    )
    return _print_result(options, result, lambda: summary(result))


def _command(
    parent: Any, name: str, run: Any, summary: str, example: str, json_option: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=run)
    if json_option:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file; see configs/ and docs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, e.g. train.steps=100")


def _pack_arguments(parser: argparse.ArgumentParser, layout: str, may_miss: bool = True) -> None:
    parser.set_defaults(layout=layout)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards of one split")
    parser.add_argument(
        "--shard-bytes", default="256MB", metavar="SIZE", help="a shard's largest size, e.g. 1GB (default: 256MB)"
    )
    parser.add_argument("--max-samples", type=int, metavar="N", help="a shard's largest number of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order (default: 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the source's order")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="write the I-th of N parts, e.g. on N machines")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of this machine (default: 1)")
    if may_miss:
        parser.add_argument(
            "--on-missing",
            default="error",
            choices=["error", "skip", "absent"],
            help="a file is missing or unreadable: stop before anything is written (default), leave the sample out, "
            "or pack it without the member",
        )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="plain lines in place of the live view")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="symile-dist",
        description="Distributed contrastive pretraining over three or more modalities.",
        epilog="example:\n  symile-dist demo\n  symile-dist train configs/demo.yaml train.steps=100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from symile_dist.launch.arguments import add_commands, profile_argument, size_arguments
    from symile_dist.tools.monitoring.arguments import add_commands as monitoring_commands
    from symile_dist.tools.view_command import add_view_arguments, add_watch_arguments

    parser.add_argument("--version", action="version", version=f"symile-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(
        commands,
        "train",
        _train,
        "Train, here or on the Ray cluster that RAY_ADDRESS names; the same command again goes on.",
        "symile-dist train configs/demo.yaml train.zero_stage=2",
    )
    _config_arguments(train)
    _run_arguments(train)
    begun = train.add_mutually_exclusive_group()
    begun.add_argument("--fresh", action="store_true", help="begin anew: move an earlier run's directory aside")
    begun.add_argument("--resume", action="store_true", help="go on with an earlier run, though its config was another")

    resume = _command(
        commands,
        "resume",
        _resume,
        "Go on with a run from its newest complete checkpoint.",
        "symile-dist resume runs/demo-symile train.steps=1200",
    )
    resume.add_argument("run", metavar="RUN", help="a run's name or directory")
    resume.add_argument("overrides", metavar="key=value", nargs="*", help="changes to its config")
    _run_arguments(resume)
    resume.add_argument("--on", metavar="BACKEND", help="`here`, or as of `submit` (default: where the run was)")
    resume.add_argument("--wait", action="store_true", help="where it was submitted: follow the job to its end")
    size_arguments(resume, nodes=None)
    profile_argument(resume)

    add_commands(commands, _command, _print_result, _examine)
    monitoring_commands(commands, _command, _print_result, _known_runs, _state_folder)

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "Whether this machine, or the cluster that RAY_ADDRESS names, is what a run needs. Exit code 1: it is not.",
        "symile-dist doctor configs/demo.yaml",
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="also check this config, its data and storage")
    doctor.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, e.g. ray.num_workers=2")

    from symile_dist.tools.plan import calibrate_command
    from symile_dist.tools.plan import command as plan_command

    plan = _command(
        commands,
        "plan",
        _plan,
        "What a config needs on machines that are not here: memory, network, time, cost, goodput: docs/plan.md",
        "symile-dist plan configs/demo.yaml --nodes 8 --gpu H200 --epochs 10",
    )
    _config_arguments(plan)
    plan_command.add_arguments(plan)

    watched = _command(
        commands,
        "watch",
        _watch,
        "A run in the terminal, live or ended, from its directory alone; ends when the run has.",
        "symile-dist watch demo-symile",
    )
    add_watch_arguments(watched)
    viewed = _command(
        commands,
        "view",
        _view,
        "A run as a web page, live or ended, from its directory alone; Ctrl-C ends it.",
        "symile-dist view runs/demo-symile",
        json_option=False,
    )
    add_view_arguments(viewed)

    fork = _command(
        commands,
        "fork",
        _fork,
        "A new run that begins where another stood at one of its checkpoints; the other is left as it is.",
        "symile-dist fork runs/demo-symile runs/colder --step 400",
    )
    fork.add_argument("run", metavar="RUN", help="directory of the run that there is")
    fork.add_argument("new", metavar="NEW", help="directory of the new one; its name becomes the run's")
    fork.add_argument("--step", default="latest", help="a step, `latest` (default) or `best` (by validation)")

    compare = _command(
        commands,
        "compare",
        _compare,
        "Runs side by side: their curves, their results, and what their configs differ in.",
        "symile-dist compare runs/demo-symile runs/demo-clip --out comparison --html",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="names or directories, two or more")
    compare.add_argument(
        "--key",
        nargs="+",
        default=[],
        metavar="KIND.KEY",
        help="curves: keys of history.jsonl, `*` stands for anything (default: train.loss validation.loss "
        "'validation.accuracy/*' train.samples_per_second)",
    )
    compare.add_argument("--x", default="steps", choices=["steps", "samples", "time"], help="default: steps")
    compare.add_argument("--out", metavar="DIR", help="also write each curve there, as PNG and SVG")
    compare.add_argument("--html", action="store_true", help="also write one page that holds everything, into --out")

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "Retrieval in every direction, zero-shot classification, linear probes, embeddings for use elsewhere; written "
        "to RUN/evaluation/: docs/evaluation.md",
        "symile-dist evaluate runs/demo-symile --split test\n"
        "  symile-dist evaluate runs/demo-symile --metrics none --export embeddings.parquet",
    )
    evaluate.add_argument("run", metavar="RUN", help="the run's directory")
    evaluate.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes to its config, e.g. data.test=data/other",
    )
    evaluate.add_argument("--step", default="latest", help="a step, `latest` (default) or `best` (by validation)")
    evaluate.add_argument("--split", default="test", choices=["test", "validation", "train"], help="default: test")
    evaluate.add_argument("--shards", metavar="URL", help="a folder of shards in the place of the split's")
    evaluate.add_argument("--max-samples", type=int, metavar="N", help="at most so many, from the first on")
    evaluate.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    evaluate.add_argument(
        "--metrics",
        default="retrieval,statistics",
        metavar="A,B",
        help="retrieval, statistics, or none (default: both)",
    )
    evaluate.add_argument(
        "--directions",
        metavar="A,B",
        help="such as image_from_audio_text; others (each modality from all the others), singles, all (every subset of "
        "the others); default: evaluation.directions",
    )
    evaluate.add_argument("--recall-at", metavar="K,K", help="k of recall at k (default: evaluation.recall_at, 1,5,10)")
    evaluate.add_argument("--resamples", type=int, metavar="N", help="of the bootstrap (default: 10)")
    evaluate.add_argument("--zero-shot", metavar="FILE", help="YAML file of classes and prompts: classify by them")
    evaluate.add_argument(
        "--probe",
        metavar="A,B",
        help="embeddings (or A+B together, or all) from which a logistic regression reads the label",
    )
    evaluate.add_argument(
        "--probe-samples", type=int, default=20_000, metavar="N", help="of the training split, at most (default: 20000)"
    )
    evaluate.add_argument("--export", metavar="FILE", help="write the embeddings to a Parquet file")
    evaluate.add_argument("--metadata", metavar="A,B", help="keys of the samples' metadata to export beside them")
    evaluate.add_argument("--no-figure", action="store_true", help="draw none")

    checkpoints = commands.add_parser(
        "checkpoints", help="What a run has saved, whether it is whole, and its weights for use elsewhere."
    )
    checkpoints_commands = checkpoints.add_subparsers(metavar="COMMAND", required=True)
    listed = _command(
        checkpoints_commands,
        "list",
        _checkpoints_list,
        "What a run has saved, step by step, and what unfinished saves have left.",
        "symile-dist checkpoints list runs/demo-symile",
    )
    verified = _command(
        checkpoints_commands,
        "verify",
        _checkpoints_verify,
        "Compare every file of a run's checkpoints with the manifests. Exit code 1: one is damaged.",
        "symile-dist checkpoints verify runs/demo-symile --step latest",
    )
    verified.add_argument("--step", help="a step, `latest` or `best` (default: all)")
    consolidated = _command(
        checkpoints_commands,
        "consolidate",
        _checkpoints_consolidate,
        "Write the whole fp32 weights of a checkpoint to one safetensors file.",
        "symile-dist checkpoints consolidate runs/demo-symile --step best --out weights.safetensors",
    )
    consolidated.add_argument("--out", required=True, metavar="FILE", help="a file whose name ends in .safetensors")
    consolidated.add_argument("--force", action="store_true", help="overwrite it")
    exported = _command(
        checkpoints_commands,
        "export",
        _checkpoints_export,
        "Write the encoders to a folder that symile_dist.load_encoders reads, with a model card: docs/checkpoints.md",
        "symile-dist checkpoints export runs/demo-symile --step best --out digits",
    )
    exported.add_argument("--out", required=True, metavar="DIR", help="a folder that is empty or not there")
    for each in (listed, verified, consolidated, exported):
        each.add_argument("run", metavar="RUN", help="the run's directory")
    for each in (consolidated, exported):
        each.add_argument("--step", default="latest", help="a step, `latest` (default) or `best` (by validation)")
    exported.add_argument("overrides", metavar="key=value", nargs="*", help="changes to its config")

    config = commands.add_parser("config", help="Validate, explain or describe configs.")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    _config_arguments(
        _command(
            config_commands,
            "validate",
            _config_validate,
            "Check a config: every mistake at once, each with its place.",
            "symile-dist config validate configs/demo.yaml",
        )
    )
    _config_arguments(
        _command(
            config_commands,
            "explain",
            _config_explain,
            "Every key with its value, where it was set and what it means.",
            "symile-dist config explain configs/demo.yaml optimizer.lr=1e-3",
        )
    )
    _command(
        config_commands,
        "schema",
        _config_schema,
        "The JSON Schema of a config, for editors.",
        "symile-dist config schema > schema.json",
    )

    shards = commands.add_parser("shards", help="Make and index WebDataset shards.")
    shards_commands = shards.add_subparsers(metavar="COMMAND", required=True)
    demo_data = _command(
        shards_commands,
        "demo",
        _shards_demo,
        "Make M3-digits: handwritten digits, spoken and written numbers; the same seed gives the same bytes.",
        "symile-dist shards demo --out data/m3-digits-5 --languages 5",
    )
    demo_data.add_argument("--out", required=True, help="folder to make")
    demo_data.add_argument("--languages", type=int, default=5, metavar="W", help="1 to 10 (default: 5)")
    demo_data.add_argument("--train", type=int, default=20_000, metavar="N", help="samples (default: 20000)")
    demo_data.add_argument("--val", type=int, default=2_000, metavar="N", help="samples (default: 2000)")
    demo_data.add_argument("--test", type=int, default=2_000, metavar="N", help="samples (default: 2000)")
    demo_data.add_argument("--seed", type=int, default=0)
    index = _command(
        shards_commands,
        "index",
        _shards_index,
        "Index the .tar shards of a folder that others made (needed once).",
        "symile-dist shards index data/my-shards/train s3://bucket/more",
    )
    index.add_argument("directories", metavar="URL", nargs="+", help="folder, or s3://... and the like")
    index.add_argument("--force", action="store_true", help="read every shard again, also those with an index")
    index.add_argument("--processes", type=int, metavar="N", help="shards read at once (default: one per core)")
    index.add_argument(
        "--skip-damaged", action="store_true", help="leave damaged shards out of the manifest, which then names them"
    )
    _storage_arguments(index)
    verify = _command(
        shards_commands,
        "verify",
        _shards_verify,
        "Read every shard again and compare it with its index; exit code 1 when something is wrong.",
        "symile-dist shards verify data/my-shards/train --quarantine",
    )
    verify.add_argument("directories", metavar="URL", nargs="+", help="folder, or s3://... and the like")
    verify.add_argument("--quick", action="store_true", help="compare sizes only")
    verify.add_argument("--quarantine", action="store_true", help="have new runs leave out what is wrong")
    verify.add_argument("--processes", type=int, metavar="N", help="shards read at once (default: one per core)")
    _storage_arguments(verify)
    stats = _command(
        shards_commands,
        "stats",
        _shards_stats,
        "Counts, presence and sizes of the members, from the indices.",
        "symile-dist shards stats data/my-shards/train --figure stats.png",
    )
    stats.add_argument("directory", metavar="URL", help="folder, or s3://... and the like")
    stats.add_argument("--figure", metavar="FILE", help="draw presence and sizes: .png, .svg or .pdf")
    _storage_arguments(stats)
    mean = _command(
        shards_commands,
        "mean",
        _shards_mean,
        "Mean of a .npy member over a folder's samples: what the encoder `features` puts where one is missing.",
        "symile-dist shards mean data/m3-2/train --member image.npy --out data/m3-2/image-mean.npy",
    )
    mean.add_argument("directory", metavar="URL", help="folder, or s3://... and the like")
    mean.add_argument("--member", required=True, metavar="NAME", help="e.g. image.npy")
    mean.add_argument("--out", required=True, metavar="FILE.npy", help="where the mean is written, as float32")
    mean.add_argument("--processes", type=int, metavar="N", help="shards read at once (default: as many as cores)")
    _storage_arguments(mean)
    quarantine = _command(
        shards_commands,
        "quarantine",
        _shards_quarantine,
        "List or clear what a run, or every new run over a folder of shards, leaves out.",
        "symile-dist shards quarantine runs/demo-symile",
    )
    quarantine.add_argument("place", metavar="RUN|URL", help="a run's directory, or a folder of shards")
    quarantine.add_argument(
        "--clear", action="store_true", help="use the samples again: a run does from its next epoch on"
    )
    quarantine.add_argument("--shard", metavar="NAME", help="only this shard's")
    _storage_arguments(quarantine)
    pack = shards_commands.add_parser(
        "pack", help="Pack published datasets, or any folder with a table: docs/packing.md"
    )
    pack_commands = pack.add_subparsers(metavar="LAYOUT", required=True)
    symile_m3 = _command(
        pack_commands,
        "symile-m3",
        _shards_pack,
        "Pack Symile-M3: its CSV with images and clips, or its tensors of features.",
        "symile-dist shards pack symile-m3 --csv train.csv --images imagenet --audio common-voice --out m3/train\n"
        "  symile-dist shards pack symile-m3 --tensors tensors --split train --out m3-features/train",
    )
    symile_m3.add_argument("--csv", metavar="FILE", help="with columns lang, audio_path, image_path, cls_id, text, ...")
    symile_m3.add_argument("--images", metavar="DIR", help="folder that image_path is relative to")
    symile_m3.add_argument("--audio", metavar="DIR", help="folder that audio_path is relative to")
    symile_m3.add_argument("--tensors", metavar="DIR", help="folder of image_SPLIT.pt, text_input_ids_SPLIT.pt, ...")
    symile_m3.add_argument("--split", help="with --tensors: train, val or test")
    symile_m3.add_argument(
        "--dtype", choices=["float16", "float32"], help="with --tensors: of the features (default: float16)"
    )
    _pack_arguments(symile_m3, "symile-m3")
    symile_mimic = _command(
        pack_commands,
        "symile-mimic",
        _shards_pack,
        "Pack Symile-MIMIC: its arrays of X-rays, electrocardiograms and laboratory values.",
        "symile-dist shards pack symile-mimic --data-npy data_npy --split train --out mimic/train",
    )
    symile_mimic.add_argument("--data-npy", required=True, metavar="DIR", help="folder that holds SPLIT/cxr_SPLIT.npy")
    symile_mimic.add_argument("--split", required=True, help="train, val, val_retrieval or test")
    _pack_arguments(symile_mimic, "symile-mimic", may_miss=False)
    arrays = _command(
        pack_commands,
        "arrays",
        _shards_pack,
        "Pack plain arrays (.npy, or .pt of one tensor), a row per sample.",
        "symile-dist shards pack arrays --array vision=vision.npy --array text=text.npy --out shards",
    )
    arrays.add_argument(
        "--array",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="an array whose row i belongs to sample i; it becomes the member NAME.npy",
    )
    arrays.add_argument(
        "--class", dest="label", metavar="FILE", help="an array of one number per sample, or a .txt of lines: its class"
    )
    _pack_arguments(arrays, "arrays", may_miss=False)
    files = _command(
        pack_commands,
        "files",
        _shards_pack,
        "Pack any folder with a table (CSV, TSV or JSONL) that names files.",
        "symile-dist shards pack files table.csv --root data --out shards/train --file image=image_path "
        "--file audio=clip --text txt=caption --class species",
    )
    files.add_argument("table", metavar="TABLE", help=".csv, .tsv or .jsonl, in UTF-8")
    files.add_argument(
        "--root", required=True, metavar="DIR", help="folder that the paths in the table are relative to"
    )
    files.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="a column of paths; the member is NAME and the file's extension (image.jpg), or NAME if it has a dot",
    )
    files.add_argument("--text", action="append", default=[], metavar="MEMBER=COLUMN", help="a column of texts")
    files.add_argument("--class", dest="label", metavar="COLUMN", help="the class, for evaluation")
    files.add_argument("--metadata", nargs="+", default=[], metavar="COLUMN", help="columns to keep in the member json")
    files.add_argument("--key", metavar="COLUMN", help="the samples' keys (default: the row's number)")
    files.add_argument("--no-quotes", action="store_true", help="take quotes in a .csv or .tsv as they are")
    _pack_arguments(files, "files")

    encode = _command(
        shards_commands,
        "encode",
        _shards_encode,
        "Run a config's encoders, frozen, over shards of raw media; write shards of features: docs/features.md",
        "symile-dist shards encode --config m3.yaml --modalities image,audio --out m3-features/train "
        "--actors 2 --gpus-per-actor 1",
    )
    encode.add_argument("--config", required=True, metavar="CONFIG", help="YAML file whose modalities are encoded")
    encode.add_argument("overrides", metavar="key=value", nargs="*", help="overrides of the config")
    encode.add_argument("--out", required=True, metavar="DIR", help="folder for the shards of features")
    encode.add_argument("--shards", metavar="URL", help="folder, or s3://... and the like (default: data.train)")
    encode.add_argument("--modalities", metavar="A,B", help="which to encode (default: all)")
    encode.add_argument(
        "--keep", metavar="A,B", help="members to copy as they are (default: all that belong to no encoded modality)"
    )
    encode.add_argument(
        "--actors", type=int, metavar="N", help="processes that encode (default: 1, or as many as the GPUs allow)"
    )
    encode.add_argument(
        "--gpus-per-actor", type=float, default=0, metavar="G", help="0 (default: on the CPU), 1, or a fraction"
    )
    encode.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at once (default: 64)")
    encode.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="of the features (default: float16)"
    )
    encode.add_argument("--part", default="1/1", metavar="I/N", help="encode the I-th of N parts, e.g. on N machines")
    encode.add_argument(
        "--on-error",
        choices=["leave-out", "stop"],
        default="leave-out",
        help="a member that is damaged or cannot be decoded: leave it out and tell in the end (default), or stop",
    )

    reproduce = _command(
        commands,
        "reproduce",
        _reproduce,
        "Run a paper's experiment: a table beside the published figures, checks, a figure. Exit code 1: a check does "
        "not hold.",
        "symile-dist reproduce xor --quick",
    )
    from symile_dist.tools.reproduce.names import EXPERIMENTS

    reproduce.add_argument("name", metavar="NAME", choices=[*EXPERIMENTS, "all"], help=", ".join([*EXPERIMENTS, "all"]))
    reproduce.add_argument(
        "--out",
        metavar="DIR",
        help="where everything goes (default: runs/reproduce, with --quick runs/reproduce-quick)",
    )
    reproduce.add_argument("--quick", action="store_true", help="smaller, one seed: all of them within 40 minutes")
    reproduce.add_argument("--seeds", type=int, metavar="N", help="default: 3, with --quick 1")
    reproduce.add_argument("--processes", type=int, metavar="N", help="trials at once (default: one per core)")
    reproduce.add_argument("--publish", metavar="FILE.md", help="then write a page of all results that are there")

    benchmark = commands.add_parser("benchmark", help="Measure the objective and the reading of data against others.")
    benchmark_commands = benchmark.add_subparsers(metavar="COMMAND", required=True)
    objective = _command(
        benchmark_commands,
        "objective",
        _benchmark_objective,
        "Symile's loss against the published package, a naive cube and torch.mm: time, memory, bytes on the network.",
        "symile-dist benchmark objective --shapes 128x256,256x512 --threads 1 --out benchmark.json",
    )
    objective.add_argument(
        "--shapes", nargs="+", default=["256x512"], metavar="NxD", help="global batch by dimension (default: 256x512)"
    )
    objective.add_argument("--threads", type=int, default=1, help="of torch, on the CPU (default: 1)")
    objective.add_argument("--repeats", type=int, default=5, help="each figure is their median (default: 5)")
    objective.add_argument(
        "--world-size",
        type=int,
        default=2,
        metavar="W",
        help="processes for counting bytes; times are of one process (default: 2; 1: no counting)",
    )
    objective.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    objective.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="default: fp32")
    objective.add_argument(
        "--negative-sampling",
        nargs="+",
        default=["n_squared"],
        choices=["n", "n_squared", "sheets"],
        help="which negatives to measure (default: n_squared)",
    )
    objective.add_argument("--sheets", type=int, metavar="S", help="of 'sheets' (default: a sixteenth of N)")
    objective.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")
    parity = _command(
        benchmark_commands,
        "parity",
        _benchmark_parity,
        "The gradient under DDP against one process's: ours and the schemes of other projects, measured over gloo.",
        "symile-dist benchmark parity --world-size 4",
    )
    parity.add_argument("--world-size", type=int, default=4, metavar="W", help="processes, 2 to 8 (default: 4)")

    negatives = _command(
        benchmark_commands,
        "negatives",
        _benchmark_negatives,
        "What negatives are worth: n, sheets and n_squared trained on M3-digits at equal CPU time.",
        "symile-dist benchmark negatives --cpu-seconds 200 --seeds 3",
    )
    negatives.add_argument("--data", default="data/m3-digits-5", help="folder of the data; made if it is not there")
    negatives.add_argument(
        "--cpu-seconds", type=float, default=200.0, metavar="S", help="of each run, over all threads (default: 200)"
    )
    negatives.add_argument("--global-batch-size", type=int, default=256, metavar="N", help="default: 256")
    negatives.add_argument("--seeds", type=int, default=3, help="runs of each strategy (default: 3)")
    negatives.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")

    checkpoint = _command(
        benchmark_commands,
        "checkpoint",
        _benchmark_checkpoint,
        "What a save holds the training loop up for, beside a save that is waited for.",
        "symile-dist benchmark checkpoint --megabytes 200",
    )
    checkpoint.add_argument("--megabytes", type=int, default=200, metavar="MB", help="training state (default: 200)")
    checkpoint.add_argument("--repeats", type=int, default=5, help="saves of each kind (default: 5)")
    checkpoint.add_argument("--work", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")

    metrics = _command(
        benchmark_commands,
        "metrics",
        _benchmark_metrics,
        "What metrics, history and signs of health take of a training step.",
        "symile-dist benchmark metrics --steps 60",
    )
    metrics.add_argument("--world-size", type=int, default=2, help="ranks (default: 2)")
    metrics.add_argument("--steps", type=int, default=60, help="timed steps (default: 60)")
    metrics.add_argument("--log-every", type=int, default=10, help="steps between records (default: 10)")

    calibrate = _command(
        benchmark_commands,
        "calibrate",
        _benchmark_calibrate,
        "This machine's own rates, for `plan --calibration`; and plan beside a training run.",
        "symile-dist benchmark calibrate --out machine.json",
    )
    calibrate_command.add_arguments(calibrate)
    data = _command(
        benchmark_commands,
        "data",
        _benchmark_data,
        "Reading shards: ours, webdataset, tarfile, LitData and MosaicML Streaming, from disk and from S3.",
        "symile-dist benchmark data --samples 20000 --out benchmark-data.json",
    )
    data.add_argument("--samples", type=int, default=20_000, metavar="N", help="default: 20000")
    data.add_argument("--shards", type=int, default=20, metavar="N", help="of the samples (default: 20)")
    data.add_argument(
        "--sizes",
        default="4096,4096,200",
        metavar="I,A,T",
        help="bytes of image, audio and text, about (default: 4096,4096,200)",
    )
    data.add_argument("--repeats", type=int, default=3, help="each figure is their median (default: 3)")
    data.add_argument("--processes", type=int, default=2, metavar="P", help="loader processes (default: 2; 0: none)")
    data.add_argument(
        "--peers",
        nargs="*",
        default=["webdataset", "tarfile", "litdata", "mosaicml"],
        metavar="PEER",
        help="which to measure beside ours (default: webdataset tarfile litdata mosaicml)",
    )
    data.add_argument("--skip-s3", action="store_true", help="only local files")
    data.add_argument("--work", metavar="DIR", help="keep the data there for a next run (default: a temporary folder)")
    data.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")

    chaos = _command(
        commands,
        "chaos",
        _chaos,
        "Disturb a run that trains on this machine, at random from a seed, and tell the goodput.",
        "symile-dist chaos runs/demo-symile --kill-every 20-40 --seconds 600",
    )
    chaos.add_argument("run", metavar="RUN", help="directory of the run")
    chaos.add_argument("--kill-every", default="20-40", metavar="A-B", help="seconds from one to the next (20-40)")
    chaos.add_argument("--seconds", type=float, default=600, help="for how long, unless the run ends before (600)")
    chaos.add_argument("--seed", type=int, default=0, help="of what happens when (0)")
    chaos.add_argument("--faults", default="kill", help="kill, stop (until the watchdog ends it), or kill,stop")
    demo = _command(
        commands,
        "demo",
        _demo,
        "The whole chain on real images, speech and words: Symile against pairwise CLIP, in minutes.",
        "symile-dist demo --out runs/demo",
        json_option=False,
    )
    demo.add_argument("--out", default="runs/demo", help="folder for the runs, the table and the figure")
    demo.add_argument("--data", default="data/m3-digits-5", help="folder of the data; made if it is not there")
    demo.add_argument("--quick", action="store_true", help="a few steps only: shows that it works, learns nothing")
    _run_arguments(demo)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 a user's mistake, 75 stopped and saved as asked by SIGTERM (call
    again), 130 interrupted."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes `train CONFIG --plain key=value` for an error: overrides may stand anywhere.
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if len(overrides) < len(rest) or (overrides and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # It has a handler of its own: each of its attempts to reach the hub would be told twice.
    logging.getLogger("huggingface_hub").propagate = False
    # Read when torch is loaded. Where processes share cores, threads that spin while they wait cost more than the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return int(options.run_command(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise
        # A file that an object store lacks has its URL in the message.
        words = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        print(f"error: {words}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the newest checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        from symile_dist.errors import RunFailed, RunStopped, StorageError

        if not isinstance(error, RunFailed | RunStopped | StorageError):
            raise
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
