"""The progress bar: how far, how fast, how long still, and how well."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """Updates per second."""

    def render(self, task: Task) -> Text:
        """Returns the rate, once it is known."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="magenta")


def bar(console: Console) -> Progress:
    """Makes a bar for tasks with a field `best`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}"),
        console=console,
    )
