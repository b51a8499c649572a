"""Make `packages.tsv` from a folder of wheels: which of them may be used, under which licence, for which part.

    pip download --no-deps --only-binary=:all: -d WHEELS NAME …
    python recipes/code/pin.py WHEELS

Run this to change the corpus; `corpus.py` builds it from the list.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import re
import zipfile
from pathlib import Path

from licences import licence_of

LIST = Path(__file__).with_name("packages.tsv")
HELD_OUT = 24  # one package of so many is kept for judging


def part_of(name: str) -> str:
    """`train` or `held-out`, from the package's name alone: nobody picks what the model is judged on."""
    digest = hashlib.sha256(name.encode()).digest()
    return "held-out" if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else "train"


def describe(wheel: Path) -> tuple[dict[str, str], str]:
    """The row of a wheel, or the reason to leave it out."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = email.message_from_string(archive.read(info).decode("utf-8", "replace"))
        is_notice = re.compile(r"\.dist-info/(.*/)?(licen[cs]e|copying|notice|authors)[^/]*$", re.I)
        texts = [archive.read(name).decode("utf-8", "replace") for name in names if is_notice.search(name)]
    licence, problem = licence_of(metadata, texts)
    name = re.sub(r"[-_.]+", "-", str(metadata["Name"])).lower()
    row = {"name": name, "version": str(metadata["Version"]), "licence": licence, "part": part_of(name)}
    return row | {"file": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    folder = parser.parse_args().wheels
    columns = ("name", "version", "licence", "part", "file", "sha256")
    lines = ["\t".join(columns)]
    for wheel in sorted(folder.glob("*.whl")):
        row, problem = describe(wheel)
        if problem:
            print(f"left out: {row['name']} {problem}")
        else:
            lines.append("\t".join(row[column] for column in columns))
    LIST.write_text("\n".join(lines) + "\n")
    print(f"{LIST.name}: {len(lines) - 1} packages")


if __name__ == "__main__":
    main()
