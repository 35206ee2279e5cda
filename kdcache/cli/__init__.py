"""The command line: `kdcache COMMAND --help` shows an example of each command."""

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
from kdcache.runtime.paths import fix_for


class _Main(click.Group):
    """A group of commands whose errors end in one message and an exit code, never in a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--json" in args:  # click may find another error before it gets to the option of the command
            output.expect_json(ctx, None, True)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as click_error:
            output.error_as_json(UsageError(click_error.format_message(), "see --help of the command"))
            raise
        except (KdcacheError, InterruptedRun) as kdcache_error:
            error: KdcacheError | InterruptedRun = kdcache_error
        except KeyboardInterrupt:
            error = InterruptedRun(
                "interrupted; no partial file was kept",
                "run the same command again: it resumes what was complete, or starts again",
            )
        except OSError as os_error:
            error = _user_error(os_error)
        output.error(error)
        sys.exit(error.exit_code)


def _user_error(error: OSError) -> KdcacheError:
    """Return the message for an operating system error that a user can fix; raise any other again."""
    what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return IncompleteError(what, "free disk space there, and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
        return UsageError(what, fix_for(error))
    raise error


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kdcache")
def main() -> None:
    """Distill knowledge from a teacher that runs only once: its logits are stored in a cache, students train from it.

    \b
    Start:       kdcache demo, kdcache doctor, kdcache pipelines
    Stage one:   kdcache train-teacher, kdcache plan, kdcache dump-teacher
    Stage two:   kdcache train-student, kdcache sweep
    Results:     kdcache evaluate, kdcache report
    Inspect:     kdcache info, kdcache verify, kdcache summarize, kdcache diff, kdcache card
    Transform:   kdcache select, kdcache merge, kdcache convert
    Share:       kdcache push, kdcache pull, kdcache sign

    Results are printed to stdout, progress and messages to stderr. With --json, stdout is one JSON document.

    Exit codes: 0 success, 2 usage error, 3 incomplete, 4 mismatch, 5 corrupt, 130 interrupted.
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
main.add_command(inspect.card)
main.add_command(select_merge.select)
main.add_command(select_merge.merge)
main.add_command(convert.convert)
