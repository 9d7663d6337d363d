"""The command `sst-merge`: parses, calls, prints.

Exit codes: 0 done, 1 a claim of the theory is broken (`verify`), 2 an error the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="sst-merge", description="Merge language-model adapters by Fisher curvature.")
    commands = parser.add_subparsers(dest="command", required=True)

    merge = commands.add_parser("merge", help="merge two adapters or checkpoints as a YAML file says")
    merge.add_argument("config", help="YAML file; its keys are in docs/keys.md")
    merge.add_argument("--out", required=True, help="folder for the merged adapter or checkpoint and the report")
    merge.add_argument("--device", help="cpu, cuda, cuda:1, …; replaces the file's")
    merge.add_argument("--dtype", help="float32, bfloat16, … in which the model runs; replaces the file's")
    merge.add_argument("--fisher", metavar="DIR", help="folder of statistics; used, finished or written (<out>.fisher)")
    merge.add_argument(
        "--tune", action="store_true", help="choose damping, shrinkage, k or mu, and alpha on held-out data"
    )
    merge.add_argument("--memory", metavar="SIZE", help="20GiB, …: what may be taken; more is collected in groups")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    merge.add_argument(
        "--merge-into-base", action="store_true", help="write the merged model as a full checkpoint, not an adapter"
    )
    merge.set_defaults(run=_merge)

    fisher = commands.add_parser("fisher", help="collect statistics for later merges, or add up collected ones")
    fisher.add_argument("config", nargs="?", help="YAML file, as for merge")
    fisher.add_argument("--out", required=True, help="folder for the statistics; one that is there in part is finished")
    fisher.add_argument("--add", nargs="+", metavar="DIR", help="sum these folders, from different data, into --out")
    fisher.add_argument("--device", help="as for merge")
    fisher.add_argument("--dtype", help="as for merge")
    fisher.add_argument("--memory", metavar="SIZE", help="as for merge")
    fisher.set_defaults(run=_fisher)

    inspect = commands.add_parser("inspect", help="say what is in an adapter and what a merge would cover")
    inspect.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    mergekit = commands.add_parser("mergekit", help="run mergekit-yaml with the method sst; needs sst-merge[mergekit]")
    mergekit.add_argument("config", help="mergekit's YAML file; docs/quickstart-merge.md has one")
    mergekit.add_argument("out", help="folder for the merged checkpoint and the report")
    mergekit.add_argument("options", nargs=argparse.REMAINDER, help="mergekit-yaml's own options")
    mergekit.set_defaults(run=_mergekit)

    verify = commands.add_parser("verify", help="check the theory on the pencils of a run, and on planted ones")
    verify.add_argument("folder", nargs="?", metavar="RUN", help="output folder of merge; none: planted pencils only")
    verify.add_argument("--out", help="folder for theory.md and theory.json (<RUN>.verify, or planted.verify)")
    verify.add_argument("--fisher", metavar="DIR", help="the run's statistics, if they were moved; none are collected")
    verify.add_argument("--alphas", nargs="+", type=float, metavar="α", help="strengths to measure (2⁻⁶ … 2)")
    verify.add_argument("--seed", type=int, default=0, help="of challengers and drawn labels (default: 0)")
    verify.add_argument("--challengers", type=int, default=64, help="of each kind, per claim and pencil (default: 64)")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser("compare", help="merge by all methods, measure every merge, say which is best")
    compare.add_argument("config", help="YAML file of a merge with a section `compare`; docs/compare.md has one")
    compare.add_argument("--out", required=True, help="folder for the report; measured rows are kept in <out>.work")
    compare.add_argument("--device", help="as for merge")
    compare.add_argument("--dtype", help="as for merge")
    compare.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    compare.set_defaults(run=_compare)

    demo = commands.add_parser("demo", help="train a small model, merge by every method, measure, report")
    demo.add_argument("--out", default="demo-out", help="folder for models and report (default: demo-out)")
    demo.add_argument("--seeds", type=int, default=1, help="how many seeds (default: 1)")
    demo.set_defaults(run=_demo)
    return parser


def _merge(args: argparse.Namespace) -> None:
    """sst-merge merge."""
    from .distributed import joined
    from .merging import merge

    overrides = {"device": args.device, "dtype": args.dtype, "fisher_dir": args.fisher, "memory": args.memory}
    overrides["tune"] = args.tune or None
    options = {"overwrite": args.overwrite, "merge_into_base": args.merge_into_base, **overrides}
    with joined():
        result = merge(args.config, out=args.out, **options)
    if result.path is None:  # another process wrote it
        return
    for warning in result.report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote {result.path} (read {result.path / 'report.html'})")


def _fisher(args: argparse.Namespace) -> None:
    """sst-merge fisher."""
    if (args.config is None) == (args.add is None):
        raise ValueError("fisher: give a config to collect by, or --add with folders to sum")
    if args.add:
        from .adding import add_folders

        add_folders(args.add, args.out)
    else:
        from .distributed import first, joined
        from .merging import collect

        with joined():
            collect(args.config, args.out, device=args.device, dtype=args.dtype, memory=args.memory)
            if not first():
                return
    print(f"wrote {args.out}; merge with --fisher {args.out}")


def _inspect(args: argparse.Namespace) -> None:
    """sst-merge inspect."""
    from .adapters import inspect_adapter, render_inspection

    report = inspect_adapter(args.adapter)
    print(json.dumps(report, indent=2) if args.json else render_inspection(report))


def _mergekit(args: argparse.Namespace) -> None:
    """sst-merge mergekit."""
    try:
        from .mergekit_method import run
    except ImportError as error:
        raise ValueError(f"mergekit could not be imported; pip install 'sst-merge[mergekit]': {error}") from None

    run(args.config, args.out, args.options)
    print(f"wrote {args.out} (read {args.out}/report.html)")


def _verify(args: argparse.Namespace) -> int:
    """sst-merge verify."""
    from .verify import ALPHAS, Settings, verify

    settings = Settings(tuple(args.alphas or ALPHAS), args.seed, args.challengers)
    theory, folder = verify(args.folder, out=args.out, fisher_dir=args.fisher, settings=settings)
    for row in theory["claims"]:
        if row["passed"] is False:
            print(f"broken: {row['claim']}: {row['statement']} ({row['where']})", file=sys.stderr)
    print(f"{'passed' if theory['passed'] else 'failed'}; wrote {folder} (read {folder / 'theory.md'})")
    return 0 if theory["passed"] else 1


def _compare(args: argparse.Namespace) -> None:
    """sst-merge compare."""
    from .compare import compare
    from .compare.verdict import verdict

    summary = compare(args.config, args.out, overwrite=args.overwrite, device=args.device, dtype=args.dtype)
    print("\n".join(verdict(summary)))
    print(f"wrote {args.out} (read {args.out}/compare.html)")


def _demo(args: argparse.Namespace) -> None:
    """sst-merge demo."""
    from .demo import run_demo

    run_demo(args.out, seeds=args.seeds)


class _Interrupt:
    """Ctrl-C's handler remembers it: compiled code that is called back may raise another error in its place."""

    seen = False

    def __call__(self, number: int, frame: object) -> None:
        self.seen = True
        raise KeyboardInterrupt


def _interrupted() -> int:
    """Say so; the exit code."""
    print(
        "sst-merge: interrupted; no output was written. The same command goes on with what was saved", file=sys.stderr
    )
    return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; the process's own when None.

    Returns:
        The exit code.

    Raises:
        Exception: A fault of the program itself, with its traceback.
    """
    args = _parser().parse_args(argv)
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if interrupt.seen:
            return _interrupted()
        if not isinstance(error, (ValueError, OSError)):
            raise
        print(f"sst-merge: error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
