"""Tables of text, plain or by rich."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import rich.table


class Table(NamedTuple):
    """Text in columns, the first `left` of them aligned to the left and the others to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def __str__(self) -> str:
        """Return the table as plain text."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        rule = ["-" * width for width in widths]
        return "\n".join(self._line(cells, widths) for cells in (self.header, rule, *self.rows))

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        pairs = list(zip(cells, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[: self.left]]
        return "  ".join([*left, *(cell.rjust(width) for cell, width in pairs[self.left :])]).rstrip()

    def __rich__(self) -> "rich.table.Table":
        """Return the table as rich prints it."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        table = RichTable(box=SIMPLE_HEAD)
        for index, name in enumerate(self.header):
            table.add_column(
                name, justify="left" if index < self.left else "right", no_wrap=index < self.left, overflow="fold"
            )
        for row in self.rows:
            table.add_row(*row)
        return table


def show(table: Table) -> None:
    """Print a table, by rich where it is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(table)
        return
    console = Console(markup=False)
    if console.is_terminal:
        console.print(table)
    else:
        print(table)


def short(count: float) -> str:
    """Multiply-adds as papers print them: 327.1M, 1.916G."""
    return f"{count / 1e9:.3f}G" if count >= 1e9 else f"{count / 1e6:.1f}M"
