"""The command line: `smt train`, `smt select`, `smt plan`, `smt schema`, `smt report`, `smt merge`, `smt export`,
`smt patch`, `smt verify`, `smt bench`, `smt env`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GGUF = "python convert_hf_to_gguf.py MERGED --outfile MODEL.gguf --outtype bf16"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status: 0; 1 when a verification failed or a run could not go on; 2 for an error in what was given; 130
        for Ctrl-C and 143 for SIGTERM, as shells have it.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    _take_settings(parser, args, rest)
    # Imported late, so that `smt --help` answers at once.
    from .training.errors import ConfigError, Interrupted, StoppedError, VerificationError

    # TRL still calls these by their old names, which is nothing a user can mend.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    try:
        args.verb(args)
    except (ConfigError, VerificationError, StoppedError, KeyboardInterrupt) as error:
        if args.traceback:
            raise
        # A signal comes to all the processes of a run, and they have but one thing to say.
        if not isinstance(error, KeyboardInterrupt) or os.environ.get("RANK", "0") == "0":
            print(f"smt {args.name}: {error or 'stopped by Ctrl-C'}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + (error.signal_number if isinstance(error, Interrupted) else signal.SIGINT)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smt", description="Fine-tune a model by training chosen blocks of its weights."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb, text in (
        (_train, "select blocks, train, evaluate, save and verify"),
        (_select, "choose blocks and save them, without training"),
        (_plan, "tell what memory a run will take, before any weight is loaded"),
    ):
        name = verb.__name__.removeprefix("_")
        sub = _verb(verbs, name, verb, text)
        sub.usage = f"smt {name} [options] RUN.yaml [key=value ...]"
        sub.add_argument(
            "settings",
            nargs="*",
            metavar="RUN.yaml key=value",
            help="the run, see configs/, and keys that replace its own: learning_rate=2e-4, smt.density=0.02",
        )
        sub.add_argument("--config", metavar="RUN.yaml", help="the run, as TRL's commands take it")
        if name == "select":
            _add_combinations(sub)
        if name == "train":
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="check the run, print its settings, their origins and one sample; no weights, nothing written",
            )
        if name == "plan":
            sub.add_argument(
                "--memory", metavar="SIZE", help="what a device has, 24GiB; that of the GPU when not given"
            )
            sub.add_argument(
                "--device", choices=("cpu", "cuda"), help="where the run will be; the GPU, if there is one"
            )
            sub.add_argument("--processes", type=int, metavar="N", help="devices that train together; as launched else")
            sub.add_argument(
                "--sharded", action="store_true", default=None, help="they share the weights (FSDP2, ZeRO-3)"
            )
    _verb(verbs, "schema", _schema, "print the JSON schema of a run's YAML, for editors")
    sub = _verb(verbs, "merge", _merge, "write base + adapter as a plain checkpoint")
    sub.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="directory of a saved adapter; several, of one base, where they share no weight",
    )
    sub.add_argument("out", metavar="OUT", help="directory for the merged model; new or empty")
    sub.add_argument(
        "--onto",
        choices=("checkpoint", "dequantised", "quantised"),
        default="checkpoint",
        help="what the blocks are added to: the base's own weights (the default), or, after training on a quantised "
        "base, its weights dequantised or quantised anew",
    )
    sub.add_argument("--report", metavar="FILE", help="write the SHA-256 of every tensor, before and after, as JSON")
    sub.epilog = f"For llama.cpp convert what was merged: {GGUF}"
    _add_export(verbs)
    _add_patch(verbs)
    sub = _verb(verbs, "verify", _verify, "check a saved adapter: its files, its base, and what it merges into")
    sub.add_argument("adapter", metavar="ADAPTER", help="directory of a saved adapter")
    sub.add_argument("--base", metavar="BASE", help="check against this base; the one that the adapter names else")
    sub.add_argument("--merged", metavar="DIR", help="check that this checkpoint is base + adapter, too")
    sub = _verb(verbs, "report", _report, "make report.html again from the files of a run")
    sub.add_argument("directory", metavar="OUT_DIR", help="output_dir of smt train or smt select")
    sub = _verb(verbs, "bench", _bench, "check the operations, then time them beside every other route")
    sub.add_argument("--operation", nargs="+", metavar="NAME", help="only these; block_grad, block_adamw_, ...")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="the GPU where there is one")
    sub.add_argument("--quick", action="store_true", help="tiny matrices: shows that it runs, says nothing of speed")
    sub.add_argument("--rounds", type=int, metavar="N", help="timed calls of every route; 21 when not given")
    sub.add_argument("--out", metavar="FILE", help="write everything as JSON")
    _verb(verbs, "env", _env, "print versions, devices, and which backend serves which operation")
    return parser


def _add_combinations(sub: argparse.ArgumentParser) -> None:
    sub.usage += "\n       smt select --union|--intersection|--difference FILE FILE ... [--out FILE]"
    group = sub.add_argument_group("instead of a run: selection files as sets").add_mutually_exclusive_group()
    for how, text in (
        ("union", "the blocks of any"),
        ("intersection", "the blocks that all have"),
        ("difference", "those of the first that no other has"),
    ):
        group.add_argument(f"--{how}", nargs="+", metavar="FILE", help=f"{text}; says how many blocks they share")
    sub.add_argument("--out", metavar="FILE", help="where to write that selection; without it, it is only told")


def _add_export(verbs) -> None:
    sub = _verb(verbs, "export", _export, "write an adapter in another form: a patch of its base, or LoRA")
    sub.add_argument("adapter", metavar="ADAPTER", help="directory of a saved adapter")
    sub.add_argument("out", metavar="OUT", help="the patch, a file; or a directory for the LoRA adapter, new or empty")
    sub.add_argument(
        "--format",
        choices=("patch", "lora"),
        required=True,
        help="patch: the changed values of the base's checkpoint, old and new, for smt patch; lora: an ordinary LoRA "
        "adapter, exact where the rank allows",
    )
    sub.add_argument(
        "--rank",
        default="exact",
        metavar="R",
        help="of lora: exact (the default), the rank at most, or with a point the share of each delta to keep, 0.95",
    )
    sub.add_argument("--uniform-rank", action="store_true", help="of lora: one rank in all modules, zeros besides")
    sub.add_argument("--min-energy", type=float, metavar="SHARE", help="of lora: fail when less is kept in all")
    sub.epilog = f"GGUF goes by way of smt merge: {GGUF}"


def _add_patch(verbs) -> None:
    sub = _verb(verbs, "patch", _patch, "write a patch into a checkpoint in place, or take it out to the byte")
    sub.add_argument("action", choices=("apply", "revert"), help="also goes on, or back, after an interruption")
    sub.add_argument("patch", metavar="PATCH", help="what smt export --format patch wrote")
    sub.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory of the base's checkpoint: its files are written"
    )


def _verb(verbs, name: str, function, text: str) -> argparse.ArgumentParser:
    sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    sub.set_defaults(verb=function, name=name)
    return sub


def _take_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Sort what follows `train` and `select` into the YAML and its overrides, wherever the options stand among them."""
    if dashed := next((word for word in rest if word.startswith("-") or not hasattr(args, "settings")), None):
        hint = ""
        if hasattr(args, "settings") and dashed.startswith("--"):
            hint = f"; a key of the YAML is given without dashes: {dashed.lstrip('-').partition('=')[0]}=VALUE"
        parser.error(f"unrecognized argument {dashed}{hint}")
    if _takes_files(parser, args, rest):
        return
    if hasattr(args, "settings"):
        words = args.settings + rest
        if args.config is None and not words:
            parser.error(f"smt {args.name} needs a run: smt {args.name} RUN.yaml [key=value ...]")
        args.overrides = words if args.config is not None else words[1:]
        args.config = args.config or words[0]


