"""All commands of `igrpo`. Each imports what it needs when it runs."""

import typer

from .demo.command import demo
from .doctor import doctor
from .eval import evaluate
from .train import train

app = typer.Typer(
    name="igrpo",
    help="Train language models with iGRPO: draft, keep the best draft, refine it, learn.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("demo")(demo)
app.command("doctor")(doctor)
