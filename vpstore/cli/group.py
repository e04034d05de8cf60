"""The root command, what all commands share, and how errors leave the program.

Place in the path: `vpstore` on the command line is `main` here. Commands live beside this.
Invariants: exit codes are the error classes'; an error of ours never shows a traceback, one that is not ours always
does, and a failure of the project's code comes below its lines; importing this loads no verb, so `vpstore --help` is
quick.

Example:
    main(["resolve", "vpDense"])
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vpstore import __version__
from vpstore.cli.exit_codes import epilog
from vpstore.cli.overview import Root
from vpstore.cli.printing import error_document, print_json
from vpstore.cli.supervised import supervise
from vpstore.errors import Interrupted, NoStore, OutputClosed, RecipeRefused, UsageError, VpstoreError
from vpstore.narration import printable_lines
from vpstore.storage import observing

if TYPE_CHECKING:
    from vpstore.workspace import Workspace


_COMPLETING: Final = "_VPSTORE_COMPLETE"  # set by the shell's completion, which click answers and leaves by itself

observing.begin()

_course: Final = {"is_begun": False, "is_done": False}  # of the command that runs in this process


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="vpstore %(version)s")
def cli() -> None:
    """Names for model checkpoints that can be proved, shared, audited and rebuilt."""


def command(name: str, *, example: str, codes: Sequence[int] = ()) -> Callable[[Callable[..., None]], click.Command]:
    """Declare a command with `--profile`, `--json`, an example and its exit codes.

    Args:    example: one line that works; codes: the exit codes beside 0, 1, 2, 130 and 141.
    """

    def declare(command_body: Callable[..., None]) -> click.Command:
        @wraps(command_body)
        def function(*values: Any, **options: Any) -> None:
            _course.update(is_begun=True)
            command_body(*values, **options)
            _course.update(is_done=True)

        as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
        profile = click.option("--profile", metavar="NAME", help="Instead of VPSTORE_PROFILE and params.yaml.")
        return cli.command(name, epilog=epilog(example, codes))(profile(as_json(function)))

    return declare


def workspace(profile: str | None, *, create: bool = False) -> Workspace:
    """The workspace around the working directory, with a narrator on stderr."""
    from vpstore.narration import Console
    from vpstore.workspace import Workspace

    return Workspace.find(Path.cwd(), profile=profile, narrator=Console(), create=create)


def trial_workspace(profile: str | None) -> Workspace:
    """The workspace of a dry run; where there is no store yet, with an empty one that is gone afterwards."""
    import tempfile

    from vpstore.checkout import Checkout
    from vpstore.narration import Console
    from vpstore.storage.store import Store
    from vpstore.workspace import Workspace

    try:
        return workspace(profile)
    except NoStore as error:
        if error.found:  # something is there that is no store: the real run would be refused, too
            raise
        folder = tempfile.TemporaryDirectory(prefix="vpstore-")
        click.get_current_context().call_on_close(folder.cleanup)
        return Workspace(Checkout.find(Path.cwd(), profile=profile), Store.create(Path(folder.name)), Console())


def complete_ref(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Every object and object@stage, for the shell's completion."""
    from vpstore.checkout import Checkout

    try:
        objects = Checkout.find(Path.cwd()).objects
    except VpstoreError:
        return []
    names = [*objects.objects, *map(str, objects.order)]
    return [name for name in names if name.startswith(incomplete)]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code.

    Args:    arguments: None: those of this program, which then runs supervised, so that it cannot end with 0 before it
             is done; a caller that gives them has the command run in its own process.
    """
    _open_closed_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is not None or os.environ.get(_COMPLETING):
        sys.exit(_run(given))
    try:
        sys.exit(supervise(lambda: _run(given), ended=lambda found: _report(_ended(given, found), given)))
    except VpstoreError as error:
        sys.exit(_report(error, given))


def _open_closed_streams() -> None:
    """Give each standard stream that is closed a place to go, so that no file of ours gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def _ended(given: Sequence[str], found: str) -> RecipeRefused:
    """The error of a command whose process was ended from within, past everything that Python does at an end."""
    return RecipeRefused(
        "the process ended in the middle of the command",
        where=" ".join(["vpstore", *given]),
        expected="a result, or an exception that says why there is none",
        found=found,
        next_step="look for os._exit, and for C's exit, in the recipe or runner and in what they call; "
        "what was being built is not published, and its pointer is as it was",
    )


def _run(given: list[str]) -> int:
    """Run one command; its exit code."""
    _course.update(is_begun=False, is_done=False)
    try:
        code = cli.main(given, prog_name="vpstore", standalone_mode=False)
        if _course["is_begun"] and not _course["is_done"]:  # an exit of click's that the project's code raised
            raise _ended(given, "an exit in the middle")
        sys.stdout.flush()
    except (OutputClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: leave quietly
        code = OutputClosed.exit_code
    except VpstoreError as error:
        code = _report(error, given)
    except click.exceptions.Abort:
        code = _report(Interrupted("interrupted"), given)
    except KeyboardInterrupt:
        code = _report(Interrupted("interrupted"), given)
    except SystemExit as leaving:  # no command of ours leaves so: a handler of a signal that a recipe has put in place
        if os.environ.get(_COMPLETING):
            raise
        code = _report(_ended(given, f"SystemExit({leaving.code!r})"), given)
    except click.exceptions.NoArgsIsHelpError as error:  # `vpstore` alone: what is there to be had
        click.echo(error.format_message(), err=True)
        code = error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "vpstore"
        code = _report(UsageError(error.format_message(), next_step=f"{where} --help"), given)
    except OSError as error:
        from vpstore.storage.refusals import as_error

        refused = as_error(error, "", f"vpstore {' '.join(given[:1])}")
        if refused is None:
            raise
        if error.filename is None:  # only output has no name: everything else that is read or written says where
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            what = f"the output cannot be written: {os.strerror(error.errno or 0)}"
            refused = VpstoreError(what, where="standard output", next_step="send it where there is room")
        code = _report(refused, given)
    return code if isinstance(code, int) else 0


def _report(error: VpstoreError, given: Sequence[str]) -> int:
    if "--json" in given:
        print_json(error_document(error))
    if error.trace:
        click.echo(printable_lines(error.trace), err=True)
    click.echo(printable_lines(error), err=True)
    return error.exit_code


def leave(code: int) -> None:
    """End a command that printed its result with an exit code of its own."""
    context: Any = click.get_current_context()
    _course.update(is_done=True)
    context.exit(code)