def _takes_files(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> bool:
    """Whether `select` combines selection files, and then needs no run."""
    given = [(how, files) for how in ("union", "intersection", "difference") if (files := getattr(args, how, None))]
    args.combination = given[0] if given else None
    if not given:
        if getattr(args, "out", None) and args.name == "select":
            parser.error("--out goes with --union, --intersection or --difference; a run names its output_dir")
        return False
    how, files = given[0]
    if args.settings or rest or args.config:
        parser.error(f"--{how} takes selection files and no run: smt select --{how} FILE FILE --out FILE")
    if len(files) < 2:
        parser.error(f"--{how} takes two selection files or more, got {files[0]} alone")
    return True


def _train(args: argparse.Namespace) -> None:
    from .training.yaml.schema import load_run

    run = load_run(args.config, args.overrides)
    if args.dry_run:
        from .plan.table import plan_or_why_not
        from .training.dry_run import dry_run

        dry_run(run, plan_or_why_not)
    else:
        from .plan.record import record
        from .training.run import train

        train(run, plan=record)


def _select(args: argparse.Namespace) -> None:
    if args.combination is not None:
        _combine(args)
        return
    from .training.yaml.schema import load_run

    run = load_run(args.config, args.overrides)
    from .training.run import select

    select(run)


def _combine(args: argparse.Namespace) -> None:
    from .blocks import BlockSelection
    from .selection.combine import combine, overlaps

    how, paths = args.combination
    with _errors_told():
        selections = [BlockSelection.load(path) for path in paths]
        for path, selection in zip(paths, selections, strict=True):
            print(f"{path}: {selection.summary()}")
        print("\n".join(overlaps(selections, paths)))
        selection = combine(how, selections)
        print(f"{how}: {selection.summary()}")
        if args.out:
            selection.save(args.out)
            print(f"wrote {args.out}; train with it: smt.selection={args.out}")


def _schema(args: argparse.Namespace) -> None:
    from .training.yaml.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _plan(args: argparse.Namespace) -> None:
    from .training.errors import ConfigError
    from .training.yaml.schema import load_run

    run = load_run(args.config, args.overrides)
    from .plan.plan import plan
    from .plan.table import size, table

    try:
        limit = None if args.memory is None else size(args.memory)
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from error
    print(table(plan(run, limit=limit, device=args.device, processes=args.processes, sharded=args.sharded)))


@contextmanager
def _errors_told() -> Iterator[None]:
    """What a user can mend ends without a traceback, and so does an interrupt."""
    from .training.errors import ConfigError

    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(130)


def _merge(args: argparse.Namespace) -> None:
    from .export.merge import merge_adapter

    with _errors_told():
        report = merge_adapter(args.adapters, args.out, onto=args.onto)
        if report is not None:
            print(report)
        elif args.report:
            raise ValueError(f"{args.out} was merged in memory, so there is no report of its tensors to write")
        if args.report:
            report.save(args.report)
    print(f"merged {' and '.join(args.adapters)} into {args.out}; load it with transformers' from_pretrained")


def _export(args: argparse.Namespace) -> None:
    of_lora = {
        "--rank": args.rank != "exact",
        "--uniform-rank": args.uniform_rank,
        "--min-energy": args.min_energy is not None,
    }
    if args.format == "patch" and any(of_lora.values()):
        from .training.errors import ConfigError

        option = next(name for name, given in of_lora.items() if given)
        raise ConfigError(
            f"{option} is about LoRA, and a patch holds the adapter whole; leave it out, or --format lora"
        )
    if args.format == "lora":
        from .export.lora import export_lora
        from .export.servers import serving_notes

        with _errors_told():
            form = export_lora(args.adapter, args.out, _rank(args.rank), args.min_energy, args.uniform_rank)
        print(form)
        print(f"wrote {args.out}, rank {form.config.r}, {form.energy:.2%} kept; PEFT loads it as LoRA")
        for note in serving_notes(form):
            print(note)
    else:
        from .export.patch import export_patch

        with _errors_told():
            patch = export_patch(args.adapter, args.out)
        print(f"wrote {args.out}: {patch.num_values:,} values of {len(patch.tensors)} tensors, old and new")
        print(f"put it into a copy of the base: smt patch apply {args.out} CHECKPOINT")


def _rank(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _patch(args: argparse.Namespace) -> None:
    from .export.patching import apply_patch, revert_patch

    with _errors_told():
        patch = (apply_patch if args.action == "apply" else revert_patch)(args.patch, args.checkpoint)
    done = "is merged now" if args.action == "apply" else "is as it was, byte for byte"
    print(f"{args.checkpoint} {done}: {patch.num_values:,} values of {len(patch.tensors)} tensors written")


def _verify(args: argparse.Namespace) -> None:
    from .training.errors import VerificationError
    from .training.verify_adapter import verify_adapter

    with _errors_told():
        checks = verify_adapter(args.adapter, args.base, args.merged)
    for check in checks:
        print(check)
    if failed := [check.name for check in checks if check.passed is False]:
        raise VerificationError(f"failed: {', '.join(failed)}; do not use {args.adapter} before it is mended")


def _report(args: argparse.Namespace) -> None:
    from .report.html import write_report

    with _errors_told():
        file = write_report(args.directory)
    print(f"wrote {file}")


def _bench(args: argparse.Namespace) -> None:
    from .bench.command import bench
    from .training.errors import ConfigError, VerificationError

    try:
        rows = bench(args.operation, args.device, args.quick, args.rounds, args.out)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if wrong := [row for row in rows if row["status"] == "wrong" and row["backend"]]:
        names = ", ".join(sorted({f"{row['operation']} by {row['backend']}" for row in wrong}))
        raise VerificationError(f"wrong results, which were not timed: {names}")


def _env(args: argparse.Namespace) -> None:
    from .bench.command import env

    env()


if __name__ == "__main__":
    sys.exit(main())
