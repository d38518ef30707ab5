"""Measure Direct-PT's parts, each beside its peers in the same run.

  python scripts/benchmark.py PART [--output FILE.json]

--output writes the figures as a list of rows: part, setting, value, unit, peer, peer_value, ratio, target, device,
versions. docs/performance.md has the figures of one machine, and what each part measures.
"""

from direct_pt.program.run import run_program

from benchmarks import (
    annotations,
    evaluation,
    export,
    gpu,
    input,
    memory,
    predict,
    scaling,
    size,
    step,
    stream,
    tiles,
    trials,
)
from benchmarks.rows import Row
from direct_pt.files import check_output, write_json, writing
from direct_pt.flags import any_path, make_parser

PARTS = {
    "input": input,
    "annotations": annotations,
    "step": step,
    "evaluation": evaluation,
    "memory": memory,
    "scaling": scaling,
    "size": size,
    "stream": stream,
    "gpu": gpu,
    "trials": trials,
    "tiles": tiles,
    "predict": predict,
    "export": export,
}


def main() -> None:
    """Measure one part and print its figures."""
    p = make_parser(__doc__ or "")
    parts = p.add_subparsers(dest="part", required=True, metavar="PART")
    for name, module in PARTS.items():
        about = module.__doc__ or ""
        part = parts.add_parser(name, help=about.splitlines()[0], description=about)
        module.add_arguments(part)
        part.add_argument("--output", type=any_path, metavar="FILE", help="write the rows as JSON")
    args = p.parse_args()
    if args.output:
        check_output(args.output.parent, "--output")
    rows = PARTS[args.part].measure(args)
    for row in rows:
        print(line(row))
    if args.output:
        with writing(f"--output {args.output}"):
            write_json(args.output, rows)


def line(row: Row) -> str:
    """A row as text."""
    value = f"{row['value']:,.4g}" if isinstance(row["value"], float) else f"{row['value']:,}"
    peer = f"   {row['peer']}: {row['peer_value']:,.6g}, ratio {row['ratio']:.3g}" if row["peer_value"] else ""
    target = f"   target: {row['target']}" if row["target"] else ""
    return f"{row['setting']:40} {value:>12} {row['unit']}{peer}{target}"


if __name__ == "__main__":
    run_program(main)
