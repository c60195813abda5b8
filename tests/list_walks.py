"""Walking lists of blocks as kernels do."""

from ringflex.kernels.block_lists import BlockLists


def visits(lists: BlockLists, row: int, kind: int) -> list[int]:
    """Blocks of one list of a row (kind 0: partial, 1: full), as a kernel walks them."""
    run, count = lists.rows[row, 2 * kind : 2 * kind + 2].tolist()
    found: list[int] = []
    while len(found) < count:
        start, end = lists.runs[run].tolist()
        found += range(start, end)
        run += 1
    assert len(found) == count
    return found
