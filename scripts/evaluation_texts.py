"""Write the held-out novel that benchmarks/transfer.yaml reads: ``python -m scripts.evaluation_texts [FOLDER]``.

The novel comes from a Debian package, which apt-get downloads (nothing is installed); it is not committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from posenc.files import replacing
from training.texts import HELD_OUT_NOVEL, TextsError, fetch, read_novels

DEFAULT = Path("out") / "texts"


def main(folder: Path = DEFAULT) -> None:
    """Fetch and write the novel; if that fails, say why and exit with status 1."""
    try:
        novel = read_novels(fetch(folder / "packages"))[HELD_OUT_NOVEL]
    except (TextsError, OSError) as error:
        sys.exit(f"the novel is not available here: {error}")
    with replacing(folder / f"{HELD_OUT_NOVEL}.txt") as temporary:
        temporary.write_text("\n".join(novel.documents), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
