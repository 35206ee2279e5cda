"""The command line: `kdcache COMMAND --help` shows an example of each."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from kdcache.cli import (
    convert,
    demo,
    doctor,
    dump_teacher,
    evaluate,
    info,
    inspect,
    output,
    pipelines,
    plan,
    report,
    select_merge,
    share,
    sweep,
    train,
    verify,
)
from kdcache.errors import IncompleteError, InterruptedRun, KdcacheError, UsageError


class _Main(click.Group):
    """A group whose mistakes end in one message and an exit code, never in a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--json" in args:  # what is mistyped is found before any option of a command is looked at
            output.owe_json(ctx, None, True)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as mistyped:
            output.mistake_as_json(UsageError(mistyped.format_message(), "see --help of the command"))
            raise
        except KdcacheError as mistake:
            failed: KdcacheError = mistake
        except KeyboardInterrupt:
            failed = InterruptedRun(
                "interrupted; nothing half-written was kept",
                "run the same command again: it begins anew, or goes on with what was whole before",
            )
        except OSError as problem:
            failed = _mistake(problem)
        output.error(failed)
        sys.exit(failed.exit_code)


def _mistake(problem: OSError) -> KdcacheError:
    """What a user can mend of what the system refuses; anything else is ours, and shows where it happened."""
    where = f"{problem.strerror}: {problem.filename}" if problem.filename else str(problem.strerror)
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return IncompleteError(where, "make room there, and run the same command again")
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
        return UsageError(where, "give a place that you may write to, with -o")
    raise problem


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kdcache")
def main() -> None:
    """Knowledge distillation with a teacher that runs only once.

    \b
    Try it:      kdcache demo, kdcache doctor, kdcache pipelines
    Stage one:   kdcache train-teacher, kdcache dump-teacher
    Stage two:   kdcache train-student, kdcache sweep
    Look:        kdcache info, kdcache plan, kdcache verify, kdcache evaluate, kdcache report,
                 kdcache summarize, kdcache diff
    Caches:      kdcache select, kdcache merge, kdcache convert, kdcache card
    Share:       kdcache push, kdcache pull, kdcache sign

    Exit codes: 0 ok, 2 usage, 3 incomplete, 4 mismatch, 5 corrupt, 130 interrupted.
    """


main.add_command(demo.demo)
main.add_command(doctor.doctor)
main.add_command(pipelines.pipelines)
main.add_command(train.train_teacher)
main.add_command(plan.plan)
main.add_command(dump_teacher.dump_teacher)
main.add_command(train.train_student)
main.add_command(sweep.sweep)
main.add_command(evaluate.evaluate)
main.add_command(report.report)
main.add_command(info.info)
main.add_command(verify.verify)
main.add_command(share.push)
main.add_command(share.pull)
main.add_command(share.sign)
main.add_command(inspect.summarize)
main.add_command(inspect.diff)
main.add_command(select_merge.select)
main.add_command(select_merge.merge)
main.add_command(convert.convert)
main.add_command(inspect.card)
