"""Less compute to one finish line: ``python -m tools.speedrun TASK --data DIR``.

TASK is a file of `configs/speedrun`: a study whose methods are recipes, all for one encoder. Recipes are run
as the study's cells, and the table of records is written from their lines; README.md has the rules.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import UserError
from tools.shared import console, tables
from tools.speedrun.records import refuse_other_encoders, rows
from tools.study import __main__ as study_program
from tools.study.plan import open_study
from tools.study.results import read_results

RESULTS = Path("tools/speedrun/results")


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = study_program.make_parser("speedrun", "Run recipes to one finish line", RESULTS).parse_args(words)
    study = open_study(args.study, args.work)
    if len(study.options.sizes) != 1:
        raise UserError(f"{args.study}: sizes: a task has one encoder")
    refuse_other_encoders(study)
    if code := study_program.run(args):
        return code
    if not (args.plan or args.cell or args.slurm):
        print(tables.aligned(rows(study, read_results(args.results / f"{study.name}.jsonl"))))
    return 0


if __name__ == "__main__":
    console.run(main)
